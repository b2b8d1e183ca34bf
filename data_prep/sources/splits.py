"""Which of several splits of a data set are read. Their names say it, as on the hub: train_sft, train_prefs, test_gen.

A split whose name says what its rows are for serves that kind of rows; where names say nothing, nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from data_prep.core.errors import UserError, unknown
from data_prep.sources.rows import side_of
from data_prep.types import CONVERSATION, DOCUMENT, PREFERENCE, PROMPT, UNPAIRED, RowKind

_WORDS: dict[RowKind, tuple[str, ...]] = {
    CONVERSATION: ("sft", "chat", "instruct", "instructions", "dialogues", "conversations", "demonstrations"),
    PREFERENCE: ("prefs", "pref", "preference", "preferences", "comparisons", "pairs", "dpo", "orpo", "rm", "reward"),
    UNPAIRED: ("kto", "unpaired"),
    PROMPT: ("gen", "generation", "prompts", "ppo", "grpo", "rl", "rlhf"),
    DOCUMENT: ("pretrain", "pretraining", "documents"),
}
"""What the name of a split has behind `train` or `test` where its rows are meant for one kind."""
_ALSO = {PROMPT: (CONVERSATION, PREFERENCE), UNPAIRED: (PREFERENCE,)}
"""The kinds whose rows serve another one too, in this order."""


@dataclass
class SplitWish:
    """What the rows of a data set of several splits are read for, and in `said` what was chosen of them."""

    kind: RowKind | None = None
    name: str | None = None
    """The split that was asked for."""
    option: str = ""
    """What stands before the names of the source's options in a run: `data.conversations.`."""
    side: str = "train"
    """The side of a hub data set that is read; "eval" for an `eval_path`."""
    said: str = ""

    def of_hub(self, names: Sequence[str], where: str) -> str:
        """The one split of a hub data set that is read: one of the side, else one that trains, or the only one.

        Raises:
            UserError: names do not say which one, or the one that was asked for is not there.
        """
        if self.name is not None:
            return self._named(self.name, names, where)
        by_side = {side: [name for name in names if side_of(name) == side] for side in ("train", "eval")}
        pool = by_side[self.side] or by_side["train"] or list(names)
        chosen = _meant_for(pool, self.kind)
        if len(chosen or ()) > 1 and "train" in pool:
            chosen = ["train"]
        if chosen is None or len(chosen) != 1:
            evaluates = self.side == "eval" and pool == by_side["eval"]
            several = "splits that evaluate" if evaluates else "train splits" if by_side["train"] else "splits"
            raise self._unclear(f"several {several}", pool, where)
        self._say(chosen, pool)
        return chosen[0]

    def of_files(self, names: Sequence[str], where: str) -> list[str]:
        """The splits of a folder that are read: those that train, and those like them that evaluate.

        All are read unless one was asked for, or several that train are meant for several kinds of rows.

        Args:
            names: the splits that its files belong to (`split_of_file`).
            where: the folder.

        Raises:
            UserError: names do not say which one, or the one that was asked for is not there.
        """
        held = [name for name in names if side_of(name) == "eval"]
        trains = [name for name in names if side_of(name) == "train"]
        if self.name is not None:
            named = self._named(self.name, names, where)
            return [named, *(_like([named], held, self.kind) if named in trains else [])]
        first = trains or held
        chosen = _meant_for(first, self.kind)
        if chosen is None:
            raise self._unclear(f"several {'train ' * bool(trains)}splits", first, where)
        if len(chosen) == len(first) and len(_kinds(held)) < 2:
            return list(names)
        self._say(chosen, first)
        own = set(chosen + (_like(chosen, held, self.kind) if trains else []))
        return [name for name in names if name in own or name not in (*trains, *held)]

    def _named(self, name: str, names: Sequence[str], where: str) -> str:
        if name not in names:
            problem = unknown("split", name, sorted(names))
            problem.field, problem.file = f"{self.option}split", where
            raise problem
        return name

    def _say(self, chosen: Sequence[str], names: Sequence[str]) -> None:
        left = [name for name in names if name not in chosen]
        if left:
            self.said = f"split {', '.join(chosen)}, not {', '.join(left)}"

    def _unclear(self, what: str, names: Sequence[str], where: str) -> UserError:
        rows = f", none of them for {self.kind} rows by its name" if self.kind else ""
        return UserError(
            f"has {what}{rows} ({', '.join(names)})",
            code="splits",
            hint=f"set {self.option}split=NAME" if self.option else "save the one to read as JSONL and give its path",
            file=where,
        )


def split_of_file(file: str, folder: str) -> str:
    """The split that a file belongs to, from its name without its ending, or else from that of its folder.

    `train_sft-00000-of-00003` is of train_sft.
    """
    name = re.sub(r"[-_.]\d+[-_.]of[-_.]\d+$", "", file)
    return folder if side_of(name) is None and side_of(folder) else name


def _rest(name: str) -> str:
    """The words of a split's name behind its side: "sft" of train_sft, "" of train and train_2."""
    words = re.findall(r"[a-z]+", name.lower())
    return " ".join(words[1:]) if side_of(name) else " ".join(words)


def _kind(name: str) -> RowKind | None:
    """The kind of rows that the name of a split speaks of."""
    words = _rest(name).split() if side_of(name) else []
    return next((kind for kind, known in _WORDS.items() if not set(known).isdisjoint(words)), None)


def _kinds(names: Sequence[str]) -> set[RowKind | None]:
    return {_kind(name) for name in names}


def _meant_for(names: Sequence[str], kind: RowKind | None) -> list[str] | None:
    """Those of the splits that are for a kind of rows, else those for none in particular; all where they do not differ.

    None: they differ, and none is for it.
    """
    if len(_kinds(names)) < 2:
        return list(names)
    for wanted in (kind, *_ALSO.get(kind, ()), None) if kind else (None,):
        if found := [name for name in names if _kind(name) == wanted]:
            return found
    return None


def _like(chosen: Sequence[str], held: Sequence[str], kind: RowKind | None) -> list[str]:
    """The splits that evaluate what these train: called like them, or for the same kind of rows, or for none."""
    called = {_rest(name) for name in chosen}
    alike = [name for name in held if _rest(name) in called]
    return alike or [name for name in held if _kind(name) in (kind, None)]

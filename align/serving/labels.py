"""Labels: pairs of replies, the file of the choices that people made between them, and what the choices say together.

The file is all the state there is. It always holds whole rows, one for each choice that stands: every change is written
beside it and renamed into place, and a choice taken back is gone. One process works on a file at a time.
`data_prep/formats/labels.py` reads the rows as preferences. Imports no torch.
"""

from __future__ import annotations

import fcntl
import json
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any, Optional

from data_prep.core.errors import UserError
from data_prep.core.files import write_text
from data_prep.core.hashing import sha256_json
from data_prep.core.options import build
from data_prep.formats.labels import CHOICES
from data_prep.sources.files import read_file
from reward.metrics import accuracy_interval

_OTHER = {"a": "b", "b": "a"}


@dataclass(frozen=True)
class Label:
    """One person's choice. `a` and `b` are the replies as they stood before that person, left or first, and right."""

    prompt: Any
    """The words of one question, or a list of messages."""
    a: str
    b: str
    choice: str
    labeller: str
    seconds: float
    """How long the pair stood on the page."""
    stages: dict[str, str]
    """a and b -> the stage whose reply it is."""
    digests: dict[str, str]
    """a and b -> digest of that stage's checkpoint, or of the base."""
    time: str
    """When it was chosen, UTC."""
    rewards: Optional[dict[str, float]] = None
    """a and b -> its reward by the chain's reward model, where it has one."""
    comment: Optional[str] = None

    def __post_init__(self) -> None:
        if self.choice not in CHOICES:
            raise ValueError(f"choice is none of {', '.join(CHOICES)} (got {self.choice!r})")
        for name in ("stages", "digests", "rewards"):
            sides = getattr(self, name)
            if sides is not None and set(sides) != {"a", "b"}:
                raise ValueError(f"{name} needs a and b (got {', '.join(sides) or 'none'})")

    @property
    def pair(self) -> str:
        """What was compared: the same for everybody who saw these two replies, whichever stood first."""
        return pair_key(self.prompt, self.a, self.b)

    @property
    def verdict(self) -> str:
        """The choice as every labeller of the pair would say it: a is the first of the two replies in the alphabet."""
        return _OTHER.get(self.choice, self.choice) if self.a > self.b else self.choice

    @property
    def winner(self) -> str | None:
        """The stage whose reply was chosen, if one was."""
        return self.stages.get(self.choice)

    def as_row(self) -> str:
        """Its line in the file; what is not known is left out."""
        row = {name: value for name, value in asdict(self).items() if value is not None}
        return json.dumps(row, ensure_ascii=False) + "\n"


_NEEDED = [each.name for each in fields(Label) if each.default is MISSING]


def pair_key(prompt: Any, a: str, b: str) -> str:
    """What names a pair of replies to a prompt, in either order."""
    return sha256_json([prompt, *sorted((a, b))])[:24]


@dataclass(frozen=True)
class Answer:
    """One policy's reply to a prompt."""

    text: str
    stage: str
    digest: str
    """Of the policy's weights."""
    reward: float | None
    likelihood: float = 0.0
    """Mean log-probability of its tokens under the first policy that is compared, in nats; 0 if nobody asks."""


@dataclass(frozen=True)
class Pair:
    """Two replies to one prompt."""

    key: str
    prompt: Any
    """The words of one question, or a list of messages."""
    answers: tuple[Answer, Answer]

    @property
    def order(self) -> float:
        """Where it stands among pairs, least first: the margin of rewards, negative where likelihood disagrees."""
        left, right = self.answers
        if left.reward is None or right.reward is None:
            return 0.0
        other = left.likelihood - right.likelihood
        return (left.reward - right.reward) * ((other > 0) - (other < 0))


class LabelFile:
    """The labels of a file that this process alone works on (`open_labels`)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.labels = read_labels(path) if path.exists() else []
        self._seen = self._state()

    def add(self, label: Label) -> None:
        """Write one more label.

        Raises:
            UserError: it cannot be written, or something else has changed the file.
        """
        self._write([*self.labels, label])

    def take_back(self, labeller: str, among: Container[str]) -> Label | None:
        """Remove a person's last label of a pair that is `among` these; returns it.

        Raises:
            UserError: as in `add`.
        """
        own = [label for label in self.labels if label.labeller == labeller and label.pair in among]
        if not own:
            return None
        self._write([label for label in self.labels if label is not own[-1]])
        return own[-1]

    def _write(self, labels: list[Label]) -> None:
        if self._state() != self._seen:
            hint = "nothing was written; start align label again, and it goes on from what the file holds now"
            raise UserError("something else has changed the file", file=str(self.path), hint=hint, code="file_changed")
        try:
            write_text(self.path, "".join(label.as_row() for label in labels))
        except OSError as problem:
            raise _unwritable(self.path, problem) from None
        self.labels, self._seen = labels, self._state()

    def _state(self) -> tuple[int, int, int] | None:
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns


@contextmanager
def open_labels(name: str) -> Iterator[LabelFile]:
    """The labels of a file, kept from other processes until the end.

    Raises:
        UserError: another process has it, it cannot be read or written, or it holds other rows.
    """
    path = label_path(name)
    try:
        handle = (path.parent / f".{path.name}.lock").open("w")
    except OSError as problem:
        raise _unwritable(path, problem) from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            hint = "several people can label on one page, each under a name; or choose another file: out=FILE.jsonl"
            raise UserError("another align label has this file", file=str(path), hint=hint, code="locked") from None
        yield LabelFile(path)


def read_labels(path: Path) -> list[Label]:
    """The rows of a file of labels.

    Raises:
        UserError: it cannot be read, or a row is no label.
    """
    found = []
    for row in read_file(str(path)) if path.stat().st_size else ():
        if isinstance(row, UserError):
            raise row
        try:
            if missing := [name for name in _NEEDED if name not in row.data]:
                raise UserError(f"it lacks {', '.join(missing)}")
            found.append(build(Label, row.data, ""))
        except UserError as problem:
            hint = "choose another file: out=FILE.jsonl, or mend the row"
            where = {"file": str(path), "row": row.row, "field": problem.field}
            raise UserError(f"is no label: {problem.message}", **where, hint=hint, code="bad_row") from None  # type: ignore[arg-type]
    return found


def label_path(name: str) -> Path:
    """The file that `out` names.

    Raises:
        UserError: it would not be read as JSON lines.
    """
    path = Path(name).expanduser().resolve()
    if path.suffix != ".jsonl":
        hint = f"out={path.with_suffix('.jsonl').name}"
        raise UserError("labels are JSON lines", file=str(path), field="out", hint=hint, code="file_kind")
    return path


def _unwritable(path: Path, problem: OSError) -> UserError:
    return UserError(f"cannot be written ({problem.strerror or problem})", file=str(path), code="output")


def summary(labels: Sequence[Label]) -> dict[str, Any]:
    """What labels say together.

    Returns `labels`, `pairs`; `labellers`, name -> {labels, seconds (median)}; `choices`, how often each; `stages`, for
    every two stages that were compared {stages, wins (of each), tie, bad, share, low, high, n}: how often the first was
    chosen over the second, ties half, both bad left out, with its 95 % Wilson interval; `between` and `reward_model`
    as `agreement` gives them.
    """
    people: dict[str, list[float]] = {}
    for label in labels:
        people.setdefault(label.labeller, []).append(label.seconds)
    return {
        "labels": len(labels),
        "pairs": len({label.pair for label in labels}),
        "labellers": {name: {"labels": len(own), "seconds": median(own)} for name, own in people.items()},
        "choices": {choice: sum(label.choice == choice for label in labels) for choice in CHOICES},
        "stages": _contests(labels),
        **agreement(labels),
    }


def agreement(labels: Sequence[Label]) -> dict[str, Any]:
    """How far labels agree with each other and with the reward model.

    Returns `between`, for every two people with pairs in common {labellers, n, same (share of equal choices), kappa
    (Cohen 1960: what is above chance; None where chance explains all)}; `reward_model`, {accuracy, low, high, n}: how
    often the chosen reply has the higher reward, a tie half, or None.
    """
    own: dict[str, dict[str, str]] = {}
    for label in labels:
        own.setdefault(label.labeller, {})[label.pair] = label.verdict
    between = [
        {"labellers": [left, right], **_compared([(own[left][pair], own[right][pair]) for pair in common])}
        for left, right in combinations(own, 2)
        if (common := [pair for pair in own[left] if pair in own[right]])
    ]
    margins = [
        label.rewards[label.choice] - label.rewards[_OTHER[label.choice]]
        for label in labels
        if label.rewards and label.choice in _OTHER
    ]
    right = sum(1.0 if margin > 0 else 0.5 * (margin == 0) for margin in margins)
    return {"between": between, "reward_model": _share("accuracy", right, len(margins)) if margins else None}


def _compared(verdicts: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """n, same and kappa of two people's verdicts on the same pairs."""
    n = len(verdicts)
    same = sum(left == right for left, right in verdicts) / n
    left, right = Counter(one for one, _ in verdicts), Counter(one for _, one in verdicts)
    chance = sum(left[choice] * right[choice] for choice in CHOICES) / n**2
    return {"n": n, "same": same, "kappa": None if chance == 1 else (same - chance) / (1 - chance)}


def _contests(labels: Sequence[Label]) -> list[dict[str, Any]]:
    """Wins and ties of every two stages that were compared; of the two, the one with more wins first."""
    found: dict[frozenset[str], Counter[str]] = {}
    for label in labels:
        found.setdefault(frozenset(label.stages.values()), Counter())[label.winner or label.choice] += 1
    contests = []
    for names, counts in found.items():
        if len(names) == 1:  # two draws of one policy
            continue
        first, second = sorted(names, key=lambda name: (-counts[name], name))
        wins, n = {first: counts[first], second: counts[second]}, counts[first] + counts[second] + counts["tie"]
        share = _share("share", counts[first] + counts["tie"] / 2, n) if n else {}
        contests.append({"stages": [first, second], "wins": wins, "tie": counts["tie"], "bad": counts["bad"], **share})
    return contests


def _share(name: str, right: float, n: int) -> dict[str, Any]:
    value, low, high = accuracy_interval(right, n)
    return {name: value, "low": low, "high": high, "n": n}


def told(found: dict[str, Any]) -> list[str]:
    """A summary in lines."""
    people = ", ".join(f"{name} {one['labels']}" for name, one in found["labellers"].items())
    lines = [f"{found['labels']} labels on {found['pairs']} pairs" + (f" by {people}" if people else "")]
    for one in found["stages"]:
        first, second = one["stages"]
        wins = f"{first} {one['wins'][first]}, {second} {one['wins'][second]}, tie {one['tie']}, both bad {one['bad']}"
        lines.append(wins + (f": {first} preferred in {_told_share(one, 'share')}" if "share" in one else ""))
    for one in found["between"]:
        kappa = "" if one["kappa"] is None else f", kappa {one['kappa']:.2f}"
        lines.append(f"{' and '.join(one['labellers'])} agree on {one['same']:.0%} of {one['n']} pairs{kappa}")
    if found["reward_model"]:
        lines.append(f"the reward model prefers the chosen reply in {_told_share(found['reward_model'], 'accuracy')}")
    return lines


def _told_share(one: dict[str, Any], name: str) -> str:
    return f"{one[name]:.0%} of {one['n']} ({one['low']:.0%} to {one['high']:.0%})"

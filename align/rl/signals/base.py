"""What every kind of signal offers, and how `stages.ppo.reward` and `data.gold.signal` list signals. No torch.

A kind is a dataclass in a file of this folder. Its fields are its options, and the one that is called as the kind
itself chooses it: {url: http://..., timeout: 5}. `weighed.py` weighs signals and adds them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from align.checkpoints.resolve import is_classifier
from data_prep.core.errors import TrainingStopped, UserError
from data_prep.core.options import build, option, unknown_key
from data_prep.core.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from data_prep.options import DataOptions
    from data_prep.types import PromptTokens

Verdict = dict[str, float]
"""What is said of one reply: "score" is the whole, other keys are parts of it."""


@dataclass(frozen=True)
class Said:
    """Replies to be scored, with the prompts that they answer, in one order."""

    prompts: Sequence[PromptTokens]
    texts: Sequence[str]
    finished: Sequence[bool]
    """Whether a reply ended by itself."""
    models_BK: Tensor | None = None
    """What the stage's K reward models say of the B replies."""

    def fields(self) -> list[dict[str, Any]]:
        """What is known of every row beside its prompt, for scorers that are not this project's."""
        rows = zip(self.prompts, self.finished, strict=True)
        return [{**row.meta, "id": row.id, "finished": finished} for row, finished in rows]


Scorer = Callable[[Said], list[Verdict]]


@dataclass(frozen=True)
class Site:
    """What is at hand where signals are opened."""

    data: DataOptions
    device: Any = "cpu"
    allow_code: bool = False
    norms: Sequence[Mapping[str, float]] = ()
    """Mean and deviation of the scores of each reward model of the stage."""


class Normalise(Enum):
    """How a signal's scores are brought to a common scale."""

    auto = "auto"
    none = "none"
    start = "start"
    running = "running"


@dataclass
class SignalOptions:
    """What can be set of every signal, beside the options of its kind."""

    name: str | None = option(None, "its name in metrics (default: the rule's, reward_model, or the kind's)")
    weight: float = option(1.0, "its weight in the sum; below 0 it is a penalty, 0 only logs it", low=-1e6, high=1e6)
    normalise: Normalise = option(
        Normalise.auto,
        "auto|none|start|running: by mean and deviation of the starting policy's replies, or of all so far; auto: a "
        "reward model by its own, a classifier by start, others not at all",
    )
    clip: float = option(0.0, "bound of the normalised score on both sides (0: none)")


@dataclass
class Source:
    """Where a signal's scores come from; the base of every kind."""

    name: ClassVar[str]
    usual: ClassVar[Normalise] = Normalise.none
    """What `normalise=auto` means."""

    @classmethod
    def of(cls, values: dict[str, Any], where: str) -> Source:
        """The kind with its options set.

        Raises:
            UserError: an option that it does not have, or of a wrong type.
        """
        for key in values:
            if key not in {each.name for each in fields(cls)}:
                raise unknown_key(f"{where}.{key}", [each.name for each in (*fields(cls), *fields(SignalOptions))])
        return build(cls, values, where)

    @property
    def default_name(self) -> str:
        """What the signal is called where it has no name."""
        return self.name

    @property
    def models(self) -> list[str]:
        """The reward models of this project that it reads, as `find_input` takes them."""
        return []

    def require_allowed(self, where: str, allow_code: bool) -> None:
        """Refuse code of the user that the run has not allowed."""

    def check(self, where: str, data: DataOptions) -> None:
        """Refuse what cannot work, before anything is trained; `where` is the dotted path of its options."""

    @property
    def rule_name(self) -> str | None:
        """The rule that it is, which may need the right answer of every prompt."""
        return None

    def contents(self, data: DataOptions) -> list[str]:
        """Hashes of what decides its scores beside its options."""
        return []

    def judges(self) -> list[dict[str, str]]:
        """Models that are no checkpoints of this project, for the record: name, path and fingerprint."""
        return []

    def norm(self, site: Site) -> tuple[float, float]:
        """Mean and deviation of its scores where `normalise=auto` measures none."""
        return 0.0, 1.0

    def open(self, where: str, site: Site) -> Scorer:
        """Get ready, and return what scores replies.

        Raises:
            UserError: as `check`.
        """
        raise NotImplementedError


kinds: Registry[type[Source]] = Registry("signal", "align.rl.signals")


@dataclass(frozen=True)
class Signal:
    """One signal as it was set."""

    name: str
    where: str
    """Dotted path of its options."""
    given: SignalOptions
    source: Source = field(repr=False)

    @property
    def normalise(self) -> Normalise:
        """How its scores are normalised; `auto` where by its own."""
        return self.source.usual if self.given.normalise is Normalise.auto else self.given.normalise

    @property
    def measured(self) -> bool:
        """Whether the starting policy's replies are scored to normalise it."""
        return self.normalise in (Normalise.start, Normalise.running)


def signals_of(value: Any, where: str) -> list[Signal]:
    """The signals that a stage's `reward` lists; none where it names a checkpoint, or nothing.

    Raises:
        UserError: no signals, an option that there is not, or two of one name.
    """
    if value is None or (isinstance(value, str) and not _is_stock(value)):
        return []
    listed = value if isinstance(value, list) else [value]
    places = [f"{where}[{i}]" for i in range(len(listed))] if isinstance(value, list) else [where]
    found = [signal_of(each, place) for each, place in zip(listed, places, strict=True)]
    if not found:
        raise UserError("an empty list rewards nothing", field=where, code="bad_value", hint="name a rule")
    names = [each.name for each in found]
    for each in found:
        if names.count(each.name) > 1:
            raise UserError(
                f"two signals are called {each.name}", field=each.where, code="bad_value", hint="give one a name=NAME"
            )
    if sum(bool(each.source.models) for each in found) > 1:
        raise UserError("more than one reward model", field=where, code="bad_value", hint="leave all but one out")
    return found


def signal_of(value: Any, where: str) -> Signal:
    """One signal; what is no option of every signal is one of its kind."""
    if isinstance(value, str):
        value = {"classifier" if _is_stock(value) else "checkpoint": value}
    if not isinstance(value, Mapping):
        raise UserError(f"expected a signal {{rule: NAME}} (got {value})", field=where, code="bad_value")
    own = {each.name for each in fields(SignalOptions)}
    given = build(SignalOptions, {key: each for key, each in value.items() if key in own}, where)
    options = {str(key): each for key, each in value.items() if key not in own and each is not None}
    chosen = [kind for kind in kinds.names() if kind in options]
    if len(chosen) != 1:
        raise UserError(
            f"a signal is one of {', '.join(kinds.names())} (got {' and '.join(chosen) or 'none'})",
            field=where,
            code="bad_value",
            hint="give it rule=NAME, checkpoint=RUN/reward_model or classifier=FOLDER; docs/ppo.md has an example each",
        )
    source = kinds.get(chosen[0]).of(options, where)
    name = given.name or source.default_name
    if not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"not a name (got {name!r})", field=f"{where}.name", code="bad_value")
    return Signal(name, where, given, source)


def _is_stock(text: str) -> bool:
    """Whether a text names the folder of a stock classifier."""
    return is_classifier(Path(text).expanduser())


MOST = 1e18
"""Largest score: its square is still a number of 32 bits, in which rewards are normalised."""


def checked(who: str, scores: Iterable[Any], said: Said) -> list[Verdict]:
    """Scores from outside as verdicts, one a reply, each a finite number.

    Raises:
        TrainingStopped: another count, or something that is no finite number; says whose.
    """
    try:
        found = [float(score + 0) for score in scores]  # a text is no number
    except (TypeError, ValueError, OverflowError) as problem:
        raise failed(who, f"gave something else than a list of numbers ({problem})") from problem
    if len(found) != len(said.texts):
        raise failed(who, f"gave {len(found)} scores for {len(said.texts)} replies")
    for score, row in zip(found, said.prompts, strict=True):
        if not math.isfinite(score):
            raise failed(who, f"gave no finite score to the reply to {row.id} (got {score})")
        if abs(score) > MOST:
            raise failed(who, f"gave the reply to {row.id} a score of {score:g}, and {MOST:g} is the most either way")
    return [{"score": score} for score in found]


def failed(who: str, what: str) -> TrainingStopped:
    """The stop that a scorer from outside causes, in one line."""
    return TrainingStopped(f"{who} {what}", code="signal_failed", hint="mend it; the same command goes on")


def batches_of(said: Said, size: int) -> Iterator[Said]:
    """The same replies, so many at a time."""
    for start in range(0, len(said.texts), size):
        part = slice(start, start + size)
        yield Said(said.prompts[part], said.texts[part], said.finished[part])

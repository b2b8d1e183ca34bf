"""The plain records that travel from a source to a batch. No tensors here.

`id` is always `file:row` (rows count from 1), so that any later message can name where a row came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Generic, SupportsIndex, TypeVar, Union, overload


class RowKind(str, Enum):
    """What a row is read as. Its name is what stages and commands call such rows, its value one record of them."""

    conversations = "conversation"
    preferences = "preference"
    unpaired = "unpaired"
    prompts = "prompt"
    text = "document"

    def __str__(self) -> str:
        return self.value

    @property
    def option(self) -> str:
        """The data option that names their source."""
        return "preferences" if self is RowKind.unpaired else self.name


CONVERSATION, PREFERENCE, UNPAIRED = RowKind.conversations, RowKind.preferences, RowKind.unpaired
PROMPT, DOCUMENT = RowKind.prompts, RowKind.text

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    """One turn.

    `train` False (or `weight` 0) leaves an assistant turn out of the loss; another `weight` multiplies the loss of its
    tokens. `calls` are the tools that an assistant turn calls, {"name", "arguments"} each; `name` and `call_id` say
    which tool a tool turn answers for, and which call.
    """

    role: str
    content: str
    train: bool | None = None
    weight: float | None = None
    calls: tuple[dict[str, Any], ...] = ()
    name: str | None = None
    call_id: str | None = None

    @property
    def trained(self) -> bool:
        """Whether the loss covers this turn, if it is the assistant's."""
        return self.train is not False and self.weight != 0

    def as_dict(self) -> dict[str, Any]:
        """The turn as chat templates and other programs know it: role, content, and what it has of tools."""
        said: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.calls:
            said["tool_calls"] = [_call(call) for call in self.calls]
        more = {"name": self.name, "tool_call_id": self.call_id}
        return said | {key: value for key, value in more.items() if value is not None}


def _call(call: dict[str, Any]) -> dict[str, Any]:
    function = {"name": call["name"], "arguments": call["arguments"]}
    return {**({"id": call["id"]} if "id" in call else {}), "type": "function", "function": function}


@dataclass(frozen=True)
class Conversation:
    """A dialogue to imitate. `meta` may hold `split` ("train" or "eval"), `topic` and `features`.

    `tools` are the JSON schemas of the tools that the assistant may call.
    """

    messages: tuple[Message, ...]
    id: str
    meta: dict[str, Any] = field(default_factory=dict)
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Preference:
    """Two replies to one prompt, the better one first; `margin` is how much better, when known."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    id: str
    margin: float | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Labelled:
    """One reply to a prompt, and whether it is a good one (KTO, arXiv 2402.01306)."""

    prompt: tuple[Message, ...]
    reply: str
    good: bool
    id: str
    meta: dict[str, Any] = field(default_factory=dict)
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Prompt:
    """Something to reply to. `meta` may hold `topic` and `features`."""

    messages: tuple[Message, ...]
    id: str
    meta: dict[str, Any] = field(default_factory=dict)
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Document:
    """Plain text to model from its first to its last token. `meta` may hold `split`."""

    text: str
    id: str
    meta: dict[str, Any] = field(default_factory=dict)


Features = Union[str, "tuple[float, ...]"]
"""What a row says of itself beside its text, for adapters that read it: a category, or numbers."""


class FeaturedIds(list[int]):
    """Token ids of a row that has features. Wherever the ids go, to a batch or into a cache, the features go with them;
    a part of a row has the features of the row."""

    def __init__(self, ids: Sequence[int], features: Features) -> None:
        super().__init__(ids)
        self.features = features

    @overload
    def __getitem__(self, place: SupportsIndex) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> list[int]: ...
    def __getitem__(self, place: SupportsIndex | slice) -> int | list[int]:
        found = super().__getitem__(place)
        return FeaturedIds(found, self.features) if isinstance(found, list) else found


def features_of(ids: Sequence[int]) -> Features | None:
    """The features of the row that the ids belong to, if it has any."""
    return ids.features if isinstance(ids, FeaturedIds) else None


def with_features(ids: Sequence[int], features: Features | None) -> list[int]:
    """The ids of a row with these features."""
    return list(ids) if features is None else FeaturedIds(ids, features)


def joined(prompt: Sequence[int], reply: Sequence[int]) -> list[int]:
    """The ids of a prompt and of a reply to it as one row, which has the prompt's features."""
    return with_features([*prompt, *reply], features_of(prompt))


class _HasFeatures:
    """A rendered row: its first ids know its features."""

    def __post_init__(self) -> None:
        row: Any = self
        features = row.features
        if features is None:
            return
        features = features if isinstance(features, str) else tuple(features)
        name = "ids" if hasattr(row, "ids") else "prompt"
        for attribute, value in (("features", features), (name, FeaturedIds(getattr(row, name), features))):
            object.__setattr__(self, attribute, value)


@dataclass(frozen=True)
class Tokens(_HasFeatures):
    """A rendered row. `mask[i]`: token i is supervised (its log-probability is in the loss).

    `ids` and `mask` have the same length T; `mask[0]` is never used, as nothing predicts the first token. `weights`,
    of length T too, multiply the loss of supervised tokens; None: all weigh 1. `task` is what the row's record says of
    itself in `meta`: evaluation losses are told apart by it.
    """

    ids: list[int]
    mask: list[bool]
    id: str
    weights: list[float] | None = None
    task: str | None = None
    features: Features | None = None


@dataclass(frozen=True)
class PairTokens(_HasFeatures):
    """A rendered preference: prompt ids with the generation prompt, and both replies with their end token."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    id: str
    margin: float | None = None
    task: str | None = None
    features: Features | None = None


@dataclass(frozen=True)
class LabelledTokens(_HasFeatures):
    """A rendered labelled reply: prompt ids with the generation prompt, reply ids with their end token."""

    prompt: list[int]
    reply: list[int]
    good: bool
    id: str
    features: Features | None = None


@dataclass(frozen=True)
class PromptTokens(_HasFeatures):
    """A rendered prompt, generation prompt included; `text` is the last user message, `messages` are all of them."""

    ids: list[int]
    text: str
    id: str
    meta: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, Any]] = field(default_factory=list)
    features: Features | None = None

    def shown(self) -> dict[str, Any]:
        """The prompt for people to read: `prompt`, `before` where messages stand before that one, and `id`."""
        last = max((place for place, one in enumerate(self.messages) if one["role"] == "user"), default=0)
        before = [{"role": one["role"], "content": one.get("content") or ""} for one in self.messages[:last]]
        return {"prompt": self.text, **({"before": before} if before else {}), "id": self.id}


T = TypeVar("T", Tokens, PairTokens, LabelledTokens, PromptTokens)


@dataclass
class Prepared(Generic[T]):
    """Rendered rows, the data card, and the digest of everything that decides them (texts, tokenizer, template).

    Training rows stand in the order of their source (of a mixture: spread evenly); evaluation rows in the order of a
    hash of their question, so that the first n of them are a fair sample of all. Few rows are lists; many are read
    from a file when they are asked for (stored.Rows).
    """

    train: Sequence[T]
    eval: Sequence[T]
    card: dict[str, Any]
    digest: str
    highest: int = -1
    """The highest token id of any row."""
    ended: float = 0.0
    """Share of the rows whose end of turn is supervised."""
    asked: Any = ()
    """64 bits of a hash of every question that training rows ask (splitting.rank_bits), uint64, each once."""
    held: Any = ()
    """The same of the evaluation rows, in their order."""

"""Where data comes from and how long it may be: dataclasses that Hydra shows and checks."""

# No `from __future__ import annotations`: OmegaConf reads these annotations as types.
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Optional

from data_prep.core.options import listing, option


class OnBadRow(Enum):
    """What to do with a row that cannot be used."""

    refuse = "refuse"
    drop = "drop"


class OnLeak(Enum):
    """What to do with a training row that says the same as an evaluation row."""

    refuse = "refuse"
    drop = "drop"


class OnLong(Enum):
    """What to do with a row longer than `max_length` tokens; truncate cuts its prompt."""

    error = "error"
    drop = "drop"
    truncate = "truncate"


class OnLongAnswer(Enum):
    """What to do with a row whose answer is to blame for its length; only `open` leaves an answer without its end."""

    error = "error"
    drop = "drop"
    truncate = "truncate"
    open = "open"


class Keep(Enum):
    """Which part of a cut prompt stays."""

    end = "end"
    start = "start"


class TrainOn(Enum):
    """Which of the assistant's turns the loss covers."""

    all = "all"
    last = "last"


def _map(text: str) -> Any:
    return field(default_factory=dict, metadata={"help": text})


@dataclass
class SourceOptions:
    """One source of rows: a file, a folder, a glob, a hub id, or a generator. Neither: not given."""

    path: Optional[str] = field(
        default=None,
        metadata={
            "help": "file, folder or glob (JSONL, JSON, CSV, TSV, Parquet, Arrow, text; packed too), or org/name"
        },
    )
    generator: Optional[str] = field(default=None, metadata={"help": "name of a built-in generator of rows"})
    format: str = field(default="auto", metadata={"help": "format of the rows; auto looks at their keys"})
    split: Optional[str] = field(
        default=None,
        metadata={"help": "split that trains, of several: train_sft (default: the one named for such rows)"},
    )
    eval_path: Optional[str] = field(default=None, metadata={"help": "a separate source of evaluation rows"})
    eval_share: float = option(0.05, "share of prompts held out when rows carry no split", high=1)
    eval_rows: int = option(500, "most evaluation rows held out")
    limit: Optional[int] = option(None, "read only the first rows, as many as this", low=1)
    mix: dict[str, Any] = _map("several sources in place of a path: {name: {path: FILE, weight: 2, ...}, ...}")
    columns: dict[str, str] = _map("our columns from theirs: {ours: theirs}, or {ours: 'text with {theirs} in it'}")
    parse: dict[str, str] = _map("take texts apart into columns: {text: 'IN: {prompt} OUT: {completion}'}")
    options: dict[str, Any] = _map("options of the format (or of the generator)")
    negatives: list[Any] = field(
        default_factory=list,
        metadata={
            "help": "pairs made of pairs [off_topic, same_style_off_topic, truncated, repeated, shuffled], one of each "
            "kind per row; {kind: number} for another number"
        },
    )
    on_bad_row: OnBadRow = field(
        default=OnBadRow.refuse, metadata={"help": "refuse (stop and name them) or drop (drop and count) bad rows"}
    )
    on_leak: OnLeak = field(
        default=OnLeak.refuse,
        metadata={"help": "refuse or drop (and count) training rows that are also rows of eval_path or split=eval"},
    )


@dataclass
class MixOptions(SourceOptions):
    """One source of a mixture: a source, and how much is drawn of it."""

    weight: float = option(1.0, "how much more is drawn of it than of others, row by row", above=0, high=1e6)
    epochs: Optional[float] = option(
        None, "draw each of its rows this many times, whatever the weights say", above=0, high=1e4
    )


@dataclass
class GoldOptions:
    """The known-good judge of replies, for evaluation and for looks during PPO."""

    rule: Optional[str] = field(default=None, metadata={"help": "name of a reward rule that knows the truth"})
    options: dict[str, Any] = _map("options of the rule")
    source: SourceOptions = field(default_factory=SourceOptions, metadata={"help": "rows the rule reads"})
    signal: dict[str, Any] = _map("in place of a rule: a signal as of stages.ppo.reward, {classifier: FOLDER}")

    @property
    def has_judge(self) -> bool:
        """Whether replies can be judged at all."""
        return bool(self.rule or self.signal)


@dataclass
class DataOptions:
    """The data of a run: one source per kind of row. Prompts fall back on those of the conversations."""

    name: str = field(default="files", metadata={"help": "name of the data, for cards and reports"})
    root: Optional[str] = field(default=None, metadata={"help": "folder that relative paths start from (else the cwd)"})
    path: Optional[str] = field(default=None, metadata={"help": "one file for the kind of row it holds"})
    mix: dict[str, Any] = _map("several sources for the kind of row they hold: {name: {path: FILE, weight: 2}, ...}")
    temperature: float = option(
        1.0, "of a mixture: 1 draws in proportion to rows, above 1 more evenly", above=0, high=1e6
    )
    workers: Optional[int] = option(
        None, "processes that render when rows are many (default: one per core; 0: none)", low=0, high=1024
    )
    license: str = field(default="", metadata={"help": "licence of the data, copied into the data card"})
    system: Optional[str] = field(default=None, metadata={"help": "system message for rows that have none"})
    train_on: TrainOn = field(
        default=TrainOn.all, metadata={"help": "all|last: which turns of the assistant the loss of dialogues covers"}
    )
    unused: list[str] = listing("columns to leave out of all rows, though answers may depend on them")
    special_tokens: list[str] = listing(
        "special tokens of the tokenizer that contents may hold, as tokens: ['<think>']; others are read as text"
    )
    keep: dict[str, Any] = _map("only rows whose columns hold this: {score: '>=4', is_safe: true, lang: [en, de]}")
    filters: dict[str, Any] = _map("filters of rows, in this order: {dedup: {near: 0.8}, refusal: {}}")
    conversations: SourceOptions = field(default_factory=SourceOptions, metadata={"help": "dialogues to imitate"})
    preferences: SourceOptions = field(default_factory=SourceOptions, metadata={"help": "pairs of replies"})
    prompts: SourceOptions = field(default_factory=SourceOptions, metadata={"help": "prompts for PPO and evaluation"})
    text: SourceOptions = field(default_factory=SourceOptions, metadata={"help": "documents for pretraining"})
    gold: GoldOptions = field(default_factory=GoldOptions, metadata={"help": "the known-good judge"})


@dataclass
class LengthOptions:
    """How long a rendered row may be, what becomes of longer ones, and how many rows may be lost."""

    max_length: int = option(1024, "longest row in tokens", low=2)
    on_long: OnLong = option(
        OnLong.drop, "rows over max_length: drop (counted), error, or truncate (cuts the prompt, never the answer)"
    )
    on_long_answer: Optional[OnLongAnswer] = option(
        None,
        "rows that are too long for their answer: error|drop|truncate (its end token stays)|open (cut without an end); "
        "default: as on_long, drop where that is truncate",
    )
    keep_prompt: Keep = option(Keep.end, "end|start: which part of a cut prompt stays")
    max_lost: float = option(0.05, "stop when more than this share of the rows is dropped as too long", high=1)

    @property
    def answer_rule(self) -> OnLongAnswer:
        """The rule for answers: as set, else error where rows are an error, and drop."""
        if self.on_long_answer is not None:
            return self.on_long_answer
        return OnLongAnswer.error if self.on_long is OnLong.error else OnLongAnswer.drop

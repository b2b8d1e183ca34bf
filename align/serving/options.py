"""What can be set for `align chat`, `align label` and `align serve`, and what their TARGET names. Imports no torch."""

# No `from __future__ import annotations`: `data_prep/core/options.py` reads these annotations as types, as elsewhere.
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from shlex import quote
from typing import Any, Optional

from align.checkpoints.checkpoint import RECORD, Checkpoint
from align.checkpoints.peft_adapter import is_foreign, unknown_of
from align.checkpoints.resolve import is_model, resolve_checkpoint, resolve_target
from align.run_record import RunRecord, is_run
from data_prep.core.errors import UserError
from data_prep.core.options import build, listing, option


@dataclass
class ChatOptions:
    """How replies are drawn, and where runs are."""

    temperature: float = option(0.7, "sampling temperature (0: always the likeliest token)", high=100)
    max_new_tokens: int = option(256, "longest reply in tokens", low=1)
    seed: Optional[int] = option(None, "seed of the sampling (null: new replies every time)", low=0)
    system: Optional[str] = option(None, "system prompt")
    features: Any = option(None, "features of the conversation, for a method that reads them: pirate, or [0.5,1]")
    reward: bool = option(True, "score replies by the chain's reward model, where it has one")
    out: str = option("runs", "folder that run folders are in")
    base: Optional[str] = option(None, "folder of the base where it lies now (default: as the checkpoint records)")

    def changed(self, **values: Any) -> "ChatOptions":
        """A copy with some options changed, checked like overrides.

        Raises:
            UserError: an option that does not exist, or a value of the wrong type or size.
        """
        return build(ChatOptions, {**asdict(self), **values}, "")


class Split(Enum):
    """Which prompts of the run are answered."""

    train = "train"
    eval = "eval"


@dataclass
class LabelOptions:
    """Which replies are compared, and where the choices go."""

    stages: list[str] = listing(
        "policies of the chain whose replies are compared, a name twice too (default: the last two)"
    )
    out: str = option("labels.jsonl", "file of the labels; one that is there is gone on with")
    labeller: Optional[str] = option(None, "who labels (null: the page asks)")
    pairs: int = option(60, "pairs to judge, those first that a label says most about", low=1)
    prompts: int = option(240, "prompts that are answered, to choose the pairs from", low=1)
    split: Split = option(Split.train, "train: prompts to learn from; eval: held-out ones, to measure by")
    temperature: float = option(0.7, "sampling temperature (0: always the likeliest token)", high=100)
    max_new_tokens: int = option(256, "longest reply in tokens", low=1)
    seed: int = option(0, "seed of prompts, replies and sides; the same seed goes on with the same pairs")
    runs: str = option("runs", "folder that run folders are in")
    base: Optional[str] = option(None, "folder of the base where it lies now (default: as the checkpoint records)")


class By(Enum):
    """Who computes what `align serve` answers."""

    align = "align"
    vllm = "vllm"


@dataclass
class ServeOptions:
    """Who may ask, what one request may cost, and where runs are."""

    host: str = option("127.0.0.1", "address to listen on; any but 127.0.0.1 needs a token")
    port: int = option(8417, "port to listen on (0: any free one)", high=65535)
    token: Optional[str] = option(None, "what requests must carry as their API key")
    temperature: float = option(1.0, "sampling temperature where a request says none", high=100)
    max_new_tokens: int = option(256, "longest reply in tokens where a request says nothing", low=1)
    batch: int = option(64, "most replies that are computed at once", low=1)
    waiting: int = option(1024, "most replies that wait; further requests are turned away", low=1)
    max_rows: int = option(128, "most replies that one request may ask for", low=1)
    max_bytes: int = option(2_000_000, "longest request in bytes", low=1)
    reward: bool = option(True, "keep the reward models in memory, for rewards and best_of")
    engine: By = option(By.align, "align serves; vllm prints the commands that let vLLM serve")
    out: str = option("runs", "folder that run folders are in")
    base: Optional[str] = option(None, "folder of the base where it lies now (default: as the checkpoint records)")


def find_policy(target: str, out: str) -> tuple[Checkpoint | Path, list[str]]:
    """The policy that TARGET names, or the folder of a plain model, and what must be said about the choice.

    Raises:
        UserError: nothing there, nothing finished, or a checkpoint that scores instead of speaking.
    """
    path, notes = Path(target).expanduser(), list[str]()
    if is_foreign(path):
        found = Checkpoint.open(path)
        return found, [unknown_of(found.record, path)]
    if is_model(path):
        return path, notes
    folder = resolve_target(target, out)
    if (folder / RECORD).is_file():
        found = Checkpoint.open(folder)
    elif is_run(folder):
        found = resolve_checkpoint(str(folder), out)
        status = RunRecord.open(folder).status
        if status != "done":
            state = "is still running or was cut off" if status == "running" else status
            notes.append(f"this run {state}: talking to {found.stage}, its last finished policy")
    else:
        hint = f"the last finished policy of the run: align chat {quote(str(folder.parent))}"
        said = "this stage keeps no weights, or is not finished"
        raise UserError(said, file=str(folder), hint=hint, code="not_finished")
    if found.record["role"] != "policy":
        raise _silent(found)
    return found, notes


def _silent(found: Checkpoint) -> UserError:
    """The refusal of a checkpoint that scores: it names the policy below it, if there is one."""
    below = next((one for one in found.ancestors() if one.record["role"] == "policy"), None)
    hint = (
        f"the policy it stands on: align chat {quote(str(below.folder))}"
        if below
        else "train a policy: align run pipeline=sft"
    )
    what = f"{found.label} is a {found.record['role']} model: it scores replies and does not speak"
    return UserError(what, file=str(found.folder), hint=hint, code="wrong_role")


def label_of(checkpoint: Checkpoint | Path) -> str:
    """RUN/STAGE for a checkpoint in a run folder, else its folder."""
    if isinstance(checkpoint, Path):
        return str(checkpoint)
    folder = checkpoint.folder.resolve()
    return f"{folder.parent.name}/{folder.name}" if is_run(folder.parent) else str(folder)

"""Which method to take: by what was measured on bases of this size, and by what fits the device; nothing is guessed.

`measured.json` has what `experiment=method_comparison` found, written by `python -m benchmarks.methods` beside the
tables of docs/adapters.md. A base more than ten times as large as those is past what they can say: then memory and what
methods can do decide alone, and the answer says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from align.config.compose import compose
from align.config.registries import adapters
from align.planning.devices import Device
from align.planning.plan import StageNeeds, plan

BEYOND = 10.0
"""How many times larger than a measured base another may be for the measurement to count."""
CLOSE = 1.15
"""Methods whose held-out loss is within this factor of LoRA's are told apart by speed or size."""
REFERENCE = "lora"
UNMEASURED = (REFERENCE, "qlora")
"""What is offered where nothing was measured: the method that most can be done with, then the one of least memory."""


class Goal(Enum):
    """What the method is to be good at."""

    quality = "loss"
    speed = "speed"
    size = "saved"


@dataclass(frozen=True)
class Candidate:
    """A method, and why it comes at this place."""

    method: str
    why: str


@dataclass(frozen=True)
class Advice:
    """What to take."""

    candidate: Candidate
    overrides: list[str]
    """Beside `adapter=METHOD`: what makes it fit."""
    peak_bytes: int
    stage: str
    """The stage that takes the most."""
    fits: bool


def candidates(goal: Goal, parameters: int) -> list[Candidate]:
    """Methods in the order to try them, for a base of so many parameters."""
    known = _table(parameters)
    if known is None:
        tables = " and ".join(f"{table['parameters']:,}" for table in _tables().values())
        past = f"no method was measured on a base of {parameters:,} parameters (only on {tables})"
        facts = {
            REFERENCE: "it merges without a trace, loads in stock peft, and other methods can stand on it",
            "qlora": "LoRA on a base in 4 bits, a quarter of the weights' memory in 16",
        }
        return [Candidate(name, f"{past}; {facts[name]}") for name in UNMEASURED]
    rows = known["methods"]
    bound = CLOSE * rows[REFERENCE]["loss"]
    fitting = [method for method, row in rows.items() if goal is Goal.quality or row["loss"] <= bound]
    keys: dict[Goal, Callable[[str], float]] = {
        Goal.quality: lambda method: float(rows[method]["loss"]),
        Goal.speed: lambda method: -float(rows[method]["speed"]),
        Goal.size: lambda method: _bytes(rows[method]["saved"]),
    }
    order = sorted((method for method in fitting if method in adapters.names()), key=keys[goal])
    return [Candidate(method, _reason(method, known)) for method in order]


def advise(
    words: Sequence[str],
    config_dir: str | None,
    goal: Goal,
    device: Device,
    parameters: int,
    say: Callable[[str], None] = lambda doing: None,
) -> Iterator[Advice]:
    """Candidates with what they take, up to the first that fits.

    Args:
        words: overrides of the run; none of them names the adapter.

    Raises:
        UserError: as `align run`.
    """
    for candidate in candidates(goal, parameters):
        say(f"planning {candidate.method}")
        config = compose([*words, f"adapter={candidate.method}"], config_dir)
        needs = dict(plan(config, device))
        changes = [_change(each) for each in needs.values() if each.memory.high > device.bytes]
        overrides = [change for change in changes if change is not None]
        stage = max(needs, key=lambda name: needs[name].memory.peak_bytes)
        yield Advice(candidate, overrides, needs[stage].memory.peak_bytes, stage, len(overrides) == len(changes))
        if len(overrides) == len(changes):
            return


def _change(needs: StageNeeds) -> str | None:
    """The first change that makes a stage fit; None where nothing helps."""
    return next((str(change["set"]) for change in needs.changes if change["fits"]), None)


def _tables() -> dict[str, Any]:
    return dict(json.loads((Path(__file__).parent / "measured.json").read_text(encoding="utf-8")))


def _table(parameters: int) -> dict[str, Any] | None:
    """The measurement on the base that is nearest in size, if any says something of this one."""
    near = [table for table in _tables().values() if parameters <= BEYOND * table["parameters"]]
    return min(near, key=lambda table: abs(math.log(parameters / table["parameters"])), default=None)


def _reason(method: str, table: dict[str, Any]) -> str:
    rows = table["methods"]
    row, other = rows[method], rows[REFERENCE]
    beside = "" if method == REFERENCE else f" (LoRA {other['loss']:.4f}, {other['saved']})"
    place = 1 + sum(each["loss"] < row["loss"] for each in rows.values())
    return (
        f"measured on a base of {table['parameters']:,} parameters: held-out loss {row['loss']:.4f}, place {place} of "
        f"{len(rows)}; {row['saved']} saved{beside}; {row['speed']:.2f} times LoRA's speed"
    )


def _bytes(text: str) -> float:
    """`807.0 KiB` as a number."""
    value, unit = text.replace(",", "").split()
    return float(value) * 1024.0 ** ["B", "KiB", "MiB", "GiB"].index(unit)

"""`align plan`: memory and minutes of every stage on a device, and what to change where it does not fit."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from align.cli.arguments import progress, say
from align.cli.own_files import with_files
from align.config.compose import compose
from data_prep.core.errors import UserError

if TYPE_CHECKING:
    from align.planning.devices import Device
    from align.planning.memory.parts import StageMemory
    from align.planning.plan import StageNeeds

_DEVICE = "device="


def plan(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Print what every stage takes; exit code 0 whether it fits or not."""
    given = [word for word in args.words if word.startswith(_DEVICE)]
    if len(given) > 1:
        raise UserError("is given twice", field="device", code="bad_override")
    config = compose(with_files([word for word in args.words if word not in given]), args.config_dir)
    device = device_named(given[0].removeprefix(_DEVICE) if given else "auto")
    from align.planning.plan import plan as look

    say(args, f"on {device.name}, which has {gigabytes(device.bytes)}", "")
    stages = {}
    with progress("planning") as told:
        for name, needs in look(config, device, told):
            stages[name] = needs.as_dict()
            say(args, *_lines(name, needs, device))
    fits = all(stage["high"] <= device.bytes for stage in stages.values())
    say(args, "fits" if fits else "does not fit: `set` has what each change would give")
    answer = {"device": {"name": device.name, "kind": device.kind, "bytes": device.bytes}, "stages": stages}
    return 0, {**answer, "fits": fits}


def device_named(name: str) -> Device:
    """The device of a name; `auto` is this machine's."""
    from align.planning.devices import device_of
    from align.runs.environment import facts

    kind = "cpu"
    if name == "auto":
        import torch

        kind = "cuda" if torch.cuda.is_available() else "cpu"
    return device_of(name, facts(kind))


def _lines(name: str, needs: StageNeeds, device: Device) -> list[str]:
    """A stage for people."""
    memory = needs.memory
    parts = ", ".join(f"{part} {gigabytes(size)}" for part, size in memory.parts.items() if size >= 5e6)
    lines = [f"{name}: {in_words(memory)}", f"  {parts}"]
    if needs.minutes is None:
        lines.append("  minutes unknown: no run of this stage, method and base on this device in the folder of runs")
    else:
        runs = f"{needs.minutes.runs} earlier run{'' if needs.minutes.runs == 1 else 's'}"
        lines.append(f"  {needs.minutes.low:.1f} to {needs.minutes.high:.1f} minutes, by {runs}")
    for change in needs.changes:
        fits = "fits" if change["fits"] else "does not fit"
        lines.append(f"  set {change['set']}: {gigabytes(change['peak_bytes'])}, {fits}")
    return [*lines, ""]


def in_words(memory: StageMemory) -> str:
    """A peak and its range."""
    return f"{gigabytes(memory.peak_bytes)} at its highest ({gigabytes(memory.low)} to {gigabytes(memory.high)})"


def gigabytes(size: float) -> str:
    """Bytes for people."""
    return f"{size / 1e9:.2f} GB"

"""What deserves a second look in a run's numbers, each with the number that says so. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from align.report.conclusion import Gain, stages_of
from align.report.formatting import fixed, number, percent, signed
from align.report.run_files import Json, StageFiles, finite, mapping, series

RISE = 1.02
"""A held-out loss this much above its lowest is said to have risen."""
LENGTH, CALIBRATION, ENDED, DROPPED = 0.3, 0.1, 0.9, 0.05
"""|rank correlation|, calibration error, share of replies that end, share of rows dropped: where a notice begins."""


def notices(stages: Sequence[StageFiles], measured: StageFiles, gain: Gain | None, earlier: Sequence[str]) -> list[str]:
    """One sentence for everything that deserves a second look; `earlier`: stages that an earlier run left."""
    found = [f"{name} is left from an earlier run of this folder and is not shown." for name in earlier]
    for stage in stages:
        found += _of_data(stage)
        found += [*_of_losses(stage), *_of_rewards(stage)] if stage.status == "done" else []
    judge = next((held for s in (measured, *stages) if (held := _judge(s))), {})
    gate = mapping(judge.get("gate"))
    if gate.get("verdict") in ("warn", "refuse") and isinstance(gate.get("reasons"), list):
        found += [f"The reward model's gate says {gate['verdict']}: {reason}." for reason in gate["reasons"]]
    length, error = finite(judge.get("length_corr")), finite(judge.get("ece"))
    if length is not None and abs(length) > LENGTH:
        found.append(f"The reward model's scores go with reply length (rank correlation {signed(length)}).")
    if error is not None and error > CALIBRATION:
        found.append(f"The reward model's confidence is {percent(error)} off its accuracy on average.")
    ended = finite(stages_of(measured).get(gain.last, {}).get("finished")) if gain else None
    if gain and ended is not None and ended < ENDED:
        found.append(f"Only {percent(ended)} of {gain.last}'s replies end before the length limit.")
    return found


def _judge(stage: StageFiles) -> Json:
    """The numbers of a reward model, from an evaluation or from the stage that trained it."""
    return mapping(stage.result.get("reward_model")) or (stage.metrics if "ece" in stage.metrics else {})


def _of_losses(stage: StageFiles) -> list[str]:
    held = series(stage.rows, "loss", "eval")
    if len(held) < 2:
        return []
    step, lowest = min(held, key=lambda point: point[1])
    if held[-1][1] <= lowest * RISE or stage.metrics.get("best_step") is not None:
        return []
    return [
        f"Held-out loss of {stage.name} was lowest at step {number(int(step))} ({number(lowest)}) and ended at "
        f"{number(held[-1][1])}."
    ]


def _of_rewards(stage: StageFiles) -> list[str]:
    found = []
    if stage.metrics.get("stopped_on_kl"):
        found.append(f"{stage.name} stopped early: its KL per reply passed kl_limit.")
    explained = stage.last("value/explained_var")
    if explained is not None and explained < 0:
        found.append(f"The critic of {stage.name} ends worse than a constant (explained variance {fixed(explained)}).")
    ended = stage.last("response/eos_rate")
    if ended is not None and ended < ENDED:
        found.append(f"In the last update of {stage.name} only {percent(ended)} of the replies ended.")
    if forced := stage.checkpoint.get("forced"):
        found.append(f"{stage.name} was forced past a check: {', '.join(map(str, forced))}.")
    return found


def _of_data(stage: StageFiles) -> list[str]:
    rows = mapping(stage.card.get("rows"))
    seen, kept = finite(rows.get("in")), finite(rows.get("kept"))
    if not seen or kept is None or 1 - kept / seen <= DROPPED:
        return []
    return [f"{percent(1 - kept / seen)} of the rows of {stage.name} were dropped."]

"""What deserves a second look in a run's numbers, each with the number that says so. Imports no torch.

These are the warnings of a run: `run.json` has them, the report shows them, the terminal ends with them, and
`align run --strict` fails on them. A stage adds its own with `StageContext.warn`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress

from align.report.conclusion import Gain, stages_of
from align.report.formatting import fixed, number, percent, signed
from align.report.run_files import Json, StageFiles, finite, mapping, series
from data_prep.quality.card_warnings import card_warnings

RISE = 1.02
"""A held-out loss this much above its lowest is said to have risen."""
LENGTH, CALIBRATION, ENDED, DROPPED = 0.3, 0.1, 0.9, 0.05
"""|rank correlation|, calibration error, share of replies that end, share of rows dropped: where a notice begins."""


def notice(code: str, message: str, hint: str | None = None, stage: str | None = None) -> Json:
    """A warning as `run.json` has it: {code, message, hint, stage}; the message without a full stop."""
    return {"code": code, "message": message, "hint": hint, "stage": stage}


def told(warning: Json) -> str:
    """A warning in one sentence, its hint included."""
    message, hint, stage = (str(warning.get(key) or "").rstrip(".") for key in ("message", "hint", "stage"))
    head = f"{stage}: " if stage not in message else ""
    return f"{head}{message}{'; ' if hint else ''}{hint}."


def notices(
    stages: Sequence[StageFiles], measured: StageFiles, gain: Gain | None, earlier: Sequence[str]
) -> list[Json]:
    """Everything that deserves a second look; `earlier`: stages that an earlier run left."""
    found = [_earlier(name) for name in earlier]
    for stage in stages:
        found += [_given(stage, row) for row in stage.warnings]
        found += _of_data(stage)
        found += [*_of_losses(stage), *_of_rewards(stage)] if stage.status == "done" else []
    judge = next((stage for stage in (*stages, measured) if _judge(stage)), None)
    said = {row["code"] for row in found}
    found += [row for row in _of_judge(_judge(judge), judge.name) if row["code"] not in said] if judge else []
    ended = finite(stages_of(measured).get(gain.last, {}).get("finished")) if gain else None
    if gain and ended is not None and ended < ENDED:
        text = f"Only {percent(ended)} of {gain.last}'s replies end before the length limit"
        found.append(notice("replies_cut", text, _longer(measured.name), measured.name))
    return found


def failures(matrix: Json, listed: Sequence[tuple[str, list[Json]]]) -> list[Json]:
    """A warning for every check that failed (`align/report/checks.py`)."""
    cells = [(text, zip(matrix["names"], found, strict=True)) for text, found in matrix["rows"]]
    failed = [(text, name, cell[1]) for text, row in cells for name, cell in row if cell and cell[0] is False]
    for name, found in listed:
        failed += [(check["text"], name, check["detail"]) for check in found if check["ok"] is False]
    hint = "do not use its weights before this is understood"
    return [
        notice("failed_check", f'Check failed in {name}: "{text}" ({detail or "no"})', hint, name)
        for text, name, detail in failed
    ]


def _earlier(name: str) -> Json:
    text = f"{name} is left from an earlier run of this folder and is not shown"
    return notice("earlier_stage", text, "the same command makes it anew once the stages before it are done", name)


def _given(stage: StageFiles, row: Json) -> Json:
    """What a stage warned of itself."""
    hint = row.get("hint")
    return notice(str(row.get("code")), str(row.get("message")), str(hint) if hint else None, stage.name)


def _longer(stage: str) -> str:
    return f"raise stages.{stage}.max_new_tokens if they are cut in the middle"


def _judge(stage: StageFiles) -> Json:
    """The numbers of a reward model, from an evaluation or from the stage that trained it."""
    return mapping(stage.result.get("reward_model")) or (stage.metrics if "ece" in stage.metrics else {})


def _of_judge(judge: Json, stage: str) -> Iterator[Json]:
    gate = mapping(judge.get("gate"))
    if gate.get("verdict") in ("warn", "refuse") and isinstance(gate.get("reasons"), list):
        yield _of_gate(gate["verdict"], [str(reason) for reason in gate["reasons"]], stage)
    length, error = finite(judge.get("length_corr")), finite(judge.get("ece"))
    if length is not None and abs(length) > LENGTH:
        text = f"The reward model's scores go with reply length (rank correlation {signed(length)})"
        hint = "balance the lengths of chosen and rejected replies, or read replies before trusting a reward that rises"
        yield notice("length_correlation", text, hint, stage)
    if error is not None and error > CALIBRATION:
        text = f"The reward model's confidence is {percent(error)} off its accuracy on average"
        yield notice("calibration", text, "train it for fewer epochs, or at a lower lr", stage)


def _of_gate(verdict: str, reasons: Sequence[str], stage: str) -> Json:
    """One warning for the verdict, with the first and worst of its reasons."""
    said, _, remedy = (reasons[0] if reasons else "it gives no reason").partition("; ")
    if more := len(reasons) - 1 if reasons else 0:
        said += f" (and {more} more reason{'s' if more > 1 else ''})"
        remedy += "; report.html lists all"
    return notice("reward_gate", f"The reward model's gate says {verdict}: {said}", remedy or None, stage)


def _of_losses(stage: StageFiles) -> Iterator[Json]:
    held = series(stage.rows, "loss", "eval")
    if len(held) < 2:
        return
    step, lowest = min(held, key=lambda point: point[1])
    if held[-1][1] <= lowest * RISE or stage.metrics.get("best_step") is not None:
        return
    text = (
        f"Held-out loss of {stage.name} was lowest at step {number(int(step))} ({number(lowest)}) and ended at "
        f"{number(held[-1][1])}"
    )
    yield notice("loss_rose", text, f"stages.{stage.name}.patience=2 keeps the best weights", stage.name)


def _of_rewards(stage: StageFiles) -> Iterator[Json]:
    name = stage.name
    if stage.metrics.get("stopped_on_kl"):
        text = f"{name} stopped early: its KL per reply passed kl_limit"
        yield notice("kl_limit", text, f"raise stages.{name}.kl_coef or lower stages.{name}.lr", name)
    explained = stage.last("value/explained_var")
    if explained is not None and explained < 0 and not any(row.get("code") == "critic" for row in stage.warnings):
        text = f"The critic of {name} ends worse than a constant (explained variance {fixed(explained)})"
        yield notice("critic", text, f"raise stages.{name}.critic_warmup or stages.{name}.value_lr_ratio", name)
    ended = stage.last("response/eos_rate")
    if ended is not None and ended < ENDED:
        text = f"In the last update of {name} only {percent(ended)} of the replies ended"
        yield notice("replies_cut", text, _longer(name), name)
    if forced := stage.checkpoint.get("forced"):
        text = f"{name} was forced past a check: {', '.join(map(str, forced))}"
        yield notice("forced", text, "compare its evaluation with that of a run without force", name)


def _of_data(stage: StageFiles) -> Iterator[Json]:
    with suppress(TypeError, KeyError, AttributeError):  # a card of another shape has nothing to say
        for code, text, hint in card_warnings(stage.card):
            yield notice(code, text, hint, stage.name)
    rows = mapping(stage.card.get("rows"))
    seen, kept = finite(rows.get("in")), finite(rows.get("kept"))
    if seen and kept is not None and 1 - kept / seen > DROPPED:
        text = f"{percent(1 - kept / seen)} of the rows of {stage.name} were dropped"
        yield notice("rows_dropped", text, "align check with the same words names the first of them", stage.name)

"""What a run says in one line: how the last policy compares with the one before it, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from align.report import charts as svg_figures
from align.report.formatting import duration, fixed, number, percent, plural, signed
from align.report.run_files import Json, StageFiles, finite, given, gold_of, mapping, series
from data_prep.core.errors import whole_sentences
from reward.metrics import Z95

LONGEST_ERROR = 600


@dataclass(frozen=True)
class Gain:
    """The last policy against the one it is measured against, on the same prompts."""

    last: str
    base: str
    before: float | None = None
    after: float | None = None
    low: float = 0.0
    high: float = 0.0
    n: int = 0

    @property
    def change(self) -> float:
        return (self.after or 0.0) - (self.before or 0.0)


def compared(measured: StageFiles) -> Gain | None:
    """Gold score of the last policy less that of its baseline, with a 95 % interval.

    The interval is that of the paired difference where the evaluation gives one, else of the two standard errors.
    """
    named = stages_of(measured)
    against = mapping(measured.result.get("win_rate")).get("against")
    if len(named) < 2:
        return None
    *others, last = named
    base = str(against) if against in others else others[-1]
    before, after = (gold_of(named[name].get("gold")) for name in (base, last))
    if before is None or after is None:
        return Gain(last, base)
    error = finite(mapping(measured.result.get("gain")).get("se"))
    if error is None:
        error = math.hypot(*(finite(mapping(named[name]["gold"]).get("se")) or 0.0 for name in (base, last)))
    change = after - before
    n = int(finite(mapping(named[last]["gold"]).get("n")) or 0)
    return Gain(last, base, before, after, change - Z95 * error, change + Z95 * error, n)


def stages_of(measured: StageFiles) -> dict[str, Json]:
    """What the evaluation gives each stage, by name."""
    return {str(name): mapping(row) for name, row in mapping(measured.result.get("stages")).items()}


def verdict(
    run: Json, stages: Sequence[StageFiles], measured: StageFiles, gain: Gain | None, waiting: list[str]
) -> Json:
    """The line on top: tone (good | bad | plain), headline, sentences. `waiting`: stages that have not begun."""
    status = str(run.get("status"))
    if status != "done":
        return _unfinished(run, stages, status, waiting)
    wins = mapping(measured.result.get("win_rate"))
    odds = f"ties counted half (95\u202f% interval {percent(wins.get('low'))} to {percent(wins.get('high'))})."
    tone, headline, sentences = "plain", _headline(stages), list[str]()
    if gain and gain.before is not None and gain.after is not None:
        tone, headline = _moved(gain, fallen_parts(measured, gain))
        sentences.append(
            f"On {gain.n} held-out prompts, {gain.last} changed it by {signed(gain.change)} over {gain.base} "
            f"(95\u202f% interval {signed(gain.low)} to {signed(gain.high)})."
        )
        if given(wins.get("value")):
            sentences.append(f"It wins {percent(wins['value'])} of comparisons with {gain.base}, {odds}")
    elif gain and given(wins.get("value")):
        tone = _tone(finite(wins.get("low")) or 0.0, finite(wins.get("high")) or 1.0, 0.5)
        doubt = ", no clear difference" if tone == "plain" else ""
        headline = f"{gain.last} wins {percent(wins['value'])} of comparisons with {gain.base}{doubt}."
        sentences.append(f"Judged by the reward model on {number(wins.get('n'))} held-out prompts, {odds}")
    elif gain:
        headline = _lost(measured, gain) or headline
        sentences.append("Nothing judged the replies: no reward model and no gold rule was given.")
    sentences += _judged(measured, gain) if gain else _uncompared(stages)
    sentences += [*_ordered(measured), *_preferred(measured), *_tasks(measured)]
    sentences += [text for stage in stages if (text := _distance(stage))]
    return {"tone": tone, "headline": headline or "The run is done.", "sentences": sentences}


def _kept_kl(stage: StageFiles) -> float | None:
    """KL of the weights that a policy was left with, where they are those of a look; not those of the last update."""
    kept = stage.metrics.get("held_out")
    return finite(kept.get("objective/kl_k1")) if kept and stage.metrics.get("best_update") is not None else None


def _distance(stage: StageFiles) -> str | None:
    """How far a policy stands from its parent: the weights that were kept, else those of the last update."""
    if (held := _kept_kl(stage)) is not None:
        far = f"{number(held)} nats of KL per reply from its parent"
        return f"{stage.name} has the weights of update {number(stage.metrics['best_update'])}, {far}."
    if (kl := stage.last("objective/kl_k1")) is None:
        return None
    early = ", where its KL limit stopped it" if stage.metrics.get("stopped_on_kl") else ""
    return f"At the end {stage.name} stood {number(kl)} nats of KL per reply from its parent{early}."


def fallen_parts(measured: StageFiles, gain: Gain) -> list[str]:
    """Parts of the gold rule, and the share of replies that end, that fell clearly: "topic fell from 0.95 to 0.71".

    Each is a mean of n values in 0..1, whose error is at most that of a share; 95 % intervals, not paired.
    """
    named, found = stages_of(measured), []
    rows = [
        {**mapping(named[name].get("gold")), "ended": named[name].get("finished")} for name in (gain.base, gain.last)
    ]
    for part in rows[1]:
        before, after = (finite(row.get(part)) for row in rows)
        if part in ("score", "n", "se") or before is None or after is None or not gain.n:
            continue
        if not (0 <= before <= 1 and 0 <= after <= 1):
            continue
        error = math.sqrt((before * (1 - before) + after * (1 - after)) / gain.n)
        if after - before + Z95 * error < 0:
            name = "the share of replies that end" if part == "ended" else part
            found.append(f"{name} fell from {fixed(before)} to {fixed(after)}")
    return found


def _moved(gain: Gain, fallen: Sequence[str]) -> tuple[str, str]:
    """Tone and headline of a change in gold score."""
    tone = _tone(gain.low, gain.high, 0.0)
    words = {"good": "rose from {} to {}", "bad": "fell from {} to {}", "plain": "shows no clear change: {}, then {}"}
    moved = f"Gold score {words[tone].format(fixed(gain.before), fixed(gain.after))}"
    if not fallen:
        return tone, f"{moved}."
    joined = {"good": ", but ", "bad": ", and ", "plain": "; "}[tone]
    return ("plain" if tone == "good" else "bad"), f"{moved}{joined}{' and '.join(fallen)}."


def _tone(low: float, high: float, even: float) -> str:
    """What an interval says against the value that means "no difference"."""
    return "good" if low > even else "bad" if high < even else "plain"


def _judged(measured: StageFiles, gain: Gain) -> list[str]:
    """What the reward model says of the same replies, beside the gold score where there is one."""
    named = stages_of(measured)
    before, after = (finite(named[name].get("reward")) for name in (gain.base, gain.last))
    if before is None or after is None:
        return []
    unmatched = after > before and gain.after is not None and gain.low <= 0
    end = ", with no clear gain in gold to match." if unmatched else "."
    return [f"The mean reward, by the reward model, went from {fixed(before)} to {fixed(after)}{end}"]


def _ordered(measured: StageFiles) -> list[str]:
    """How many pairs of a benchmark the reward model orders rightly, whole and by section."""
    held = mapping(measured.result.get("pairs"))
    if not all(given(held.get(key)) for key in ("accuracy", "low", "high")):
        return []
    between = f"{percent(held['low'])} to {percent(held['high'])}"
    sections = [(name, mapping(row).get("accuracy")) for name, row in mapping(held.get("sections")).items()]
    listed = ", ".join(f"{name} {percent(share)}" for name, share in sections if given(share))
    whole = f"{percent(held['accuracy'])} of {number(held.get('n'))} benchmark pairs rightly"
    return [f"The reward model orders {whole} (95\u202f% interval {between}): {listed}."]


def _preferred(measured: StageFiles) -> list[str]:
    """What the judge behind an endpoint says of the last stage against the one before it."""
    held, named = mapping(measured.result.get("judged")), list(stages_of(measured))
    if not named or not all(given(held.get(key)) for key in ("value", "low", "high")):
        return []
    between = f"{percent(held['low'])} to {percent(held['high'])}"
    said = (
        f"{held.get('judge')} prefers {named[-1]} in {percent(held['value'])} of comparisons with {held.get('against')}"
    )
    return [f"{said}, asked in both orders (95\u202f% interval {between}, {number(held.get('n'))} prompts)."]


def _tasks(measured: StageFiles) -> list[str]:
    """What the benchmarks say of the last stage against the one before it, and of their documents in the data."""
    words = {"better": "is better", "worse": "is worse", "unclear": "shows no clear change"}
    found = []
    for name, task in mapping(measured.result.get("tasks")).items():
        for metric, row in mapping(mapping(task).get("metrics")).items():
            changes = [(stage, mapping(one)) for stage, one in mapping(mapping(row).get("changes")).items()]
            if changes and all(given(changes[-1][1].get(key)) for key in ("value", "low", "high")):
                before, change = changes[-1]
                said = f"{name}, {metric}: {words.get(str(change.get('verdict')), 'moved')} over {before} by"
                between = f"{signed(change['low'])} to {signed(change['high'])}, {number(change.get('n'))} documents"
                found.append(f"{said} {signed(change['value'])} (95\u202f% interval {between}).")
        held = mapping(mapping(task).get("contamination"))
        if count := int(finite(held.get("found")) or 0):
            found.append(f"{name}: {count} of its {number(held.get('documents'))} documents stand in the data.")
    return found


def _lost(measured: StageFiles, gain: Gain) -> str:
    """How the held-out loss moved from the stage that is measured against to the last one, where both have one."""
    named = stages_of(measured)
    before, after = (finite(named[name].get("loss")) for name in (gain.base, gain.last))
    if before is None or after is None:
        return ""
    return f"Held-out loss went from {before:.3f} ({gain.base}) to {after:.3f} ({gain.last})."


def _headline(stages: Sequence[StageFiles]) -> str:
    """What to say of a run with nothing compared: the last stage's held-out numbers."""
    for stage in reversed(stages):
        if stage.result.get("headline"):
            return str(stage.result["headline"])
        if given(stage.metrics.get("accuracy")):
            return f"The reward model orders {percent(stage.metrics['accuracy'])} of held-out pairs rightly."
        if given(stage.metrics.get("rewards/accuracies")):
            share = percent(stage.metrics["rewards/accuracies"])
            return f"{stage.name} judges {share} of held-out replies rightly by its own rewards."
        if looked := _looked(stage):
            return looked
        held = series(stage.rows, "loss", "eval")
        if held:
            (step, first), (_, last) = held[0], held[-1]
            moved = f"went from {first:.3f} at step {step:.0f} to {last:.3f}" if len(held) > 1 else f"is {first:.3f}"
            return f"Held-out loss {moved}."
    return ""


def _looked(stage: StageFiles) -> str:
    """How a policy's replies to held-out prompts changed during its stage, up to the weights that were kept."""
    for key, name in (("gold/score", "gold score"), ("objective/score_shaped", "reward")):
        looks = series(stage.rows, key, "eval")
        if len(looks) > 1:
            best = finite(stage.metrics.get("best_update"))
            kept = next((value for step, value in looks if step == best), looks[-1][1])
            said = f"went from {fixed(looks[0][1])} to {fixed(kept)}"
            return f"The mean {name} of {stage.name}'s replies to held-out prompts {said}."
    return ""


def _uncompared(stages: Sequence[StageFiles]) -> list[str]:
    """On what the last stage was measured, in a run that compares no replies."""
    said = []
    for stage in stages[-1:]:
        if all(given(stage.metrics.get(key)) for key in ("low", "high", "n")):
            low, high = percent(stage.metrics["low"]), percent(stage.metrics["high"])
            said.append(f"Of {number(stage.metrics['n'])} pairs, with a 95\u202f% interval of {low} to {high}.")
        steps = max((finite(row.get("step")) or 0.0 for row in stage.rows), default=0.0)
        splits = mapping(stage.card.get("splits"))
        if steps and given(splits.get("train")):
            measured = given(splits.get("eval")) and any(row.get("split") == "eval" for row in stage.rows)
            held = f", measured on {number(splits['eval'])} that were held out" if measured else ""
            rows = plural(splits["train"], "row")
            said.append(f"{plural(int(steps), 'step')} of {stage.name} on {rows}{held}.")
    return [*said, "No replies were compared."]


def _unfinished(run: Json, stages: Sequence[StageFiles], status: str, waiting: list[str]) -> Json:
    """What to say of a run that failed, was stopped, or is not at its end: where, why, and what there is."""
    at = next((s for s in stages if s.status == status), None)
    where = f" in {at.name}" if at else ""
    words = {"failed": f"The run failed{where}.", "stopped": f"The run stopped{where}."}
    sentences = []
    error = next((e for e in (run.get("error"), *(s.entry.get("error") for s in stages)) if e), None)
    if error:
        text = str(error.get("message", error)) if isinstance(error, Mapping) else str(error)
        sentences.append(whole_sentences(text, LONGEST_ERROR) + ".")
    done = [s.name for s in stages if s.status == "done"]
    sentences.append(f"Finished: {', '.join(done)}." if done else "No stage was finished.")
    if at and (step := max((finite(row.get("step")) or 0.0 for row in at.rows), default=0.0)):
        sentences.append(f"{at.name} got as far as step {number(int(step))}; what it logged is below.")
    if waiting:
        sentences.append(f"Not begun: {', '.join(waiting)}.")
    if done:
        sentences.append("The same command skips what is finished, and goes on from the last state that was kept.")
    when = f": it was{where} when this was written" if where else ""
    headline = words.get(status, f"The run has not finished{when}.")
    return {"tone": "bad" if status in words else "plain", "headline": headline, "sentences": sentences}


def figures(stages: Sequence[StageFiles], measured: StageFiles, gain: Gain | None) -> list[Json]:
    """The few numbers that matter, each with its interval where it has one."""
    found: list[Json] = []

    def add(label: str, value: str, detail: str, drawing: str = "") -> None:
        found.append({"label": label, "value": value, "detail": detail, "drawing": drawing})

    if gain and gain.after is not None:
        axis = (min(0.0, gain.low) - 0.05, max(0.0, gain.high) + 0.05)
        drawing = svg_figures.interval(gain.change, gain.low, gain.high, axis, 0.0)
        add("Gain in gold score", signed(gain.change), f"{signed(gain.low)} to {signed(gain.high)}", drawing)
    own = next((s.metrics for s in stages if "accuracy" in s.metrics), {})
    judge = mapping(measured.result.get("reward_model")) or own
    wins = mapping(measured.result.get("win_rate"))
    for label, held, key in (("Win rate", wins, "value"), ("Reward model accuracy", judge, "accuracy")):
        if all(given(held.get(part)) for part in (key, "low", "high")):
            axis = (min(0.4, held["low"]), 1.0)
            drawing = svg_figures.interval(held[key], held["low"], held["high"], axis, 0.5)
            add(label, percent(held[key]), f"{percent(held['low'])} to {percent(held['high'])}", drawing)
    for stage in stages:
        kept = _kept_kl(stage)
        if (kl := stage.last("objective/kl_k1") if kept is None else kept) is not None:
            add(f"KL of {stage.name}", number(kl), "nats per reply from its parent")
        elif (loss := finite(stage.metrics.get("eval_loss"))) is not None:
            add(f"Held-out loss, {stage.name}", number(loss), f"perplexity {number(math.exp(min(loss, 50.0)))}")
    seconds = [finite(s.entry.get("seconds")) or 0.0 for s in stages]
    if any(seconds):
        reused = sum(bool(s.entry.get("skipped")) for s in stages)
        add("Time", duration(sum(seconds)), plural(len(seconds), "stage") + (f", {reused} reused" if reused else ""))
    return found

"""What a run says in one line: how the last policy compares with the one before it, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from align import svg
from align.run_files import Json, StageFiles, finite, given, gold_of, series
from align.words import number, percent, share, signed
from reward.metrics import Z95, paired_difference


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
    """Gold reward of the last policy less that of its baseline, with a 95 % interval.

    The interval is that of the paired difference where the evaluation gives one, else of the two standard errors.
    """
    named = measured.result.get("stages") or {}
    against = (measured.result.get("win_rate") or {}).get("against")
    if len(named) < 2:
        return None
    *others, last = named
    base = str(against) if against in others else others[-1]
    before, after = (gold_of(named[name].get("gold")) for name in (base, last))
    if before is None or after is None:
        return Gain(last, base)
    error = finite((measured.result.get("gain") or {}).get("se"))
    if error is None:
        error = math.hypot(*(finite(named[name]["gold"].get("se")) or 0.0 for name in (base, last)))
    change = after - before
    n = int(named[last]["gold"].get("n") or 0)
    return Gain(last, base, before, after, change - Z95 * error, change + Z95 * error, n)


def verdict(run: Json, stages: Sequence[StageFiles], measured: StageFiles, gain: Gain | None) -> Json:
    """The line on top: tone (good | bad | plain), headline, sentences."""
    status = str(run.get("status"))
    if status != "done":
        return _unfinished(run, stages, status)
    tone, headline, sentences = "plain", "", list[str]()
    if gain and gain.before is not None and gain.after is not None:
        tone = "good" if gain.low > 0 else "bad" if gain.high < 0 else "plain"
        moved = {"good": "rose from {} to {}", "bad": "fell from {} to {}"}.get(
            tone, "shows no clear change: {}, then {}"
        )
        headline = f"Gold reward {moved.format(share(gain.before), share(gain.after))}."
        sentences.append(
            f"On {gain.n} held-out prompts, {gain.last} changed it by {signed(gain.change)} over {gain.base} "
            f"(95\u202f% interval {signed(gain.low)} to {signed(gain.high)})."
        )
    sentences += _judged(measured, gain) if gain else []
    for stage in stages:
        if (kl := stage.last("objective/kl_k1")) is not None:
            early = ", where its KL limit stopped it" if stage.metrics.get("stopped_on_kl") else ""
            sentences.append(f"{stage.name} ended {number(kl)} nats of KL per reply from its parent{early}.")
    headline = headline or (sentences.pop(0) if gain and sentences else _headline(stages))
    return {"tone": tone, "headline": headline or "The run is done.", "sentences": sentences}


def _judged(measured: StageFiles, gain: Gain) -> list[str]:
    """What the win rate and the reward model say of the same replies."""
    sentences = []
    wins = measured.result.get("win_rate") or {}
    if given(wins.get("value")):
        sentences.append(
            f"{gain.last} wins {percent(wins['value'])} of comparisons with {gain.base}, ties counted half "
            f"(95\u202f% interval {percent(wins.get('low'))} to {percent(wins.get('high'))})."
        )
    named = measured.result["stages"]
    before, after = (finite(named[name].get("reward")) for name in (gain.base, gain.last))
    if before is not None and after is not None:
        text = f"The reward model's own score went from {number(before)} to {number(after)}"
        fooled = after > before and gain.after is not None and gain.high <= 0
        sentences.append(text + (": the policy pleased its judge, not the gold rule." if fooled else "."))
    return sentences


def _headline(stages: Sequence[StageFiles]) -> str:
    """What to say of a run with nothing compared: the last stage's held-out numbers."""
    for stage in reversed(stages):
        if given(stage.metrics.get("accuracy")):
            return f"The reward model orders {percent(stage.metrics['accuracy'])} of held-out pairs rightly."
        held = series(stage.rows, "loss", "eval")
        if held:
            moved = f"went from {held[0][1]:.3f} to {held[-1][1]:.3f}" if len(held) > 1 else f"is {held[0][1]:.3f}"
            return f"Held-out loss {moved}."
    return ""


def _unfinished(run: Json, stages: Sequence[StageFiles], status: str) -> Json:
    at = next((s.name for s in stages if s.entry.get("status") == status), None)
    where = f" in {at}" if at else ""
    words = {"failed": f"The run failed{where}.", "stopped": f"The run stopped{where}."}
    sentences = []
    error = next((e for e in (run.get("error"), *(s.entry.get("error") for s in stages)) if e), None)
    if error:
        sentences.append(str(error.get("message", error)) if isinstance(error, Mapping) else str(error))
    done = [s.name for s in stages if s.entry.get("status") == "done"]
    sentences.append(f"Finished: {', '.join(done)}." if done else "No stage was finished.")
    headline = words.get(status, f"The run has not finished{where and '; it is' + where}.")
    return {"tone": "bad" if status in words else "plain", "headline": headline, "sentences": sentences}


def figures(stages: Sequence[StageFiles], measured: StageFiles, gain: Gain | None) -> list[Json]:
    """The few numbers that matter, each with its interval where it has one."""
    found: list[Json] = []

    def add(label: str, value: str, detail: str, drawing: str = "") -> None:
        found.append({"label": label, "value": value, "detail": detail, "drawing": drawing})

    if gain and gain.after is not None:
        axis = (min(0.0, gain.low) - 0.05, max(0.0, gain.high) + 0.05)
        drawing = svg.interval(gain.change, gain.low, gain.high, axis, 0.0)
        add("Gain in gold reward", signed(gain.change), f"{signed(gain.low)} to {signed(gain.high)}", drawing)
    own = next((s.metrics for s in stages if "accuracy" in s.metrics), {})
    for label, found_in, key in (
        ("Win rate", measured.result.get("win_rate") or {}, "value"),
        ("Reward model accuracy", measured.result.get("reward_model") or own, "accuracy"),
    ):
        if all(given(found_in.get(part)) for part in (key, "low", "high")):
            value, low, high = found_in[key], found_in["low"], found_in["high"]
            drawing = svg.interval(value, low, high, (min(0.4, low), 1.0), 0.5)
            add(label, percent(value), f"{percent(low)} to {percent(high)}", drawing)
    for stage in stages:
        if (kl := stage.last("objective/kl_k1")) is not None:
            add("KL at the end", number(kl), "nats per reply from the parent")
        elif (loss := finite(stage.metrics.get("eval_loss"))) is not None:
            add(f"Held-out loss, {stage.name}", number(loss), f"perplexity {number(math.exp(min(loss, 50.0)))}")
    return found

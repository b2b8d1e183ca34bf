"""The plain facts of a report: data, time, memory, machine, versions, and how to make the run again.

Imports no torch.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from markupsafe import Markup

from align.report.charts import bar, histogram
from align.report.formatting import number, percent, size
from align.report.run_files import Json, StageFiles, finite, given, mapping

LONGEST_RECIPE = 60_000
PRINTED = {"rows", "splits", "tokens", "supervised_share", "license", "source", "format", "kind"}
PRINTED |= {"filters", "overlap", "pairs", "samples"}
"""Keys of a data card that have a place of their own on the page."""
DIGESTS = {"digest", "template_digest", "tokenizer_digest"}


def data(stages: Sequence[StageFiles]) -> list[Json]:
    """What every stage read: counts, reasons for dropping, lengths, and whatever else its data card says."""
    found = []
    for stage in stages:
        card = stage.card
        if not card:
            continue
        rows, tokens = mapping(card.get("rows")), mapping(card.get("tokens"))
        dropped = {str(k).replace("_", " "): v for k, v in mapping(rows.get("dropped")).items() if v}
        found.append(
            {
                "name": stage.name,
                "about": [_name(card[key]) for key in ("source", "format", "license") if card.get(key)],
                "counts": _counts(rows, mapping(card.get("splits")), tokens, finite(card.get("supervised_share"))),
                "dropped": dropped,
                "remarks": [*_filtered(card), *_overlapping(mapping(card.get("overlap"))), *_pairs(card)],
                "drawings": _histograms(stage.name, card),
                "samples": [
                    [(k, _name(v) if k == "id" else str(v)) for k, v in mapping(row).items()]
                    for row in _listed(card.get("samples"))
                ],
                "more": _more(card),
            }
        )
    return found


def _counts(rows: Json, splits: Json, tokens: Json, supervised: float | None) -> list[tuple[str, str]]:
    """(title, number) of a data card's counts; prompts have no supervised tokens and so no share of them."""
    dropped = mapping(rows.get("dropped")).values()
    counts = (
        ("rows in", rows.get("in")),
        ("kept", rows.get("kept")),
        ("dropped", sum(int(count) for count in dropped if given(count)) if rows else None),
        ("train", splits.get("train")),
        ("held out", splits.get("eval")),
        ("tokens", tokens.get("total")),
        ("per row", tokens.get("mean")),
        ("longest", tokens.get("longest")),
    )
    return [*((title, number(count)) for title, count in counts), ("supervised", percent(supervised or None))]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _filtered(card: Mapping[str, Any]) -> list[str]:
    """What each filter dropped, in one sentence."""
    steps = [
        f"{one['name']} dropped {number(one.get('dropped'))} of {number(one.get('in'))}"
        for one in map(mapping, _listed(card.get("filters")))
        if one.get("name")
    ]
    return [f"filters, in this order: {'; '.join(steps)}"] if steps else []


def _overlapping(overlap: Json) -> list[str]:
    """What is known of evaluation rows in training, one sentence for each kind."""
    share = f"from {number(overlap.get('near_from'))}"
    of = f"; {number(overlap['near_of'])} rows looked at" if overlap.get("near_of") else ""
    kinds = (
        ("exact", "also evaluation rows: left out of training"),
        ("question", "with the question of an evaluation row: left out of training"),
        ("near", f"nearly an evaluation row ({share} of the word pairs{of}): still trained on"),
    )
    return [f"training rows {words}: {number(overlap[key])}" for key, words in kinds if overlap.get(key)]


def _pairs(card: Mapping[str, Any]) -> list[str]:
    """What length alone tells of pairs, and how many contradict another or are tied."""
    pairs = mapping(card.get("pairs"))
    longer = finite(pairs.get("chosen_longer"))
    if longer is None:
        return []
    chars = f"mean {number(pairs.get('chosen_chars'))} against {number(pairs.get('rejected_chars'))} characters"
    faults = [f"{number(pairs[key])} {key}" for key in ("contradictory", "tied") if pairs.get(key)]
    return [f"the chosen reply is the longer one in {percent(longer)} of the pairs ({chars})", *faults]


def _name(source: Any) -> str:
    """A source without the folders of the machine it was on."""
    text = str(source)
    return PurePath(text).name if text.startswith("/") else text


def _histograms(name: str, card: Mapping[str, Any]) -> list[tuple[str, Markup]]:
    """Every {counts, edges} of the card, one edge more than counts, wherever it stands."""
    found = []
    for key, value in card.items():
        if not isinstance(value, dict):
            continue
        counts, edges = value.get("counts"), value.get("edges")
        if isinstance(counts, list) and isinstance(edges, list) and len(edges) == len(counts) + 1 > 1:
            if all(given(x) for x in (*counts, *edges)):
                title = key.replace("_", " ")
                found.append((title, histogram(counts, edges, f"{title} of {name}")))
        elif key != "rows":
            found += [(f"{key.replace('_', ' ')}: {inner}", drawing) for inner, drawing in _histograms(name, value)]
    return found


def _more(card: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Entries of the card without a place of their own, each as one line; histograms and empty ones left out."""
    found = []
    for key, value in card.items():
        if key in PRINTED or value in (None, "", {}, []) or _holds_histogram(value):
            continue
        text = str(value)[:8] if key in DIGESTS else _told(value)
        found.append((key.replace("_", " "), text))
    return found


def _holds_histogram(value: Any) -> bool:
    return isinstance(value, dict) and ("counts" in value or any(_holds_histogram(v) for v in value.values()))


def _told(value: Any) -> str:
    """A value of a card in words, on one line of bounded length."""
    if isinstance(value, dict):
        text = ", ".join(f"{str(k).replace('_', ' ')}: {_told(v)}" for k, v in list(value.items())[:40])
    elif isinstance(value, list):
        text = ", ".join(_told(v) for v in value[:40])
    else:
        text = number(value) if given(value) else _name(value)
    return text if len(text) <= 800 else text[:800] + "\u2026"


def costs(stages: Sequence[StageFiles]) -> Json:
    """Seconds by stage and phase and bytes by stage, with bars of their shares."""
    timed = [s for s in stages if given(s.entry.get("seconds")) or given(s.entry.get("peak_rss_bytes"))]
    total = sum(finite(s.entry.get("seconds")) or 0.0 for s in timed)
    rows = []
    for stage in timed:
        seconds = finite(stage.entry.get("seconds"))
        phases = {str(k): float(v) for k, v in mapping(stage.entry.get("phases")).items() if given(v)}
        if seconds is not None and phases and seconds > sum(phases.values()):
            phases["other"] = seconds - sum(phases.values())
        rows.append(
            {
                "name": stage.name,
                "seconds": seconds,
                "peak": finite(stage.entry.get("peak_rss_bytes")),
                "peak_gpu": finite(stage.entry.get("peak_gpu_bytes")),
                "skipped": bool(stage.entry.get("skipped")),
                "bar": _share(seconds, total, f"share of {stage.name} in the run's time"),
                "phases": [
                    (name, spent, _share(spent, total, f"share of {name} in the run's time"))
                    for name, spent in phases.items()
                ],
            }
        )
    memories = [(s.name, held) for s in stages if (held := _memory(mapping(s.metrics.get("memory"))))]
    return {"rows": rows, "total": total, "memories": memories}


def _share(part: float | None, whole: float, title: str) -> Markup | str:
    return bar(part / whole, title) if part is not None and whole > 0 else ""


def _memory(memory: Json) -> list[tuple[str, str, Markup | str]]:
    """Bytes of weights and optimiser states: (what, how many, bar)."""
    kinds = (("base_bytes", "base weights, once"), ("beside_bytes", "beside them"), ("head_bytes", "scalar heads"))
    held = [(words, value) for key, words in kinds if (value := finite(memory.get(key))) is not None]
    if memory.get("bases") not in (None, 1, 1.0):
        held = [(words.replace(", once", f", {number(memory['bases'])} sets"), value) for words, value in held]
    whole = sum(value for _, value in held)
    rows = [(words, size(value), _share(value, whole, words)) for words, value in held]
    if (ratio := finite(memory.get("ratio"))) is not None:
        rows.append(("beside, over one adapter with its optimiser", f"{ratio:.2f} times", ""))
    return rows


def again(folder: Path, run: Json) -> Json:
    """Command, recipe, seed, machine and versions."""
    words = run.get("command") or []
    command = words if isinstance(words, str) else shlex.join(map(str, words))
    recipe = folder / "recipe.yaml"
    text = recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else ""
    return {
        "command": command,
        "recipe": text[:LONGEST_RECIPE],
        "recipe_cut": max(0, len(text) - LONGEST_RECIPE),
        "facts": _facts(run),
        "versions": mapping(run.get("versions")),
    }


def _facts(run: Json) -> list[tuple[str, str]]:
    machine = mapping(run.get("machine"))
    found = [("Seed", run.get("seed")), ("Configuration", str(run.get("config_digest") or "")[:8])]
    found += [("Device", machine.get("device")), ("Processor", machine.get("processor"))]
    found += [("Cores", machine.get("cores")), ("System", machine.get("system"))]
    for key, title in (("memory_bytes", "Memory"), ("device_memory_bytes", "Device memory")):
        if given(machine.get(key)):
            found.append((title, size(machine[key])))
    return [(title, str(value)) for title, value in found if value not in (None, "")]

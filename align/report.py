"""The report of a run: one HTML page that needs nothing but itself.

Every number on it comes from the files of the run folder, found through `run.json`; a part whose files are not there
(the pipeline does not have it, the run failed before it) is left out, and a file that cannot be read is named. Imports
no torch.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path, PurePath

from align import svg
from align.run_files import Json, StageFiles, finite, given, gold_of, read_json, read_stage, series
from align.verdict import Gain, compared, figures, verdict
from align.words import duration, fixed, number, percent, signed, size
from data_prep.errors import UserError

SHOWN, WORSE_SHOWN, LONGEST_TEXT = 12, 4, 600
EXACT, PARITY = 1e-5, 1e-4  # tolerances of the checks at step 0 (PARITY relative to the largest score above 1)
SUPERVISED = (
    ("loss", "Loss", "", None),
    ("accuracy", "Pairs ordered rightly", "share", None),
)
REINFORCED = (
    ("objective/reward", "Reward", "score less KL penalty", None),
    ("objective/kl_k1", "KL from the parent", "nats per reply", None),
    ("response/eos_rate", "Replies that end", "share", None),
    ("objective/entropy", "Entropy", "nats per token", None),
    ("value/explained_var", "Variance the critic explains", "share", -1.0),
)
"""(key in metrics.jsonl, title, unit, floor below which values are drawn at the floor)"""


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run folder, from its files alone, and return its path.

    Raises:
        UserError: there is no readable run.json.
    """
    import jinja2

    folder, notes = Path(run_dir), list[str]()
    run = read_json(folder / "run.json", notes)
    if not run:
        raise UserError(notes[0] if notes else "no run.json here", code="no_run", file=str(folder))
    stages = [read_stage(folder, entry, notes) for entry in run.get("stages") or []]
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.ChainableUndefined)
    environment.filters.update(number=number, fixed=fixed, signed=signed, percent=percent, size=size, duration=duration)
    page = environment.get_template("report.html.jinja").render(
        run=run, **contents(run, stages), command=command(run), versions=run.get("versions") or {}, notes=notes
    )
    staging, path = folder / f".report.html.{os.getpid()}", folder / "report.html"
    staging.write_text(page, encoding="utf-8")
    os.replace(staging, path)
    return path


def contents(run: Json, stages: Sequence[StageFiles]) -> Json:
    """Everything the page shows, section by section, in its order."""
    measured = next((s for s in stages if s.result), StageFiles("", {}))
    gain = compared(measured)
    return {
        "verdict": verdict(run, stages, measured, gain),
        "figures": figures(stages, measured, gain),
        "chain": chain(stages),
        "curves": [(s.name, drawn) for s in stages if (drawn := curves(s))],
        "scores": scores(measured),
        "samples": samples(measured, gain),
        "judge": measured.result.get("reward_model") or {},
        "checks": [(s.name, listed) for s in stages if (listed := checks(s, stages))],
        "data": [(s.name, s.card, s.card.get("rows") or {}, s.card.get("splits") or {}) for s in stages if s.card],
        "costs": [s for s in stages if s.entry.get("seconds") is not None],
    }


def chain(stages: Sequence[StageFiles]) -> Json:
    """Rows of the chain from the base down, and the rail that joins them."""
    bases = [s.checkpoint["base"] for s in stages if s.checkpoint.get("base")]
    rows: list[Json] = [{"name": "base", "base": bases[0] if bases else {}, "id": ""}]
    if bases:
        name = str(bases[0].get("id", ""))
        rows[0]["id"] = PurePath(name).name if name.startswith("/") else name
    joins: list[tuple[str, svg.Edge]] = []
    at: dict[str, int] = {}
    for stage in stages:
        parents = stage.checkpoint.get("parents") or stage.entry.get("parents") or []
        for parent in parents:
            if parent["digest"] not in at:
                at[parent["digest"]] = len(rows)
                joins.append(("init", svg.Edge(0, len(rows))))
                rows.append({"name": parent.get("path", "from another run"), "outside": parent["digest"]})
        own = len(rows)
        if not any(parent["role"] == "init" for parent in parents):
            joins.append(("init", svg.Edge(0, own)))
        for parent in parents:
            joins.append((parent["role"], svg.Edge(at[parent["digest"]], own, dashed=parent["role"] != "init")))
        if stage.entry.get("digest"):
            at[stage.entry["digest"]] = own
        rows.append({"name": stage.name, "stage": stage, "method": _method(stage)})
    judges = {edge.above for role, edge in joins if role == "reward"}
    lanes = [int(row in judges) for row in range(len(rows))]
    hollow = ["stage" not in row or row["stage"].entry.get("status") != "done" for row in rows]
    return {"rows": rows, "rail": svg.rail(lanes, [edge for _, edge in joins], hollow), "judged": bool(judges)}


def _method(stage: StageFiles) -> str:
    """The adapter's method with its rank; nothing for a stage that trains nothing."""
    if not stage.entry.get("trainable") and not stage.checkpoint:
        return ""
    name = str(stage.checkpoint.get("method") or stage.entry.get("adapter") or "")
    rank = (stage.checkpoint.get("options") or {}).get("rank")
    return f"{name} r{rank}" if given(rank) else name


def curves(stage: StageFiles) -> list[Json]:
    """The stage's curves, supervised or reinforced (whose loss says little), as far as it logged them."""
    drawn = []
    reinforced = any(series(stage.rows, "objective/reward", split) for split in ("train", "eval"))
    for key, title, unit, floor in REINFORCED if reinforced else SUPERVISED:
        line, dots = (series(stage.rows, key, split) for split in ("train", "eval"))
        if not line and not dots:
            continue
        every = svg.thin(line)[1]
        remarks = [f"line: means of {every} steps"] if every > 1 else []
        if floor is not None and any(y < floor for _, y in (*line, *dots)):
            remarks.append(f"lower values drawn at {number(int(floor))}")
        final = (dots or line)[-1][1]
        drawing = svg.curve(line, dots, f"{title} of {stage.name} over its steps, {number(final)} at the end", floor)
        drawn.append({"title": title, "unit": unit, "final": final, "drawing": drawing, "remark": "; ".join(remarks)})
    return drawn


def scores(measured: StageFiles) -> Json:
    """What the evaluation gives each stage; `parts` are the gold rule's own parts."""
    named = measured.result.get("stages") or {}
    parts = [key for row in named.values() for key in row.get("gold") or {} if key not in ("score", "n", "se")]
    return {"stages": named, "parts": list(dict.fromkeys(parts))}


def samples(measured: StageFiles, gain: Gain | None) -> Json:
    """Prompts spread evenly over all, with every stage's reply; and where the last stage does worse than its baseline.

    Data sets are often ordered by topic, so that the first dozen would show one topic alone.
    """
    rows = [_sample(row) for row in measured.samples]

    def drop(row: Json) -> float:
        """How much worse, by gold if there is gold, else by reward."""
        replies = {reply["stage"]: reply for reply in row["replies"]}
        pair = [replies.get(name) for name in (gain.last, gain.base)] if gain else [None, None]
        if pair[0] is None or pair[1] is None:
            return 0.0
        key = "gold" if pair[0]["gold"] is not None and pair[1]["gold"] is not None else "reward"
        after, before = pair[0][key], pair[1][key]
        return float(before - after) if after is not None and before is not None else 0.0

    worse = sorted((row for row in rows if drop(row) > 0), key=drop, reverse=True)
    spread = [rows[i * len(rows) // SHOWN] for i in range(SHOWN)] if len(rows) > SHOWN else rows
    unseen = [row for row in worse if row not in spread][:WORSE_SHOWN]
    return {"spread": spread, "worse": unseen, "worse_count": len(worse), "count": len(rows), "gain": gain}


def _sample(row: Json) -> Json:
    replies = []
    for name, reply in row["replies"].items():
        text = str(reply.get("text", ""))
        replies.append(
            {
                "stage": name,
                "text": text[:LONGEST_TEXT],
                "cut": max(0, len(text) - LONGEST_TEXT),
                "reward": finite(reply.get("reward")),
                "gold": gold_of(reply.get("gold")),
                "finished": reply.get("finished", True),
            }
        )
    return {"prompt": str(row.get("prompt", ""))[:LONGEST_TEXT], "replies": replies}


def checks(stage: StageFiles, stages: Sequence[StageFiles]) -> list[Json]:
    """What was checked before a policy's first update and after its last: passed, failed, or None: only noted.

    Ratios and scores are exact in fp32 alone; at another precision a gap is noted and does not fail.
    """
    step0 = stage.metrics.get("step0") or {}
    probes = [abs(x) for s in stages for x in s.metrics.get("probe_scores") or []]
    exact = stage.entry.get("load") == "fp32" and stage.recipe.get("autocast") != "bf16"
    exact = exact and not stage.checkpoint.get("forced")
    found: list[Json] = []

    def add(key: str, text: str, limit: float, strict: bool) -> None:
        if given(step0.get(key)):
            ok = True if step0[key] <= limit else False if strict else None
            found.append({"ok": ok, "text": text, "detail": f"{number(step0[key])}, at most {number(limit)}"})

    add("kl", "The policy starts as its parent: no KL before the first update", EXACT, True)
    add("ratio_dev", "The first minibatch's ratios are 1", EXACT, exact)
    add("reward_parity", "The reward model scores here as in its own evaluation", PARITY * max([1.0, *probes]), exact)
    if step0.get("grad_roles") is not None:
        roles = sorted(step0["grad_roles"])
        found.append(
            {
                "ok": roles == ["policy", "value"],
                "text": "Only policy and value are trained",
                "detail": ", ".join(roles),
            }
        )
    if stage.metrics.get("reference_unchanged") is not None:
        text = "Reference and reward model end with the bytes they started with"
        found.append({"ok": bool(stage.metrics["reference_unchanged"]), "text": text, "detail": ""})
    return found


def command(run: Json) -> str:
    """The command line that makes this run again."""
    words = run.get("command") or []
    return words if isinstance(words, str) else shlex.join(map(str, words))

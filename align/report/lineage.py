"""The chain of a report: what every stage stands on, from the base down. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from align.report.charts import Edge, rail
from align.report.formatting import number, percent
from align.report.run_files import Json, StageFiles, finite, given, mapping


def chain(stages: Sequence[StageFiles], waiting: Sequence[str], model: Json) -> Json:
    """Rows of the chain and the rail that joins them.

    `waiting` are stages that have not begun, `model` is the recipe's: it names a base that no checkpoint names.
    """
    bases = [base for s in stages if (base := mapping(s.checkpoint.get("base")))]
    rows: list[Json] = [_base_row(bases[0] if bases else {"id": model.get("path") or model.get("name") or ""})]
    joins: list[tuple[str, Edge]] = []
    at: dict[str, int] = {}
    named: dict[str, str] = {}
    for stage in stages:
        parents = _parents(stage)
        for parent in parents:
            if parent["digest"] not in at:
                at[parent["digest"]] = len(rows)
                parent["path"] = parent.get("path") or stage.recipe.get(parent["role"]) or "from another run"
                named[parent["digest"]] = PurePath(str(parent["path"])).name
                joins.append(("init", Edge(0, len(rows))))
                rows.append(_outside_row(parent))
        own = len(rows)
        if stage.status == "done" and not any(parent["role"] == "init" for parent in parents):
            joins.append(("init", Edge(0, own)))
        for parent in parents:
            joins.append((parent["role"], Edge(at[parent["digest"]], own, dashed=parent["role"] != "init")))
        if stage.entry.get("digest"):
            at[str(stage.entry["digest"])], named[str(stage.entry["digest"])] = own, stage.name
        rows.append(_stage_row(stage, [(parent["role"], named[parent["digest"]]) for parent in parents]))
    rows += [{"name": name, "status": "not begun", "lines": []} for name in waiting]
    judges = {edge.above for role, edge in joins if role == "reward"}
    lanes = [int(row in judges) for row in range(len(rows))]
    hollow = [row.get("status") != "done" for row in rows]
    return {"rows": rows, "rail": rail(lanes, [edge for _, edge in joins], hollow), "judged": bool(judges)}


def _parents(stage: StageFiles) -> list[Json]:
    """What a stage stands on or was judged by, each with role and digest."""
    listed = stage.checkpoint.get("parents") or stage.entry.get("parents") or []
    found = [dict(mapping(parent)) for parent in listed if isinstance(listed, list)]
    return [parent for parent in found if parent.get("role") and isinstance(parent.get("digest"), str)]


def _base_row(base: Json) -> Json:
    name = str(base.get("id", "")) or "not named in this run"
    shown = PurePath(name).name if name.startswith("/") else name
    revision = f" at {str(base['revision'])[:12]}" if base.get("revision") else ""
    lines = [f"{shown}{revision}"]
    return {"name": "base", "status": "outside", "digest": base.get("fingerprint") or "", "lines": lines}


def _outside_row(parent: Json) -> Json:
    place = "/".join(PurePath(str(parent["path"])).parts[-2:])
    return {"name": place, "status": "outside", "digest": parent["digest"], "lines": ["a checkpoint of another run"]}


def _stage_row(stage: StageFiles, parents: Sequence[tuple[str, str]]) -> Json:
    entry, lines = stage.entry, list[str]()
    method = method_of(stage)
    if method:
        mode, below = entry.get("on_parent"), [name for role, name in parents if role == "init"]
        stands = f"{MODES.get(str(mode), f'{mode}s')} {below[0]}" if mode and below else ""
        lines.append(" · ".join(word for word in (method, str(entry.get("load") or ""), stands) if word))
    elif stage.status == "done":
        lines.append("no weights of its own")
    judges, asked = ([name for role, name in parents if role == wanted] for wanted in ("reward", "policy"))
    trained, total = finite(entry.get("trainable")), finite(entry.get("total"))
    if trained and total:
        lines.append(f"trains {number(int(trained))} of {number(int(total))} ({percent(trained / total)})")
    words = [f"judged by {', '.join(judges)}"] if judges else []
    words += [f"learns from replies of {', '.join(asked)}"] if asked else []
    words += ["on a merged base of its own"] if stage.checkpoint.get("derived_base") else []
    lines += [" · ".join(words)] if words else []
    return {
        "name": stage.name,
        "status": stage.status,
        "digest": str(entry.get("digest") or ""),
        "reused": bool(entry.get("skipped")),
        "lines": lines,
    }


MODES = {"continue": "continues", "stack": "stacked on", "merge": "merged with"}
"""How a stage stands on its parent (`on_parent`), in words."""


def method_of(stage: StageFiles) -> str:
    """The adapter's method with its rank; nothing for a stage that trains nothing."""
    if not stage.entry.get("trainable") and not stage.checkpoint:
        return ""
    name = str(stage.checkpoint.get("method") or stage.entry.get("adapter") or "")
    rank = mapping(stage.checkpoint.get("options")).get("rank")
    return f"{name} r{rank}" if given(rank) else name

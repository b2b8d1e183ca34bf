"""The guards of a report: what the run checked itself, and what its files still say. Imports no torch.

The first are read from `run.json` (PPO's equal start, exact ratios, frozen roles). The second are made again for the
report: bytes against recorded hashes, records against `run.json`, parents against each other, rows counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from align.report.formatting import number, plural, size
from align.report.run_files import Json, StageFiles, finite, given, mapping
from data_prep.core.hashing import file_sha256

EXACT, PARITY, GAP = 1e-5, 1e-4, 1e-3
"""Tolerances at step 0 (PARITY relative to the largest score above 1)."""
MOST_HASHED = 2**29
"""Bytes of a stage that a report reads again; a larger stage is left to `align verify`."""

INTEGRITY = (
    ("probe", "Saved weights give the outputs of what was trained"),
    ("files", "Files have the bytes that were saved"),
    ("record", "run.json names this very checkpoint"),
    ("parents", "Parents are those it was trained on"),
    ("rows", "Every row of data is kept or counted as dropped"),
)


def integrity(stages: Sequence[StageFiles]) -> Json:
    """A matrix of checks by stages: {names, rows: [(text, [(ok, detail) or None])]}; ok None: could not be told."""
    known = {str(s.entry["digest"]) for s in stages if s.entry.get("digest")}
    columns = [(s.name, _of_stage(s, known)) for s in stages]
    columns = [(name, found) for name, found in columns if found]
    rows = [(text, [found.get(key) for _, found in columns]) for key, text in INTEGRITY]
    return {"names": [name for name, _ in columns], "rows": [row for row in rows if any(row[1])]}


def _of_stage(stage: StageFiles, known: set[str]) -> dict[str, tuple[bool | None, str]]:
    found: dict[str, tuple[bool | None, str]] = {}
    record = stage.checkpoint
    if stage.status == "done" and record:
        probe = mapping(record.get("probe")).get("expected")
        if isinstance(probe, list) and probe:  # a stage whose outputs differ is never published
            found["probe"] = True, plural(sum(len(row) for row in probe if isinstance(row, list)), "output")
        found["files"] = _hashed(stage.folder, mapping(record.get("files")))
    own = stage.folder / ("checkpoint.json" if record else "result.json")
    if stage.entry.get("digest") and own.is_file():
        digest = file_sha256(own)
        found["record"] = digest == stage.entry["digest"], digest[:8]
    parents = [mapping(parent).get("digest") for parent in stage.entry.get("parents") or []]
    if parents:
        outside = [digest for digest in parents if digest not in known]
        found["parents"] = (None, f"{len(outside)} of another run") if outside else (True, str(len(parents)))
    rows = mapping(stage.card.get("rows"))
    if given(rows.get("in")) and given(rows.get("kept")):
        dropped = sum(finite(count) or 0 for count in mapping(rows.get("dropped")).values())
        found["rows"] = rows["in"] == rows["kept"] + dropped, f"{number(rows['in'])} in"
    return found


def _hashed(folder: Path, files: Json) -> tuple[bool | None, str]:
    """Whether the files of a checkpoint have the bytes they were saved with."""
    paths = {folder / name: digest for name, digest in files.items()}
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        return False, f"{missing[0]} is missing"
    total = sum(path.stat().st_size for path in paths)
    if total > MOST_HASHED:
        return None, f"{size(total)} not read again"
    changed = [path.name for path, digest in paths.items() if file_sha256(path) != digest]
    return (False, f"{changed[0]} changed") if changed else (True, plural(len(paths), "file"))


def checks(stage: StageFiles, stages: Sequence[StageFiles]) -> list[Json]:
    """What was checked before a policy's first update and after its last: passed, failed, or None: only noted.

    Ratios and scores are exact in fp32 alone; at another precision a gap is noted and does not fail.
    """
    step0 = mapping(stage.metrics.get("step0"))
    probes = [abs(x) for s in stages for x in s.metrics.get("probe_scores") or [] if given(x)]
    in_float32 = stage.entry.get("load") == "fp32" and stage.recipe.get("autocast") != "bf16"
    limit = step0.get("ratio_at_most", EXACT if in_float32 else None)
    exact = limit is not None and not stage.checkpoint.get("forced")
    found: list[Json] = []

    def add(key: str, text: str, limit: float, strict: bool) -> None:
        if given(step0.get(key)):
            ok = True if step0[key] <= limit else False if strict else None
            noted = " in fp32; only noted at this precision" if ok is None else ""
            found.append({"ok": ok, "text": text, "detail": f"{number(step0[key])}, at most {number(limit)}{noted}"})

    add("kl", "The policy starts as its parent: no KL before the first update", EXACT, True)
    add("ratio_dev", "The first minibatch's ratios are 1", EXACT if limit is None else limit, exact)
    add("reward_parity", "The reward model scores here as in its own evaluation", PARITY * max([1.0, *probes]), exact)
    add("rollout_gap", "Sampled log-probabilities are those that are trained", GAP, exact)
    if isinstance(step0.get("grad_roles"), list):
        roles = sorted(map(str, step0["grad_roles"]))
        trained = ["policy", "value"] if "value/loss" in stage.metrics else ["policy"]
        text = f"Gradients reach {' and '.join(trained)}, and nothing else"
        found.append({"ok": roles == trained, "text": text, "detail": ", ".join(roles)})
    if stage.metrics.get("reference_unchanged") is not None:
        text = "The reference ends with the bytes it started with"
        if "reward_parity" in step0:
            text = "Reference and reward model end with the bytes they started with"
        found.append({"ok": bool(stage.metrics["reference_unchanged"]), "text": text, "detail": ""})
    bases = finite(mapping(stage.metrics.get("memory")).get("bases"))
    if bases is not None:
        text = "One set of base weights is in memory for all roles"
        more = "; merged and fully tuned weights are sets of their own" if bases > 1 else ""
        found.append({"ok": True if bases == 1 else None, "text": text, "detail": plural(int(bases), "set") + more})
    return found


def tally(matrix: Json, listed: Sequence[tuple[str, list[Json]]]) -> Json:
    """How many checks there are: {passed, failed, noted}."""
    marks = [cell[0] for _, cells in matrix["rows"] for cell in cells if cell]
    marks += [check["ok"] for _, found in listed for check in found]
    return {"passed": marks.count(True), "failed": marks.count(False), "noted": marks.count(None)}

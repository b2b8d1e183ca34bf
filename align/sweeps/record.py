"""What a sweep is known by: sweep.json with a row for each job, and the same rows as table.txt, table.csv, report.html.

All of it is made again, whenever a job ends, from the plan in sweep.json and from what the jobs left on disk; so it is
right after a kill as well, and jobs in other processes need to tell nobody. Imports no torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.report.run_files import Json, finite, gold_of, read_json
from align.run_record import RunRecord
from align.runs.folder import locked
from align.sweeps.comparison import tuned
from align.sweeps.table import as_csv, as_text
from data_prep.core.errors import UserError
from data_prep.core.files import write_json, write_text

FORMAT_VERSION = 1
DONE, FAILED, STOPPED, RUNNING, PENDING = "done", "failed", "stopped", "running", "pending"


def begin(
    folder: Path, jobs: Sequence[Sequence[str]], shared: Sequence[Json], command: Sequence[str], config_dir: str | None
) -> None:
    """Write down what is going to be run, and forget how jobs ended that are to be run again."""
    record = {
        "format_version": FORMAT_VERSION,
        "name": folder.name,
        "dir": str(folder),
        "status": RUNNING,
        "command": list(command),
        "config_dir": str(Path(config_dir).absolute()) if config_dir else None,
        "jobs": [{"number": number, "overrides": list(words)} for number, words in enumerate(jobs)],
        "shared": [dict(each) for each in shared],
        "rows": [],
    }
    for path in (folder / "jobs").glob("*.json"):
        held = read_json(path, [])
        if held.get("status") != DONE or (jobs and held.get("overrides") not in [list(words) for words in jobs]):
            path.unlink()
    write_json(folder / "sweep.json", record)
    bring_up_to_date(folder)


def read_sweep(folder: Path) -> Json:
    """The content of sweep.json.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    notes: list[str] = []
    record = read_json(folder / "sweep.json", notes)
    if not record:
        raise UserError(notes[0] if notes else "no sweep.json here", code="no_sweep", file=str(folder))
    return record


def finish(folder: Path, interrupted: bool) -> None:
    """No job runs any more: say how the sweep ended, and print the table."""
    notes: list[str] = []
    with locked(folder, ".lock-record", waiting=""):
        record = read_sweep(folder)
        for path in (folder / "jobs").glob("*.json"):
            held = read_json(path, notes)
            if held.get("status") == RUNNING:
                write_json(path, {**held, "status": STOPPED})
        done = all(job["status"] == DONE for job in _jobs(folder, record))
        failed = any(job["status"] == FAILED for job in _jobs(folder, record))
        record["status"] = STOPPED if interrupted and not failed else DONE if done and record["jobs"] else FAILED
        write_json(folder / "sweep.json", record)
    _, record = bring_up_to_date(folder)
    if any(row["status"] != PENDING for row in record["rows"]):
        print(as_text(record, _width(), tuned(record["rows"])))
        print(f"\ntable: {folder / 'table.csv'}\nreport: {folder / 'report.html'}")


def bring_up_to_date(folder: Path) -> tuple[int, Json]:
    """Make sweep.json, the tables and the report say what is on disk; returns (exit code of the sweep, sweep.json)."""
    with locked(folder, ".lock-record", waiting=""):
        record = read_sweep(folder)
        record["jobs"] = _jobs(folder, record)
        record["shared"] = [{**each, **_trained(folder, each, record["jobs"])} for each in record["shared"]]
        record["rows"] = [row_of(folder, job) for job in record["jobs"]]
        for row, varied in zip(record["rows"], varied_of(record["jobs"]), strict=True):
            row["varied"] = varied
        if os.environ.get("RANK", "0") == "0":
            write_json(folder / "sweep.json", record)
            write_text(folder / "table.txt", as_text(record, best=tuned(record["rows"])) + "\n")
            write_text(folder / "table.csv", as_csv(record))
            _report(folder)
    codes = [int(job["exit_code"]) for job in record["jobs"] if job.get("exit_code")]
    return (codes[0] if codes else 0 if record["status"] in (DONE, RUNNING) else 1), record


def _report(folder: Path) -> None:
    """What is trained stays, whatever goes wrong here."""
    from align.sweeps.page import write_sweep_report

    try:
        write_sweep_report(folder)
    except Exception as problem:
        print(f"report.html was not written ({type(problem).__name__}: {problem})", file=sys.stderr)


def _jobs(folder: Path, record: Json) -> list[Json]:
    """How each job stands: as it wrote down itself, else pending."""
    notes: list[str] = []
    found = {int(path.stem): read_json(path, notes) for path in (folder / "jobs").glob("*.json")}
    planned = {job["number"]: job for job in record["jobs"]}
    jobs = []
    for number in sorted(planned or found):
        pending = {**planned.get(number, {}), "dir": f"jobs/{number}", "status": PENDING}
        own = found.get(number, {})
        jobs.append(own if own.get("overrides", 0) == pending.get("overrides", own.get("overrides")) else pending)
    for job in jobs:
        for left in ("exit_code", "error") if job["status"] == PENDING else ():
            job.pop(left, None)
    return jobs


def _trained(folder: Path, shared: Json, jobs: Sequence[Json]) -> Json:
    """Where a stage in common was trained and how long that took, once it is there."""
    kept_in = RunRecord.left_in(folder / "shared")
    entries = {entry.dir: entry for entry in kept_in.finished()}
    for number in shared["used_by"]:
        for entry in _entries(folder / "jobs" / str(number)):
            kept = entries.get(Path(str(entry["dir"])).name)
            if entry["name"] == shared["stage"] and kept and kept.digest == entry.get("digest"):
                return {
                    "dir": f"shared/{kept.dir}",
                    "digest": kept.digest,
                    "seconds": kept.seconds,
                    "adapter": kept.adapter,
                }
    return {"dir": None, "digest": None, "seconds": None, "adapter": None}


def _entries(run: Path) -> list[Json]:
    return [entry.as_dict() for entry in RunRecord.left_in(run).stages]


def varied_of(jobs: Sequence[Json]) -> list[Json]:
    """For each job, the overrides that are not the same in all: key -> value, numbers as numbers."""
    words = [[word.lstrip("+") for word in job.get("overrides", []) if "=" in word] for job in jobs]
    settings = [dict(word.split("=", 1) for word in each) for each in words]
    keys = dict.fromkeys(key for each in settings for key in each)
    varied = [key for key in keys if len({each.get(key) for each in settings}) > 1]
    return [{key: _value(each[key]) for key in varied if key in each} for each in settings]


def _value(text: str) -> Any:
    """A number where it is one."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def row_of(folder: Path, job: Json) -> Json:
    """One job's line of the table: its metrics, trainable parameters, bytes, peak memory, speed and seconds.

    `seconds` counts the job's own stages, `shared_seconds` those it has in common with other jobs. Parameters, bytes of
    weights on disk and tokens per second of training (evaluations included) are those of the last stage that trained.
    """
    run = folder / str(job["dir"])
    entries = [entry for entry in _entries(run) if entry.get("digest")]
    trained = [entry for entry in entries if entry.get("trainable")]
    last = trained[-1] if trained else {}
    times: dict[bool, float] = {True: 0.0, False: 0.0}
    for entry in entries:
        times[str(entry["dir"]).startswith("..")] += finite(entry.get("seconds")) or 0.0
    peaks = [entry["peak_rss_bytes"] for entry in entries if entry.get("peak_rss_bytes")]
    share = last["trainable"] / last["total"] if last.get("total") else None
    return {
        "job": job["number"],
        "status": job["status"],
        "error": (job.get("error") or {}).get("message"),
        "metrics": metrics_of(run, entries),
        "trainable": last.get("trainable"),
        "total": last.get("total"),
        "share": share,
        "weights_bytes": _weights_bytes(run / str(last["dir"])) if last else None,
        "tokens_per_second": _speed(last),
        "peak_rss_bytes": max(peaks, default=None),
        "seconds": round(times[False], 3) if entries else None,
        "shared_seconds": round(times[True], 3) if entries else None,
        "every": {
            f"{entry['name']}.{key}": value
            for entry in entries
            for key, value in (entry.get("metrics") or {}).items()
            if finite(value) is not None
        },
    }


def _weights_bytes(stage: Path) -> int | None:
    """Size of what a stage trained, as it is saved."""
    sizes = [path.stat().st_size for path in stage.glob("*.safetensors")]
    return sum(sizes) if sizes else None


def _speed(entry: Json) -> float | None:
    """Tokens that the model saw in training per second of the training phase; None where nobody counted them."""
    tokens, seconds = finite(entry.get("tokens")), finite((entry.get("phases") or {}).get("train"))
    return round(tokens / seconds, 1) if tokens and seconds else None


def metrics_of(run: Path, entries: Sequence[Json]) -> Json:
    """The numbers that jobs are compared by, as far as there are any: of the evaluation, else of the stages."""
    found: Json = {}
    for entry in entries:
        own = entry.get("metrics") or {}
        for key, name in (("accuracy", "accuracy"), ("objective/kl_k1", "kl"), ("eval_loss", "eval_loss")):
            if (value := finite(own.get(key))) is not None:
                found[name] = value
                if name == "accuracy":
                    found.pop("accuracy_n", None)
                    found |= {"accuracy_n": own["n"]} if finite(own.get("n")) and "low" in own else {}
        result = read_json(run / str(entry["dir"]) / "result.json", [])
        named = result.get("stages") or {}
        if named:
            found.update(_evaluated(list(named.values())[-1], result))
        if (value := finite(result.get("suggestion"))) is not None:
            found["suggested_lr"] = value
    return found


def _evaluated(last: Json, result: Json) -> Json:
    """The numbers of an evaluation's last stage."""
    wins, gain = result.get("win_rate") or {}, result.get("gain") or {}
    numbers = {
        "gold": gold_of(last.get("gold")),
        "gold_se": finite((last.get("gold") or {}).get("se")),
        "gold_n": finite((last.get("gold") or {}).get("n")),
        "gain": finite(gain.get("gold")),
        "gain_se": finite(gain.get("se")),
        "win_rate": finite(wins.get("value")),
        "win_rate_n": finite(wins.get("n")),
        "reward": finite(last.get("reward")),
        "eval_loss": finite(last.get("loss")),
    }
    return {key: value for key, value in numbers.items() if value is not None}


def _width() -> int | None:
    """Columns of the terminal; None where the output is no terminal."""
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns
    except (OSError, ValueError):
        return None

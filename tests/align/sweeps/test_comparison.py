"""A recipe that is a sweep: its own lists of values, what replaces them, and each setting at its best learning rate."""

from __future__ import annotations

import json

import pytest

from align.config.compose import compose
from align.config.registries import adapters
from align.sweeps.comparison import tuned
from align.sweeps.page import charts
from align.sweeps.record import row_of
from align.sweeps.sweep import plan_of
from align.sweeps.table import as_text
from data_prep.core.errors import UserError
from tests.tiny_chain import base, data_words, read, refused, run

RATES = ["10", "30", "100"]


def jobs_of(capfd, tmp_path, *words: str) -> list[dict[str, str]]:
    """The overrides of the jobs that a sweep would run; nothing is run."""
    import align.sweeps.sweep as sweep

    found: list[list[str]] = []

    def planned(words, config_dir):
        plan = plan_of(words, config_dir)
        found.extend(plan.jobs)
        raise UserError("planned", code="planned")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "plan_of", planned)
        assert "planned" in refused(*run(capfd, "-m", *words, f"out={tmp_path}"))
    return [dict(word.split("=", 1) for word in job) for job in found]


def test_the_recipe_compares_every_method_at_three_rates(capfd, tmp_path):
    """Those that read no features: its rows have none."""
    jobs = jobs_of(capfd, tmp_path, "experiment=method_comparison")
    methods = [name for name, cls in adapters.items() if not cls.traits.reads_features]
    assert {(job["adapter"], job["model.lr_scale"]) for job in jobs} == {(m, r) for m in methods for r in RATES}
    assert len(jobs) == 3 * len(methods)


def test_lists_on_the_command_line_replace_those_of_the_recipe(capfd, tmp_path):
    jobs = jobs_of(capfd, tmp_path, "experiment=method_comparison", "adapter=vera", "seed=0,1")
    assert {(job["adapter"], job["seed"], job["model.lr_scale"]) for job in jobs} == {
        ("vera", seed, rate) for seed in "01" for rate in RATES
    }


def test_without_m_it_is_refused_and_a_user_s_recipe_may_do_the_same(capfd, tmp_path):
    line = refused(*run(capfd, "experiment=method_comparison"))
    assert "a sweep over adapter and model.lr_scale" in line and "add -m" in line
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nhydra:\n  sweeper:\n    params:\n      seed: 4,5\n", encoding="utf-8"
    )
    assert compose(["experiment=mine"], str(tmp_path)).swept == {"seed": "4,5"}


def test_a_comparison_runs_and_ends_in_one_row_for_each_method(capfd, tmp_path):
    words = ["experiment=method_comparison", "adapter=lora,prompt", "model.lr_scale=1,2", "model=hf"]
    words += [f"model.path={base()}", *data_words(), "stages.sft.max_steps=2", "stages.sft.eval_every=2"]
    code, err = run(capfd, "-m", *words, f"out={tmp_path}", "name=both")
    assert code == 0, err
    record = read(tmp_path / "both" / "sweep.json")
    assert len(record["rows"]) == 4
    best = tuned(record["rows"])
    assert sorted(row["varied"]["adapter"] for row in best) == ["lora", "prompt"]
    for row in best:
        rivals = [other for other in record["rows"] if other["varied"]["adapter"] == row["varied"]["adapter"]]
        assert row["metrics"]["eval_loss"] == min(other["metrics"]["eval_loss"] for other in rivals)
    text = (tmp_path / "both" / "table.txt").read_text(encoding="utf-8")
    assert "each at its best learning rate:" in text and "tokens/s" in text and "saved" in text


def test_a_row_counts_tokens_bytes_and_seconds_from_the_files(capfd, tmp_path):
    words = ["pipeline=sft", "model=hf", f"model.path={base()}", *data_words(), "stages.sft.max_steps=2"]
    assert run(capfd, *words, f"out={tmp_path}", "name=jobs")[0] == 0
    folder = tmp_path / "jobs"
    row = row_of(tmp_path, {"number": 0, "dir": "jobs", "status": "done"})
    rows = [row for row in map(json.loads, (folder / "sft" / "metrics.jsonl").open()) if "tokens" in row]
    entry = read(folder / "run.json")["stages"][0]
    assert [row["split"] for row in rows] == ["train", "train"] and all(row["tokens"] > 0 for row in rows)
    assert entry["tokens"] == sum(row["tokens"] for row in rows)
    assert row["tokens_per_second"] == pytest.approx(entry["tokens"] / entry["phases"]["train"], rel=0.01)
    assert row["weights_bytes"] == (folder / "sft" / "adapter_model.safetensors").stat().st_size


def made(job: int, loss: float | None, **varied) -> dict:
    numbers = {"trainable": 10 * (job + 1), "total": 100, "share": 0.1, "peak_rss_bytes": 2**20, "seconds": 1.0}
    numbers |= {"weights_bytes": 40, "tokens_per_second": None, "shared_seconds": 0.0, "every": {}}
    metrics = {} if loss is None else {"eval_loss": loss}
    return {"job": job, "status": "done", "error": None, "metrics": metrics, "varied": varied, **numbers}


def test_the_best_rate_of_each_setting_best_setting_first():
    losses = {("lora", 1e-3): 0.5, ("lora", 1e-2): 0.4, ("vera", 1e-3): 0.3, ("vera", 1e-2): 0.9, ("ia3", 1e-3): None}
    rows = [made(i, loss, **{"adapter": a, "stages.sft.lr": lr}) for i, ((a, lr), loss) in enumerate(losses.items())]
    assert [(row["varied"]["adapter"], row["metrics"]["eval_loss"]) for row in tuned(rows)] == [
        ("vera", 0.3),
        ("lora", 0.4),
    ]
    text = as_text({"rows": rows, "shared": []}, best=tuned(rows))
    assert text.index("best learning rate:") < text.rindex("vera") < text.rindex("lora")
    assert [chart["title"] for chart in charts(rows)][:2] == [
        "eval loss by setting, each at its best learning rate",
        "eval loss over trainable parameters, each at its best learning rate",
    ]


def test_a_sweep_over_rates_alone_has_no_second_table():
    rows = [made(i, loss, **{"stages.sft.lr": lr}) for i, (lr, loss) in enumerate([(1e-3, 0.5), (1e-2, 0.4)])]
    assert tuned(rows) == [] and "best learning rate:" not in as_text({"rows": rows, "shared": []}, best=tuned(rows))

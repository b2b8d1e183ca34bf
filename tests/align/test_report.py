"""The report of a run folder, made of the files that the contract names."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from align.report import write_report
from data_prep.errors import UserError
from tests.run_folder import DIGESTS, REPLIES, fake_run, write


def page(run: Path) -> str:
    path = write_report(run)
    assert path == run / "report.html"
    return path.read_text(encoding="utf-8")


def change(run: Path, **more: Any) -> None:
    record = json.loads((run / "run.json").read_text())
    write(run / "run.json", {**record, **more})


def test_shows_the_numbers_given(tmp_path: Path) -> None:
    html = page(fake_run(tmp_path))
    for text in (
        "Gold reward rose from 0.42 to 0.81.",
        "On 256 held-out prompts, ppo changed it by +0.39 over sft",
        "interval +0.33 to +0.45",
        "At the end ppo stood 6.31 nats of KL per reply from its parent.",
        "83.2\u202f%",
        "76.5\u202f%",
        "0.041",
        "0.118",
        "went from 0.12 to 1.44",
        "trains 82,432 of 1,420,032 (5.8\u202f%)",
        "lora r16 · fp32 · continues parent",
        "31 duplicate prompt",
        "3 min 35 s",
        "1.16 GiB",
        "align run pipeline=rlhf model=nano data=smalltalk adapter=lora stages.ppo.updates=40",
        "torch&nbsp;2.13.0",
        "0c0ffee0",
        *(digest[:8] for digest in DIGESTS.values()),
    ):
        assert text in html, text


def test_one_small_page_that_loads_nothing(tmp_path: Path) -> None:
    html = page(fake_run(tmp_path))
    assert len(html.encode()) < 200_000
    assert not re.search(r"https?:|//[a-z]|src=|href=|url\(|@import|<script", html)


def test_sections_stand_in_order(tmp_path: Path) -> None:
    headings = re.findall(r"<h2>([^<]+)", page(fake_run(tmp_path)))
    assert headings == [
        *("Chain", "Curves", "Scores", "Replies", "Where it got worse", "Reward model"),
        *("Checks", "Data", "Time and memory", "Again"),
    ]


def test_a_huge_run_stays_below_a_megabyte(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    rows = [{"stage": "sft", "step": i, "split": "train", "loss": 1 / (i + 1)} for i in range(50_000)]
    write(run / "sft" / "metrics.jsonl", rows)
    reply = {name: {"text": "word " * 20_000, "reward": 1.0, "gold": 1.0, "finished": True} for name in REPLIES}
    write(run / "evaluate" / "samples.jsonl", [{"prompt": "p " * 5000, "id": "x", "replies": reply}] * 100)
    html = page(run)
    assert len(html.encode()) < 1_000_000
    assert "and 99,400 more characters" in html
    assert "line: means of 167 steps" in html


def test_replies_are_escaped(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    reply = {"text": "<script>alert(1)</script> & <b>bold</b>", "reward": 0.5, "gold": None, "finished": True}
    write(run / "evaluate" / "samples.jsonl", [{"prompt": "<img onerror=x>", "id": "x", "replies": {"ppo": reply}}])
    change(run, name="<i>name</i>", command=["align", "run", "name=<u>"])
    html = page(run)
    assert (
        "<script" not in html
        and "<img" not in html
        and "<b>bold" not in html
        and "<i>" not in html
        and "<u>" not in html
    )
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &lt;b&gt;bold" in html


def test_worse_replies_are_shown_and_counted(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    rows = []
    for i in range(20):
        worse = i in (3, 15, 17)
        replies = {"sft": {"text": "s", "gold": 1.0}, "ppo": {"text": f"reply {i}.", "gold": 0.0 if worse else 1.0}}
        rows.append({"prompt": f"Question {i}?", "id": str(i), "replies": replies})
    write(run / "evaluate" / "samples.jsonl", rows)
    html = page(run)
    assert "ppo does worse than sft on 3 of 20 prompts; 1 of those not shown above." in html
    assert re.findall(r"Question (\d+)\?", html) == [str(i * 20 // 12) for i in range(12)] + ["17"]


def test_failed_checks_say_so(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    stages = json.loads((run / "run.json").read_text())["stages"]
    stages[2]["metrics"]["step0"] = {"kl": 0.5, "ratio_dev": 1e-3, "reward_parity": 1e-4, "grad_roles": ["policy"]}
    change(run, stages=stages)
    assert page(run).count(">failed<") == 3
    stages[2]["load"] = "nf4"
    change(run, stages=stages)
    html = page(run)
    assert html.count(">failed<") == 2
    assert "noted at this precision" in html


@pytest.mark.parametrize(
    ("gain", "se", "expected"),
    [
        ((0.42, 0.44), 0.03, "Gold reward shows no clear change: 0.42, then 0.44."),
        ((0.42, 0.22), 0.03, "Gold reward fell from 0.42 to 0.22."),
        ((0.42, 0.92), 0.03, "Gold reward rose from 0.42 to 0.92."),
    ],
)
def test_the_verdict_follows_the_interval(tmp_path: Path, gain: tuple[float, float], se: float, expected: str) -> None:
    run = fake_run(tmp_path)
    stages = {
        name: {"reward": score, "gold": {"score": score, "n": 100, "se": se}}
        for name, score in zip(("sft", "ppo"), gain, strict=True)
    }
    write(run / "evaluate" / "result.json", {"stages": stages})
    html = page(run)
    assert expected in html
    assert ("no clear gain in gold" in html) == ("no clear change" in expected)


def test_without_gold_the_win_rate_leads(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    result = json.loads((run / "evaluate" / "result.json").read_text())
    for stage in result["stages"].values():
        stage["gold"] = None
    write(run / "evaluate" / "result.json", {**result, "gain": None})
    assert "<h1>ppo wins 83.2\u202f% of comparisons with sft" in page(run)


def test_sft_alone(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    record = json.loads((run / "run.json").read_text())
    change(run, pipeline="sft", stages=record["stages"][:1])
    html = page(run)
    assert re.search(r"<h1>Held-out loss went from 1\.\d+ to 1\.\d+\.</h1>", html)
    assert "Replies" not in re.findall(r"<h2>([^<]+)", html)


def test_a_reward_model_alone(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    record = json.loads((run / "run.json").read_text())
    change(run, stages=record["stages"][1:2])
    html = page(run)
    assert "The reward model orders 76.5\u202f% of held-out pairs rightly." in html
    assert "a checkpoint of another run" in html


@pytest.mark.parametrize("status", ["running", "failed", "stopped", "anything"])
@pytest.mark.parametrize("count", [0, 1, 4])
def test_every_status_renders(tmp_path: Path, status: str, count: int) -> None:
    run = fake_run(tmp_path)
    record = json.loads((run / "run.json").read_text())
    change(run, status=status, stages=record["stages"][:count], error="ppo: mean ratio 31.2 passes <max_ratio>")
    html = page(run)
    assert "mean ratio 31.2 passes &lt;max_ratio&gt;" in html
    assert {"failed": "The run failed.", "stopped": "The run stopped."}.get(status, "The run has not finished.") in html


def test_a_failed_stage_is_named(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    stages = json.loads((run / "run.json").read_text())["stages"][:1]
    stages.append({"name": "ppo", "status": "failed", "dir": "absent", "error": {"message": "out of prompts"}})
    change(run, status="failed", stages=stages)
    html = page(run)
    assert "The run failed in ppo." in html and "out of prompts" in html and "Finished: sft." in html


def test_the_least_run_json(tmp_path: Path) -> None:
    write(tmp_path / "run.json", {"name": "x", "status": "done", "stages": [{"name": "sft", "status": "done"}]})
    assert "The run is done." in page(tmp_path)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    (run / "sft" / "metrics.jsonl").write_text("nonsense\n")
    (run / "ppo" / "data_card.json").write_text("[")
    html = page(run)
    assert "Left out: sft/metrics.jsonl: not a JSON object" in html
    assert "Left out: ppo/data_card.json is not a JSON object" in html


def test_no_run_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run\.json here"):
        write_report(tmp_path)


def test_resumed_steps_are_drawn_once(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    rows = [
        {"stage": "sft", "step": s, "split": "train", "loss": float(v)} for s, v in ((1, 3), (2, 9), (2, 2), (3, 1))
    ]
    write(run / "sft" / "metrics.jsonl", rows)
    html = page(run)
    points = re.search(r'<polyline class="train" points="([^"]+)"', html)
    assert points and len(points[1].split()) == 3


def test_writing_a_report_needs_no_torch() -> None:
    subprocess.run([sys.executable, "-c", "import sys, align.report; assert 'torch' not in sys.modules"], check=True)

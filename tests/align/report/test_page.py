"""The report of a run folder, made of the files that the contract names."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from align.report.page import write_report
from data_prep.core.errors import UserError
from tests.run_folder import REPLIES, fake_run, write


def page(run: Path) -> str:
    path = write_report(run)
    assert path == run / "report.html"
    return path.read_text(encoding="utf-8")


def change(run: Path, **more: Any) -> None:
    record = json.loads((run / "run.json").read_text())
    write(run / "run.json", {**record, **more})


def test_shows_the_numbers_given(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    html = page(run)
    for text in (
        "Gold score rose from 0.42 to 0.81.",
        "On 256 held-out prompts, ppo changed it by +0.39 over sft",
        "interval +0.33 to +0.45",
        "At the end ppo stood 6.31 nats of KL per reply from its parent.",
        "83.2\u202f%",
        "76.5\u202f%",
        "0.041",
        "0.118",
        "went from 0.12 to 1.44",
        "trains 82,432 of 1,420,032 (5.8\u202f%)",
        "lora r16 · fp32 · continues sft",
        "judged by reward_model",
        "feedbeef",
        "12 too long, 31 duplicate prompt",
        "3 min 35 s",
        "1.16 GiB",
        "align run pipeline=rlhf model=nano data=smalltalk adapter=lora stages.ppo.updates=40",
        "torch&nbsp;2.13.0",
        "0c0ffee0",
        *(stage["digest"][:8] for stage in json.loads((run / "run.json").read_text())["stages"]),
    ):
        assert text in html, text


def test_the_distance_is_that_of_the_weights_that_were_kept(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    stages = json.loads((run / "run.json").read_text())["stages"]
    ppo = next(stage for stage in stages if stage["name"] == "ppo")
    ppo["metrics"] |= {"best_update": 31, "held_out": {"objective/kl_k1": 1.25}}
    change(run, stages=stages)
    html = page(run)
    assert "ppo has the weights of update 31, 1.25 nats of KL per reply from its parent." in html
    assert "At the end ppo stood" not in html


def test_scores_of_a_reward_model_are_shown_as_rewards(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    pair = {"prompt": "p", "chosen": {"text": "yes", "score": 7.0}, "rejected": {"text": "no", "score": 2.0}}
    write(run / "reward_model" / "samples.jsonl", [pair])
    path = run / "reward_model" / "checkpoint.json"
    write(path, {**json.loads(path.read_text()), "reward_norm": {"mean": 3.0, "std": 2.0}})
    shown = re.findall(r'data-label="reward">([^<]+)', page(run).split("of reward_model</summary>")[-1])
    assert shown == ["2.00", "\u22120.50"]


def test_one_small_page_that_loads_nothing(tmp_path: Path) -> None:
    html = page(fake_run(tmp_path))
    assert len(html.encode()) < 200_000
    assert not re.search(r"https?:|//[a-z]|src=|href=|url\(|@import|<script|<link|<iframe|<object", html)


def test_sections_stand_in_order(tmp_path: Path) -> None:
    headings = re.findall(r"<h2>([^<]+)", page(fake_run(tmp_path)))
    assert headings == [
        *("Chain", "Scores", "Replies that gained", "Replies that lost", "Other replies", "Curves", "Reward model"),
        *("Checks", "Data", "Time and memory", "Run it again"),
    ]


def test_a_huge_run_stays_below_a_megabyte(tmp_path: Path) -> None:
    """100,000 rows of metrics, replies of 100,000 characters that grow fivefold when escaped."""
    run = fake_run(tmp_path)
    rows = [
        {"stage": "sft", "step": i, "split": "train", "loss": 1 / (i + 1), "peak": 9.0 if i == 77_777 else 0.0}
        for i in range(100_000)
    ]
    write(run / "sft" / "metrics.jsonl", rows)
    reply = {name: {"text": "'\"'<&" * 20_000, "reward": 1.0, "gold": 1.0, "finished": True} for name in REPLIES}
    write(run / "evaluate" / "samples.jsonl", [{"prompt": "p " * 5000, "id": "x", "replies": reply}] * 100)
    html = page(run)
    assert len(html.encode()) < 1_000_000
    assert "12,000 more characters" in html and "and 87,400 more characters in samples.jsonl" in html
    assert "line: mean of 5000 steps; faint: every step" in html.replace("5,000", "5000")
    assert "between 0 and 9.00" in html  # one value in 100,000 is still drawn


def test_a_page_that_would_be_too_large_folds_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = fake_run(tmp_path)
    reply = {"ppo": {"text": "word " * 2000, "reward": 1.0}}
    write(run / "evaluate" / "samples.jsonl", [{"prompt": "p", "id": "x", "replies": reply}] * 20)
    whole = len(page(run).encode())
    monkeypatch.setattr("align.report.page.MOST_BYTES", whole - 1)
    assert len(page(run).encode()) < whole


def test_a_prompt_stands_behind_what_was_said_before_it(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    reply = {"text": "Yes.", "reward": None, "gold": None, "finished": True}
    before = [{"role": "user", "content": "Is <it> late?"}, {"role": "assistant", "content": "Not yet."}]
    rows = [{"prompt": "And now?", "before": before, "id": "x", "replies": {"ppo": reply}}]
    write(run / "evaluate" / "samples.jsonl", rows)
    (asked,) = re.findall(r'<th scope="rowgroup"[^>]*>(.*And now\?.*)</th>', page(run))
    said = re.sub("<[^>]+>", "", asked)
    assert said == "user: Is &lt;it&gt; late?assistant: Not yet.And now?"
    write(run / "evaluate" / "samples.jsonl", [{**rows[0], "before": "nonsense"}])
    assert "And now?" in page(run)


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


def test_text_that_cannot_be_seen_is_made_visible(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    reply = {"text": "a\x00b\x1b[31m\u202eevil\ud800 \u05e9\u05dc\u05d5\u05dd </script><svg onload=x>", "reward": 1}
    write(run / "evaluate" / "samples.jsonl", [{"prompt": "x" * 10_000, "id": "x", "replies": {"ppo": reply}}])
    html = page(run)
    assert "a\u2400b\u241b[31m&lt;U+202E&gt;evil&lt;U+D800&gt; \u05e9\u05dc\u05d5\u05dd &lt;/script&gt;&lt;svg" in html
    assert "9,400 more characters</summary>" in html and "x" * 9_400 in html
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e]", html)


def test_replies_are_picked_by_what_they_teach(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    rows = []
    for i in range(20):
        after = {3: 0.0, 15: 0.0, 17: 0.5, 4: 3.0, 8: 2.0}.get(i, 1.0)
        replies = {"sft": {"text": "s", "gold": 1.0}, "ppo": {"text": f"reply {i}.", "gold": after}}
        rows.append({"prompt": f"Question {i}?", "id": str(i), "replies": replies})
    write(run / "evaluate" / "samples.jsonl", rows)
    html = page(run)
    assert "ppo scores higher than sft on 2 of 20 prompts" in html
    assert "ppo scores lower than sft on 3 of 20 prompts" in html
    assert "6 of the other 15 prompts, evenly spaced" in html
    rest = [str(i) for i in range(20) if i not in (3, 15, 17, 4, 8)]
    assert re.findall(r"Question (\d+)\?", html) == ["4", "8", "3", "15", "17", *(rest[i * 15 // 6] for i in range(6))]


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
    assert "only noted at this precision" in html


@pytest.mark.parametrize(
    ("change_in_gold", "se", "expected"),
    [
        ((0.42, 0.44), 0.03, "Gold score shows no clear change: 0.42, then 0.44."),
        ((0.42, 0.22), 0.03, "Gold score fell from 0.42 to 0.22."),
        ((0.42, 0.92), 0.03, "Gold score rose from 0.42 to 0.92."),
    ],
)
def test_the_verdict_follows_the_interval(
    tmp_path: Path, change_in_gold: tuple[float, float], se: float, expected: str
) -> None:
    run = fake_run(tmp_path)
    stages = {
        name: {"reward": score, "gold": {"score": score, "n": 100, "se": se}}
        for name, score in zip(("sft", "ppo"), change_in_gold, strict=True)
    }
    write(run / "evaluate" / "result.json", {"stages": stages})
    html = page(run)
    assert f"<title>{run.name}: {expected}" in html
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
    assert re.search(r"<h1>Held-out loss went from 1\.\d+ at step \d+ to 1\.\d+\.</h1>", html)
    assert "Replies" not in re.findall(r"<h2>([^<]+)", html)


def test_a_reward_model_alone(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    record = json.loads((run / "run.json").read_text())
    change(run, stages=record["stages"][1:2])
    html = page(run)
    assert "The reward model orders 76.5\u202f% of held-out pairs rightly." in html
    assert "a checkpoint of another run" in html


def test_a_stage_that_leaves_no_weights_and_compares_nothing(tmp_path: Path) -> None:
    """A stage of one's own: its result is not an evaluation, its base is named by the recipe alone."""
    run = fake_run(tmp_path)
    record = json.loads((run / "run.json").read_text())
    write(run / "sft" / "result.json", {"anything": [1, 2]})
    (run / "sft" / "checkpoint.json").unlink()
    (run / "recipe.yaml").write_text("model: {name: nano, path: /home/someone/models/my-base}\nstages: {sft: {}}\n")
    change(run, pipeline="sft", stages=record["stages"][:1])
    html = page(run)
    assert "my-base" in html and "Scores" not in html and "No replies were compared." in html
    assert html.count("/home/someone") == 1  # in the folded recipe alone


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
    assert "Not begun: reward_model, evaluate." in html and html.count(">not begun<") == 2


def test_a_run_that_was_killed_shows_how_far_it_came(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    stages = json.loads((run / "run.json").read_text())["stages"][:3]
    (run / "ppo").rename(run / ".staging-ppo")
    (run / ".staging-ppo" / "checkpoint.json").unlink()
    stages[2] = {"name": "ppo", "status": "running", "dir": ".staging-ppo", "skipped": False, "metrics": {}}
    change(run, status="running", stages=stages)
    with (run / ".staging-ppo" / "metrics.jsonl").open("a") as stream:
        stream.write('{"stage": "ppo", "step": 41, "spl')  # torn by the kill
    html = page(run)
    assert (
        "The run has not finished: it was in ppo when this was written." in html
        and "ppo got as far as step 40;" in html
    )
    assert "Not begun: evaluate." in html and "Left out" not in html
    assert '<span class="soft">running</span>' in html and "KL from the parent" in html


def test_what_an_earlier_run_left_is_not_shown_as_this_runs(tmp_path: Path) -> None:
    """The second run of a folder fails in PPO; the evaluation there is of the first."""
    run = fake_run(tmp_path)
    stages = json.loads((run / "run.json").read_text())["stages"]
    stages[2] = {"name": "ppo", "status": "failed", "dir": ".staging-ppo", "skipped": False, "metrics": {}}
    change(run, status="failed", stages=stages, error="out of prompts")
    html = page(run)
    assert "evaluate is left from an earlier run of this folder and is not shown; the same command" in html
    assert "Finished: sft, reward_model." in html and "Gain in gold score" not in html
    assert not {"Scores", "Replies"} & set(re.findall(r"<h2>([^<]+)", html))


def test_a_fallen_part_is_in_the_verdict(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    result = json.loads((run / "evaluate" / "result.json").read_text())
    result["stages"]["ppo"]["gold"]["topic"] = 0.6
    result["stages"]["ppo"]["gold"]["persona"] = 0.82  # within its error of 0.85
    write(run / "evaluate" / "result.json", result)
    assert "<h1>Gold score rose from 0.42 to 0.81, but topic fell from 0.90 to 0.60.</h1>" in page(run)


def test_a_policy_without_an_evaluation_is_told_by_its_own_looks(tmp_path: Path) -> None:
    """The weights of the best look are the ones that were kept, not those of the last."""
    run = fake_run(tmp_path)
    stages = json.loads((run / "run.json").read_text())["stages"][2:3]
    stages[0]["metrics"]["best_update"] = 20
    rows = [(0, 0.12, -0.5), (20, 0.83, 1.5), (30, 0.4, 1.75)]
    looks = [
        {"stage": "ppo", "step": step, "split": "eval", "gold/score": gold, "objective/score_shaped": reward}
        for step, gold, reward in rows
    ]
    write(run / "ppo" / "metrics.jsonl", looks)
    change(run, stages=stages)
    assert "<h1>The mean gold score of ppo&#39;s replies to held-out prompts went from 0.12 to 0.83.</h1>" in page(run)
    for look in looks:
        del look["gold/score"]
    write(run / "ppo" / "metrics.jsonl", looks)
    assert (
        "<h1>The mean reward of ppo&#39;s replies to held-out prompts went from \N{MINUS SIGN}0.50 to 1.50.</h1>"
        in page(run)
    )


def test_what_deserves_a_second_look(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    assert "Worth a second look" not in page(run)
    result = json.loads((run / "evaluate" / "result.json").read_text())
    result["reward_model"].update(length_corr=-0.41, ece=0.2)
    result["stages"]["ppo"]["finished"] = 0.5
    write(run / "evaluate" / "result.json", result)
    rows = [{"stage": "sft", "step": s, "split": "eval", "loss": v} for s, v in ((10, 2.0), (20, 1.0), (30, 1.5))]
    write(run / "sft" / "metrics.jsonl", rows)
    html = page(run)
    for text in (
        "Held-out loss of sft was lowest at step 20 (1.00) and ended at 1.50; stages.sft.patience=2 keeps",
        "(rank correlation \N{MINUS SIGN}0.41)",
        "20.0\u202f% off its accuracy",
        "Only 50.0\u202f% of ppo&#39;s replies end",
    ):
        assert text in html, text


def test_changed_files_are_seen(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    assert 'aria-label="failed"' not in page(run)
    (run / "sft" / "adapter_config.json").write_text("{}")
    (run / "ppo" / "adapter_config.json").unlink()
    html = page(run)
    assert html.count('aria-label="failed"') == 2
    said = "Check failed in sft: &#34;Files have the bytes that were saved&#34; (adapter_config.json changed); do not"
    assert said in html and "adapter_config.json is missing" in html
    assert "failed, 17 passed" in re.sub(r"\d+ passed", "17 passed", html)


def test_rows_that_do_not_add_up_are_seen(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    held = json.loads((run / "sft" / "data_card.json").read_text())
    held["rows"]["kept"] -= 1
    write(run / "sft" / "data_card.json", held)
    assert page(run).count('aria-label="failed"') == 1


def test_the_least_run_json(tmp_path: Path) -> None:
    write(tmp_path / "run.json", {"name": "x", "status": "done", "stages": [{"name": "sft", "status": "done"}]})
    assert "The run is done." in page(tmp_path)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    whole = (run / "sft" / "metrics.jsonl").read_text()
    (run / "sft" / "metrics.jsonl").write_text(whole + "nonsense\n[1]\n")
    (run / "ppo" / "data_card.json").write_text("[")
    (run / "evaluate" / "samples.jsonl").write_bytes(b"\xff\xfe\n")
    html = page(run)
    assert "Left out: sft/metrics.jsonl: 2 of 406 rows are not a JSON object (first: row 405)" in html
    assert "Left out: ppo/data_card.json is not a JSON object" in html
    assert "Left out: evaluate/samples.jsonl: 1 of 1 rows is not a JSON object (first: row 1)" in html
    assert "Loss of sft" in html  # what can be read is shown


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "data_card.json", "result.json", "checkpoint.json"])
@pytest.mark.parametrize("rows", [[{}], [{"step": "x", "split": "eval", "loss": []}], [{"replies": {"ppo": 3}}]])
def test_files_of_another_shape_leave_a_page(tmp_path: Path, name: str, rows: list[Any]) -> None:
    """No file but run.json can keep the report from being written."""
    run = fake_run(tmp_path)
    for stage in ("sft", "reward_model", "ppo", "evaluate"):
        write(run / stage / name, rows if name.endswith("l") else rows[0])
    assert "rlhf-1a2b3c4d" in page(run)


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.integers(), lambda inner:
    st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(("n", "gold", "score", "rows", "in", "stages", "x")),
    inner, max_size=4), max_leaves=12))  # fmt: skip
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_json_leaves_a_page(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    run = fake_run(tmp_path_factory.mktemp("any"))
    keys = ("stages", "win_rate", "reward_model", "rows", "tokens", "splits", "parents", "base", "probe", "files")
    for name in ("result.json", "data_card.json", "checkpoint.json"):
        for stage in ("sft", "evaluate"):
            (run / stage / name).write_text(json.dumps(dict.fromkeys(keys, value)))
    (run / "ppo" / "metrics.jsonl").write_text(json.dumps({"step": value, "split": "eval", "loss": value}) + "\n")
    assert "rlhf-1a2b3c4d" in page(run)


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

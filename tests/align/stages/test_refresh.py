"""A reward model that goes on with the policy's own replies: what is judged, kept, trained on, recorded and refused."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from align.checkpoints.checkpoint import Checkpoint
from align.checkpoints.lineage import chain_of, judge_of
from align.config.compose import compose
from align.planning.check import check
from align.planning.preflight import plan_stages, source_problems
from align.rl.signals.rule import RuleSource
from align.stages import refresh
from align.tracking.trackers.base import StageFacts
from align.training import resume
from align.training.resume import StateSaver
from data_prep.core.errors import UserError
from data_prep.options import DataOptions, SourceOptions
from data_prep.records.stream import Given, open_stream
from data_prep.types import PREFERENCE
from tests.tiny_chain import HOME, base, copied, execute, made, pipeline_words, read

ROUND = [
    "stages.ppo.refresh=1",
    "stages.reward_model_2.judge={rule: length, target: 3}",
    "stages.reward_model_2.prompts=40",
]


def words(*more: str, judge: str = "{rule: length, target: 3}") -> list[str]:
    """A round of its own behind the chain's first PPO."""
    run = one_round()
    inputs = [f"stages.refresh.init={run / 'ppo'}", f"stages.refresh.reward={run / 'reward_model'}"]
    return [*inputs, f"stages.refresh.judge={judge}", "name=n", *more]


@cache
def one_round() -> Path:
    """A whole chain with one round."""
    return made("rlhf", *ROUND, out=HOME / "rounds")


def sampled(stage: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (stage / "sampled.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_chain_goes_on_and_every_round_has_its_lineage() -> None:
    run = one_round()
    assert [entry["status"] for entry in read(run / "run.json")["stages"]] == ["done"] * 6
    refreshed, policy = Checkpoint.open(run / "reward_model_2"), Checkpoint.open(run / "ppo_2")
    assert [(one.role, one.path) for one in refreshed.parents()] == [("init", "../reward_model"), ("policy", "../ppo")]
    assert (refreshed.role, refreshed.on_parent) == ("reward", "continue")
    assert [(one.role, one.path) for one in policy.parents()] == [("init", "../ppo"), ("reward", "../reward_model_2")]
    assert [name for name, _ in chain_of(policy)] == ["base", "sft", "ppo", "ppo_2"]
    judge = judge_of(policy)
    assert judge is not None and judge.stage == "reward_model_2"
    assert all(found["ok"] for found in policy.verify())
    assert list(read(run / "evaluate" / "result.json")["stages"]) == ["base", "sft", "ppo", "ppo_2"]


def test_pairs_say_where_they_come_from_and_held_out_prompts_give_held_out_pairs() -> None:
    run = one_round()
    rows, card = sampled(run / "reward_model_2"), read(run / "reward_model_2" / "data_card.json")["on_policy"]
    assert card["policy"] == Checkpoint.open(run / "ppo").digest and card["judge"] == "length"
    assert [card[side] for side in ("train", "eval")] == [
        sum(row["split"] == side for row in rows) for side in ("train", "eval")
    ]
    assert card["train"] > 0 and card["eval"] > 0
    for row in rows:
        assert row["scores"]["chosen"] > row["scores"]["rejected"]
    asked = [{str(row["prompt"]) for row in rows if row["split"] == side} for side in ("train", "eval")]
    assert not asked[0] & asked[1]
    kinds = Checkpoint.open(run / "reward_model_2").record["metrics"]["by_kind"]
    assert kinds["on_policy"]["n"] == card["eval"] and kinds["given"]["n"] == 8


def test_the_kept_rows_are_read_as_pairs() -> None:
    """By whoever is given the file, with the sides that they had; a blank reply is a bad row there."""
    path = one_round() / "reward_model_2" / "sampled.jsonl"
    read_back = list(open_stream(Given(DataOptions(), SourceOptions(path=str(path))), PREFERENCE, 0))
    assert [(one.chosen, one.rejected, one.meta["split"]) for one in read_back] == [
        (row["chosen"], row["rejected"], row["split"]) for row in sampled(path.parent) if row["rejected"].strip()
    ]


def test_it_starts_as_the_reward_model_that_it_goes_on_with(tmp_path: Path) -> None:
    """Head and adapter: hardly trained, it says of the pairs of the data what the reward model says."""
    run = made("refresh", *words("stages.refresh.lr=1e-30", "stages.refresh.max_steps=1"), out=tmp_path)
    before, after = (Checkpoint.open(one) for one in (one_round() / "reward_model", run / "refresh"))
    given = [found.record["metrics"]["by_kind"]["given"]["margin"] for found in (before, after)]
    assert given[1] == pytest.approx(given[0], rel=1e-6)
    trained = Checkpoint.open(one_round() / "reward_model_2").record["metrics"]["by_kind"]["given"]["margin"]
    assert trained != pytest.approx(given[0], rel=1e-3), "and it does learn"


def test_the_same_command_skips_the_rounds_and_their_number_decides_nothing_of_ppo(tmp_path: Path) -> None:
    run = copied(one_round(), tmp_path)
    config = compose([*pipeline_words("rlhf", *ROUND), f"out={tmp_path}"])
    assert config.name == run.name
    assert all(entry["skipped"] for entry in execute(config)["stages"])
    (ppo,) = [spec.stage for spec in config.stages if spec.name == "ppo"]
    assert "refresh" in ppo.idle, "one more round trains PPO anew"


def test_a_stopped_round_goes_on_with_the_pairs_that_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge that would answer otherwise the second time is not asked again."""
    monkeypatch.setattr(resume, "_SHARE", 0)
    often = words("stages.refresh.save_minutes=1e-9", "stages.refresh.max_steps=3")
    offer = StateSaver.offer

    def stop(self: StateSaver, updater: Any, at: int, more: dict[str, Any]) -> None:
        offer(self, updater, at, more)
        if at == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StateSaver, "offer", stop)
        made("refresh", *often, out=tmp_path)
    kept = (tmp_path / "n" / ".staging-refresh" / "sampled.jsonl").read_bytes()
    monkeypatch.setattr(RuleSource, "open", lambda *_: pytest.fail("the judge was asked again"))
    run = made("refresh", *often, out=tmp_path)
    assert (run / "refresh" / "sampled.jsonl").read_bytes() == kept and len(kept) > 0
    card = read(run / "refresh" / "data_card.json")["on_policy"]
    assert card["train"] + card["eval"] == len(sampled(run / "refresh"))


def test_pairs_of_texts_with_other_line_ends_are_read_back(tmp_path: Path) -> None:
    """JSON leaves U+2028 and U+0085 in a text as they are, and `str.splitlines` would cut there."""
    rows = [{"prompt": "a\u2028b", "chosen": "c\u0085d\x1ce\r\n", "rejected": "f"}, {"prompt": "g"}]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (tmp_path / "sampled.jsonl").write_text("".join(lines), encoding="utf-8")
    (tmp_path / "samples.jsonl").write_text("".join(lines), encoding="utf-8")
    assert refresh._kept(SimpleNamespace(staging=tmp_path)) == rows
    columns, shown = StageFacts("ppo", str(tmp_path), {}).samples()
    assert columns == ["prompt", "chosen", "rejected"] and shown[0][0] == "a\u2028b" and len(shown) == 2


def test_a_judge_that_finds_all_replies_alike_is_warned_of(tmp_path: Path) -> None:
    run = made("refresh", *words(judge="{rule: forbidden, texts: [zzzz]}"), out=tmp_path)
    assert "no_pairs" in [warning["code"] for warning in read(run / "run.json")["warnings"]]
    assert sampled(run / "refresh") == []


def test_labels_alone_need_no_judge(tmp_path: Path) -> None:
    run = made("refresh", *words("stages.refresh.replies=0", judge="null"), out=tmp_path)
    assert not (run / "refresh" / "sampled.jsonl").exists()
    assert "on_policy" not in read(run / "refresh" / "data_card.json")


def problems(*more: str, pipeline: str = "refresh") -> list[str | None]:
    config = compose([*pipeline_words(pipeline), *more])
    found = [problem for _, problem in source_problems(config)]
    found += [problem for plan in plan_stages(config, base()) for problem in plan.problems]
    return [problem.code for problem in found]


def test_what_cannot_work_is_known_before_anything_is_trained() -> None:
    run = one_round()
    assert problems(*words()) == []
    assert problems(*words(judge="null")) == ["no_judge"]
    assert problems("stages.ppo.refresh=1", pipeline="rlhf") == ["no_judge"]
    assert problems(*words(judge="{rule: number}")) == [], "which rows have an answer is seen in them"
    assert problems(*words(f"stages.refresh.reward={run / 'sft'}")) == ["wrong_role"]
    assert problems(*words("stages.refresh.adapter=vera", "stages.refresh.on_parent=continue")) == ["illegal_chain"]
    assert problems(*words(judge="{python: nowhere.function}")) == ["code_not_allowed"]
    with pytest.raises(UserError, match=r"right answer|ground_truth"):
        made("refresh", *words("name=bad", judge="{rule: number}"), out=HOME / "bad")


def test_check_reads_its_rows_and_counts_its_steps() -> None:
    found = check(compose([*pipeline_words("refresh"), *words()]))
    assert found.ok
    (stage,) = found.stages
    assert (stage["init"], stage["reward"], stage["on_parent"]) == (
        Checkpoint.open(one_round() / "ppo").label,
        Checkpoint.open(one_round() / "reward_model").label,
        "continue",
    )
    assert stage["steps"] == 2 and stage["rows"] == 32


def test_the_head_is_trained() -> None:
    from safetensors.torch import load_file

    before, after = (load_file(one_round() / name / "head.safetensors") for name in ("reward_model", "reward_model_2"))
    assert any(not torch.equal(before[name], after[name]) for name in before)

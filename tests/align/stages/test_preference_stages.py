"""The stages that learn from judged replies: what they refuse, labelled rows, and what their page shows."""

from __future__ import annotations

import pytest

from align.config.compose import compose
from align.planning.check import check
from align.planning.preflight import require_plans
from data_prep.core.errors import TrainingStopped, UserError
from tests.tiny import write_jsonl
from tests.tiny_chain import base, finished, made, pipeline_words, read


def refusal(*words: str) -> UserError:
    with pytest.raises(UserError) as caught:
        require_plans(compose([*words, "model=hf", f"model.path={base()}", "data=files"]), base())
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    return caught.value


@pytest.mark.parametrize("stage", ["dpo", "kto", "orpo"])
def test_a_reward_model_is_no_parent(stage):
    problem = refusal(f"pipeline={stage}", f"stages.{stage}.init={finished() / 'reward_model'}")
    assert problem.code == "wrong_role" and "policy is needed" in str(problem)


def test_label_smoothing_where_it_has_no_use_or_is_needed():
    problem = refusal("pipeline=dpo", "stages.dpo.loss_type=hinge", "stages.dpo.label_smoothing=0.1")
    assert problem.field == "stages.dpo.label_smoothing" and "sigmoid, robust, exo_pair" in str(problem.hint)
    problem = refusal("pipeline=dpo", "stages.dpo.loss_type=exo_pair")
    assert problem.hint == "set stages.dpo.label_smoothing=0.001"
    for words in (["loss_type=robust", "label_smoothing=0.1"], ["label_smoothing=0.2"], ["loss_type=ipo"]):
        own = [f"stages.dpo.{word}" for word in words]
        require_plans(compose(["pipeline=dpo", *own, "model=hf", f"model.path={base()}", "data=files"]), base())


@pytest.mark.parametrize(
    "word",
    ["dpo.loss_type=aot", "dpo.beta=0", "dpo.label_smoothing=0.5", "dpo.sft_weight=-1", "kto.beta=-0.1", "orpo.beta=0"],
)
def test_values_out_of_range(word):
    with pytest.raises(UserError):
        compose([f"pipeline={word.partition('.')[0]}", f"stages.{word}", "model=nano", "data=files"])


def labels(path, prompts=24):
    rows = [
        {"prompt": f"say {i % prompts}", "completion": ("yes " if i % 3 else "no ") * (1 + i % 4), "label": i % 3 > 0}
        for i in range(48)
    ]
    return write_jsonl(path, rows)


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_kto_learns_from_labelled_replies(loss, tmp_path):
    """Two of three are good; nothing else is read."""
    words = [f"data.preferences.path={labels(tmp_path / 'labels.jsonl')}", f"stages.kto.loss_type={loss}"]
    words += ["stages.kto.max_steps=12", "stages.kto.lr=3e-2", "stages.kto.eval_every=12", "stages.kto.sft_weight=0"]
    run = made("kto", *words, "name=k", out=tmp_path)
    card = read(run / "kto" / "data_card.json")
    assert (card["format"], card["kind"], card["rows"]["kept"]) == ("kto", "unpaired", 48)
    metrics = read(run / "run.json")["stages"][0]["metrics"]
    assert metrics["rewards/margins"] > 0.05 and metrics["rewards/accuracies"] > 0.7
    assert metrics["step0"] == {"loss": 0.5, "max_log_ratio": 0.0}
    assert (metrics["kl"] == 0) == (loss != "kto")


def test_replies_of_one_label_alone_are_warned_of(tmp_path, capfd):
    rows = [{"prompt": f"say {i}", "completion": "yes", "label": False} for i in range(12)]
    words = [f"data.preferences.path={write_jsonl(tmp_path / 'bad.jsonl', rows)}", "stages.kto.max_steps=1"]
    made("kto", *words, "name=k", out=tmp_path)
    said = capfd.readouterr().err
    assert "kto: warning: all 11 training rows are labelled bad; add rows of the other label" in said
    found = check(compose([*pipeline_words("kto", *words), f"out={tmp_path}"])).as_dict()
    assert "one_label" in [problem["code"] for problem in found["problems"]], "before anything is trained, too"


def test_one_prompt_is_refused_where_others_are_needed(tmp_path):
    words = [f"data.preferences.path={labels(tmp_path / 'labels.jsonl', prompts=1)}", "data.preferences.eval_share=0"]
    with pytest.raises(UserError, match="single prompt"):
        made("kto", *words, "name=k", out=tmp_path)
    made("kto", *words, "stages.kto.loss_type=apo_zero_unpaired", "name=a", out=tmp_path)


def test_a_policy_that_does_not_start_as_its_reference_is_stopped(tmp_path, monkeypatch):
    from align.training.context import StageContext
    from tests.tiny_chain import stirred

    start = StageContext.start_role
    monkeypatch.setattr(StageContext, "start_role", lambda self, name: stirred(start(self, name).requires_grad_(True)))
    with pytest.raises(TrainingStopped, match="before the first step") as caught:
        made("dpo", "adapter=full", "name=d", out=tmp_path)
    assert caught.value.code == "unequal_start"


def test_the_page_shows_rewards_and_margins(tmp_path):
    run = made("dpo", "stages.dpo.lr=1e-2", "stages.dpo.sft_weight=0.2", "name=d", out=tmp_path)
    html = (run / "report.html").read_text("utf-8")
    for title in ("Rewards of chosen replies", "Margin", "Replies judged rightly"):
        assert title in html, title
    assert "dpo judges" in html and "of held-out replies rightly by its own rewards." in html

"""Features of rows through whole runs: they reach every forward pass of every role, and what lacks them is refused."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest

import align
from align.checkpoints.checkpoint import Checkpoint
from align.checkpoints.compatibility import require_features
from align.models.row_features import FeatureReader
from align.serving.conversation import Conversation, Ended, Panel
from align.serving.openai_request import ChatRequest, asked, read_request
from align.serving.options import ChatOptions, ServeOptions
from align.serving.served import Served
from align.stages.evaluate import Evaluate
from align.weights.export import export
from align.weights.merge import merge
from align.weights.options import ExportOptions, MergeOptions
from data_prep.core.errors import UserError
from tests.tiny import write_jsonl
from tests.tiny_chain import HOME, data_words, made, read, rows_folder

STYLES = ("plain", "pirate")
METHOD = ["adapter=lora_features", "adapter.categories=[plain,pirate]"]


@cache
def styled_rows(wrong: object = None, row: int = 7) -> Path:
    """The rows of `rows_folder`, each of a style; one row of the conversations has another."""
    folder = HOME / f"styled-{wrong}"
    for kind in ("conversations", "preferences", "text"):
        lines = [json.loads(line) for line in (rows_folder() / f"{kind}.jsonl").read_text().splitlines()]
        rows = [{**line, "features": STYLES[place % 2]} for place, line in enumerate(lines)]
        if wrong is not None:
            rows[row]["features"] = None if wrong == "none" else wrong
        write_jsonl(folder / f"{kind}.jsonl", rows)
    return folder


def styled(pipeline: str, *more: str, data: Path | None = None) -> Path:
    """The run folder of a short run of the method; a pass without the features of its rows ends it."""
    encode, enter, passes = FeatureReader._encoded, FeatureReader.enter, []

    def encoded(reader, values, device):
        assert all(value in STYLES for value in values), values
        passes.append(len(values))
        return encode(reader, values, device)

    def entered(reader, rows):
        assert rows is not None
        enter(reader, rows)

    paths = [word for word in data_words(data or styled_rows()) if word != "data=files"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureReader, "_encoded", encoded)
        patch.setattr(FeatureReader, "enter", entered)
        found = made(pipeline, *METHOD, *paths, *more, out=HOME / "styled")
    assert passes
    return found


@cache
def run() -> Path:
    """SFT, a reward model, PPO and an evaluation."""
    return styled("rlhf", "name=rlhf")


def test_no_pass_of_sft_reward_model_and_ppo_lacks_features():
    for stage in ("sft", "reward_model", "ppo"):
        record = Checkpoint.open(run() / stage).record
        assert record["method"] == "lora_features" and record["probe"]["features"][0] in STYLES
        assert Checkpoint.open(run() / stage).verify()
    samples = (run() / "ppo" / "samples.jsonl").read_text().splitlines()
    assert {json.loads(line)["features"] for line in samples} <= set(STYLES)


@pytest.mark.grid
@pytest.mark.parametrize("stage", ["dpo", "kto", "orpo"])
def test_no_pass_of_the_preference_stages_lacks_features(stage):
    record = Checkpoint.open(styled(stage, f"name={stage}") / stage).record
    assert record["probe"]["features"][0] in STYLES


@pytest.mark.parametrize(
    ("wrong", "said"),
    [("none", "got none; expected plain, pirate"), ("pirat", "got pirat; expected plain, pirate; did you mean")],
)
def test_the_first_row_with_wrong_features_is_named(wrong, said):
    with pytest.raises(UserError, match=said) as refusal:
        styled("sft", f"name=wrong-{wrong}", data=styled_rows(wrong))
    assert (refusal.value.row, refusal.value.field) == (8, "features")
    assert str(refusal.value.file).endswith("conversations.jsonl")


def test_tasks_have_no_features():
    context = SimpleNamespace(init=Checkpoint.open(run() / "ppo"), spec=SimpleNamespace(name="evaluate", adapter=None))
    (HOME / "mine.yaml").write_text("task: mine\noutput_type: multiple_choice\n")
    with pytest.raises(UserError, match="tasks have no features, which ppo"):
        Evaluate(tasks=[str(HOME / "mine.yaml")])._open_tasks(context)


def test_chat_takes_features_and_refuses_to_guess():
    panel = Panel(Checkpoint.open(run() / "ppo"), ChatOptions())
    said = {}
    for style in STYLES:
        options = ChatOptions(temperature=0, max_new_tokens=6, features=style)
        (ended,) = [e for e in panel.answer(Conversation(), "say owl", ["ppo"], options) if isinstance(e, Ended)]
        said[style] = ended.said
    assert said["plain"].reward != said["pirate"].reward
    with pytest.raises(UserError, match="got none; expected plain, pirate"):
        list(panel.answer(Conversation(), "say owl", ["ppo"], ChatOptions()))


def test_a_request_names_its_features():
    served = Served([Checkpoint.open(run() / "ppo")], ServeOptions())
    body = {"model": "ppo", "messages": [{"role": "user", "content": "say owl"}]}

    def rows(**more):
        return asked(read_request(ChatRequest, json.dumps({**body, **more}).encode()), served, ServeOptions()).rows

    assert rows(features="pirate")[0].prompt.features == "pirate"
    for wrong in ({}, {"features": "happy"}, {"features": [1.0]}):
        with pytest.raises(UserError, match="expected plain, pirate"):
            rows(**wrong)
    assert rows(model="base")[0].prompt == rows(model="base", features="plain")[0].prompt
    with pytest.raises(UserError, match="got none; expected plain"):
        rows(model="base", best_of=2)  # the reward model reads them
    with pytest.raises(UserError, match="nothing in the base reads features"):
        require_features([], "pirate")


def test_export_and_merge_at_fixed_features(tmp_path):
    with pytest.raises(UserError, match=r"features=\.\.\. fixes them"):
        merge(str(run() / "sft"), MergeOptions(to=str(tmp_path / "no")))
    lora = export(str(run() / "sft"), ExportOptions(to=str(tmp_path / "lora"), features="pirate"))
    assert lora["form"] == "lora" and lora["drift"]["kl"] < 1e-6
    merged = merge(str(run() / "sft"), MergeOptions(to=str(tmp_path / "merged"), features="plain"))
    assert merged["drift"]["kl"] < 1e-6
    config = read(tmp_path / "lora" / "adapter_config.json")
    assert config["peft_type"] == "LORA"
    score = align.score(str(run() / "reward_model"), ["say owl"] * 2, ["owl", "owl"], features=STYLES)
    assert score[0] != score[1]

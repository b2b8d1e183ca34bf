"""What `import align` offers: names, examples that run, and models that are stock ones."""

from __future__ import annotations

import inspect
import re
import textwrap
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

import align
from align.inference.generation import RolloutEngine, Sampling
from align.inference.loaded import Opened
from align.models.packing import pack
from align.weights.drift import measure, of_model, of_role
from data_prep.types import Message
from tests.tiny_chain import execute, finished, made, sft

EXAMPLES = ["check", "compose", "export", "load", "merge", "run", "score", "Checkpoint.open"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder whose `runs/my-run` is a finished chain."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "my-run").symlink_to(finished())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def example(name: str) -> str:
    """The indented block of a docstring, dedented."""
    found = align
    for part in name.split("."):
        found = getattr(found, part)
    blocks = re.findall(r"\n\n((?: {4}\S.*\n)+)", inspect.cleandoc(found.__doc__ or "") + "\n")
    return textwrap.dedent(blocks[0])


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_of_its_docstring_runs(name: str, here: Path) -> None:
    exec(example(name), {"align": align})


def test_every_public_name_exists_and_explains_itself() -> None:
    for name in align.__all__:
        assert getattr(align, name).__doc__, name
    assert re.match(r"\d+\.\d+", align.__version__)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = align.lod


def greedy(model: PreTrainedModel, ids: list[int], length: int) -> list[int]:
    row = torch.tensor([ids])
    out = model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=length, do_sample=False)
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize(("stage", "kind"), [("ppo", PeftModel), ("sft", PeftModel)])
def test_a_loaded_chain_says_what_chat_says(stage: str, kind: type, here: Path) -> None:

    model, tokenizer = align.load(f"my-run/{stage}")
    assert isinstance(model, kind) and not model.training
    opened = Opened.target(f"my-run/{stage}", "runs")
    ids = opened.renderer.prompt([Message("user", "say owl")])
    told = tokenizer.apply_chat_template([{"role": "user", "content": "say owl"}], add_generation_prompt=True)
    assert list(told["input_ids"] if hasattr(told, "keys") else told) == ids
    engine = RolloutEngine(opened.role, opened.renderer.end_token_id)
    (reply,) = engine.generate([ids], Sampling(8, greedy=True), torch.Generator())
    assert greedy(model, ids, len(reply.ids)) == list(reply.ids)


@pytest.mark.parametrize("method", ["full", "vera"])
def test_what_peft_cannot_hold_is_loaded_as_weights(method: str, tmp_path: Path) -> None:
    """Whole weights, and an adapter that is stacked on its parent's."""
    below = [f"stages.sft.init={finished() / 'sft'}", "stages.sft.on_parent=stack"] if method == "vera" else []
    folder = made("sft", f"adapter={method}", *below, "name=n", out=tmp_path) / "sft"
    model, _ = align.load(str(folder))
    assert isinstance(model, PreTrainedModel) and not isinstance(model, PeftModel)
    opened = Opened.target(str(folder), "runs")
    assert measure(of_role(opened.role), of_model(model), opened.rows()).kl < 1e-9


def test_what_no_stock_model_computes_is_refused(tmp_path: Path) -> None:
    folder = made("sft", "adapter=bottleneck", "name=n", out=tmp_path) / "sft"
    with pytest.raises(align.UserError, match="no stock model computes"):
        align.load(str(folder))


def test_scores_are_the_normalised_scores_of_the_reward_model(here: Path) -> None:
    opened = Opened.target("my-run/reward_model", "runs")
    ids = [*opened.renderer.prompt([Message("user", "say owl")]), *opened.renderer.reply("the owl")]
    with torch.no_grad():
        raw = float(opened.role.scores(pack([ids]), torch.tensor([len(ids) - 1]))[0])
    norm = opened.checkpoint.record["reward_norm"]
    expected = (raw - norm["mean"]) / norm["std"]
    for target in ("my-run", "my-run/ppo", "my-run/reward_model"):
        assert align.score(target, ["say owl"], ["the owl"]) == pytest.approx([expected], rel=1e-4, abs=1e-5)
    with pytest.raises(align.UserError, match="1 prompts for 2 replies"):
        align.score("my-run", ["a"], ["b", "c"])
    with pytest.raises(align.UserError, match="head"):
        align.load("my-run/reward_model")


def test_a_chain_without_a_reward_model_scores_nothing(tmp_path: Path) -> None:
    run = Path(str(execute(align.compose(sft(tmp_path)))["name"]))
    with pytest.raises(align.UserError, match="has no reward model"):
        align.score(str(tmp_path / run / "sft"), ["a"], ["b"])

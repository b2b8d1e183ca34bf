"""`align check` on chains, methods and PPO settings; and `align run` refuses the same before the first stage."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from align.adapters.base import Traits
from align.adapters.lora import Lora
from align.config.compose import compose
from align.config.hydra_loader import group_choices, recipes
from align.config.registries import adapters
from align.planning.check import check
from align.planning.findings import Findings
from tests.tiny import write_jsonl
from tests.tiny_chain import WORDS, base, copied, execute, finished, pipeline_words, refused, run

STYLES = ("professional", "friendly", "enthusiastic", "witty", "caring")


def found(*words: str) -> Findings:
    """The findings of a configuration."""
    return check(compose(words))


def lines(findings: Findings, severity: str = "error") -> list[str]:
    """The lines of a severity."""
    return [str(problem) for problem in findings.problems if problem.severity == severity]


@pytest.fixture
def unwilling(monkeypatch):
    """A method that cannot recompute activations, registered as `unwilling`."""

    @dataclass
    class Unwilling(Lora):
        method: str = "unwilling"
        traits: ClassVar[Traits] = Traits(gradient_checkpointing=False)

    adapters.load()
    monkeypatch.setitem(adapters._choices, "unwilling", Unwilling)
    config = compose(pipeline_words("rlhf", "stages.sft.gradient_checkpointing=true"))
    for spec in config.stages:
        object.__setattr__(spec, "adapter", Unwilling())
    return config


def test_gradient_checkpointing_with_a_method_that_forbids_it(unwilling, tmp_path):
    expected = "stages.sft.gradient_checkpointing: unwilling does not work with gradient checkpointing"
    assert [line for line in lines(check(unwilling)) if expected in line]
    object.__setattr__(unwilling, "out", str(tmp_path))
    with pytest.raises(Exception, match="unwilling does not work with gradient checkpointing"):
        execute(unwilling)
    assert not list(tmp_path.iterdir()), "refused before anything was done"


def test_the_critic_is_trained_with_the_reward_models_method(unwilling):
    """Only the reward model has the method; PPO trains a copy of it."""
    config = compose(pipeline_words("rlhf", "stages.ppo.gradient_checkpointing=true"))
    assert lines(check(config)) == []
    object.__setattr__(config.stages[1], "adapter", unwilling.stages[1].adapter)
    assert "stages.ppo.gradient_checkpointing: unwilling" in lines(check(config))[0]


# Each row: overrides, what the line says. Found by check, and refused by run before the first stage is trained.
REFUSED = [
    (
        ["stages.sft.adapter=prefix", "stages.sft.gradient_checkpointing=true"],
        "stages.sft.gradient_checkpointing: prefix does not work with gradient checkpointing",
    ),
    (["stages.ppo.adapter=qlora"], "ppo: precision changes along the chain: sft was trained on a fp32 base"),
    (["stages.reward_model.adapter=qlora"], "precision changes along the chain"),
    (["stages.ppo.adapter=full", "stages.reward_model.adapter=lora", "stages.ppo.on_parent=continue"], "cannot be"),
    (["stages.sft.on_parent=stack"], "on_parent=stack needs a parent checkpoint"),
    (["stages.sft.init=ppo"], "stage 'ppo' comes later in this pipeline"),
    (["stages.ppo.init=reward_model"], "'reward_model' is a reward checkpoint where a policy is needed"),
    (["stages.ppo.reward=sft"], "'sft' is a policy checkpoint where a reward is needed"),
    (["stages.ppo.reward=base"], "ppo needs a reward model"),
    (["stages.ppo.updates=3", "stages.ppo.critic_warmup=3"], "stages.ppo.critic_warmup: no update would train"),
    (["stages.ppo.minibatches=9"], "a batch of 8 prompts cannot be cut into 9 minibatches"),
    (["stages.ppo.kl_coef=0", "stages.ppo.kl_target=3"], "stages.ppo.kl_target: an adaptive coefficient"),
    (["data.gold.rule=known_reply"], "the rule known_reply lacks topic"),
    (
        ["data.gold.rule=known_reply", "data.gold.options={topic: t, styles: [a], preferred: a}"],
        "data.gold.source: the rule has no rows",
    ),
    (["data.gold.rule=knwon_reply"], "unknown rule 'knwon_reply' (did you mean 'known_reply'?"),
]


@pytest.mark.parametrize(("words", "said"), REFUSED, ids=[row[1][:40] for row in REFUSED])
def test_what_the_chain_refuses(words, said, tmp_path, capfd):
    overrides = [*pipeline_words("rlhf", *words), f"out={tmp_path}"]
    assert [line for line in lines(found(*overrides)) if said in line], lines(found(*overrides))
    line = refused(*run(capfd, *overrides))
    assert said.partition(": ")[2] in line and not list(tmp_path.iterdir()), "refused before the first stage"


def test_one_stage_does_not_hide_the_next(tmp_path):
    words = ["stages.reward_model.adapter=qlora", "stages.ppo.minibatches=9", "stages.ppo.adapter=qlora"]
    words += ["data.preferences.path=/nothere.jsonl", "data.gold.rule=known_reply"]
    shown = lines(found(*pipeline_words("rlhf", *words, f"out={tmp_path}")))
    assert {line.partition(":")[0] for line in shown} == {"reward_model", "stages.ppo.minibatches", "ppo"}


def test_a_precision_change_that_was_asked_for(tmp_path):
    findings = found(*pipeline_words("rlhf", "stages.ppo.adapter=qlora", "on_precision_change=recalibrate"))
    assert lines(findings) == []
    ppo = next(stage for stage in findings.stages if stage["name"] == "ppo")
    assert ppo["load"] == "nf4" and ppo["forced"] == ["precision fp32 -> nf4"]


def test_a_reward_model_from_another_base(tmp_path, capfd):
    words = [f"stages.ppo.init={finished()}/sft", f"stages.ppo.reward={finished()}/reward_model"]
    assert lines(found(*pipeline_words("ppo", *words))) == []
    overrides = [*pipeline_words("ppo", *words, model=base(1)), f"out={tmp_path}"]
    shown = lines(found(*overrides))
    assert len(shown) == 2 and all("was trained on another base" in line for line in shown)
    assert "reward_model" in shown[1] and "another base" in refused(*run(capfd, *overrides))


def test_a_damaged_parent(tmp_path):
    parent = copied(finished(), tmp_path)
    weights = parent / "sft" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\1\2\3")
    words = [f"stages.ppo.init={parent}/sft", f"stages.ppo.reward={parent}/reward_model"]
    assert "content changed since sft" in lines(found(*pipeline_words("ppo", *words)))[0]


def test_evaluation_stands_on_any_method(tmp_path):
    """A stage that trains nothing puts nothing on its parent, whatever the run's adapter is."""
    words = ["stages.sft.adapter=prefix", "~stages.reward_model", "~stages.ppo"]
    findings = found(*pipeline_words("rlhf", *words))
    assert lines(findings) == []
    assert next(stage for stage in findings.stages if stage["name"] == "evaluate")["on_parent"] is None


def test_prompts_and_replies_against_the_context(tmp_path, capfd):
    line = lines(found(*pipeline_words("rlhf", "stages.ppo.max_new_tokens=96")))[0]
    assert line.startswith("stages.ppo.max_new_tokens: no room for a prompt") and "lower" in line
    shown = lines(found(*pipeline_words("rlhf", "stages.ppo.max_new_tokens=80", "stages.ppo.max_lost=0")))
    assert "prompts" not in shown and "are longer than max_length=16" in shown[0]
    line = lines(found(*pipeline_words("rlhf", "stages.ppo.batch_size=64", "stages.ppo.minibatches=4")))[0]
    assert "training prompts are fewer than one batch of 64" in line and "stages.ppo.batch_size=" in line


def test_layers_that_a_model_does_not_have():
    line = lines(found(*pipeline_words("sft", "adapter.target_modules=[q_porj]")))[0]
    assert "q_porj" in line


# ---------------------------------------- warnings
WARNED = [
    ("stages.sft.lr=0.5", "stages.sft.lr: 0.5 is 2.5e+03 times the usual learning rate"),
    ("stages.sft.lr=1e-9", "stages.sft.lr: 1e-09 is 1/2e+05 of the usual learning rate"),
    ("stages.ppo.kl_coef=5", "stages.ppo.kl_coef: 5 makes the KL penalty outweigh"),
    ("stages.ppo.kl_coef=0", "stages.ppo.kl_coef: 0 lets the policy leave its parent"),
    ("stages.ppo.clip=0.9", "stages.ppo.clip: 0.9 is an unusual ratio clip"),
    ("stages.ppo.gamma=0.5", "stages.ppo.gamma: 0.5 hides the reward"),
    ("stages.ppo.temperature=5", "stages.ppo.temperature: 5 samples replies far"),
    ("stages.ppo.minibatches=3", "stages.ppo.minibatches: 3 minibatches of a batch of 8 are of unequal size"),
    ("stages.ppo.micro_batch_size=3", "stages.ppo.micro_batch_size: 3 rows at a time leave a remainder"),
    ("stages.sft.micro_tokens=20", "stages.sft.micro_tokens: 25 of 32 rows have more than 20 tokens (the longest,"),
    ("stages.ppo.micro_tokens=20", "stages.ppo.micro_tokens: 24 of 32 rows have more than 20 tokens (the longest,"),
]


@pytest.mark.parametrize(("word", "said"), WARNED, ids=[row[0] for row in WARNED])
def test_what_is_hardly_meant_is_warned_of_and_runs(word, said):
    findings = found(*pipeline_words("rlhf" if "ppo" in word else "sft", *word.split()))
    assert findings.ok and lines(findings) == []
    shown = lines(findings, "warning")
    assert len(shown) == 1 and shown[0].startswith(said)


# ---------------------------------------- shipped recipes
@pytest.fixture(scope="module")
def own_rows(tmp_path_factory) -> Path:
    """A folder with small stand-ins for the data that the experiments name."""
    folder = tmp_path_factory.mktemp("data")
    table = [
        {"prompt": f"say {word} {i}", "scenario": word, **{style: f"{style} {word}" for style in STYLES}}
        for i, word in enumerate(WORDS * 3)
    ]
    alpaca = [{"instruction": row["prompt"], "input": "", "output": row["witty"]} for row in table]
    write_jsonl(folder / "chitchat" / "table.jsonl", table)
    (folder / "instruct").mkdir()
    packed = gzip.compress((folder / "chitchat" / "table.jsonl").read_bytes())
    (folder / "chitchat" / "persona_table.jsonl.gz").write_bytes(packed)
    (folder / "instruct" / "alpaca_data.json.gz").write_bytes(gzip.compress(json.dumps(alpaca).encode()))
    (folder / "verifiable").mkdir()
    commands = "".join(f"IN: jump and run {i} OUT: I_JUMP I_RUN {i}\n" for i in range(160))
    (folder / "verifiable" / "scan_simple_train_6000.txt.gz").write_bytes(gzip.compress(commands.encode()))
    return folder


def shipped() -> list[str]:
    """Every experiment and pipeline, and SFT with every adapter preset."""
    with recipes(None):
        words = [f"{group}={name}" for group in ("experiment", "pipeline") for name in group_choices(group)]
        return [*words, *(f"adapter={name}" for name in group_choices("adapter"))]


def needs(word: str, folder: Path) -> list[str]:
    """What a recipe leaves to its user: a base, data, checkpoints; fewer rows of the embedded data."""
    few = [f"data.{kind}.limit=300" for kind in ("conversations", "preferences", "prompts", "text")]
    own = [f"model.path={base()}", f"data.root={folder}"]
    asked = {
        name: [f"stages.{name}.init={finished()}/sft", f"stages.{name}.reward={finished()}/reward_model"]
        for name in ("ppo", "refresh")
    }
    tiny = [*few, "model=hf", f"model.path={base()}"]
    return {
        "experiment=alpaca_sft": own,
        "experiment=scan_rules": [*own, *(f"stages.{name}.max_new_tokens=160" for name in ("ppo", "evaluate"))],
        "adapter=lora_features": [*few, "pipeline=sft", "adapter.fixed=[0]"],  # these rows have no features
        "experiment=persona_rlhf": [*own, "stages.ppo.batch_size=32"],
        "pipeline=ppo": [*tiny, "stages.ppo.max_length=240", *asked["ppo"]],
        "pipeline=refresh": [*tiny, "stages.refresh.max_length=240", *asked["refresh"]],
    }.get(word, few if "=" in word and not word.startswith("adapter") else [*few, "pipeline=sft"])


@pytest.mark.parametrize("word", shipped())
def test_shipped_recipes_are_not_complained_of(word, own_rows):
    findings = found(word, *needs(word, own_rows))
    found_wrong = [str(one) for one in findings.problems if one.error.code != "few_held_out"]  # of the test's own rows
    assert found_wrong == []
    assert findings.stages and findings.data and findings.preview

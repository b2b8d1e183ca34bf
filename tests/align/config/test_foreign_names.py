"""Names of other tools are answered with options that exist here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from align.cli import dispatch as cli
from align.config.compose import compose
from align.config.foreign_names import CHOICES, NOT_NEEDED, OURS
from align.config.registries import adapters, stages
from align.config.schema import DistributedOptions, ModelOptions, RunOptions, TrackingOptions
from align.stages.base import TrainingStage
from data_prep.core.errors import UserError
from data_prep.core.options import option_types
from data_prep.options import DataOptions, SourceOptions

PLACES = {
    "model.": [ModelOptions],
    "tracking.": [TrackingOptions],
    "distributed.": [DistributedOptions],
    "data.conversations.": [SourceOptions],
    "data.preferences.": [SourceOptions],
    "data.": [DataOptions],
    "{adapter}.": list(dict(adapters.items()).values()),
    "{stage}.": [TrainingStage],
    "": [RunOptions],
}
PLACES |= {f"stages.{name}.": [kind] for name, kind in stages.items()}


def option_of(text: str) -> str:
    """The option that an answer names, without its value and its note."""
    return text.partition(" (")[0].split()[-1].partition("=")[0]


def test_every_answer_is_an_option_that_exists() -> None:
    for name, text in OURS.items():
        groups = r"(?:\{\w+\}|model|data|stages|tracking|distributed)"
        for option in re.findall(rf"{groups}\.[\w.]+", text) or [option_of(text)]:
            prefix = max((one for one in PLACES if option.startswith(one)), key=len)
            known = {one for kind in PLACES[prefix] for one in option_types(kind)}
            assert option.removeprefix(prefix) in known, (name, text)
    assert not OURS.keys() & NOT_NEEDED.keys()


def test_no_foreign_name_is_one_of_ours() -> None:
    """Where a stage has an option of the name it is taken, and the table would never be asked."""
    own = {one for kind in (TrainingStage, *dict(stages.items()).values()) for one in option_types(kind)}
    own |= {one for kind in dict(adapters.items()).values() for one in option_types(kind)}
    assert not (OURS.keys() | NOT_NEEDED.keys()) & own - {"micro_batch_size", "bias", "beta"}


@pytest.mark.parametrize("given", CHOICES, ids="=".join)
def test_a_choice_of_another_tool_is_answered_with_one_that_composes(given: tuple[str, str]) -> None:
    with pytest.raises(UserError) as raised:
        compose(["pipeline=sft", "=".join(given)])
    ours = CHOICES[given]
    assert str(raised.value).endswith(f"here it is {ours}")
    compose(["pipeline=sft", *ours.partition(" (")[0].split()])


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("learning_rate=1e-4", "learning_rate: unknown option; here it is stages.sft.lr"),
        ("stages.reward_model.learning_rate=1", "here it is stages.reward_model.lr"),
        ("adapter.r=8", "adapter.r: unknown option; here it is adapter.rank"),
        ("stages.sft.lora_alpha=8", "here it is stages.sft.adapter.alpha"),
        ("packing=true", "not needed: rows are always packed"),
        ("stages.sft.cliprange=0.1", "here it is stages.ppo.clip"),
        ("adapter.learning_rate=1e-4", "here it is stages.sft.lr"),
        ("fp16=true", "not needed: only bf16 needs no loss scaling: stages.sft.autocast=bf16"),
        ("fsdp=full_shard", "fsdp: unknown option; here it is distributed.shard (FSDP2: base cuts"),
        ("deepspeed=zero3.json", "not needed: DeepSpeed is not used: distributed.shard=base cuts the base"),
        ("distributed.tensor_parallel_size=4", "not needed: products are not divided: distributed.shard=base cuts"),
        ("report_to=wandb", "here it is tracking.to=[wandb]"),
        ("stages.sft.adapter=dora", "unknown adapter 'dora'; here it is adapter=lora adapter.dora=true"),
    ],
)
def test_the_line(word: str, line: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "pipeline=rlhf", word]) == 2
    err = capfd.readouterr().err
    assert line in err and err.startswith("align: ") and err.count("\n") == 1, err


def test_an_option_of_a_stage_of_the_run_is_named_by_its_place() -> None:
    with pytest.raises(UserError, match=r"beta: unknown option; did you mean 'stages\.dpo\.beta'\?"):
        compose(["pipeline=sft_dpo", "beta=0.1"])
    with pytest.raises(UserError, match=r"here it is stages\.ppo\.kl_coef"):
        compose(["pipeline=rlhf", "beta=0.1"])


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("columns={a: b}", "data.conversations.columns'? (also in: data.preferences, data.prompts)"),
        ("format=alpaca", "data.conversations.format'? (also"),
        ("data.on_bad_row=drop", "data.conversations.on_bad_row'? (also"),
        ("data.eval_share=0.1", "data.conversations.eval_share'? (also"),
        ("train_on=last", "data.train_on'?"),
        ("unused=[a]", "data.unused'?"),
        ("load=nf4", "model.load'?"),
        ("rank=8", "adapter.rank'?"),
        ("options.order=best_first", "data.conversations.options'? (also"),
    ],
)
def test_an_option_without_its_place_is_told_the_place(word: str, line: str) -> None:
    """Messages name options in short, as `columns={completion: answer}`."""
    with pytest.raises(UserError) as raised:
        compose(["pipeline=rlhf", word])
    assert f"unknown option; did you mean '{line}" in str(raised.value)


def test_a_recipe_is_answered_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "experiment").mkdir()
    recipe = "# @package _global_\ndefaults:\n  - override /pipeline: sft\nstages:\n  sft:\n    num_train_epochs: 2\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(recipe)
    assert cli.main(["run", "experiment=mine", "--config-dir", str(tmp_path)]) == 2
    line = "mine.yaml:6:stages.sft.num_train_epochs: unknown option; here it is stages.sft.epochs"
    assert line in capfd.readouterr().err

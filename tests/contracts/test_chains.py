"""Every ordered pair of methods, on every footing: the parent's function is kept exactly, or the pair is refused."""

from __future__ import annotations

from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch

from align.checkpoints.checkpoint import Checkpoint
from align.checkpoints.compatibility import adapter_of, choose_parent_mode
from align.config.registries import adapters, stages
from align.config.schema import Load, OnParent, OnPrecisionChange
from align.roles import Bases, Role
from align.stages.base import Stage
from align.training.saving import outputs
from data_prep.core.errors import TrainingStopped, UserError
from tests.tiny_chain import (
    HOME,
    PRECISIONS,
    base,
    bases,
    checkpoint,
    fresh,
    grid_beyond,
    logits,
    made,
    read,
    shared_bytes,
)

METHODS = adapters.names()
PAIRS = list(product(METHODS, METHODS))
MODES = [mode for mode in OnParent if mode is not OnParent.auto]
CONTINUE = OnParent["continue"]
STAGES = [
    name
    for name, cls in stages.items()
    if cls.trains and cls.makes and cls.stands_on is Stage.stands_on and name not in ("sft", "pretrain")
]
"""Those that stand on a policy; the parents here are trained by `sft` itself."""


def turned(modes: list[OnParent]) -> list:
    """Every pair with one of the modes, in turn; the rest is for the grid."""
    found = []
    for number, (parent, child) in enumerate(PAIRS):
        for place, mode in enumerate(modes):
            marks = [] if place == (number + number // len(METHODS)) % len(modes) else [pytest.mark.grid]
            found.append(pytest.param(parent, child, mode, marks=marks, id=f"{parent}-{child}-{mode.name}"))
    return found


EACH_PAIR = pytest.mark.parametrize(("parent", "child"), PAIRS, ids=[f"{p}-{c}" for p, c in PAIRS])


@cache
def tuned(method: str) -> Checkpoint:
    """An SFT checkpoint of a method, trained far enough to be another function than its base."""
    run = made("sft", f"adapter={method}", "stages.sft.lr=3e-2", f"name=parent-{method}", out=HOME / "chains")
    return checkpoint(run, "sft")


def standing(parent, child, mode, change=OnPrecisionChange.refuse, load=None, **options):
    """(adapter, footing) of a child method on a parent, or None with the refusal asserted to be a UserError."""
    adapter = adapters.get(child)(**options)
    try:
        return adapter, choose_parent_mode(parent, adapter, mode, load, change)
    except UserError as refusal:
        assert "\n" not in str(refusal) and refusal.exit_code == 2
        return None


@cache
def held() -> Bases:
    """One set of bases under all roles of these tests, which must not disturb each other."""
    return bases()


_SPOKEN: dict[tuple[str, Load], torch.Tensor] = {}


def spoken(parent: Checkpoint, load: Load) -> torch.Tensor:
    """The logits of a parent that is another function than its base."""
    if (key := (parent.digest, load)) not in _SPOKEN:
        reference = held().realise(parent, "reference", load)
        assert not any(p.requires_grad for p in reference.parameters())
        bare = Role("bare", held().root(load).tree(), None)
        _SPOKEN[key] = logits(reference)
        assert (_SPOKEN[key] - logits(bare)).abs().max() > 3e-3, "or tests of chains would see nothing"
    return _SPOKEN[key]


def assert_keeps(parent: Checkpoint, adapter, found, mode: OnParent) -> None:
    """The fresh role computes what the parent computes, before any training.

    Continued or stacked the parent moves to the stage's precision; merged it stays as it was trained.
    """
    torch.manual_seed(1)
    role = held().fresh(parent, adapter, found, "policy")
    ours, theirs = logits(role), spoken(parent, Load(parent.load) if mode is OnParent.merge else found.load)
    if mode is CONTINUE:
        assert torch.equal(ours, theirs)
    else:
        size = max(1.0, float(theirs.abs().max()))
        # Another order of summation; merged, large terms are rounded into the base's weights as well.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=(1e-4 if mode is OnParent.merge else 1e-5) * size)
    torch.testing.assert_close(logits(held().start_of(parent, found, "start")), ours, rtol=0, atol=1e-5)
    assert any(p.requires_grad for p in role.parameters())


@pytest.mark.parametrize(("parent", "child", "mode"), turned(MODES))
def test_parent_is_kept_or_refused(parent, child, mode):
    below = tuned(parent)
    found = standing(below, child, mode)
    if found is None:
        return
    adapter, chosen = found
    assert chosen.mode is mode
    assert_keeps(below, adapter, chosen, chosen.mode)


@pytest.mark.parametrize(("parent", "child", "mode"), turned(MODES))
def test_a_change_of_precision_keeps_the_parent_or_is_refused(parent, child, mode):
    below = tuned(parent)
    for load in PRECISIONS:
        if load.value == below.load:
            continue
        assert standing(below, child, mode, load=load) is None or adapters.get(child)().quantization()
        found = standing(below, child, mode, OnPrecisionChange.recalibrate, load)
        if found is not None and found[1].load.value != below.load:
            assert found[1].forced
            if load is Load.fp32 and below.load == "nf4":
                assert_keeps(below, *found, found[1].mode)


@EACH_PAIR
def test_auto_takes_the_first_legal_footing(parent, child):
    below = tuned(parent)
    legal = [mode for mode in MODES if standing(below, child, mode)]
    found = standing(below, child, OnParent.auto)
    assert (found is None) == (not legal)
    if found is not None:
        assert found[1].mode is legal[0]


@pytest.mark.parametrize("method", METHODS)
def test_same_method_continues_and_other_options_do_not(method):
    below = tuned(method)
    assert standing(below, method, OnParent.auto)[1].mode is CONTINUE
    if "rank" in below.record["options"]:
        changed = standing(below, method, OnParent.auto, rank=4)
        assert changed[1].mode is OnParent.stack if adapter_of(below).traits.low_rank else changed is None
        assert standing(below, method, CONTINUE, rank=4) is None


@pytest.mark.parametrize("method", [name for name in METHODS if "dropout" in adapters.get(name).__dataclass_fields__])
def test_continuing_takes_the_new_dropout(method):
    if adapters.get(method)(dropout=0.5).check(read(base() / "config.json")):
        pytest.skip("the method allows none")
    below = tuned(method)
    adapter, found = standing(below, method, OnParent.auto, dropout=0.5)
    role = bases().fresh(below, adapter, found, "policy")
    dropped = {m.p for m in role.modules() if isinstance(m, torch.nn.Dropout) and m.p > 0}
    assert found.mode is CONTINUE and dropped == {0.5}


def test_a_footing_needs_a_parent():
    for mode in MODES:
        with pytest.raises(UserError, match="needs a parent"):
            choose_parent_mode(None, adapters.get("lora")(), mode, None, OnPrecisionChange.refuse)


def test_changing_precision_is_refused_unless_asked_for():
    refused = pytest.raises(UserError, match="precision changes")
    with refused:
        choose_parent_mode(tuned("lora"), adapters.get("qlora")(), OnParent.auto, None, OnPrecisionChange.refuse)
    with refused:
        choose_parent_mode(tuned("qlora"), adapters.get("lora")(), OnParent.auto, Load.fp32, OnPrecisionChange.refuse)
    forced = choose_parent_mode(
        tuned("lora"), adapters.get("qlora")(), OnParent.auto, None, OnPrecisionChange.recalibrate
    )
    assert forced.load is Load.nf4 and forced.forced == ("precision fp32 -> nf4",)


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param(("vera", "lora merge", "vera stack", "vera continue"), marks=pytest.mark.grid),
        ("qlora", "vera stack", "qlora stack", "qlora continue"),
        pytest.param(("full", "lora stack", "vera merge", "full merge", "lora auto"), marks=pytest.mark.grid),
        pytest.param(("lora", "full merge", "full continue", "vera stack"), marks=pytest.mark.grid),
    ],
    ids=lambda steps: "-".join(step.replace(" ", "_") for step in steps),
)
def test_long_chains_keep_their_function(steps, tmp_path):
    """Each link is trained and saved (the stage re-reads and compares it); the next starts as it ended."""
    below = tuned(steps[0])
    for number, step in enumerate(steps[1:]):
        method, mode = step.split()
        adapter, found = standing(below, method, OnParent[mode])
        assert_keeps(below, adapter, found, found.mode)
        words = [f"adapter={method}", f"stages.sft.on_parent={mode}", f"stages.sft.init={below.folder}"]
        run = made("sft", *words, "stages.sft.lr=1e-2", f"name=link{number}", out=tmp_path)
        below = checkpoint(run, "sft")
        assert below.on_parent == found.mode.name
    again = outputs(bases().realise(below, "again", Load(below.load)), below.record["probe"]["input_ids"])
    assert again == below.record["probe"]["expected"]
    below.require(bases().folder)


def test_a_second_base_is_counted():
    run = mixed("bf16-merge")
    inputs = [f"stages.ppo.init={run / 'sft'}", f"stages.ppo.reward={run / 'reward_model'}", "model.load=bf16"]
    alone = made("ppo", *inputs, "adapter=lora", "name=one-base", out=HOME / "mixed")
    one, found = (read(path / "run.json")["stages"][-1]["metrics"]["memory"] for path in (alone, run))
    assert (one["bases"], found["bases"]) == (1, 2) and found["base_bytes"] > 1.9 * one["base_bytes"]


def test_stacking_twice_shares_the_frozen_terms():
    parent = tuned("lora")
    adapter, found = standing(parent, "vera", OnParent.stack)
    roles = [held().fresh(parent, adapter, found, "policy") for _ in range(2)]
    pointers = [{b.data_ptr() for name, b in role.named_buffers() if "term_" in name} for role in roles]
    assert pointers[0] and pointers[0] == pointers[1]


MIXED = {
    "vera-lora-lora": ["stages.sft.adapter=vera", "adapter=lora"],
    "lora-vera-lora": ["adapter=lora", "stages.reward_model.adapter=vera"],
    "qlora-vera-qlora": ["adapter=qlora", "stages.reward_model.adapter=vera"],
    "full-lora-lora": ["stages.sft.adapter=full", "adapter=lora"],
    "bf16": ["adapter=lora", "model.load=bf16"],
    "bf16-stack": ["adapter=vera", "model.load=bf16", "stages.ppo.on_parent=stack"],
    "bf16-merge": ["adapter=lora", "model.load=bf16", "stages.ppo.on_parent=merge"],
}


@cache
def mixed(name: str) -> Path:
    words = ["stages.sft.lr=3e-2", "stages.reward_model.lr=1e-2", "stages.ppo.critic_warmup=0", f"name={name}"]
    return made("rlhf", *MIXED[name], *words, out=HOME / "mixed", without="evaluate")


@pytest.mark.parametrize("name", grid_beyond(MIXED, {"qlora-vera-qlora", "full-lora-lora"}))
def test_mixed_pipelines_start_ppo_as_their_parent(name):
    run = mixed(name)
    record = read(run / "run.json")
    assert record["status"] == "done" and [s["status"] for s in record["stages"]] == ["done"] * 3
    by_name = {entry["name"]: entry for entry in record["stages"]}
    step0 = by_name["ppo"]["metrics"]["step0"]
    assert step0["kl"] <= 1e-5
    if by_name["ppo"]["load"] != "bf16":
        assert step0["ratio_dev"] <= 1e-5 and step0["reward_parity"] <= 1e-4
    assert sorted(step0["grad_roles"]) == ["policy", "value"]
    assert [p["digest"] for p in by_name["ppo"]["parents"]] == [by_name[n]["digest"] for n in ("sft", "reward_model")]
    found = checkpoint(run, "ppo")
    assert {c.stage for c in found.ancestors()} == {"sft", "reward_model"}
    found.require(bases().folder)
    critic = Checkpoint.open(run / "ppo" / "value")
    assert critic.method == by_name["reward_model"]["adapter"] and critic.record["head"]
    again = outputs(bases().realise(critic, "value", Load(critic.load)), critic.record["probe"]["input_ids"])
    assert again == critic.record["probe"]["expected"]


def test_qlora_throughout_stays_on_four_bits():
    record = read(mixed("qlora-vera-qlora") / "run.json")
    assert [s["load"] for s in record["stages"]] == ["nf4"] * 3
    assert record["stages"][2]["metrics"]["memory"]["bases"] == 1


CHANGES = [("qlora", "lora", "fp32", "stack"), ("qlora", "lora", "fp32", "merge"), ("lora", "lora", "bf16", "merge")]


@pytest.mark.parametrize("words", grid_beyond(CHANGES, CHANGES[:1]), ids="-".join)
def test_ppo_after_a_change_of_precision_starts_equal(words, tmp_path):
    """Asked for with recalibrate, policy and reference are still one function at step 0."""
    parent, child, load, mode = words
    options = [f"adapter={child}", f"model.load={load}", "on_precision_change=recalibrate"]
    inputs = [f"stages.ppo.init={tuned(parent).folder}", f"stages.ppo.on_parent={mode}"]
    judge = made("reward_model", "adapter=lora", "name=judge", out=tmp_path) / "reward_model"
    try:
        run = made("ppo", *options, *inputs, f"stages.ppo.reward={judge}", "name=changed", out=tmp_path)
    except UserError as refusal:
        assert refusal.hint
        return
    except TrainingStopped as stopped:
        pytest.fail(f"legal by its footing, stopped at step 0: {stopped}")
    assert read(run / "run.json")["stages"][0]["metrics"]["step0"]["kl"] <= 1e-5


def stages_turned() -> list:
    """Every pair in every mode into every stage; by default each method on another, the stage in turn."""
    found = []
    for number, (parent, child) in enumerate(PAIRS):
        row, column = divmod(number, len(METHODS))
        for mode, stage in product([OnParent.auto, *MODES], STAGES):
            by_default = (
                mode is OnParent.auto and column == (row + 1) % len(METHODS) and stage == STAGES[row % len(STAGES)]
            )
            if by_default or mode is not OnParent.auto:
                marks = [] if by_default else [pytest.mark.grid]
                found.append(pytest.param(parent, child, mode, stage, marks=marks))
    return found


@cache
def judge(load: str) -> Path:
    """A reward model for PPO at a precision."""
    return made("reward_model", f"model.load={load}", f"name=judge-{load}", out=HOME / "judges") / "reward_model"


@pytest.mark.parametrize(("parent", "child", "mode", "stage"), stages_turned())
def test_stages_start_as_their_parent(parent, child, mode, stage, tmp_path):
    """The stage's own road: it is refused, or what was hardly trained speaks as its parent. Stages with a reference
    measure no distance from it before the first step."""
    below = tuned(parent)
    chosen = standing(below, child, mode)
    words = [f"adapter={child}", f"stages.{stage}.init={below.folder}", f"stages.{stage}.on_parent={mode.name}"]
    words += [f"stages.{stage}.lr=1e-30", f"stages.{stage}.max_steps=1"] if stage != "ppo" else []
    words += [f"stages.ppo.reward={judge(chosen[1].load.value)}"] if stage == "ppo" and chosen else []
    if chosen is None:
        with pytest.raises(UserError):
            made(stage, *words, "name=r", out=tmp_path)
        return
    saved = checkpoint(made(stage, *words, "name=r", out=tmp_path), stage)
    assert adapter_of(saved).method == child and saved.on_parent == chosen[1].mode.name
    step0 = read(tmp_path / "r" / "run.json")["stages"][0]["metrics"].get("step0", {})
    if stage == "ppo":
        assert max(step0["kl"], step0["ratio_dev"]) <= 1e-5
        return
    assert step0.get("max_log_ratio", 0.0) == 0.0
    role = held().realise(saved, "again", Load(saved.load))
    torch.testing.assert_close(logits(role), spoken(below, Load(below.load)), rtol=0, atol=3e-5)
    assert (role.head is not None) == stages.get(stage).has_head and saved.record["base"]["fingerprint"]


def test_a_stirred_role_differs_from_its_parent():
    assert not torch.allclose(logits(fresh("lora", Load.fp32)), logits(fresh("vera", Load.fp32)), atol=1e-3)


def test_the_shared_bases_are_as_they_were_loaded():
    """Runs last: every role of the tests above stood on them."""
    for load in PRECISIONS:
        assert shared_bytes(held().root(load)) == shared_bytes(bases().root(load))

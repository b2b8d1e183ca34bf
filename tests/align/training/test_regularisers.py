"""Regularisers: each by hand, each in training alone, each with any method."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
import torch

from align.cli.dispatch import main
from align.config.registries import adapters
from align.config.schema import Load
from align.inference.generation import RolloutEngine, Sampling
from align.models.packing import pack, pack_branches
from align.roles import Role
from align.stages.base import TrainingStage
from align.training.objectives import LanguageModeling, Pairwise
from align.training.regularisers import Regulariser, decayed, regularise
from reward.head import ScalarHead
from tests.tiny_chain import base, bases, fresh, legal_loads, logits, made, pipeline_words, read, refused, sentences
from tests.tiny_training import actor_critic, gradients, lora, options, pair_rows, token_rows, updater

METHODS = adapters.names()
OPTIONS = ["neftune", "hidden_drift", "embedding_drift"]


def start() -> Role:
    return Role("start", bases().root(Load.fp32).tree(), None).freeze()


def regularised(objective, role: Role, **values):
    regularise(objective, role, options(**values), start)
    return objective.train()


def first_layer_inputs(role: Role) -> list[torch.Tensor]:
    kept: list[torch.Tensor] = []
    role.tree.model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: kept.append((args[0] if args else kwargs["hidden_states"])[0].detach()),
        with_kwargs=True,
    )
    return kept


def row_hidden(role: Role, ids: list[int]) -> torch.Tensor:
    """Last hidden states of one row by the model's own forward."""
    return role.tree.model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]


# ---------------------------------------------------------------------------------------------------------- noise
def test_lengths_of_rows():
    rows = sentences(7, longest=20)
    expected = [len(row) for row in rows for _ in row]
    assert pack(rows).layout.lengths_N().tolist() == expected
    packed = pack_branches([[5, 6], [7]], [([8], [9, 10, 11]), ([12, 13], [14])])
    assert packed.layout.lengths_N().tolist() == [3, 3, 3, 5, 5, 5, 3, 3, 3, 2]


@pytest.mark.parametrize("method", METHODS)
def test_noise_is_uniform_over_the_root_of_length_times_width(method):
    role = fresh(method, legal_loads(adapters.get(method))[0])
    rows = token_rows(6)
    objective = regularised(LanguageModeling(role), role, neftune=5.0)
    inputs = first_layer_inputs(role)
    batch = objective.collate(rows)
    torch.manual_seed(3)
    objective(batch)
    objective.eval()(batch)
    noisy, plain = inputs
    torch.manual_seed(3)
    drawn = torch.empty(1, batch.packed.tokens, 32).uniform_(-1, 1)[0]
    scale = torch.tensor([5.0 / (len(row.ids) * 32) ** 0.5 for row in rows for _ in row.ids])
    own = len(noisy) - batch.packed.tokens  # virtual tokens stand first and get no noise
    torch.testing.assert_close(noisy[own:] - plain[own:], drawn * scale[:, None], rtol=0, atol=1e-6)
    assert torch.equal(noisy[:own], plain[:own])


# --------------------------------------------------------------------------------------------- drift of hidden states
def test_hidden_drift_by_hand():
    role, rows = lora(), token_rows(5)
    objective = regularised(LanguageModeling(role), role, hidden_drift=0.7)
    batch = objective.collate(rows)
    loss, numbers = objective(batch)
    total = 0.0
    for row in rows:
        gap = (row_hidden(role, row.ids) - row_hidden(start(), row.ids)).detach().double()
        total += sum(float(gap[t - 1].square().mean()) for t in range(1, len(row.ids)) if row.mask[t])
    plain, _ = objective.eval()(batch)
    assert float(numbers["penalty/hidden_drift"]) == pytest.approx(0.7 * total, rel=1e-4) and total > 0
    assert float(loss) == pytest.approx(float(plain) + 0.7 * total, rel=1e-5)
    assert float(numbers["loss"]) == pytest.approx(float(plain), rel=1e-6)


def test_hidden_drift_of_pairs_is_read_at_both_replies():
    role = lora(head=True)
    objective, rows = Pairwise(role), pair_rows(4)
    regularised(objective, role, hidden_drift=2.0)
    _, numbers = objective(objective.collate(rows))
    total = 0.0
    for row in rows:
        for reply in (row.chosen, row.rejected):
            ids = [*row.prompt, *reply]
            gap = (row_hidden(role, ids) - row_hidden(start(), ids))[-1].double()
            total += float(gap.square().mean()) / 2
    assert float(numbers["penalty/hidden_drift"]) == pytest.approx(2.0 * total, rel=1e-4)


def test_hidden_drift_holds_the_policy_alone():
    objective, rows = actor_critic()
    regularised(objective, objective.policy, hidden_drift=1.0)
    plain, _ = actor_critic()
    batch = objective.collate(rows)
    (loss, numbers), (without, _) = objective(batch), plain.train()(batch)
    loss.backward(), without.backward()
    held, free = gradients(objective), gradients(plain)
    assert float(numbers["penalty/hidden_drift"]) > 0
    assert all(torch.equal(held[name], free[name]) for name in held if name.startswith("value."))
    assert any(not torch.equal(held[name], free[name]) for name in held if name.startswith("policy."))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_held(method):
    load = legal_loads(adapters.get(method))[0]
    found = bases()
    role = fresh(method, load, found)
    ground = Role("start", found.root(load).tree(), None).freeze()
    objective = LanguageModeling(role)
    Regulariser(role, options(hidden_drift=1.0), ground).attach(objective)
    loss, numbers = objective.train()(objective.collate(token_rows(4)))
    loss.backward()
    assert float(numbers["penalty/hidden_drift"]) > 0
    assert all(p.grad is not None for p in role.parameters() if p.requires_grad)
    assert all(p.grad is None for p in ground.parameters())


@pytest.mark.parametrize("size", [1, 3, 16])
def test_penalties_do_not_depend_on_how_a_batch_is_cut(size):
    found = bases()
    role = fresh("full", Load.fp32, found)
    objective = LanguageModeling(role)
    settings = options(hidden_drift=0.5, embedding_drift=0.1)
    Regulariser(role, settings, start()).attach(objective)
    rows = token_rows(16)
    numbers = updater(objective.train(), settings, 1).step(
        [objective.collate(rows[i : i + size]) for i in range(0, 16, size)]
    )
    found_now = gradients(objective)
    whole = fresh("full", Load.fp32)
    other = LanguageModeling(whole)
    Regulariser(whole, settings, start()).attach(other)
    loss, _ = other.train()(batch := other.collate(rows))
    (loss / batch.weight).backward()
    for name, gradient in gradients(other).items():
        torch.testing.assert_close(found_now[name], gradient, rtol=1e-4, atol=1e-6)
    assert {"penalty/hidden_drift", "penalty/embedding_drift"} <= set(numbers)


# ------------------------------------------------------------------------------------------------ drift of embeddings
def test_embedding_drift_pulls_every_row_of_the_table_back():
    role = fresh("full", Load.fp32)
    objective = regularised(LanguageModeling(role), role, embedding_drift=0.3)
    batch = objective.collate(token_rows(4))
    loss, numbers = objective(batch)
    loss.backward()
    table = role.tree.get_input_embeddings().weight
    change = (table - start().tree.get_input_embeddings().weight).detach()
    with_penalty = table.grad.clone()
    role.zero_grad()
    objective.eval()(batch)[0].backward()
    torch.testing.assert_close(with_penalty - table.grad, 0.3 * batch.weight * change, rtol=1e-4, atol=1e-4)
    expected = 0.15 * batch.weight * float(change.double().square().sum())
    assert float(numbers["penalty/embedding_drift"]) == pytest.approx(expected, rel=1e-5)


# --------------------------------------------------------------------------------------------------- training alone
@pytest.mark.parametrize("option", OPTIONS)
def test_evaluation_and_rollouts_see_nothing_of_it(option):
    role = fresh("full", Load.fp32)
    rows, prompts = token_rows(4), sentences(3)
    plain = LanguageModeling(role).eval()
    batch = plain.collate(rows)
    engine = RolloutEngine(role, 1)
    expected, replies = plain(batch), engine.generate(prompts, Sampling(4, greedy=True))
    objective = regularised(LanguageModeling(role), role, **{option: 0.5})
    drawn = torch.random.get_rng_state()
    objective.eval()
    found = objective(batch)
    assert torch.equal(found[0], expected[0]) and found[1] == {}
    assert torch.equal(torch.random.get_rng_state(), drawn)
    objective.train()
    assert objective(batch)[0] != expected[0]
    again = engine.generate(prompts, Sampling(4, greedy=True))
    assert [r.logprobs for r in again] == [r.logprobs for r in replies]
    assert not role.tree.get_input_embeddings()._forward_hooks and not role.tree.model._forward_hooks


def test_nothing_stays_on_the_tree_when_a_forward_fails():
    role = lora()
    objective = regularised(LanguageModeling(role), role, neftune=5.0, hidden_drift=1.0)
    batch = objective.collate(token_rows(2))
    batch.targets_M = batch.targets_M + 10_000
    with pytest.raises((IndexError, RuntimeError)):
        objective(batch)
    assert not role.tree.get_input_embeddings()._forward_hooks and not role.tree.model._forward_hooks


def test_nothing_asked_for_nothing_added():
    objective = LanguageModeling(lora())
    regularise(objective, objective.role, TrainingStage(), lambda: pytest.fail("no start is needed"))
    assert not objective._forward_hooks and not objective._forward_pre_hooks


# ------------------------------------------------------------------------------------------------------ weight decay
def by_name(role: Role, groups) -> dict[str, float]:
    names = {id(p): name for name, p in role.named_parameters()}
    return {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}


def test_biases_and_norms_are_not_decayed():
    role = fresh("full", Load.fp32)
    role.head = ScalarHead(32)
    settings = options(weight_decay=0.1, head_decay=0.2, embedding_decay=0.3)
    found = by_name(role, decayed(role, [{"params": list(role.parameters()), "lr": 1.0}], settings))
    assert len(found) == len(list(role.parameters()))
    for name, decay in found.items():
        small = "norm" in name or name.endswith("bias")
        special = {"head.score.weight": 0.2, "carrier.model.embed_tokens.weight": 0.3}
        assert decay == (0.0 if small else special.get(name, 0.1)), name
    plain = by_name(role, decayed(role, [{"params": list(role.parameters()), "lr": 1.0}], options(weight_decay=0.1)))
    assert set(plain.values()) == {0.0, 0.1} and plain["head.score.weight"] == 0.1


@pytest.mark.parametrize("method", METHODS)
def test_groups_keep_their_rates_and_every_parameter(method):
    role = fresh(method, legal_loads(adapters.get(method))[0])
    groups = role.adapter.parameter_groups(role.carrier, 1e-3)
    parts = decayed(role, groups, options(weight_decay=0.1))
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert {id(p): part["lr"] for part in parts for p in part["params"]} == rates
    assert len(decayed(role, groups, options())) == len([group for group in groups if group["params"]])


def test_decay_is_decoupled_and_by_group():
    role = fresh("full", Load.fp32)
    settings = options(weight_decay=0.5, norm_decay=0.25)
    optimizer = torch.optim.AdamW(decayed(role, [{"params": list(role.parameters()), "lr": 0.1}], settings))
    before = {name: p.detach().clone() for name, p in role.named_parameters()}
    for parameter in role.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in role.named_parameters():
        decay = 0.25 if "norm" in name else 0.5
        torch.testing.assert_close(parameter.detach(), before[name] * (1 - 0.1 * decay))


# ----------------------------------------------------------------------------------------------------------- dropout
WITH_DROPOUT = [n for n, cls in adapters.items() if "dropout" in {item.name for item in fields(cls)}]


@pytest.mark.parametrize("method", WITH_DROPOUT)
def test_dropout_changes_training_alone(method):
    if problems := adapters.get(method)(dropout=0.5).check(read(base() / "config.json")):
        assert "does not go with" in str(problems[0]), "refused, or it works"
        return
    load = legal_loads(adapters.get(method))[0]
    role, plain = fresh(method, load, dropout=0.5), fresh(method, load)
    assert torch.equal(logits(role), logits(plain))
    ids = pack(sentences())
    role.train()
    torch.manual_seed(1)
    first, second = role.hidden(ids), role.hidden(ids)
    assert not torch.equal(first, second), "training draws anew"
    role.silence_dropout()
    assert torch.equal(role.hidden(ids), plain.train().hidden(ids)), "and PPO draws nothing"


# --------------------------------------------------------------------------------------------------------- in stages
def rows_of(run, stage):
    return [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]


def test_stages_log_penalties_of_training_alone(tmp_path):
    held = ["hidden_drift=0.5", "weight_decay=0.1", "lr=1e-2"]
    words = [f"stages.{name}.{word}" for name in ("sft", "reward_model", "ppo") for word in held]
    noise = ["stages.sft.neftune=5", "stages.reward_model.neftune=5"]
    run = made("rlhf", "adapter=lora", *words, *noise, "stages.ppo.kl_limit=1000", "name=held", out=tmp_path)
    for stage in ("sft", "reward_model", "ppo"):
        train = [row for row in rows_of(run, stage) if row["split"] == "train"]
        train = [row for row in train if stage != "ppo" or "policy/loss" in row]  # not while the policy rests
        assert all(row["penalty/hidden_drift"] >= 0 for row in train) and train[-1]["penalty/hidden_drift"] > 0
        assert not any("penalty/hidden_drift" in row for row in rows_of(run, stage) if row["split"] == "eval")


def test_the_drift_from_ones_own_start_begins_at_zero(tmp_path):
    words = ["stages.sft.hidden_drift=0.5", "stages.sft.embedding_drift=0.5", "stages.sft.lr=1e-3"]
    run = made("sft", "adapter=full", *words, "name=begin", out=tmp_path)
    first, *_, last = [row for row in rows_of(run, "sft") if row["split"] == "train"]
    assert first["penalty/hidden_drift"] == first["penalty/embedding_drift"] == 0.0
    assert last["penalty/hidden_drift"] > 0 and last["penalty/embedding_drift"] > 0


@pytest.mark.parametrize(
    ("pipeline", "word", "part"),
    [
        ("sft", "stages.sft.embedding_drift=0.1", "stages.sft.embedding_drift: lora trains no embeddings"),
        ("sft", "stages.sft.embedding_decay=0.1", "trains no embeddings"),
        ("sft", "stages.sft.head_decay=0.1", "stages.sft.head_decay: this stage trains no score head"),
        ("sft", "stages.sft.neftune=-1", "expected at least 0"),
        ("rlhf", "stages.ppo.neftune=5", "stages.ppo.neftune: noise in training forwards"),
    ],
)
def test_what_has_no_effect_is_refused(pipeline, word, part, tmp_path, capsys):
    code = main(["run", *pipeline_words(pipeline, word), f"out={tmp_path}"])
    assert part in refused(code, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())

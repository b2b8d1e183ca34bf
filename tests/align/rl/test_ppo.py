"""PPO's invariants: equal start, exact rewards by hand, an honest sampler, padding that cannot matter, one base."""

from __future__ import annotations

import json
import math

import pytest
import torch

from align.config.schema import Load
from align.functional import generalized_advantages, policy_loss, value_loss, whiten
from align.inference.generation import Reply, RolloutEngine, Sampling
from align.inference.scoring import pack_responses, score_replies
from align.models.packing import pack
from align.rl import invariants as ppo_checks
from align.rl.actor_critic import ActorCritic, ExperienceRow, PPOLoss
from align.rl.advantages import estimate
from align.rl.experience import PPORoles, RewardRule, Rollout, experience, judge, reward, statistics
from align.rl.options import Estimator, PPOOptions
from align.rl.rollouts import longest_replies
from align.roles import Role
from align.training.options import TrainingOptions
from data_prep.types import FeaturedIds, PromptTokens
from reward.head import ScalarHead
from tests.tiny import save_tiny_llama
from tests.tiny_chain import (
    bases,
    checkpoint,
    copied,
    finished,
    fresh,
    grid_beyond,
    legal_loads,
    logits,
    made,
    methods_and_loads,
    read,
    sentences,
    stirred,
)

END = 1
CLOSE = 1e-5
"""Log-probabilities and scores of size 5, summed in another order: twenty units in the last place of a float32."""
RULE = RewardRule(
    kl_coef=0.1, mean=0.0, std=1.0, clip=10.0, missing_eos_penalty=1.0, gamma=1.0, lam=1.0, temperature=1.0
)


def scored(role: Role, seed: int = 0) -> Role:
    torch.manual_seed(seed)
    role.head = ScalarHead(role.tree.config.hidden_size)
    return role


def troupe(method: str = "lora", load: Load = Load.fp32, **options) -> PPORoles:
    """Four roles on one base; policy and reference start as one function."""
    found = bases()
    policy, reference = (fresh(method, load, found, seed=1, **options) for _ in range(2))
    reward = scored(fresh(method, load, found, seed=2)).freeze()
    value = scored(fresh(method, load, found, seed=3), seed=3)
    roles = PPORoles(policy, reference.freeze(), reward, value)
    for name, role in zip(("policy", "reference", "reward", "value"), roles.all(), strict=True):
        role.name = name
        role.silence_dropout()
    return roles


def sampled(policy: Role, count: int = 6, tokens: int = 7, temperature: float = 1.0) -> tuple[list, list[Reply]]:
    prompts = sentences(count)
    generator = torch.Generator().manual_seed(5)
    return prompts, RolloutEngine(policy, END).generate(prompts, Sampling(tokens, temperature), generator)


def gather(
    roles: PPORoles, prompts, replies, rule=RULE, chunk=100, trusted=False
) -> tuple[list[ExperienceRow], dict[str, float]]:
    """Experience of the replies, and what is logged of it."""
    rollout = Rollout([PromptTokens(ids, "", f"p:{i}") for i, ids in enumerate(prompts)], replies)
    judged = judge(roles, rollout, rule.temperature, TrainingOptions(micro_batch_size=chunk), trusted)
    rewards = reward(judged, rollout, rule)
    advantages = estimate(rewards, judged, rule, lambda total: total)
    stats = statistics(rollout, judged, rewards, advantages, rule)
    return experience(rollout, judged, advantages), stats


# ---------------------------------------- equal start
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_ratio_is_one_and_kl_zero_before_the_first_update(dropout, temperature):
    """Also with a dropout that was on during supervised tuning: PPO turns it off everywhere."""
    from dataclasses import replace

    roles = troupe(dropout=dropout)
    prompts, replies = sampled(roles.policy, temperature=temperature)
    rule = replace(RULE, temperature=temperature)
    rows, stats = gather(roles, prompts, replies, rule)
    assert stats["objective/kl_k1"] == 0 and stats["rollout/kl_max"] == 0
    assert stats["rollout/logprob_gap"] < 1e-5
    objective = ActorCritic(roles.policy, roles.value, PPOLoss(temperature=temperature))
    objective.train()
    for size in (1, 2, 6):
        for start in range(0, 6, size):
            _, numbers = objective(objective.collate(rows[start : start + size]))
            assert float(numbers["max_ratio_dev"]) <= CLOSE
            assert float(numbers["policy/clipfrac"]) == 0
    again, _ = gather(roles, prompts, replies, rule, chunk=2)
    assert [row.logprobs for row in again] == [pytest.approx(row.logprobs, abs=CLOSE) for row in rows]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_trusted_rollout_is_read_by_the_policy_in_part(temperature, monkeypatch):
    """Of eighteen replies nine are read again; what the others were sampled with is what training computes."""
    from dataclasses import replace

    roles, rule, read = troupe(), replace(RULE, temperature=temperature), []
    prompts, replies = sampled(roles.policy, count=18, temperature=temperature)
    every, plain = gather(roles, prompts, replies, rule, chunk=4)
    hidden = roles.policy.hidden
    monkeypatch.setattr(roles.policy, "hidden", lambda packed: read.append(packed.tokens) or hidden(packed))
    rows, stats = gather(roles, prompts, replies, rule, chunk=4, trusted=True)
    assert sum(read) == sum(len(prompts[i]) + len(replies[i].ids) for i in range(0, 18, 2))
    assert [row.logprobs for row in rows] == [pytest.approx(reply.logprobs, abs=1e-6) for reply in replies]
    assert [row.logprobs for row in rows] == [pytest.approx(row.logprobs, abs=CLOSE) for row in every]
    assert stats["objective/entropy"] == plain["objective/entropy"] > 0
    assert [row.advantages for row in rows] == [pytest.approx(row.advantages, abs=1e-4) for row in every]


def test_a_trusted_rollout_that_is_off_is_computed_again():
    roles = troupe()
    prompts, replies = sampled(roles.policy, count=9)
    expected, _ = gather(roles, prompts, replies)
    replies[8].logprobs[0] -= 0.01
    rows, stats = gather(roles, prompts, replies, trusted=True)
    assert [row.logprobs for row in rows] == [row.logprobs for row in expected]
    assert stats["rollout/logprob_gap"] == pytest.approx(0.01, abs=1e-5)


def test_attention_dropout_of_the_base_is_off_too(tmp_path):
    """A configuration value that is no module: nothing of it may reach a ratio."""
    folder = save_tiny_llama(tmp_path / "base", seed=3)
    config = read(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}), encoding="utf-8")
    for method in ("lora", "full"):
        role = fresh(method, Load.fp32, bases(folder)).silence_dropout().train()
        with torch.no_grad():
            first, second = (role.hidden(pack(sentences())) for _ in range(2))
        assert torch.equal(first, second)


def test_a_policy_that_is_not_its_reference_is_stopped():
    from data_prep.core.errors import TrainingStopped

    roles = troupe()
    stirred(roles.policy, seed=8)
    _, stats = gather(roles, *sampled(roles.policy))
    with pytest.raises(TrainingStopped, match="before the first update"):
        ppo_checks.require_equal_start(stats, {}, exact=True)


# ---------------------------------------- reward by hand
class Scripted(Role):
    """A role whose scores are a function of the token and its place, to compute rewards by hand."""

    def scores(self, packed, index):
        return packed.ids_1N[0, index].float() / 100


SHAPES = [
    # reply lengths, finished
    ([3], [True]),
    ([1], [False]),
    ([1, 4], [True, False]),
    ([5, 2, 3], [False, True, True]),
    ([2, 2, 2, 2], [True, True, False, False]),
    ([7, 1, 6], [True, True, True]),
]


@pytest.mark.parametrize(("lengths", "finished_"), SHAPES, ids=[str(shape[0]) for shape in SHAPES])
@pytest.mark.parametrize("lam", [1.0, 0.9])
def test_rewards_advantages_and_returns_by_hand(lengths, finished_, lam):
    """Score once, at the last token; KL at every token; the penalty where the reply did not end; plain loops."""
    from dataclasses import replace

    roles = troupe()
    stirred(roles.policy, seed=4)
    roles.reward.__class__ = roles.value.__class__ = Scripted
    rule = replace(RULE, mean=0.3, std=0.5, clip=1.5, kl_coef=0.2, gamma=0.97, lam=lam, missing_eos_penalty=0.7)
    prompts = sentences(len(lengths))
    found = sentences(len(lengths), seed=3, longest=40)
    replies = [Reply((ids * 3)[:n], [-5.0] * n, done) for ids, n, done in zip(found, lengths, finished_, strict=True)]
    rows, stats = gather(roles, prompts, replies, rule)
    raw = []
    for prompt, reply, row in zip(prompts, replies, rows, strict=True):
        ids, n = [*prompt, *reply.ids], len(reply.ids)
        ours, theirs = (
            torch.log_softmax(logits(role, [ids]), -1)[len(prompt) - 1 : -1].gather(1, torch.tensor(reply.ids)[:, None])
            for role in (roles.policy, roles.reference)
        )
        kl = (ours - theirs)[:, 0].tolist()
        score = max(-1.5, min(1.5, (reply.ids[-1] / 100 - 0.3) / 0.5)) - (0.0 if reply.finished else 0.7)
        rewards = [-0.2 * k for k in kl]
        rewards[-1] += score
        values = [token / 100 for token in ids[len(prompt) - 1 : -1]]
        advantages, running = [0.0] * n, 0.0
        for t in reversed(range(n)):
            after = values[t + 1] if t + 1 < n else 0.0
            running = rewards[t] + 0.97 * after - values[t] + 0.97 * lam * running
            advantages[t] = running
        assert row.returns == pytest.approx([a + v for a, v in zip(advantages, values, strict=True)], abs=1e-4)
        assert row.values == pytest.approx(values, abs=CLOSE)
        assert row.logprobs == pytest.approx(ours[:, 0].tolist(), abs=CLOSE)
        raw += advantages
    mean = sum(raw) / len(raw)
    deviation = math.sqrt(sum((a - mean) ** 2 for a in raw) / len(raw))
    white = [a for row in rows for a in row.advantages]
    if len(raw) > 1 and deviation > 1e-3:
        assert white == pytest.approx([(a - mean) / deviation for a in raw], abs=2e-3)
    assert stats["response/eos_rate"] == pytest.approx(sum(finished_) / len(finished_))
    assert stats["response/len_mean"] == pytest.approx(sum(lengths) / len(lengths))


def test_nan_outside_the_mask_is_harmless():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    clean = torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.0, 0.0]])
    for poison in (float("nan"), float("inf"), 1e9):
        dirty = torch.where(mask, clean, torch.full_like(clean, poison))
        for ours, theirs in zip(
            generalized_advantages(dirty, dirty, mask, 0.9, 0.8),
            generalized_advantages(clean, clean, mask, 0.9, 0.8),
            strict=True,
        ):
            assert torch.equal(ours, theirs)
        assert torch.equal(whiten(dirty, mask), whiten(clean, mask))


def test_losses_of_one_token_by_hand():
    loss, ratio, clipped = policy_loss(torch.tensor(-1.0), torch.tensor(-1.5), torch.tensor(2.0), 0.2)
    assert float(ratio) == pytest.approx(math.exp(0.5))
    assert float(loss) == pytest.approx(-2.0 * 1.2) and bool(clipped)
    loss, *_ = policy_loss(torch.tensor(-1.0), torch.tensor(-1.5), torch.tensor(-2.0), 0.2)
    assert float(loss) == pytest.approx(2.0 * math.exp(0.5)), "a worse action is never protected by the clip"
    loss, clipped = value_loss(torch.tensor(2.0), torch.tensor(1.0), torch.tensor(3.0), 0.2)
    assert float(loss) == pytest.approx(0.5 * (1.2 - 3.0) ** 2) and bool(clipped)


# ---------------------------------------- reward, roles, memory
def test_scores_on_ppos_path_are_those_of_the_reward_models_evaluation():
    """Alone, in any batch, and by the pairwise objective that shares the prompt."""
    from align.training.objectives import Pairwise
    from data_prep.types import PairTokens

    role = scored(fresh("vera", Load.fp32, seed=2)).freeze()
    found = sentences(18, longest=16)
    rows = [PairTokens(found[3 * i], found[3 * i + 1], found[3 * i + 2], str(i), None) for i in range(6)]
    objective = Pairwise(role)
    batch = objective.collate(rows)
    chosen, rejected = role.scores(batch.packed, torch.cat([batch.chosen_P, batch.rejected_P])).chunk(2)
    pairs = [(row.prompt, side) for row in rows for side in (row.chosen, row.rejected)]
    wanted = torch.stack([chosen, rejected], 1).reshape(-1).tolist()
    for chunk in (1, 5, 12):
        assert score_replies(role, pairs, chunk) == pytest.approx(wanted, abs=CLOSE)
    assert [score_replies(role, [pair], 1)[0] for pair in pairs] == pytest.approx(wanted, abs=CLOSE)


def test_a_score_is_read_at_the_replies_last_token():
    role = scored(fresh("lora", Load.fp32)).freeze()
    prompt, reply = sentences(1)[0], [40, 41, END]
    whole = role.head(role.hidden(pack([[*prompt, *reply]])))
    assert score_replies(role, [(prompt, reply)], 1)[0] == pytest.approx(float(whole[-1]), abs=CLOSE)
    batch = pack_responses([(prompt, reply)])
    assert batch.targets_M.tolist() == reply
    assert batch.packed.ids_1N[0, batch.source_M].tolist() == [prompt[-1], *reply[:-1]]


def test_replies_to_one_prompt_share_its_tokens():
    """Wherever they stand in the batch; the loss and its gradients are those of rows computed alone."""
    roles = troupe()
    objective = ActorCritic(stirred(roles.policy), stirred(roles.value), PPOLoss())
    one, other = sentences(2)
    draw = torch.Generator().manual_seed(2)
    rows = [
        ExperienceRow(prompt, list(range(9, 9 + size)), *torch.randn(4, size, generator=draw).tolist())
        for prompt, size in ((one, 3), (other, 2), (one, 5), (one, 1))
    ]
    batch = objective.collate(rows)
    assert batch.packed.tokens == len(one) + len(other) + 11
    assert batch.targets_M.tolist() == [token for row in rows for token in row.reply]
    assert batch.packed.ids_1N[0, batch.last_B].tolist() == [row.reply[-1] for row in rows]
    learned = [p for role in roles.trained().values() for p in role.parameters() if p.requires_grad]
    together = torch.autograd.grad(objective(batch)[0], learned)
    alone = torch.autograd.grad(sum(objective(objective.collate([row]))[0] for row in rows), learned)
    for found, wanted in zip(together, alone, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_prompts_of_other_features_are_not_shared():
    plain = [5, 6, 7]
    prompts = [plain, FeaturedIds(plain, "x"), FeaturedIds(plain, "y"), FeaturedIds(plain, "x")]
    pairs = [(prompt, [8]) for prompt in prompts]
    batch = pack_responses(pairs)
    assert batch.packed.tokens == 3 * 3 + 4
    assert batch.packed.features is not None
    row_M = batch.packed.features.row_N[batch.source_M]
    assert [batch.packed.features.values[row] for row in row_M.tolist()] == [None, "x", "y", "x"]
    assert pack_responses(pairs, apart=True).packed.tokens == 4 * 4


def test_a_plan_shares_prompts_where_every_update_does():
    """Several minibatches are drawn from all replies: the largest pass has each prompt for itself."""
    prompts = [PromptTokens([5] * size, "", str(size)) for size in (2, 9, 4, 3)]
    found = []
    for minibatches in (1, 2):
        options = PPOOptions(
            advantage=Estimator.rloo, batch_size=8, group_size=2, minibatches=minibatches, max_new_tokens=3, updates=1
        )
        found.append([row.id for row in longest_replies(prompts, options, seed=0)])
    together, apart = found
    assert together[::2] == together[1::2] == apart[:4] == apart[4:] and sorted(apart[:4]) == ["2", "3", "4", "9"]


def test_frozen_roles_do_not_change_and_a_change_is_found():
    from data_prep.core.errors import TrainingStopped

    roles = troupe()
    before = ppo_checks.adapter_digests(roles)
    objective = ActorCritic(roles.policy, roles.value, PPOLoss())
    rows, _ = gather(roles, *sampled(roles.policy))
    optimizer = torch.optim.Adam([p for p in objective.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        objective(objective.collate(rows))[0].backward()
        optimizer.step()
    for role in (roles.reference, roles.reward):
        assert all(p.grad is None and not p.requires_grad for p in role.parameters())
    ppo_checks.require_unchanged(roles, before)
    assert not torch.equal(logits(roles.policy), logits(roles.reference))
    with torch.no_grad():
        next(p for name, p in roles.reference.named_parameters() if "lora_" in name).add_(1e-6)
    with pytest.raises(TrainingStopped, match="reference"):
        ppo_checks.require_unchanged(roles, before)


def test_the_saved_reference_and_reward_are_untouched_by_a_run(tmp_path):
    run = copied(finished(), tmp_path)
    record = read(run / "run.json")
    for name in ("sft", "reward_model"):
        checkpoint(run, name).check_files()
    parents = {p["role"]: p["digest"] for p in read(run / "ppo" / "checkpoint.json")["parents"]}
    assert parents == {"init": record["stages"][0]["digest"], "reward": record["stages"][1]["digest"]}


MEMORY = sorted({method for method, load in methods_and_loads() if load in (Load.fp32, Load.nf4) and method != "full"})


OFTEN = ("lora", "qlora")
"""Measured in every run of the tests; the others in `make test-grid`."""


def memory_of(method: str) -> dict[str, float]:
    run = finished() if method == "lora" else finished(f"adapter={method}")
    return read(run / "run.json")["stages"][2]["metrics"]["memory"]


@pytest.mark.parametrize("method", grid_beyond(MEMORY, OFTEN))
def test_one_base_and_at_most_eight_thirds_beside_it(method):
    """Against a count of its own: storages of base, adapters and Adam's two moments.

    VeRA's frozen projections stand once for all four adapters; LoRA-FA's frozen A belongs to each adapter.
    """
    found = memory_of(method)
    load = legal_loads(type(fresh(method, Load.nf4 if method == "qlora" else Load.fp32).adapter))[0]
    held = bases().root(load)
    pointers = {}
    for tensor in [*held.model.parameters(), *held.model.buffers()]:
        pointers[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    assert found["bases"] == 1 and found["base_bytes"] >= sum(pointers.values())
    if load is Load.fp32:
        assert found["base_bytes"] == sum(pointers.values())
    else:
        assert found["base_bytes"] < 0.7 * sum(s.nbytes for s in bases().root(Load.fp32).model.parameters())
    role = fresh(method, load)
    trained = sum(p.nbytes for p in role.parameters() if p.requires_grad)
    brought = 4 * role.adapter.count(read(bases().folder / "config.json")).frozen
    assert found["sft_bytes"] == pytest.approx(3 * trained + brought, rel=0.01)
    copies = 4 if method == "lora_fa" else 1
    assert found["beside_bytes"] == pytest.approx(8 * trained + copies * brought, rel=0.01)
    assert found["ratio"] == pytest.approx(found["beside_bytes"] / found["sft_bytes"])
    assert found["ratio"] <= (3 if method == "lora_fa" else 8 / 3) + 1e-9
    assert found["head_bytes"] == 2 * (32 + 1) * 4


def test_gradient_checkpointing_recomputes_in_ppo_too(tmp_path, monkeypatch):
    from transformers import modeling_utils

    calls = []
    original = modeling_utils.checkpoint
    monkeypatch.setattr(modeling_utils, "checkpoint", lambda *a, **k: calls.append(1) or original(*a, **k))
    chain = finished()
    words = [f"stages.ppo.init={chain / 'sft'}", f"stages.ppo.reward={chain / 'reward_model'}"]
    words += ["stages.ppo.updates=1", "stages.ppo.critic_warmup=0"]
    run = made("ppo", *words, "stages.ppo.gradient_checkpointing=true", "name=g", out=tmp_path)
    assert calls
    plain = made("ppo", *words, "name=p", out=tmp_path)
    first, second = (read(folder / "run.json")["stages"][0]["metrics"] for folder in (run, plain))
    assert first["step0"]["ratio_dev"] <= 1e-5
    assert first["policy/loss"] == pytest.approx(second["policy/loss"], abs=1e-5)


def test_critic_warm_up_leaves_the_policy_alone(tmp_path, monkeypatch):
    """Of three updates the first is warm-up: the policy moves after the second, the critic at once."""
    from align.rl import ppo

    chain, seen = finished(), []

    def watch(roles, *rest):
        trained = (roles.policy, roles.value)
        seen.append([{name: p.detach().clone() for name, p in role.named_parameters()} for role in trained])
        return judge(roles, *rest)

    monkeypatch.setattr(ppo, "judge", watch)
    words = [f"stages.ppo.init={chain / 'sft'}", f"stages.ppo.reward={chain / 'reward_model'}"]
    words += ["stages.ppo.updates=3", "stages.ppo.lr=1e-2", "stages.ppo.schedule=constant"]
    made("ppo", *words, "name=w", out=tmp_path)

    def moved(role: int, update: int) -> bool:
        return any(not torch.equal(p, seen[update + 1][role][name]) for name, p in seen[update][role].items())

    assert not moved(0, 0) and moved(0, 1)
    assert moved(1, 0) and moved(1, 1)

"""Whole PPO runs against a reference of their own: separate full copies of the model in float64, one row at a time.

The reference knows the replies that the run sampled, the weights that its roles began with, and its options. It has no
packing, no shared base, no adapter library: every role is a stock model whose weights are W + scale B A, and every
formula stands here once more as a loop over tokens.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from align.rl.rollouts import Rollouts
from align.stages.ppo import PPO
from align.training.optimizer import Updater
from tests.align.rl.test_controls import ppo, train_rows
from tests.tiny_chain import base, checkpoint, finished

CLOSE = 1e-6
"""Weights that moved by 5e-4 and more, in float32 against float64; Adam's `eps` is large enough that a gradient's last
digits do not decide the step of a weight that hardly has one."""
LOSSES_CLOSE = 5e-6
"""Losses, beside 1: a log-probability in float32 is good for 1e-6, and advantages that are not whitened multiply it."""
SHAPE = ["batch_size=8", "minibatches=2", "ppo_epochs=2", "max_new_tokens=6", "monitor=off"]
STEERED = ["kl_coef=0.1", "kl_target=0.01", "kl_horizon=2", "max_approx_kl=100", "kl_limit=1000", "temperature=0.8"]
LOSS = [
    "eps=1e-3",
    "clip=0.005",
    "clip_high=0.008",
    "dual_clip=3",
    "value_clip=0.05",
    "value_coef=0.7",
    "gamma=0.97",
    "lr=5e-4",
]
MORE = {
    "gae": ["updates=3", "critic_warmup=1"],
    "rloo": ["updates=2", "group_size=4"],
    "grpo": ["updates=2", "group_size=4"],
    "reinforce_pp": ["updates=2", "group_size=4", "ptx_coef=0.3", "ema_decay=0.6"],
}


class Copy:
    """A role as a model of its own in float64; `factors` are its trained matrices, `head` its weight and bias."""

    def __init__(self, role: Any) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(base(), dtype=torch.float64, attn_implementation="eager")
        self.weights = {name: p.detach() for name, p in self.model.named_parameters()}
        self.scale = role.adapter.alpha / role.adapter.rank
        held = {name: p.detach().double().clone() for name, p in role.named_parameters() if "lora_" in name}
        self.factors = {name: p.requires_grad_() for name, p in held.items()}
        self.head = [p.detach().double().clone().requires_grad_() for p in role.head.parameters()] if role.head else []

    def merged(self) -> dict[str, Tensor]:
        found = dict(self.weights)
        for name, down in self.factors.items():
            if ".lora_A." in name:
                place = name.removeprefix("carrier.base_model.model.").partition(".lora_A.")[0] + ".weight"
                up = self.factors[name.replace(".lora_A.", ".lora_B.")]
                found[place] = found[place] + self.scale * up @ down
        return found

    def reply(self, prompt: list[int], reply: list[int], temperature: float) -> Tensor:
        """Log-probability of every reply token."""
        rows = functional_call(self.model, self.merged(), (torch.tensor([[*prompt, *reply]]),)).logits[0]
        every = torch.log_softmax(rows[len(prompt) - 1 : -1] / temperature, -1)
        return torch.stack([every[t, token] for t, token in enumerate(reply)])

    def language(self, row: Any) -> Tensor:
        """Minus the log-probability of the supervised tokens of a conversation, summed."""
        rows = functional_call(self.model, self.merged(), (torch.tensor([list(row.ids)]),)).logits[0]
        every = torch.log_softmax(rows[:-1], -1)
        return -sum(every[t - 1, row.ids[t]] for t in range(1, len(row.ids)) if row.mask[t])

    def scores(self, prompt: list[int], reply: list[int]) -> Tensor:
        """The head's output at every position."""
        kwargs = {"input_ids": torch.tensor([[*prompt, *reply]]), "output_hidden_states": True}
        hidden = functional_call(self.model, self.merged(), (), kwargs).hidden_states[-1][0]
        return (hidden @ self.head[0].T + self.head[1])[:, 0]

    def trained(self) -> list[Tensor]:
        return [*self.factors.values(), *self.head]


class Recorder:
    """What a run did: replies, steps, and the roles with their first and last weights."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rollouts: list[Any] = []
        self.steps: list[dict[str, float]] = []
        sample, step, make = Rollouts.sample, Updater.step, PPO._updater

        def sampled(rollouts: Rollouts, update: int) -> Any:
            self.rollouts.append(sample(rollouts, update))
            return self.rollouts[-1]

        def stepped(updater: Updater, *window: Any, **more: Any) -> dict[str, float]:
            self.steps.append(step(updater, *window, **more))
            return self.steps[-1]

        def begun(stage: PPO, context: Any, roles: Any) -> Updater:
            self.options, self.roles, self.lr, self.seed = stage, roles, context.lr, context.seed
            self.norm = context.reward.record["reward_norm"]
            self.talk = context.rows("conversations").train
            self.copies = {role.name: Copy(role) for role in roles.all()}
            return make(stage, context, roles)

        monkeypatch.setattr(Rollouts, "sample", sampled)
        monkeypatch.setattr(Updater, "step", stepped)
        monkeypatch.setattr(PPO, "_updater", begun)


def advantages(o: PPO, rewards: list[list[float]], values: list[list[float]]) -> tuple[list[Any], list[Any]]:
    """Advantages and returns of every token, as the definitions have them."""
    size, name = o.replies_per_prompt, o.advantage.value
    whole = [sum(row) for row in rewards]
    groups = [[whole[j] for j in range(len(whole)) if j // size == i // size] for i in range(len(whole))]
    found, returns = [], []
    for i, (row, value) in enumerate(zip(rewards, values, strict=True)):
        n = len(row)
        if name == "gae":
            delta = [row[t] + (o.gamma * value[t + 1] if t + 1 < n else 0.0) - value[t] for t in range(n)]
            own = [sum((o.gamma * o.lam) ** k * delta[t + k] for k in range(n - t)) for t in range(n)]
        elif name == "rloo":
            own = [whole[i] - (sum(groups[i]) - whole[i]) / (size - 1)] * n
        elif name == "grpo":
            own = [(whole[i] - np.mean(groups[i])) / (np.std(groups[i], ddof=1) + 1e-4)] * n
        else:
            less = np.mean(groups[i]) if size > 1 else 0.0
            own = [sum(o.gamma**k * row[t + k] for k in range(n - t)) - less for t in range(n)]
        found.append(own)
        returns.append([a + v for a, v in zip(own, value, strict=True)])
    if name in ("gae", "reinforce_pp"):
        every = np.array([x for row in found for x in row])
        found = [[(x - every.mean()) / math.sqrt(every.var() + 1e-8) for x in row] for row in found]
    return found, returns


def losses(o: PPO, new: Tensor, old: list[float], advantage: list[float]) -> Tensor:
    """The clipped surrogate, summed over a reply's tokens."""
    total = torch.zeros((), dtype=torch.float64)
    for t, a in enumerate(advantage):
        ratio = torch.exp(new[t] - old[t])
        loss = torch.maximum(-a * ratio, -a * ratio.clamp(1 - o.clip, 1 + (o.clip_high or o.clip)))
        if a < 0 and o.dual_clip:
            loss = loss.clamp(max=-a * o.dual_clip)
        total = total + loss
    return total


def value_losses(o: PPO, new: Tensor, old: list[float], returns: list[float], clip: float) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for t, wanted in enumerate(returns):
        error = (new[t] - wanted) ** 2
        if clip:
            held = old[t] + torch.clamp(new[t] - old[t], -clip, clip)
            error = torch.maximum(error, (held - wanted) ** 2)
        total = total + error / 2
    return total


def judged(run: Recorder, rollout: Any, kl_coef: float) -> tuple[list[Any], ...]:
    """Prompts and replies, log-probabilities, values, rewards of every token, and the KL of every reply."""
    o, copies = run.options, run.copies
    pairs, old, values, rewards, kl = [], [], [], [], []
    for prompt, reply in zip(rollout.prompts, rollout.replies, strict=True):
        pair = (list(prompt.ids), list(reply.ids))
        ours, theirs = (copies[name].reply(*pair, o.temperature).tolist() for name in ("policy", "reference"))
        score = (float(copies["reward"].scores(*pair)[-1]) - run.norm["mean"]) / run.norm["std"]
        row = [-kl_coef * (a - b) for a, b in zip(ours, theirs, strict=True)]
        row[-1] += min(max(score, -o.reward_clip), o.reward_clip) - (0 if reply.finished else o.missing_eos_penalty)
        critic = copies.get("value")
        values.append(critic.scores(*pair)[len(pair[0]) - 1 : -1].tolist() if critic else [0.0] * len(row))
        pairs.append(pair)
        old.append(ours)
        rewards.append(row)
        kl.append(sum(a - b for a, b in zip(ours, theirs, strict=True)))
    return pairs, old, values, rewards, kl


def followed(run: Recorder, kl_coefs: list[float]) -> dict[str, float]:
    """Go the run's way in float64; the largest difference met, by name."""
    o, copies = run.options, run.copies
    policy, critic = copies["policy"], copies.get("value")
    adam = {"betas": (0.9, o.beta2), "eps": o.eps, "weight_decay": 0.0}
    optimizers = [torch.optim.AdamW(role.trained(), lr=0.0, **adam) for role in (policy, critic) if role]
    peaks = [run.lr, run.lr * o.value_lr_ratio]
    kl_coef, worst, done = o.kl_coef, {}, 0
    average = [p.detach().clone() for p in policy.trained()]

    def note(name: str, ours: float, theirs: float) -> None:
        worst[name] = max(worst.get(name, 0.0), abs(ours - theirs) / max(1.0, abs(theirs)))

    for update in range(o.updates):
        warming = update < o.warmup_updates
        note("kl_coef", kl_coefs[update], kl_coef)
        with torch.no_grad():
            pairs, old, values, rewards, kl = judged(run, run.rollouts[update], kl_coef)
        better, returns = advantages(o, rewards, values)
        talk = [
            run.talk[int(i)] for i in np.random.default_rng([run.seed, update, 0, 1]).choice(len(run.talk), 8, False)
        ]
        for epoch in range(o.ppo_epochs):
            order = np.random.default_rng([run.seed, update, epoch, 0]).permutation(len(pairs))
            for part in np.array_split(order, o.minibatches):
                tokens = sum(len(old[i]) for i in part)
                ours = sum(losses(o, policy.reply(*pairs[i], o.temperature), old[i], better[i]) for i in part) / tokens
                total = ours * (0.0 if warming else 1.0)
                if critic:
                    clip = 0.0 if warming else o.value_clip
                    theirs = sum(
                        value_losses(
                            o, critic.scores(*pairs[i])[len(pairs[i][0]) - 1 : -1], values[i], returns[i], clip
                        )
                        for i in part
                    )
                    total = total + o.value_coef * theirs / tokens
                    note("value/loss", run.steps[done]["value/loss"], float(theirs) / tokens)
                if o.ptx_coef:
                    supervised = sum(sum(talk[i].mask[1:]) for i in part)
                    language = sum(policy.language(talk[i]) for i in part) / supervised
                    total = total + o.ptx_coef * language
                    note("ptx/loss", run.steps[done]["policy/ptx_loss"], float(language))
                for optimizer in optimizers:
                    optimizer.zero_grad()
                total.backward()
                for place, role in enumerate(role for role in (policy, critic) if role):
                    norm = float(torch.nn.utils.clip_grad_norm_(role.trained(), o.max_grad_norm))
                    if not (place == 0 and warming):
                        note("grad_norm", run.steps[done]["grad_norm_1" if place else "grad_norm"], norm)
                        optimizers[place].param_groups[0]["lr"] = peaks[place] * (1 - done / len(run.steps))
                        optimizers[place].step()
                if not warming:
                    note("policy/loss", run.steps[done]["policy/loss"], float(ours))
                done += 1
        if o.kl_target and not warming:
            kl_coef *= math.exp(max(-1.0, min(1.0, float(np.mean(kl)) / o.kl_target - 1)) / o.kl_horizon)
        average = [
            o.ema_decay * e + (1 - o.ema_decay) * p.detach() for e, p in zip(average, policy.trained(), strict=True)
        ]
    for own, e in zip(policy.trained(), average, strict=True):
        own.data.copy_(e)
    return worst


@pytest.mark.parametrize("name", ["gae", "rloo", "grpo", "reinforce_pp"])
def test_a_run_is_the_one_that_the_reference_makes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished()  # made before anything is recorded
    run = Recorder(monkeypatch)
    folder = ppo(tmp_path, *SHAPE, *STEERED, *LOSS, *MORE[name], f"advantage={name}", "name=r")
    assert checkpoint(finished(), "sft").method == "lora", "the copies are made of W + scale B A"
    first = {role: [p.detach().clone() for p in copy.trained()] for role, copy in run.copies.items()}
    worst = followed(run, [row["objective/kl_coef"] for row in train_rows(folder)])
    assert len(run.steps) == 4 * run.options.updates and {"kl_coef", "policy/loss", "grad_norm"} <= worst.keys()
    for role in run.roles.all():
        ours = [p.detach().double() for n, p in role.named_parameters() if "lora_" in n or n.startswith("head")]
        theirs = run.copies[role.name].trained()
        gaps = [float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)]
        moved = max(float((a - b).abs().max()) for a, b in zip(ours, first[role.name], strict=True))
        worst[role.name] = max(gaps)
        assert (moved > 5e-4) == (role.name in run.roles.trained()), (role.name, moved)
    clipped = [step.get("policy/clipfrac", 0.0) for step in run.steps]
    assert max(clipped) > 0, "the clip must have been at work"
    for key, gap in worst.items():
        assert gap <= (LOSSES_CLOSE if key.endswith("/loss") else CLOSE), (key, worst)

"""What must hold in every PPO run, checked while it runs: equal start, exact ratios, frozen roles, one base.

Before the first update pi = pi_old = q, so that log pi_old - log q is 0 at every token and rho_t is 1 in the first
minibatch (a check of "The 37 Implementation Details of Proximal Policy Optimization", ICLR blog track
2022). Symbols are those of `align/rl/__init__.py`.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from align.inference.scoring import score_replies
from align.models.sharding import held
from align.models.shared_base import storages
from align.rl.experience import GAP, PPORoles
from align.rl.served_rollouts import FLAGS
from align.roles import Bases, Role
from align.training.optimizer import is_narrow
from data_prep.core.errors import TrainingStopped

if TYPE_CHECKING:
    from align.checkpoints.checkpoint import Checkpoint
    from align.rl.options import PPOOptions
    from align.training.context import StageContext
    from align.training.optimizer import Updater

TOLERANCE = 1e-5
"""Mean KL, and |ratio - 1| where one processor takes all products in float32."""
REORDERED = 1e-3
"""|ratio - 1| in float32 on a device, whose kernels add up in an order that the batch's shape decides."""
COARSE = 4e-3
"""Mean |ratio - 1| where products are rounded to bfloat16, whose unit in the last place is 2^-8."""


def require_equal_start(stats: dict[str, float], step0: dict[str, Any], exact: bool) -> None:
    """Policy and reference are the same function before the first update: every token's |log p - log q| is tiny."""
    step0["kl"] = abs(stats["objective/kl_k1"])
    step0["kl_max_token"] = stats["rollout/kl_max"]
    if step0["kl"] > TOLERANCE:
        raise TrainingStopped(
            f"KL(policy, reference) is {step0['kl']:.2e} before the first update (at most {TOLERANCE})",
            code="unequal_start",
            hint="the policy does not start as its parent; report this with the run's recipe.yaml",
        )
    step0["rollout_gap"] = stats["rollout/logprob_gap"]
    if exact and step0["rollout_gap"] > GAP:
        raise TrainingStopped(
            f"the rollout's log-probabilities are {step0['rollout_gap']:.2e} off those trained with (at most {GAP})",
            code="rollout_gap",
        )


def require_near(stats: dict[str, float], options: PPOOptions, update: int) -> None:
    """Servers sample from the policy that is trained, up to the precision of their products and what they are ahead."""
    gap, allowed = stats.get("rollout/logprob_gap_mean", 0.0), options.gap_at(update)
    if gap > allowed:
        raise TrainingStopped(
            f"the servers' log-probabilities are {gap:.2e} nats a token off those trained with, in the mean "
            f"(at most {allowed:.2g}: rollout_gap is {options.rollout_gap:g})",
            code="rollout_gap",
            hint=f"let them have the stage's base, precision and adapter, and start them with {FLAGS}",
        )


def record_first_minibatch(numbers: dict[str, float], context: StageContext, step0: dict[str, Any]) -> None:
    """Ratios of the first minibatch are 1: each where products are taken in float32, on average elsewhere.

    Records which roles have gradients (grad_norm is the policy's, grad_norm_1 the value role's), and what each ratio
    may differ by, which is None where only their mean is bounded.
    """
    step0["ratio_dev"], step0["ratio_dev_mean"] = numbers["max_ratio_dev"], numbers["ratio_dev_mean"]
    norms = {"policy": "grad_norm", "value": "grad_norm_1"}
    step0["grad_roles"] = [role for role, norm in norms.items() if numbers.get(norm, 0.0) > 0]
    each = TOLERANCE if context.accelerator.device.type == "cpu" else REORDERED
    key, allowed = ("ratio_dev", each) if is_exact(context) else ("ratio_dev_mean", COARSE)
    step0["ratio_at_most"] = each if is_exact(context) else None
    if step0[key] > allowed:
        raise TrainingStopped(
            f"the first minibatch's ratios are {step0[key]:.2e} away from 1 before any step (at most {allowed})",
            code="ratio",
            hint="the policy is computed otherwise than when its replies were judged; report this with recipe.yaml",
        )


def is_exact(context: StageContext) -> bool:
    """Whether products are taken in float32, where batches of another shape give equal numbers."""
    in_float32 = context.parent_mode.load.computes_in(context.accelerator.device.type) == "fp32"
    return in_float32 and not is_narrow(context.spec.stage, context.accelerator.device)


def reward_parity(roles: PPORoles, context: StageContext) -> dict[str, float]:
    """Largest difference between scores on PPO's path and those the reward model's evaluation gave, same replies."""
    gaps = [_parity(role, judge, context) for role, judge in zip(roles.judges(), context.judges, strict=True)]
    return {"reward_parity": max(gaps)} if gaps else {}


def _parity(role: Role, judge: Checkpoint, context: StageContext) -> float:
    """The largest difference of one reward model's scores."""
    record = judge.record
    ids = judge.probe_ids
    with context.autocast():
        scores = score_replies(role, [(row[:-1], row[-1:]) for row in ids], len(ids))
    gap: float = max(abs(a - b) for a, b in zip(scores, record["metrics"]["probe_scores"], strict=True))
    deviation = float(record["reward_norm"]["std"])
    allowed = 1e-4 * max(1.0, deviation) if is_exact(context) else 0.2 * deviation
    if gap > allowed and record["load"] == context.parent_mode.load.value:
        raise TrainingStopped(
            f"the reward model scores otherwise here than in its own evaluation (by {gap:.2e}, at most {allowed:.2e})",
            code="reward_parity",
        )
    return gap


def adapter_digests(roles: PPORoles) -> dict[str, str]:
    """SHA-256 of the frozen roles' own tensors (the shared base has its fingerprint)."""
    return {role.name: _digest(role) for role in (roles.reference, *roles.judges())}


def require_unchanged(roles: PPORoles, before: dict[str, str]) -> None:
    """Reference and reward end with the bytes they started with."""
    for name, digest in adapter_digests(roles).items():
        if digest != before[name]:
            raise TrainingStopped(f"the frozen {name} changed during training", code="frozen_changed")


def _digest(role: Role) -> str:
    digest = hashlib.sha256()
    for name, tensor in [*role.named_parameters(), *role.named_buffers()]:
        digest.update(name.encode())
        flat = (
            held(tensor.detach()).cpu().contiguous().reshape(-1)
        )  # a scalar cannot be viewed as bytes (Gemma has some)
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()


def memory(roles: PPORoles, bases: Bases, updater: Updater) -> dict[str, float]:
    """Bytes of weights and optimiser states, counted by storage.

    `ratio` is everything beside base and heads, over the policy's adapter and optimiser state alone, which is what
    supervised tuning with the same method holds; four roles with one method make at most 8/3.
    """
    base = storages(base.model for base in bases.opened())
    held = storages(roles.all())
    heads = storages(role.head for role in roles.all() if role.head is not None)
    policy = {k: v for k, v in storages([roles.policy]).items() if k not in base}
    beside = sum(size for pointer, size in held.items() if pointer not in base and pointer not in heads)
    head_params = {id(p) for role in roles.all() if role.head is not None for p in role.head.parameters()}
    states = _state_bytes(updater, [p for r in roles.trained().values() for p in r.parameters()], head_params)
    policy_bytes = sum(policy.values()) + _state_bytes(updater, list(roles.policy.parameters()), head_params)
    return {
        "base_bytes": float(sum(base.values())),
        "bases": float(len(bases.opened())),
        "beside_bytes": float(beside + states),
        "sft_bytes": float(policy_bytes),
        "head_bytes": float(sum(heads.values())),
        "ratio": (beside + states) / max(1, policy_bytes),
    }


def _state_bytes(updater: Updater, parameters: list[nn.Parameter], without: set[int]) -> int:
    total = 0
    for parameter in parameters:
        if id(parameter) not in without:
            for value in updater.optimizer.state.get(parameter, {}).values():
                if isinstance(value, torch.Tensor) and value.numel() > 1:
                    parts = value.device_mesh.size() if isinstance(value, DTensor) else 1
                    total += held(value).untyped_storage().nbytes() * parts
    return total

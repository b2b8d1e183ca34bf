"""Scores of replies: packed (prompt, reply) rows read by a reward role. Replies to one prompt share its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from align.checkpoints.checkpoint import Checkpoint
from align.models.packing import Packed, pack_branches
from align.roles import Role, chosen_logprobs
from data_prep.types import features_of
from reward.shaping import shape_rewards


@dataclass
class ResponseBatch:
    """Packed prompts and replies; `source_M` is the position before each reply token, where it is predicted.

    M runs over the replies in the order of the rows, wherever in the packed row they lie.
    """

    packed: Packed
    source_M: Tensor
    last_B: Tensor
    targets_M: Tensor
    numbers: dict[str, Tensor]
    weight: float
    ids: Sequence[str]

    def to(self, device: torch.device) -> ResponseBatch:
        """The batch on `device`."""
        return ResponseBatch(
            self.packed.to(device),
            self.source_M.to(device),
            self.last_B.to(device),
            self.targets_M.to(device),
            {name: value.to(device) for name, value in self.numbers.items()},
            self.weight,
            self.ids,
        )

    def read(self) -> tuple[Tensor, Tensor | float]:
        """Packed positions whose hidden states the policy's loss reads, and their shares of `weight`."""
        return self.source_M, 1.0


def pack_responses(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]], ids: Sequence[str] = (), apart: bool = False
) -> ResponseBatch:
    """Pack (prompt, reply) pairs and find every reply token's place. Replies are never empty.

    Each prompt is computed once for all replies to it; `apart`: once for each of them.
    """
    families: dict[object, list[int]] = {}
    for place, (prompt, _) in enumerate(pairs):
        families.setdefault(place if apart else (tuple(prompt), features_of(prompt)), []).append(place)
    prompts = [pairs[places[0]][0] for places in families.values()]
    packed = pack_branches(prompts, [[pairs[place][1] for place in places] for places in families.values()])
    nothing, stop = np.empty(0, dtype=np.int64), 0
    sources, targets = [nothing] * len(pairs), [nothing] * len(pairs)
    for prompt, places in zip(prompts, families.values(), strict=True):
        stop = end = stop + len(prompt)
        for place in places:
            targets[place] = np.arange(stop, stop + len(pairs[place][1]))
            sources[place] = np.concatenate([[end - 1], targets[place][:-1]])
            stop += len(targets[place])
    source_M, index_M = (torch.from_numpy(np.concatenate(every)) for every in (sources, targets))
    last_B = torch.tensor([int(every[-1]) for every in targets])
    return ResponseBatch(packed, source_M, last_B, packed.ids_1N[0, index_M], {}, float(len(index_M)), list(ids))


def score_replies(role: Role, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], chunk: int) -> list[float]:
    """Raw scores of (prompt, reply) pairs by a reward role, read at the last reply token."""
    scores: list[float] = []
    with torch.no_grad():
        for start in range(0, len(pairs), chunk):
            batch = pack_responses(pairs[start : start + chunk]).to(role.tree.device)
            scores += role.scores(batch.packed, batch.last_B).tolist()
    return scores


@torch.no_grad()
def mean_logprobs(role: Role, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], chunk: int) -> list[float]:
    """Mean log-probability of a reply's tokens under a policy, in nats, for every (prompt, reply) pair."""
    means: list[float] = []
    for start in range(0, len(pairs), chunk):
        part = pairs[start : start + chunk]
        batch = pack_responses(part).to(role.tree.device)
        logprobs_M = chosen_logprobs(role, role.hidden(batch.packed)[batch.source_M], batch.targets_M)
        means += [float(own.mean()) for own in logprobs_M.split([len(reply) for _, reply in part])]
    return means


def normalised(scores: Sequence[float], judge: Checkpoint) -> list[float]:
    """Scores of a reward model as rewards: in deviations of its own scores around their mean; no clip, no penalty.

    What is called a reward anywhere (evaluation, report, chat, `align.score`) is this; what the head gives is a score.
    """
    norm = judge.record["reward_norm"] or {"mean": 0.0, "std": 1.0}
    score_B = torch.tensor(scores)
    ended_B = torch.ones(len(scores), dtype=torch.bool)
    rewards: list[float] = shape_rewards(score_B, ended_B, norm["mean"], norm["std"], None, 0.0).tolist()
    return rewards

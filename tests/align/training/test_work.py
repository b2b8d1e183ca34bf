"""How much work a training step and a decoded token are: a pass too many fails here, whatever the machine is doing.

Counted are floating-point operations of matrix products, operations of any kind, and bytes of new tensors. `TODAY` is
what they are; the ceiling is a twentieth above. Where work is saved, the numbers are written anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from align.inference.generation import RolloutEngine, Sampling
from tests.tiny_chain import sentences
from tests.tiny_training import OBJECTIVES, lora, options, updater

ROOM = 1.05


@dataclass
class Work:
    """What was done."""

    flops: int
    operations: int
    made_bytes: int

    def exceeds(self, today: Work) -> list[str]:
        """What of it is more than today's, with room."""
        return [name for name, count in vars(self).items() if count > ROOM * getattr(today, name)]


TODAY = {
    "supervised": Work(32_336_640, 1_100, 7_245_976),
    "pairwise": Work(41_908_224, 924, 8_461_448),
    "direct_preference": Work(61_839_360, 1_273, 11_872_092),
    "odds_ratio": Work(47_984_640, 991, 8_979_204),
    "kahneman_tversky": Work(60_048_384, 1_665, 10_379_716),
    "actor_critic": Work(233_152_512, 1_756, 23_612_232),
    "rollout": Work(5_049_344, 2_507, 1_135_392),
}
"""A step over 16 rows on the tiny model with a LoRA, and 8 tokens of five replies."""


class Counter(TorchDispatchMode):
    """Counts operations, and the bytes of the storages that they make."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.made_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if torch.is_tensor(each)}
        out = func(*args, **(kwargs or {}))
        stores = [each.untyped_storage() for each in tree_leaves(out) if torch.is_tensor(each)]
        made = {store._cdata: store.nbytes() for store in stores}
        self.operations += 1
        self.made_bytes += sum(size for key, size in made.items() if key not in known)
        return out


def counted(work: Callable[[], object]) -> Work:
    """What is done in a call."""
    with FlopCounterMode(display=False) as flops, Counter() as counter:
        work()
    return Work(flops.get_total_flops(), counter.operations, counter.made_bytes)


def step(make: Any, passes: int = 1) -> Work:
    """One optimiser step of an objective, its forward computed so many times."""
    objective, rows = make()
    once, batch = objective.forward, objective.collate(rows)

    def again(batch: Any) -> Any:
        for _ in range(passes - 1):
            with torch.no_grad():
                once(batch)
        return once(batch)

    objective.forward = again
    return counted(lambda: updater(objective, options(), 1).step([batch]))


@pytest.mark.parametrize("make", OBJECTIVES, ids=lambda make: make.__name__)
def test_a_step_is_no_more_work_than_today(make):
    found = step(make)
    assert not found.exceeds(TODAY[make.__name__]), found


def test_one_forward_too_many_is_found():
    assert step(OBJECTIVES[0], passes=2).exceeds(TODAY["supervised"]) == ["flops", "operations", "made_bytes"]


def rollout() -> Work:
    """Eight tokens of every reply; no token ends one."""
    engine = RolloutEngine(lora(), end_id=-1)
    return counted(lambda: engine.generate(sentences(), Sampling(8), torch.Generator().manual_seed(0)))


def test_a_decoded_token_is_no_more_work_than_today():
    found = rollout()
    assert not found.exceeds(TODAY["rollout"]), found

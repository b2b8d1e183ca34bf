"""The trunk cache: what lies below the lowest trained block is computed once a row, and gives what it gave before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from align.adapters.layers.private_weights import make_private, norm_names
from align.checkpoints.compatibility import ParentMode
from align.config.registries import adapters
from align.config.schema import Load
from align.models import trunk
from align.models.low_rank import stack
from align.models.packing import Packed, pack, pack_branches
from align.models.sharding import layers_of
from align.models.trunk import TrunkCache, alike, attach_trunk, depth_of, forget_rows, release_trunk
from align.rl.actor_critic import ActorCritic, PPOLoss
from align.roles import Role
from align.training.dpo import DirectPreference
from align.training.objectives import LanguageModeling, Objective, Pairwise
from align.training.regularisers import regularise
from data_prep.core.errors import UserError
from reward.head import ScalarHead
from tests.architectures import SUPPORTED, folder
from tests.tiny import save_tiny_llama
from tests.tiny_chain import HOME, bases, fresh, grid_beyond, legal_loads, sentences
from tests.tiny_training import experience_rows, gradients, options, pair_rows, token_rows

LAYERS = 3
GIB = 1 << 30
BARE = ParentMode(None, Load.fp32)


@cache
def deep() -> Path:
    return save_tiny_llama(HOME / "trunk", layers=LAYERS)


@cache
def loaded() -> Any:
    """Bases that tests share: trees over them are their own."""
    return bases(deep())


def top(method: str = "lora", found: Any = None, load: Load = Load.fp32, seed: int = 0, **options: Any) -> Role:
    """A role whose last block alone is trained, where the method can be put there."""
    if method != "feature_extraction" and "layers" in adapters.get(method).__dataclass_fields__:
        options = {"layers": "top_1", **options}
    return fresh(method, load, found or loaded(), seed=seed, **options)


def with_head(role: Role) -> Role:
    torch.manual_seed(1)
    role.head = ScalarHead(32)
    return role


def attached(*roles: Role, room: int = GIB, together: bool = False) -> TrunkCache:
    """A cache for the trunks of roles, of which the first says how deep it is."""
    trees = {role.name: role.tree for role in roles}
    assert alike(trees, roles[0].name) == list(trees)
    kept = TrunkCache(room, together)
    attach_trunk(trees, depth_of(roles[0].tree), kept)
    return kept


def batches() -> list[Packed]:
    """Rows of unequal lengths, pairs behind their prompts, one row, a pair without a prompt, and a pair as one row."""
    rows = sentences(6)
    pairs = pack_branches(rows[:2], [(rows[2], rows[3]), (rows[4], rows[5])])
    joined = pack([[*rows[0], *rows[2], *rows[3]]])
    return [pack(rows), pairs, pack(rows[:1]), pack_branches([[]], [(rows[0], rows[1])]), joined]


@contextmanager
def counted(*roles: Role) -> Iterator[list[int]]:
    """How often each block of the roles is computed inside."""
    passes, hooks = [0] * LAYERS, []
    for role in roles:
        for place, block in enumerate(layers_of(role.tree)):

            def count(module: Any, *_: Any, place: int = place) -> None:
                passes[place] += 0 if "forward" in vars(module) else 1

            hooks.append(block.register_forward_pre_hook(count))
    yield passes
    for hook in hooks:
        hook.remove()


# ------------------------------------------------------------------------------------------------ where it ends
CHOICES = [(method, {}) for method in adapters.names()] + [
    ("lora", {"layers": "all"}),
    ("lora", {"layers": [1]}),
    ("lora", {"trainable_tokens": ["<|user|>"]}),
    ("feature_extraction", {"last_blocks": 0}),
    ("feature_extraction", {"norms": True}),
    ("feature_extraction", {"head": True}),
    ("feature_extraction", {"last_blocks": 2}),
    ("bottleneck", {"norms": True}),
]


@pytest.mark.parametrize(("method", "chosen"), CHOICES, ids=lambda value: str(value))
def test_it_ends_where_gradients_begin(method, chosen):
    role = top(method, load=legal_loads(adapters.get(method))[0], **chosen)
    grads: list[bool] = []
    for block in layers_of(role.tree):
        block.register_forward_hook(lambda _, __, out: grads.append(out.requires_grad))
    role.hidden(pack(sentences()))
    assert depth_of(role.tree) == (grads.index(True) if True in grads else LAYERS)


def test_active_dropout_ends_it():
    role = top()
    assert depth_of(role.tree) == LAYERS - 1
    layers_of(role.tree)[1].add_module("noise", torch.nn.Dropout(0.1))
    assert depth_of(role.tree) == 1


# ------------------------------------------------------------------------------------------- what it gives
@pytest.mark.parametrize("load", [Load.fp32, Load.bf16, Load.nf4])
@pytest.mark.parametrize(("narrow", "together"), [(False, False), (True, True)])
def test_hidden_states_are_those_of_all_blocks(load, narrow, together):
    role = top(load=load)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
        plain = [role.hidden(packed) for packed in batches()]
        attached(role, together=together)
        found = [role.hidden(packed) for packed in batches()]
    assert together or torch.equal(found[2], plain[2])  # a row alone
    for ours, theirs in zip(found, plain, strict=True):
        size = float(theirs.abs().max())
        torch.testing.assert_close(
            ours, theirs, rtol=0, atol=size * (1e-5 if load is Load.fp32 and not narrow else 3e-2)
        )


def test_a_row_gives_the_same_bits_whatever_is_beside_it_and_kept():
    role, rows = top(), sentences(6)

    def states(order: list[int], room: int, times: int = 1) -> dict[int, Tensor]:
        attached(role, room=room)
        for _ in range(times):
            hidden_ND = trunk_states(role, pack([rows[i] for i in order]))
        return dict(zip(order, hidden_ND.split([len(rows[i]) for i in order]), strict=True))

    first = states([0, 1, 2, 3, 4, 5], GIB)
    for other in (states([5, 2, 0], GIB), states([3, 1, 4], 2000, times=2), states([0], 0)):
        assert all(torch.equal(states_TD, first[i]) for i, states_TD in other.items())


def trunk_states(role: Role, packed: Packed) -> Tensor:
    return vars(role.tree)[trunk._TRUNK].states(packed)


def test_precisions_of_products_are_kept_apart():
    role, packed = top(), pack(sentences())
    attached(role)
    plain = trunk_states(role, packed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not torch.equal(trunk_states(role, packed), plain)
    assert torch.equal(trunk_states(role, packed), plain)


@pytest.mark.parametrize("name", grid_beyond(SUPPORTED, {"gpt2", "gemma2"}))
def test_every_architecture_has_one(name):
    role = top(found=bases(folder(name)), rank=2)
    depth = depth_of(role.tree)
    assert depth == len(layers_of(role.tree)) - 1
    attach_trunk({"policy": role.tree}, depth, TrunkCache(GIB))


# ---------------------------------------------------------------------------------------------- how much it saves
@pytest.mark.parametrize("together", [False, True])
def test_lower_blocks_are_computed_once_a_row_for_all_roles(together):
    found = loaded()
    policy, reference = top(found=found), found.start_of(None, BARE, "reference")
    rows = sentences(6)
    packs = [pack(rows), pack(rows[3:]), pack([rows[5], rows[0]])]
    with counted(policy, reference) as passes, torch.no_grad():
        for packed in packs:
            policy.hidden(packed), reference.hidden(packed)
        assert passes == [6, 6, 6]  # passes
        attached(policy, reference, together=together)
        passes[:] = [0] * LAYERS
        for packed in packs:
            policy.hidden(packed), reference.hidden(packed)
        once = 1 if together else 6  # the first batch has all six rows
        assert passes == [once, once, 6]
        for packed in packs:
            policy.hidden(packed), reference.hidden(packed)
        assert passes == [once, once, 12]
        forget_rows(reference.tree)
        policy.hidden(packs[0])
        assert passes == [2 * once, 2 * once, 13]
        release_trunk(policy.tree)
        policy.hidden(packs[0])
        assert passes == [2 * once + 1, 2 * once + 1, 14]


def test_what_does_not_fit_is_computed_in_every_pass_and_told_once():
    told: list[int] = []
    role, rows = top(), sentences(6)
    room = 4 * 32 * (len(rows[0]) + len(rows[1]))
    attach_trunk({"policy": role.tree}, 2, kept := TrunkCache(room, on_full=lambda: told.append(1)))
    with counted(role) as passes, torch.no_grad():
        for _ in range(2):
            role.hidden(pack(rows))
    assert passes == [10, 10, 2] and kept.used == room and told == [1]


# --------------------------------------------------------------------------------------------------- who shares it
def test_roles_share_it_that_have_the_same_blocks_there():
    found = loaded()
    trees = {
        "policy": top(found=found).tree,
        "reference": found.start_of(None, BARE, "reference").tree,
        "reader": top("lora_features", found).tree,
        "longer": top(found=found, layers="top_2").tree,
        "elsewhere": top(found=bases(deep())).tree,
    }
    normed = found.root(Load.fp32).tree()
    make_private(normed, norm_names(normed), trainable=False)
    stacked = found.root(Load.fp32).tree()
    stack(stacked, top().adapter.low_rank_terms(top(found=found, layers=[0]).carrier))
    trees |= {"normed": normed, "stacked": stacked}
    expected = {"policy", "reference"} | ({"reader"} if depth_of(trees["reader"]) == 2 else set())
    assert set(alike(trees, "policy")) == expected
    assert alike({"policy": top(layers="all").tree}, "policy") == []


def test_roles_on_one_stacked_parent_share_it():
    found = loaded()
    parent = top(found=found, layers="all", seed=4)
    terms = parent.adapter.low_rank_terms(parent.carrier)

    def standing(name: str, trained: bool) -> Role:
        tree = found.root(Load.fp32).tree()
        stack(tree, terms)
        adapter = adapters.get("lora")(layers="top_1")
        return Role(name, adapter.attach(tree, trainable=True) if trained else tree, adapter if trained else None)

    policy, reference = standing("policy", True), standing("reference", False)
    packed = batches()[1]
    with torch.no_grad():
        plain = policy.hidden(packed), reference.hidden(packed)
        attached(policy, reference)
        found_both = policy.hidden(packed), reference.hidden(packed)
    for ours, theirs in zip(found_both, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------- losses and gradients
def language(found: Any) -> tuple[Objective, list[Any]]:
    return LanguageModeling(top(found=found, dropout=0.2)), token_rows()


def pairwise(found: Any) -> tuple[Objective, list[Any]]:
    return Pairwise(with_head(top("bottleneck", found)), centering=0.05), pair_rows(margins=True)


def preference(found: Any) -> tuple[Objective, list[Any]]:
    return DirectPreference(top(found=found), found.start_of(None, BARE, "reference")), pair_rows()


def actor_critic(found: Any) -> tuple[Objective, list[Any]]:
    value = with_head(top("feature_extraction", found))
    value.name = "value"
    return ActorCritic(top(found=found), value, PPOLoss(value_coef=0.7)), experience_rows()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("make", [language, pairwise, preference, actor_critic], ids=lambda make: make.__name__)
def test_losses_and_gradients_are_those_of_all_blocks(make, checkpointing):
    def once(cached: bool) -> tuple[float, dict[str, Tensor]]:
        objective, rows = make(loaded())
        roles = [each for each in objective.modules() if isinstance(each, Role)]
        for role in roles if checkpointing else []:
            role.tree.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if cached:
            attached(*roles, together=make is actor_critic)
            objective.eval()
            objective(objective.collate(rows[:2:-1]))  # most rows are known, beside others
        objective.train()
        torch.manual_seed(5)
        loss = objective(objective.collate(rows))[0]
        loss.backward()
        return loss.item(), gradients(objective)

    (loss, found), (expected_loss, expected) = once(True), once(False)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert found.keys() == expected.keys() and expected
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()))


def test_a_penalty_on_drift_reads_whole_passes():
    def losses(cached: bool) -> list[float]:
        objective, rows = language(loaded())
        start = loaded().start_of(None, BARE, "start")
        regularise(objective, objective.role, options(hidden_drift=0.5), lambda: start)
        if cached:
            attached(objective.role, start)
        objective.train()
        found = []
        for _ in range(2):  # rows are new, rows are known
            torch.manual_seed(5)
            found.append(objective(objective.collate(rows))[0].item())
        return found

    assert losses(True) == pytest.approx(losses(False), rel=1e-5)


# -------------------------------------------------------------------------------------------------- planted faults
class Noisy(torch.nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + 1e-3 * torch.randn_like(hidden)


def noisy(role: Role) -> None:
    layers_of(role.tree)[0].post_attention_layernorm = Noisy()


def paired(role: Role) -> None:
    """Blocks that give pairs, as some architectures' do."""
    for block in layers_of(role.tree):
        plain = block.forward
        vars(block)["forward"] = lambda *given, plain=plain, **named: (plain(*given, **named), None)


def remembering(role: Role) -> None:
    """A block above that reads what one below has left beside the hidden states."""
    below, above = layers_of(role.tree)[0], layers_of(role.tree)[2]
    left = SimpleNamespace(sum=0.0)
    below.mlp.register_forward_hook(lambda _, __, out: setattr(left, "sum", float(out.sum())))
    above.mlp.register_forward_hook(lambda _, __, out: out + left.sum)


@pytest.mark.parametrize("spoil", [noisy, paired, remembering], ids=lambda spoil: spoil.__name__)
def test_what_does_not_give_the_same_is_refused(spoil):
    role, packed = top(), pack(sentences())
    spoil(role)
    with pytest.raises(UserError, match=r"with the trunk cache, .* of the policy role"):
        attach_trunk({"policy": role.tree}, 2, TrunkCache(GIB))
    with counted(role) as passes, torch.no_grad():
        if spoil is not paired:
            role.hidden(packed)
            assert passes == [1, 1, 1]
    assert trunk._TRUNK not in vars(role.tree)


def test_a_trunk_that_is_too_deep_and_one_that_is_not_shared_are_refused():
    found = loaded()
    policy, reference = top(found=found), found.start_of(None, BARE, "reference")
    trees = {"policy": policy.tree, "reference": reference.tree}
    with pytest.raises(UserError, match="of the reference role"):
        attach_trunk(trees, 3, TrunkCache(GIB))
    other = bases(save_tiny_llama(HOME / "trunk-other", seed=3, layers=LAYERS)).start_of(None, BARE, "reference")
    with pytest.raises(UserError, match="of the reference role"):
        attach_trunk({**trees, "reference": other.tree}, 2, TrunkCache(GIB))
    assert all(trunk._TRUNK not in vars(role.tree) for role in (policy, reference, other))

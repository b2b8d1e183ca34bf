"""Delta-LoRA: the exact sum against the published loop, what it equals, and what it is saved as."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from align.adapters.delta_lora import Form
from align.checkpoints.compatibility import ParentMode, choose_parent_mode
from align.config.registries import adapters
from align.config.schema import Load, OnParent, OnPrecisionChange
from align.models.shared_base import SharedBase
from align.roles import Role
from align.training.objectives import LanguageModeling
from data_prep.core.errors import UserError
from data_prep.types import Tokens
from tests.tiny_chain import bases, logits, sentences, shared_bytes

ROWS = [Tokens(ids, [True] * len(ids), f"row:{i}") for i, ids in enumerate(sentences(8))]


def made(name: str = "delta_lora", **options) -> Role:
    torch.manual_seed(0)
    adapter = adapters.get(name)(rank=4, alpha=8.0, **options)
    return bases().fresh(None, adapter, ParentMode(None, Load.fp32), "policy")


def trained(role: Role, steps: int, optimizer_of=lambda groups: torch.optim.AdamW(groups, weight_decay=0.0)) -> list:
    """Losses of `steps` steps over the same rows."""
    objective = LanguageModeling(role)
    optimizer = optimizer_of(role.adapter.parameter_groups(role.carrier, 2e-3))
    batch, losses = objective.collate(ROWS), []
    role.adapter.begin(role.carrier, optimizer, steps)
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss, _ = objective(batch)
        (loss / batch.weight).backward()
        optimizer.step()
        role.adapter.after_step(role.carrier, optimizer, step + 1)
        losses.append(float(loss.detach() / batch.weight))
    return losses


@pytest.mark.parametrize("start_step", [0, 3])
def test_the_sum_is_the_published_loop_over_fifty_steps(start_step):
    options = {"lambda_": 0.7, "start_step": start_step}
    functional, literal = made(**options), made(form=Form.literal, **options)
    losses = [trained(role, 50) for role in (functional, literal)]
    assert losses[0][-1] < losses[0][0] - 0.05
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=0, atol=1e-5)
    plain = made("lora")
    trained(plain, 50)
    assert (logits(plain) - logits(literal)).abs().max() > 1e-2, "the weights must have moved"
    torch.testing.assert_close(logits(functional), logits(literal), rtol=0, atol=1e-4)


def test_without_a_pause_it_is_lora_with_alpha_times_one_plus_lambda():
    """For a step that does not depend on the gradient's size: here its sign."""

    class Sign(torch.optim.SGD):
        @torch.no_grad()
        def step(self):
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter -= group["lr"] * parameter.grad.sign()

    torch.manual_seed(0)
    scaled = bases().fresh(None, adapters.get("lora")(rank=4, alpha=8.0 * 1.5), ParentMode(None, Load.fp32), "policy")
    role = made(lambda_=0.5)
    for each in (role, scaled):
        trained(each, 10, lambda groups: Sign(groups))
    torch.testing.assert_close(logits(role), logits(scaled), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("start_step", "rank"), [(0, 4), (3, 8)])
def test_it_is_saved_as_a_plain_lora_that_stock_peft_loads(start_step, rank, tmp_path):
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from tests.tiny_chain import base

    role = made(lambda_=0.7, start_step=start_step)
    trained(role, 6)
    role.adapter.save(role.carrier, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {t.shape[0] for n, t in tensors.items() if ".lora_A." in n} == {rank}
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base()), str(tmp_path)).eval()
    with torch.no_grad():
        theirs = torch.cat([stock(input_ids=torch.tensor([ids])).logits[0] for ids in sentences()])
    torch.testing.assert_close(theirs, logits(role), rtol=0, atol=1e-5)
    again = Role("again", role.adapter.load(bases().root(Load.fp32).tree(), tmp_path, trainable=False), role.adapter)
    assert torch.equal(logits(again), logits(role))
    assert role.adapter.count(role.tree.config.to_dict()).saved == sum(t.numel() for t in tensors.values())


def test_continuing_goes_on_without_a_new_pause(tmp_path):
    role = made(lambda_=0.7, start_step=3)
    trained(role, 6)
    role.adapter.save(role.carrier, tmp_path)
    again = Role("again", role.adapter.load(bases().root(Load.fp32).tree(), tmp_path, trainable=True), role.adapter)
    before = {n: t.clone() for n, t in role.adapter.state(again.carrier).items()}
    trained(again, 4)
    assert all(torch.equal(t, before[n]) for n, t in role.adapter.state(again.carrier).items())


def test_the_update_has_at_most_twice_the_rank():
    role = made(lambda_=0.7, start_step=3)
    trained(role, 8)
    for term in role.adapter.low_rank_terms(role.carrier).values():
        values = torch.linalg.svdvals(term.delta().double())
        assert 4 < int((values > values[0] * 1e-6).sum()) <= 8


def test_the_literal_loop_leaves_the_shared_weights_alone(tmp_path):
    found = bases()
    root: SharedBase = found.root(Load.fp32)
    before = shared_bytes(root)
    torch.manual_seed(0)
    adapter = adapters.get("delta_lora")(rank=4, form=Form.literal)
    role = found.fresh(None, adapter, ParentMode(None, Load.fp32), "policy")
    trained(role, 3)
    assert shared_bytes(root) == before
    adapter.save(role.carrier, tmp_path)
    again = Role("again", adapter.load(root.tree(), tmp_path, trainable=False), adapter)
    assert torch.equal(logits(again), logits(role)) and shared_bytes(root) == before
    private = root.private()
    merged = adapter.merge(adapter.load(private, tmp_path, trainable=False))
    torch.testing.assert_close(logits(Role("merged", merged, None)), logits(role), rtol=0, atol=1e-5)


@pytest.mark.parametrize("load", [Load.bf16, Load.nf4])
def test_the_literal_loop_is_refused_where_it_would_round_away(load):
    adapter = adapters.get("delta_lora")(form=Form.literal)
    with pytest.raises(UserError, match="delta_lora"):
        choose_parent_mode(None, adapter, OnParent.auto, load, OnPrecisionChange.refuse)


@pytest.mark.parametrize("options", [{"dropout": 0.1}, {"dora": True}])
def test_what_does_not_go_with_it_is_refused(options):
    with pytest.raises(UserError, match="does not go with delta_lora"):
        made(**options)


def test_why_bf16_is_refused():
    """The increments of the loop are lost in bfloat16: most of the update rounds away."""
    weight = torch.randn(64, 64)
    step = torch.randn(64, 64) * 1e-4
    lost = weight.bfloat16()
    for _ in range(20):
        lost = lost + step.bfloat16()
    moved = (lost.float() - weight.bfloat16().float()).flatten()
    assert F.cosine_similarity(moved, step.flatten() * 20, dim=0) < 0.7


def test_the_best_weights_are_put_back_with_what_is_beside_them():
    """Early stopping returns to a step before the pause ended: what is subtracted must be that of then."""
    from align.stages.supervised import AdapterHook
    from align.training.optimizer import Updater
    from tests.tiny_training import options, process

    role = made(lambda_=0.7, start_step=3)
    objective = LanguageModeling(role)
    groups = role.adapter.parameter_groups(role.carrier, 5e-3)
    updater = Updater(objective, groups, options(warmup=0.0), 6, process(), [AdapterHook(role)])
    seen = {}
    for step in range(6):
        updater.step([objective.collate(ROWS)])
        seen[step + 1] = (logits(role), updater.weights())
    assert not torch.equal(seen[2][0], seen[6][0])
    with torch.no_grad():
        for name, held in updater.held().items():
            held.copy_(seen[2][1][name])
    assert torch.equal(logits(role), seen[2][0])

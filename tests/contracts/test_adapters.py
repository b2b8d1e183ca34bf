"""What every registered adapter method must keep, at every precision of the base it allows.

A new method enters by existing: nothing here names one.
"""

from __future__ import annotations

from itertools import count

import pytest
import torch

from align.checkpoints.compatibility import ParentMode
from align.config.registries import adapters
from align.config.schema import Load
from align.inference.generation import RolloutEngine, Sampling
from align.models.low_rank import merge, stack
from align.models.packing import pack
from align.roles import Role, chosen_logprobs
from align.training.objectives import LanguageModeling
from data_prep.core.errors import UserError
from data_prep.types import Tokens, features_of, joined
from reward.head import ScalarHead
from tests.tiny_chain import (
    CPU,
    base,
    bases,
    covered,
    fresh,
    legal_loads,
    logits,
    methods_and_loads,
    read,
    sentences,
    shared_bytes,
)

CASES = methods_and_loads()
EXACT = [(method, load) for method, load in CASES if load is not Load.bf16]
METHODS = adapters.names()
_TURNS = count()


def each(cases=CASES):
    """Every method at one precision, at another one in every test; `make test-grid` takes the others."""
    return pytest.mark.parametrize(("method", "load"), covered(cases, next(_TURNS)))


def rows() -> list[Tokens]:
    return [Tokens(ids, [True] * len(ids), f"row:{i}", features=features_of(ids)) for i, ids in enumerate(sentences())]


def gradients(role: Role) -> dict[str, torch.Tensor | None]:
    """Gradients of every parameter after one backward of the language-modelling loss."""
    objective = LanguageModeling(role)
    role.zero_grad(set_to_none=True)
    loss, _ = objective(objective.collate(rows()))
    (loss / 50).backward()
    return {name: p.grad for name, p in role.named_parameters()}


def train(role: Role, steps: int = 3) -> None:
    """A few steps as the loop takes them: the method's own groups, Adam, its hook."""
    optimizer = torch.optim.AdamW(role.adapter.parameter_groups(role.carrier, 1e-2))
    role.train()
    role.adapter.begin(role.carrier, optimizer, steps)
    for step in range(steps):
        gradients(role)
        optimizer.step()
        role.adapter.after_step(role.carrier, optimizer, step + 1)


@each()
def test_only_what_the_method_declares_is_trained(method, load):
    found = bases()
    role = fresh(method, load, found)
    shared = {id(p) for p in found.root(load).model.parameters()}
    trained = [p for p in role.parameters() if p.requires_grad]
    assert trained and not shared & {id(p) for p in trained}
    assert not any(p.requires_grad for p in found.root(load).model.parameters())
    grouped = [p for group in role.adapter.parameter_groups(role.carrier, 1e-3) for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in trained} and len(grouped) == len(trained)
    optimizer_sees = [p.data_ptr() for p in trained]
    assert len(set(optimizer_sees)) == len(optimizer_sees)


@pytest.mark.parametrize("method", METHODS)
def test_not_trainable_means_no_gradient_at_all(method):
    adapter = adapters.get(method)()
    load = legal_loads(type(adapter))[0]
    source = bases().root(load)
    tree = source.private() if adapter.traits.owns_weights else source.tree()
    assert not any(p.requires_grad for p in adapter.attach(tree, trainable=False).parameters())


@each()
def test_counts_equal_the_modules(method, load):
    config = read(base() / "config.json")
    found = bases()
    role = fresh(method, load, found)
    counts = role.adapter.count(config)
    assert counts.trainable == sum(p.numel() for p in role.parameters() if p.requires_grad)
    plain = sum(p.numel() for p in bases().root(Load.fp32).model.parameters())
    own = 0 if role.adapter.traits.owns_weights else counts.trainable
    assert counts.total == plain + own + counts.frozen
    if role.adapter.traits.owns_weights:
        return
    model = found.root(load).model
    known = {p.data_ptr() for p in [*model.parameters(), *model.buffers()]}
    frozen = [*role.buffers(), *(p for p in role.parameters() if not p.requires_grad)]
    brought = {p.data_ptr(): p.numel() for p in frozen if p.dim() == 2 and p.data_ptr() not in known}
    assert counts.frozen == sum(brought.values())


@pytest.mark.parametrize("method", METHODS)
def test_counts_follow_the_targets(method):
    cls = adapters.get(method)
    if "target_modules" not in cls.__dataclass_fields__:
        pytest.skip("the method has no targets")
    role = fresh(method, legal_loads(cls)[0], target_modules=["q_proj", "down_proj"])
    counts = role.adapter.count(read(base() / "config.json"))
    assert counts.trainable == sum(p.numel() for p in role.parameters() if p.requires_grad)
    with pytest.raises(UserError):
        fresh(method, legal_loads(cls)[0], target_modules=["nothing_here"])


@each()
def test_base_keeps_its_bytes_and_other_trees_their_outputs(method, load, tmp_path):
    found = bases()
    root = found.root(load)
    before = shared_bytes(root)
    bare = Role("bare", root.tree(), None)
    others = [fresh(name, load, found, seed=5) for name, at in CASES if at is load]
    kept = [logits(other) for other in (bare, *others)]
    trained = [[p.requires_grad for p in other.parameters()] for other in others]
    role = fresh(method, load, found, seed=9)
    own = logits(role)
    train(role)
    role.adapter.save(role.carrier, tmp_path)
    assert not torch.equal(logits(role), own), "training must change the trained tree"
    assert trained == [[p.requires_grad for p in other.parameters()] for other in others]
    assert all(p.grad is None for other in others for p in other.parameters())
    del role
    assert shared_bytes(root) == before
    assert all(torch.equal(logits(other), was) for other, was in zip((bare, *others), kept, strict=True))


@each()
def test_same_seed_same_start(method, load):
    adapter = adapters.get(method)
    tensors = []
    for noise in (0, 1):
        torch.manual_seed(noise)
        torch.randn(7)
        torch.manual_seed(3)
        role = bases().fresh(None, adapter(), ParentMode(None, load), "policy")
        tensors.append({name: p for name, p in role.named_parameters() if p.requires_grad})
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


@each()
def test_every_trained_tensor_gets_a_gradient_and_no_other(method, load):
    found = gradients(fresh(method, load))
    role = fresh(method, load)
    for name, parameter in role.named_parameters():
        if parameter.requires_grad:
            assert found[name] is not None and float(found[name].abs().sum()) > 0, name
        else:
            assert found[name] is None, name


@each()
def test_gradient_checkpointing_gives_equal_gradients(method, load, monkeypatch):
    if not adapters.get(method).traits.gradient_checkpointing:
        pytest.skip("the method does not allow it")
    from transformers import modeling_layers

    role = fresh(method, load).train()
    plain = gradients(role)
    recomputed = []
    original = modeling_layers.GradientCheckpointingLayer.__call__

    def counting(layer, *args, **kwargs):
        recomputed.append(layer.gradient_checkpointing and layer.training)
        return original(layer, *args, **kwargs)

    monkeypatch.setattr(modeling_layers.GradientCheckpointingLayer, "__call__", counting)
    role.tree.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = gradients(role)
    assert recomputed and all(recomputed)
    for name, gradient in plain.items():
        if gradient is not None:
            torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-8)


@each()
def test_rollout_logprobs_equal_teacher_forced_ones(method, load):
    role = fresh(method, load)
    prompts, temperature = sentences(6), 0.7
    generator = torch.Generator().manual_seed(0)
    replies = RolloutEngine(role, 1).generate(prompts, Sampling(8, temperature), generator)
    for prompt, reply in zip(prompts, replies, strict=True):
        ids = joined(prompt, reply.ids)
        hidden = role.hidden(pack([ids]))[len(prompt) - 1 : -1]
        forced = chosen_logprobs(role, hidden, torch.tensor(reply.ids), temperature).detach()
        close = 0.1 if load is Load.bf16 else 1e-5
        torch.testing.assert_close(forced, torch.tensor(reply.logprobs), rtol=0, atol=close)


@each(EXACT)
def test_company_in_a_packed_batch_changes_nothing(method, load):
    """Rows of other lengths beside a row pad it on the right inside attention; logits and scores stay."""
    role = fresh(method, load)
    torch.manual_seed(0)
    role.head = ScalarHead(role.tree.config.hidden_size)
    rows_ = sentences()
    together, ends = logits(role, rows_), torch.tensor([len(ids) for ids in rows_]).cumsum(0)
    alone = torch.cat([logits(role, [ids]) for ids in rows_])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    with torch.no_grad():
        scores = role.scores(pack(rows_), ends - 1)
        each = torch.cat([role.scores(pack([ids]), torch.tensor([len(ids) - 1])) for ids in rows_])
    torch.testing.assert_close(scores, each, rtol=0, atol=1e-5)


@each(EXACT)
def test_left_padding_changes_nothing(method, load):
    role = fresh(method, load)
    prompts = sentences(6, longest=20)
    engine, sampling = RolloutEngine(role, 1), Sampling(8, greedy=True)
    together = engine.generate(prompts, sampling)
    for prompt, reply in zip(prompts, together, strict=True):
        alone = engine.generate([prompt], sampling)[0]
        assert alone.ids == reply.ids and alone.finished == reply.finished
        torch.testing.assert_close(torch.tensor(alone.logprobs), torch.tensor(reply.logprobs), rtol=0, atol=1e-5)


@each(EXACT)
def test_low_rank_terms_are_the_function(method, load):
    if not adapters.get(method).traits.low_rank:
        pytest.skip("the method has no low-rank form")
    found = bases()
    role = fresh(method, load, found)
    terms = role.adapter.low_rank_terms(role.carrier)
    tree = found.root(load).tree()
    assert not torch.allclose(logits(Role("bare", tree, None)), logits(role), atol=1e-3)
    stack(tree, terms)
    torch.testing.assert_close(logits(Role("stacked", tree, None)), logits(role), rtol=0, atol=1e-5)
    folded = found.root(load).private()
    merge(folded, terms)
    if adapters.get(method).traits.mergeable:
        torch.testing.assert_close(logits(Role("merged", folded, None)), logits(role), rtol=0, atol=1e-5)


@each()
def test_saved_and_loaded_is_bit_equal(method, load, tmp_path):
    found = bases()
    role = fresh(method, load, found)
    role.adapter.save(role.carrier, tmp_path)
    assert all((tmp_path / name).is_file() for name in role.adapter.files())
    torch.manual_seed(4321)
    source = bases(tmp_path).root(load) if role.adapter.traits.owns_weights else found.root(load)
    again = Role("again", role.adapter.load(source.tree(), tmp_path, trainable=False), role.adapter)
    assert torch.equal(logits(again), logits(role))
    assert not any(p.requires_grad for p in again.parameters())


@pytest.mark.parametrize("method", [name for name, cls in adapters.items() if not cls.traits.owns_weights])
def test_missing_and_left_over_tensors_are_refused(method, tmp_path):
    from safetensors.torch import load_file, save_file

    load = legal_loads(adapters.get(method))[0]
    role = fresh(method, load)
    role.adapter.save(role.carrier, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    first = sorted(tensors)[0]
    less = {name: value for name, value in tensors.items() if name != first}
    for wrong in (
        less,
        {**tensors, "more": tensors[first].clone()},
        {**tensors, first: tensors[first][..., :-1].contiguous()},
    ):
        save_file(wrong, file)
        with pytest.raises(UserError, match="do not fit"):
            role.adapter.load(bases().root(load).tree(), tmp_path, trainable=False)


@each(EXACT)
def test_opens_in_stock_peft_with_equal_logits(method, load, tmp_path):
    if not adapters.get(method).traits.portable:
        pytest.skip("not peft's")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from align.models.shared_base import _four_bit

    role = fresh(method, load)
    role.adapter.save(role.carrier, tmp_path)
    options = {"quantization_config": _four_bit(CPU), "device_map": {"": CPU}} if load is Load.nf4 else {}
    stock = AutoModelForCausalLM.from_pretrained(base(), dtype=torch.float32, **options)
    loaded = PeftModel.from_pretrained(stock, str(tmp_path)).train()  # a 4-bit layer's eval repacks its bytes
    with torch.no_grad():
        each = [loaded(input_ids=torch.tensor([ids])).logits[0, -len(ids) :] for ids in sentences()]
    torch.testing.assert_close(torch.cat(each), logits(role), rtol=0, atol=1e-5)

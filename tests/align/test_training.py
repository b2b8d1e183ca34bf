"""The optimisation loop: exact gradients under every cut, schedules, early stopping, stop on NaN; TRL as oracle."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from align.actor_critic import ActorCritic, ExperienceRow
from align.objectives import LanguageModeling, Pairwise
from align.options import Load
from align.roles import Role
from align.stages.base import Optimizer, Schedule, TrainingStage
from align.training import Objective, Updater, batches, fit, total_steps
from data_prep.errors import TrainingStopped
from data_prep.types import PairTokens, Tokens
from reward.head import ScalarHead
from tests.tiny_chain import base, bases, fresh, made, rows_folder, sentences

CUTS = [1, 2, 3, 5, 8, 16]
"""Rows per forward pass of a batch of 16."""


@cache
def process() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture
def double_precision(monkeypatch):
    """float64 all the way: the places that ask for float32 (norms, losses, heads) leave a float64 tensor as it is."""
    plain_to, plain_float = torch.Tensor.to, torch.Tensor.float

    def to(self, *args, **kwargs):
        if self.dtype is torch.float64 and (torch.float32 in args or kwargs.get("dtype") is torch.float32):
            return self
        return plain_to(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self if self.dtype is torch.float64 else plain_float(self))


def lora(seed: int = 0, head: bool = False, **options) -> Role:
    role = fresh("lora", Load.fp32, seed=seed, **options)
    if head:
        torch.manual_seed(seed)
        role.head = ScalarHead(role.tree.config.hidden_size)
    return role


def token_rows(count: int = 16) -> list[Tokens]:
    """Rows of unequal lengths and unequal numbers of supervised tokens."""
    made = []
    for i, ids in enumerate(sentences(count, longest=20)):
        mask = [False] + [(i + j) % 3 > 0 for j in range(len(ids) - 1)]
        mask[-1] = True
        made.append(Tokens(ids, mask, f"rows.jsonl:{i + 1}"))
    return made


def pair_rows(count: int = 16, margins: bool = False) -> list[PairTokens]:
    found = sentences(3 * count, longest=12)
    return [
        PairTokens(found[3 * i], found[3 * i + 1], found[3 * i + 2], f"pairs:{i}", 0.3 * (i % 3) if margins else None)
        for i in range(count)
    ]


def experience_rows(count: int = 16) -> list[ExperienceRow]:
    generator = np.random.default_rng(0)
    found = sentences(2 * count, longest=12)
    made = []
    for i in range(count):
        reply = found[2 * i + 1]
        numbers = generator.normal(size=(4, len(reply)))
        numbers[0] = -4.0 + 0.1 * numbers[0]
        made.append(ExperienceRow(found[2 * i], reply, *(row.tolist() for row in numbers), id=f"p:{i}"))
    return made


def supervised() -> tuple[Objective, list]:
    return LanguageModeling(lora()), token_rows()


def pairwise() -> tuple[Objective, list]:
    return Pairwise(lora(head=True), centering=0.05), pair_rows(margins=True)


def actor_critic() -> tuple[Objective, list]:
    found = bases()
    policy = fresh("lora", Load.fp32, found)
    value = fresh("vera", Load.fp32, found, seed=2)
    value.head = ScalarHead(32)
    objective = ActorCritic(policy, value, clip=0.2, value_clip=0.2, value_coef=0.7)
    objective.temperature = 0.8
    return objective, experience_rows()


OBJECTIVES = [supervised, pairwise, actor_critic]


def options(**values) -> TrainingStage:
    plain = TrainingStage(lr=1e-3, batch_size=16, optimizer=Optimizer.sgd, max_grad_norm=1e9, warmup=0.0, max_steps=1)
    return replace(plain, **values)


def updater(objective: Objective, chosen: TrainingStage, steps: int, lr: float = 1e-3) -> Updater:
    groups = [{"params": [p for p in objective.parameters() if p.requires_grad], "lr": lr}]
    return Updater(objective, groups, chosen, steps, process())


def gradients(objective: Objective) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


def weights(objective: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in objective.named_parameters() if p.requires_grad}


# ------------------------------------------------------------------------------------- exactness under every cut
@pytest.mark.parametrize("make", OBJECTIVES, ids=lambda make: make.__name__)
def test_gradient_of_step_1_does_not_depend_on_the_cut(make, double_precision):
    found, losses = [], []
    for micro in CUTS:
        torch.manual_seed(0)
        objective, rows = make()
        objective.double()
        numbers = {}
        chosen = options(micro_batch_size=micro)
        fit(updater(objective, chosen, 1), rows, [], 0, lambda step, split, n, into=numbers: into.update(n))
        found.append(gradients(objective))
        losses.append(numbers["loss"])
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-12)
    assert found[0] and all(float(g.abs().max()) > 0 for g in found[0].values())
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, gradient in found[0].items():
            assert gradient.dtype is torch.float64
            scale = float(gradient.abs().max())
            assert float((other[name] - gradient).abs().max()) <= 1e-10 * scale, name


def test_the_loss_is_a_mean_over_tokens_not_over_rows(double_precision):
    """Against the plainest computation there is: every row alone, log-softmax, one mean over supervised tokens."""
    objective, rows = supervised()
    objective.double()
    total = count = 0
    for row in rows:
        ids = torch.tensor([row.ids])
        logits = objective.role.carrier(input_ids=ids, use_cache=False).logits[0]
        picked = torch.log_softmax(logits[:-1], -1)[torch.arange(len(row.ids) - 1), ids[0, 1:]]
        mask = torch.tensor(row.mask[1:])
        total, count = total - picked[mask].sum(), count + int(mask.sum())
    (total / count).backward()
    plain = gradients(objective)
    numbers = {}
    fit(updater(objective, options(micro_batch_size=5), 1), rows, [], 0, lambda s, k, n: numbers.update(n))
    assert numbers["loss"] == pytest.approx(float(total / count), rel=1e-12)
    for name, gradient in gradients(objective).items():
        assert float((plain[name] - gradient).abs().max()) <= 1e-10 * float(plain[name].abs().max())


@pytest.mark.parametrize("make", OBJECTIVES[:2], ids=lambda make: make.__name__)
def test_eval_loss_does_not_depend_on_chunks_or_order(make, double_precision):
    objective, rows = make()
    objective.double()
    runner = updater(objective, options(), 1)
    results = []
    for size in (1, 2, 3, 7, 16):
        for order in (rows, rows[::-1], sorted(rows, key=lambda row: len(row.id))):
            chunks = [objective.collate(order[i : i + size]) for i in range(0, 16, size)]
            results.append(runner.evaluate(chunks))
    for found in results[1:]:
        assert found == pytest.approx(results[0], rel=1e-9)
    assert objective.training


def test_clipping_is_of_the_whole_batch():
    chosen = options(max_grad_norm=0.01, micro_batch_size=3)
    objective, rows = supervised()
    fit(updater(objective, chosen, 1), rows, [], 0, lambda *_: None)
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients(objective).values()))
    assert norm == pytest.approx(0.01, rel=1e-3)


def test_policy_and_value_are_clipped_apart():
    objective, rows = actor_critic()
    runner = updater(objective, options(max_grad_norm=0.01), 1)
    norms = runner.step([objective.collate(rows)])
    assert norms["grad_norm"] > 0.01 and norms["grad_norm_1"] > 0.01
    for role in (objective.policy, objective.value):
        total = math.sqrt(sum(float(p.grad.square().sum()) for p in role.parameters() if p.grad is not None))
        assert total == pytest.approx(0.01, rel=1e-3)


# ----------------------------------------------------------------------------------------------- schedule and order
@pytest.mark.parametrize("warmup", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("schedule", list(Schedule), ids=lambda schedule: schedule.value)
def test_learning_rate_at_every_step(schedule, warmup):
    steps, peak, rise = 20, 3e-3, round(20 * warmup)
    objective = LanguageModeling(lora(rank=1))
    runner = updater(objective, options(schedule=schedule, warmup=warmup), steps, lr=peak)
    window = [objective.collate(token_rows(1))]
    seen = []
    for _ in range(steps):
        assert runner.step(window)["lr"] == pytest.approx(runner.optimizer.param_groups[0]["lr"])
        seen.append(runner.optimizer.param_groups[0]["lr"] / peak)
    after = np.arange(steps - rise) / max(1, steps - rise)
    shape = {"constant": np.ones_like(after), "linear": 1 - after, "cosine": (1 + np.cos(np.pi * after)) / 2}
    expected = [*((np.arange(rise) + 1) / max(1, rise)), *shape[schedule.value]]
    np.testing.assert_allclose(seen, expected, rtol=1e-12, atol=1e-15)


def test_groups_keep_their_ratio_of_learning_rates():
    objective, rows = actor_critic()
    groups = [
        {"params": [p for p in role.parameters() if p.requires_grad], "lr": lr}
        for role, lr in ((objective.policy, 1e-4), (objective.value, 5e-4))
    ]
    runner = Updater(objective, groups, options(schedule=Schedule.linear), 4, process())
    for _ in range(4):
        runner.step([objective.collate(rows[:2])])
        first, second = (group["lr"] for group in runner.optimizer.param_groups)
        assert second == pytest.approx(5 * first)


@pytest.mark.parametrize("count", [1, 5, 16, 31, 100, 257])
def test_every_epoch_covers_every_row_once(count):
    for size in (1, 4, 16):
        for epoch in (0, 1, 7):
            found = batches(count, size, seed=3, epoch=epoch)
            assert sorted(np.concatenate(found).tolist()) == list(range(count))
            lengths = [len(part) for part in found]
            assert max(lengths) - min(lengths) <= 1 and min(lengths) >= min(size, count)
            again = batches(count, size, seed=3, epoch=epoch)
            assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))
    if count > 16:
        orders = {tuple(np.concatenate(batches(count, 4, seed, epoch))) for seed in (0, 1) for epoch in (0, 1, 2)}
        assert len(orders) == 6


def test_the_order_is_stateless():
    """Drawing random numbers in between, or starting at a later epoch, changes nothing."""
    first = np.concatenate(batches(50, 4, seed=1, epoch=2))
    np.random.rand(100)
    torch.rand(100)
    assert np.array_equal(first, np.concatenate(batches(50, 4, seed=1, epoch=2)))


def test_a_run_sees_the_rows_its_epochs_say():
    class Counting(LanguageModeling):
        def collate(self, rows):
            seen.extend(row.id for row in rows)
            return super().collate(rows)

    seen: list[str] = []
    chosen = options(batch_size=5, epochs=2.0, max_steps=0, micro_batch_size=2)
    steps = total_steps(16, chosen)
    fit(updater(Counting(lora(rank=1)), chosen, steps), token_rows(), [], 0, lambda *_: None)
    assert steps == 6 and len(seen) == 32
    assert sorted(seen[:16]) == sorted(seen[16:]) == sorted(row.id for row in token_rows())


# ---------------------------------------------------------------------------------------------------------- stopping
class Poisoned(LanguageModeling):
    """Its loss, or its gradient, is not finite on one row."""

    bad = "rows.jsonl:7"
    where = "loss"

    def forward(self, batch):
        loss, numbers = super().forward(batch)
        if self.bad in batch.ids and self.where == "loss":
            loss = loss * float("nan")
        elif self.bad in batch.ids:
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss, numbers


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_stops_at_once_names_the_rows_and_leaves_the_weights(where):
    objective = Poisoned(lora())
    objective.where = where
    runner = updater(objective, options(optimizer=Optimizer.adamw, batch_size=4, micro_batch_size=2), 8)
    order = [[token_rows()[i].id for i in part] for part in batches(16, 4, 0, 0)]
    good = next(i for i, names in enumerate(order) if Poisoned.bad in names)
    seen = []
    with pytest.raises(TrainingStopped) as stopped:
        fit(runner, token_rows(), [], 0, lambda step, split, n: seen.append(weights(objective)))
    assert stopped.value.exit_code == 3 and "\n" not in str(stopped.value)
    assert Poisoned.bad in str(stopped.value) and f"step {good + 1}" in str(stopped.value)
    assert len(seen) == good and runner.step_number == good
    expected = seen[-1] if seen else weights(lora())
    for name, now in weights(objective).items():
        assert torch.isfinite(now).all()
        assert torch.equal(now, expected[name if seen else name.removeprefix("role.")])


@pytest.mark.parametrize("call", [2, 3], ids=["evaluation", "training"])
def test_nan_in_a_stage_exits_3_and_publishes_nothing(call, tmp_path, monkeypatch, capfd):
    from align import objectives
    from align.cli import main
    from tests.tiny_chain import pipeline_words

    original, calls = objectives.chosen_logprobs, []

    def poisoned(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs) * (float("nan") if len(calls) == call else 1.0)

    monkeypatch.setattr(objectives, "chosen_logprobs", poisoned)
    capfd.readouterr()
    code = main(["run", *pipeline_words("sft", "name=n", "stages.sft.eval_every=1"), f"out={tmp_path}"])
    err = capfd.readouterr().err
    assert len(calls) == call, "it went on after the first bad number"
    assert code == 3 and "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("align:")]
    assert "not finite" in line
    assert not (tmp_path / "n" / "sft").exists()
    monkeypatch.undo()
    assert main(["run", *pipeline_words("sft", "name=n"), f"out={tmp_path}"]) == 0


class Scripted(LanguageModeling):
    """Its evaluation loss follows a script; training is real."""

    script: tuple[float, ...] = ()
    place = 0

    def forward(self, batch):
        loss, numbers = super().forward(batch)
        if not self.training:
            loss = torch.tensor(self.script[self.place % len(self.script)] * batch.weight)
        return loss, numbers


def test_early_stopping_puts_the_best_weights_back():
    objective = Scripted(lora(rank=2))
    objective.script = (3.0, 1.0, 2.0, 1.5, 0.5)
    chosen = options(batch_size=4, eval_every=1, patience=2, optimizer=Optimizer.adamw)
    rows, seen = token_rows(), []

    def log(step, split, numbers):
        if split == "eval":
            seen.append((step, numbers["loss"], weights(objective)))
            objective.place += 1

    final = fit(updater(objective, chosen, 40, lr=1e-2), rows, rows[:3], 0, log)
    assert [loss for _, loss, _ in seen] == pytest.approx([3.0, 1.0, 2.0, 1.5]), "two misses after step 2 end it"
    assert final["best_step"] == 2
    best, last = seen[1][2], seen[-1][2]
    assert all(torch.equal(now, best[name]) for name, now in weights(objective).items())
    assert any(not torch.equal(now, last[name]) for name, now in weights(objective).items())


def test_the_best_metric_is_measured_again_on_the_best_weights():
    objective = LanguageModeling(lora(rank=2))
    chosen = options(batch_size=4, eval_every=1, patience=3, optimizer=Optimizer.adamw)
    rows, losses = token_rows(), []

    def log(step, split, numbers):
        if split == "eval":
            losses.append(numbers["loss"])

    final = fit(updater(objective, chosen, 30, lr=0.3), rows, rows[:3], 0, log)
    assert min(losses) < losses[-1], "the learning rate must be too high, or this test sees nothing"
    assert final["loss"] == pytest.approx(min(losses), rel=1e-6)
    assert final["best_step"] == losses.index(min(losses)) + 1


def test_without_patience_the_last_weights_count():
    objective = Scripted(lora(rank=2))
    objective.script = (1.0, 5.0)
    seen = []

    def log(step, split, numbers):
        if split == "eval":
            seen.append(weights(objective))
            objective.place += 1

    final = fit(updater(objective, options(batch_size=4, eval_every=2), 4), token_rows(), token_rows()[:3], 0, log)
    assert final["loss"] == pytest.approx(5.0) and "best_step" not in final
    assert all(torch.equal(now, seen[-1][name]) for name, now in weights(objective).items())


def test_a_tensor_without_a_gradient_stops_the_first_step():
    objective = LanguageModeling(lora())
    objective.role.unused = torch.nn.Parameter(torch.ones(3))
    runner = updater(objective, options(), 1)
    with pytest.raises(TrainingStopped, match="no gradient") as stopped:
        runner.step([objective.collate(token_rows(2))])
    assert "unused" in str(stopped.value)


@pytest.mark.parametrize("optimizer", list(Optimizer), ids=lambda optimizer: optimizer.value)
def test_optimisers_run_where_they_run(optimizer):
    """Every choice takes a step on this machine, or refuses in one line."""
    from data_prep.errors import UserError

    objective = LanguageModeling(lora(rank=2))
    before = weights(objective)
    try:
        updater(objective, options(optimizer=optimizer), 1).step([objective.collate(token_rows(2))])
    except UserError as refusal:
        assert refusal.hint
        return
    assert any(not torch.equal(now, before[name]) for name, now in weights(objective).items())


def test_equal_seeds_give_equal_runs(tmp_path):
    """Adapter and metrics of two runs from nothing are byte-equal."""
    words = ["adapter.dropout=0.3", "stages.sft.max_steps=3", "stages.sft.eval_every=1"]
    first, second = (made("sft", *words, f"name={name}", out=tmp_path) for name in ("a", "b"))
    for name in ("adapter_model.safetensors", "metrics.jsonl", "checkpoint.json"):
        assert (first / "sft" / name).read_bytes() == (second / "sft" / name).read_bytes(), name


# ---------------------------------------------------------------------------------------------------- TRL as oracle
def stock(role: Role, kind, **config):
    """The role's weights in a stock transformers model under stock peft, attached for no task in particular."""
    from peft import get_peft_model

    wanted = role.adapter.peft_config()
    wanted.task_type, wanted.exclude_modules = None, ["score"]
    theirs = get_peft_model(kind.from_pretrained(base(), dtype=torch.float32, **config), wanted)
    own = dict(role.carrier.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(own[name])
    return theirs


def compared(role: Role, theirs: torch.nn.Module) -> int:
    """Assert that LoRA gradients agree to 1e-5 of their size; returns how many were compared."""
    other = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    count = 0
    for name, parameter in role.carrier.named_parameters():
        if parameter.requires_grad:
            gradient = other[name]
            scale = float(gradient.abs().max())
            assert scale > 0
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-5 * scale)
            count += 1
    return count


def test_sft_loss_and_gradients_are_trls(tmp_path):
    """TRL tokenises and masks the conversations itself."""
    import json

    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from data_prep.prepare import Renderer
    from data_prep.types import Conversation, Message

    tokenizer = AutoTokenizer.from_pretrained(base())
    lines = (rows_folder() / "conversations.jsonl").read_text("utf-8").splitlines()[:12]
    talk = [json.loads(line)["messages"] for line in lines]
    renderer = Renderer(tokenizer)
    rows = [
        renderer.conversation(Conversation(tuple(Message(m["role"], m["content"]) for m in row), f"t:{i}", {}))
        for i, row in enumerate(talk)
    ]
    role = lora(seed=3)
    objective = LanguageModeling(role)
    numbers = updater(objective, options(), 1, lr=0.0).step([objective.collate(rows[i : i + 5]) for i in (0, 5, 10)])
    theirs = stock(role, AutoModelForCausalLM)
    config = SFTConfig(
        output_dir=str(tmp_path / "trl"),
        per_device_train_batch_size=12,
        assistant_only_loss=True,
        max_length=None,
        use_cpu=True,
        report_to="none",
        gradient_checkpointing=False,
        bf16=False,
    )
    data = Dataset.from_list([{"messages": row} for row in talk])
    trainer = SFTTrainer(model=theirs, args=config, train_dataset=data, processing_class=tokenizer)
    loss = trainer.compute_loss(trainer.model.train(), next(iter(trainer.get_train_dataloader())))
    loss.backward()
    assert numbers["loss"] == pytest.approx(float(loss), abs=1e-5)
    assert compared(role, trainer.model) == 28


@pytest.mark.parametrize("margins", [False, True], ids=["plain", "margins"])
def test_reward_loss_and_gradients_are_trls(margins, tmp_path):
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    role = lora(seed=4, head=True)
    objective, rows = Pairwise(role, centering=0.03), pair_rows(8, margins)
    numbers = updater(objective, options(), 1, lr=0.0).step([objective.collate(rows[i : i + 3]) for i in (0, 3, 6)])
    theirs = stock(role, AutoModelForSequenceClassification, num_labels=1)
    head = theirs.get_base_model().score
    with torch.no_grad():
        head.weight.copy_(role.head.score.weight)
    head.weight.requires_grad_(True)
    config = RewardConfig(
        output_dir=str(tmp_path / "trl"),
        per_device_train_batch_size=8,
        center_rewards_coefficient=0.03,
        max_length=None,
        use_cpu=True,
        report_to="none",
        gradient_checkpointing=False,
        bf16=False,
        disable_dropout=True,
    )
    data = Dataset.from_list(
        [
            {"chosen_ids": [*row.prompt, *row.chosen], "rejected_ids": [*row.prompt, *row.rejected]}
            | ({"margin": row.margin} if margins else {})
            for row in rows
        ]
    )
    tokenizer = AutoTokenizer.from_pretrained(base())
    trainer = RewardTrainer(model=theirs, args=config, train_dataset=data, processing_class=tokenizer)
    loss = trainer.compute_loss(trainer.model.train(), next(iter(trainer.get_train_dataloader())))
    trainer.model.zero_grad(set_to_none=True)
    loss.backward()
    assert numbers["loss"] == pytest.approx(float(loss), abs=1e-5)
    assert compared(role, trainer.model) == 28
    torch.testing.assert_close(role.head.score.weight.grad, head.weight.grad, rtol=1e-5, atol=1e-6)

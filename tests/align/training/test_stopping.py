"""How training ends: on a number that is not finite, on its best evaluation, or as it ended the time before."""

from __future__ import annotations

import pytest
import torch

from align.training.batching import batches
from align.training.loop import fit
from align.training.objectives import LanguageModeling
from align.training.options import Optimizer
from data_prep.core.errors import TrainingStopped
from tests.tiny_chain import made
from tests.tiny_training import lora, options, token_rows, updater, weights


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
    from align.cli.dispatch import main
    from align.training import objectives
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


class Distance(LanguageModeling):
    """Its evaluation loss is how far its weights are from a goal; training is real."""

    goal: dict[str, torch.Tensor] | None = None

    def forward(self, batch):
        loss, numbers = super().forward(batch)
        if not self.training:
            gap = sum(float((now - self.goal[name]).abs().sum()) for name, now in weights(self).items())
            loss = torch.tensor(gap * batch.weight)
        return loss, numbers


def test_the_best_metric_is_measured_again_on_the_best_weights():
    """The goal is where the third step leads, so that the third evaluation, and none beside it, is nothing."""
    chosen = options(batch_size=4, eval_every=1, patience=3, optimizer=Optimizer.adamw)
    first, objective = LanguageModeling(lora(rank=2)), Distance(lora(rank=2))
    rows, passed, losses = token_rows(), [], []
    fit(updater(first, chosen, 30, lr=0.3), rows, [], 0, lambda *_: passed.append(weights(first)))
    objective.goal = passed[2]

    def log(step, split, numbers):
        if split == "eval":
            losses.append(numbers["loss"])

    final = fit(updater(objective, chosen, 30, lr=0.3), rows, rows[:3], 0, log)
    assert len(losses) == 6 and [loss > 0 for loss in losses] == [True, True, False, True, True, True]
    assert final["best_step"] == 3 and final["loss"] == 0.0


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
    from data_prep.core.errors import UserError

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

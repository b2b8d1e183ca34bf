"""Memory that runs out anywhere in a stage is told in one line, with what makes the passes smaller; nothing is lost."""

from __future__ import annotations

import re
from dataclasses import replace
from unittest import mock

import pytest
import torch

from align.inference.generation import RolloutEngine
from align.models.memory import OutOfMemory, is_out_of_memory, told_of
from align.training.objectives import LanguageModeling
from align.training.optimizer import Updater
from data_prep.core.errors import UserError
from tests.tiny_chain import compose, execute, pipeline_words, read, refused, run, sft

ERRORS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to"),
}


def no_backward(error: Exception):
    """Backward passes need more memory than there is."""

    def backward(self: torch.Tensor, *args: object, **more: object) -> None:
        raise error

    return mock.patch.object(torch.Tensor, "backward", backward)


def test_the_errors_of_allocators_are_told_from_others():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 55)  # more than any machine addresses: the allocator's own words
    assert (
        is_out_of_memory(caught.value)
        and all(map(is_out_of_memory, ERRORS.values()))
        and is_out_of_memory(MemoryError())
    )
    assert not is_out_of_memory(RuntimeError("size mismatch")) and not is_out_of_memory(ValueError("out of memory"))
    with pytest.raises(RuntimeError, match="size mismatch"), told_of(3):
        raise RuntimeError("size mismatch")


@pytest.mark.parametrize("kind", ERRORS)
def test_a_step_that_does_not_fit_names_half_of_its_tokens_to_try(tmp_path, capfd, kind):
    with no_backward(ERRORS[kind]):
        line = refused(*run(capfd, *sft(tmp_path)))
    found = re.search(r"stages\.sft: out of memory in a pass over (\d+) tokens; .*micro_tokens=(\d+)", line)
    assert found and int(found[2]) == int(found[1]) // 2 > 8, line
    code, err = run(capfd, *sft(tmp_path, f"stages.sft.micro_tokens={found[2]}"))
    assert code == 0, err


def test_the_smaller_passes_go_on_where_memory_ran_out(tmp_path, capfd, monkeypatch):
    """The line that is printed, taken at its word: what was trained until then is not trained again."""
    monkeypatch.setattr("align.training.resume._SHARE", 0)
    step, taken = Updater.step, []

    def scarce(self: Updater, window: object) -> object:
        if len(taken) == 2:
            raise ERRORS["cuda"]
        taken.append(1)
        return step(self, window)

    words = sft(tmp_path, "stages.sft.max_steps=4", "stages.sft.save_minutes=1e-9")
    with mock.patch.object(Updater, "step", scarce):
        line = refused(*run(capfd, *words))
    assert line.endswith("The same command with it goes on after the last kept state")
    code, err = run(capfd, *words, re.search(r"stages\.sft\.micro_tokens=\d+", line)[0])
    assert code == 0 and "sft: goes on after step 2, where it was stopped" in err
    assert "from step 2 on computed with micro_" in err and "the result is that of neither to the bit" in err


@pytest.mark.parametrize("late", [False, True])
def test_passes_are_halved_until_they_fit(tmp_path, capfd, monkeypatch, late):
    """From the last kept state on, where there is one; the result is found done under the options that were given."""
    monkeypatch.setattr("align.training.resume._SHARE", 0)
    forward, step, held, done = LanguageModeling.forward, Updater.step, list[int](), list[int]()

    def scarce(self: LanguageModeling, batch: object) -> object:
        held.append(batch.packed.tokens)
        if batch.packed.tokens > 60 and self.training and (not late or len(done) == 2):
            raise ERRORS["cuda"]
        return forward(self, batch)

    def counted(self: Updater, window: object) -> object:
        found = step(self, window)
        done.append(1)
        return found

    words = sft(tmp_path, "stages.sft.max_steps=4", "stages.sft.save_minutes=1e-9", "stages.sft.micro_tokens=200")
    words.append("stages.sft.on_out_of_memory=halve")
    with mock.patch.object(LanguageModeling, "forward", scarce), mock.patch.object(Updater, "step", counted):
        code, err = run(capfd, *words)
    assert code == 0 and len(done) == 4, err
    tried = [
        int(size)
        for size in re.findall(r"warning: out of memory in a pass over \d+ tokens; computed with .*=(\d+) from", err)
    ]
    assert tried and tried[-1] <= 60 and max(held[-4:]) <= 60
    assert ("sft: goes on after step 2, where it was stopped" in err) == late
    code, err = run(capfd, *words)
    assert code == 0 and "sft: finished before, skipped" in err


def test_a_row_that_does_not_fit_alone_is_not_halved(tmp_path, capfd):
    words = sft(tmp_path, "stages.sft.micro_tokens=16", "stages.sft.on_out_of_memory=halve")
    with no_backward(ERRORS["cuda"]):
        line = refused(*run(capfd, *words))
    assert "stages.sft: out of memory in a pass over" in line and "gradient_checkpointing=true" in line


def test_what_was_finished_before_is_kept(tmp_path):
    config = compose([*pipeline_words("rlhf", "name=n"), f"out={tmp_path}"])
    config = replace(config, stages=config.stages[:2])
    step = Updater.step

    def scarce(self: Updater, window: object) -> object:
        if isinstance(self.objective, LanguageModeling):
            return step(self, window)
        raise ERRORS["cuda"]

    with mock.patch.object(Updater, "step", scarce), pytest.raises(OutOfMemory, match="out of memory"):
        execute(config)
    assert read(tmp_path / "n" / "run.json")["status"] == "failed"
    record = execute(config)
    assert record["status"] == "done" and [stage["skipped"] for stage in record["stages"]] == [True, False]


def test_a_base_that_does_not_fit_is_no_unknown_architecture(tmp_path, capfd):
    from transformers import PreTrainedModel

    with mock.patch.object(PreTrainedModel, "_load_pretrained_model", side_effect=ERRORS["cpu"]):
        assert "out of memory" in refused(*run(capfd, *sft(tmp_path)))


def test_the_opening_probe_that_does_not_fit_is_no_unknown_architecture(tmp_path, capfd):
    with mock.patch("align.models.forward.pack", side_effect=ERRORS["cuda"]):
        line = refused(*run(capfd, *sft(tmp_path)))
    assert "stages.sft: out of memory in a pass over 16 tokens" in line and "not supported" not in line


def test_replies_that_do_not_fit_are_told(tmp_path, capfd):
    with mock.patch.object(RolloutEngine, "generate", side_effect=ERRORS["cuda"]):
        line = refused(*run(capfd, *sft(tmp_path)))
    assert "stages.sft: out of memory; set stages.sft.micro_tokens=" in line


def test_outside_a_run_it_is_one_line_too():
    with pytest.raises(UserError, match="out of memory in a pass over 7 tokens"), told_of(7):
        raise ERRORS["cpu"]
    with pytest.raises(OutOfMemory) as caught, told_of(), told_of(9):
        raise ERRORS["cuda"]
    assert caught.value.tokens == 9

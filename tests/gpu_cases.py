"""What training, decoding and whole runs ask of a graphics card, counted on one that is simulated.

    python -m pytest -p tests.simulated_gpu tests/gpu_cases.py

`tests/align/test_on_a_gpu.py` runs this in a process of its own, since the device is there for a whole process. Every
ceiling stands beside the number of today, and a test puts in what it is there to find. 4-bit weights are the one
method left out: bitsandbytes' kernels would be given wrapped tensors.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import tests.simulated_gpu as gpu
from align.adapters.lora import Lora
from align.cli.dispatch import main
from align.config.registries import adapters
from align.config.schema import Load
from align.inference import loaded
from align.inference.generation import RolloutEngine, Sampling
from align.models import packing
from align.models.forward import packed_hidden
from align.models.own_functions import NarrowCopies
from align.models.own_modules import put_in
from align.models.shared_base import BaseIdentity, SharedBase
from align.rl.actor_critic import ActorCritic, PPOLoss
from align.roles import Bases, Role, chosen_logprobs
from align.runs.processes import join_processes
from align.stages import supervised
from align.stages.ppo import PPO
from align.stages.sft import SFT
from align.training import resume
from align.training.objectives import LanguageModeling, Objective, SupervisedBatch
from align.training.optimizer import Updater, make_optimizer
from align.training.resume import StateSaver
from reward.head import ScalarHead
from tests.processors import ROOT
from tests.simulated_gpu import GPU, counted
from tests.tiny_chain import grid_beyond, made, read
from tests.tiny_training import experience_rows, token_rows

BUDGET = {
    "forward, 1 group": (72, 75),
    "backward, 1 group": (145, 150),
    "forward, 4 groups": (85, 88),
    "backward, 4 groups": (178, 185),
    "forward, one kernel": (68, 70),
    "backward, one kernel": (137, 141),
    "token of a layer": (56, 58),
    "waits of a token": (1, 1),
    "copies of a token": (1, 1),
    "waits of an sft step": (1, 1),
    "copies of an sft step": (7, 8),
    "waits of a ppo step": (1, 1),
    "copies of a ppo step": (12, 12),
}
"""(today's number, ceiling). Kernels are those of one decoder layer with LoRA on every linear layer, in bfloat16: for a
packed pass of rows with attention in so many groups or as one kernel, or for one more token of each row. A step is one
of one micro-batch."""
ROWS = {"1 group": [20] * 4, "4 groups": [60, 42, 29, 20]}
BF16 = [f"stages.{name}.autocast=bf16" for name in ("sft", "reward_model", "ppo")]


def role(layers: int = 2, seed: int = 0, head: bool = False, load: Load = Load.bf16) -> Role:
    """LoRA on every linear layer of a small Llama, on the device."""
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    kind = torch.bfloat16 if load is Load.bf16 else torch.float32
    model = AutoModelForCausalLM.from_config(config, attn_implementation=packing.ATTENTION, dtype=kind)
    base = SharedBase.freeze(model.to(GPU), BaseIdentity("small", None, "small"), load)
    put_in(base.model)
    adapter = Lora(rank=4)
    return Role("policy", adapter.attach(base.tree(), True), adapter, ScalarHead(32).to(GPU) if head else None)


def layer_cost(rows: list[int], groups: bool = True) -> tuple[int, int]:
    """Kernels (forward, backward) that one more layer takes for rows of these lengths, attention in groups or not."""
    found = []
    for layers in (2, 3):
        objective = LanguageModeling(role(layers))
        batch = objective.collate([row for row in token_rows(1) for _ in rows])
        packed = packing.pack([[5 + i % 90 for i in range(length)] for length in rows])
        batch.packed = replace(packed, layout=replace(packed.layout, runs=None)) if groups else packed
        batch = batch.to(GPU)
        with counted() as forward:
            loss, _ = objective(batch)
        with counted() as backward:
            loss.backward()
        found.append((forward.taken()["kernels"], backward.taken()["kernels"]))
    return found[1][0] - found[0][0], found[1][1] - found[0][1]


def token_cost(layers: int) -> dict[str, float]:
    """What one more token of each of four rows takes, all in all."""
    policy, found = role(layers), []
    prompts = [[5, 6, 7, 8][: 2 + i % 3] for i in range(4)]
    for tokens in (4, 8):
        with counted() as counts:
            RolloutEngine(policy, 9999).generate(prompts, Sampling(tokens), torch.Generator(device=GPU))
        found.append(counts.taken())
    return {name: (found[1][name] - found[0][name]) / 4 for name in found[0]}


def step_cost(objective: Objective, rows: list[Any], options: Any) -> gpu.Counts:
    """What an optimiser step after the first asks of the device."""
    objective.train()
    groups = [{"params": [p for p in objective.parameters() if p.requires_grad], "lr": 1e-3}]
    updater = Updater(objective, groups, options, 10, join_processes())
    for _ in range(2):
        with counted() as counts:
            updater.step([objective.collate(rows)])
    return counts


def sft_step() -> dict[str, int]:
    return step_cost(LanguageModeling(role()), token_rows(8), SFT()).taken()


def ppo_step() -> dict[str, int]:
    both = ActorCritic(role(), role(seed=1, head=True), PPOLoss())
    return step_cost(both, experience_rows(8), PPO()).taken()


def require(found: dict[str, float]) -> None:
    """Nothing above its ceiling; what has come down brings its ceiling with it."""
    over = {name: f"{value:g} of {BUDGET[name][1]}" for name, value in found.items() if value > BUDGET[name][1]}
    assert not over, f"above the ceiling: {over}"
    below = {name: f"{value:g}, not {BUDGET[name][0]}" for name, value in found.items() if value < BUDGET[name][0]}
    assert not below, f"better than BUDGET says, which is to be lowered: {below}"


# ------------------------------------------------------------------------------------------------------- the device
def test_it_refuses_what_cuda_refuses():
    ours, host = torch.ones(3, device=GPU), torch.ones(3)
    for wrong in (
        lambda: ours + host,
        lambda: torch.cat([ours, host]),
        lambda: host[torch.zeros(1, dtype=torch.long, device=GPU)],
        lambda: torch.rand(3, device=GPU, generator=torch.Generator()),
    ):
        with pytest.raises(RuntimeError, match="device"):
            wrong()
    with pytest.raises(TypeError, match="numpy"):
        ours.numpy()
    assert float((ours * 2 + torch.tensor(1.0)).sum()) == 9.0


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x),
    ],
)
def test_each_way_to_wait_for_it_is_counted(look: Callable[[torch.Tensor], Any]):
    ours = torch.ones(3, device=GPU)
    with counted() as counts:
        look(ours)
    assert counts.taken()["waits"] == 1, counts.waits


def test_it_computes_what_the_cpu_does():
    torch.manual_seed(0)
    layer, rows = torch.nn.Linear(8, 8), torch.randn(4, 8)
    expected = layer(rows).square().sum()
    expected.backward()
    gradient = layer.weight.grad
    layer.zero_grad()
    moved = layer.to(GPU)
    found = moved(rows.to(GPU)).square().sum()
    found.backward()
    assert float(found) == float(expected) and torch.equal(moved.weight.grad.cpu(), gradient)


# ----------------------------------------------------------------------------------------------------------- budgets
@pytest.mark.parametrize("groups", ROWS)
def test_kernels_of_a_layer(groups: str):
    forward, backward = layer_cost(ROWS[groups])
    require({f"forward, {groups}": forward, f"backward, {groups}": backward})


@pytest.mark.parametrize("groups", ROWS)
def test_kernels_of_a_layer_whose_attention_is_one(groups: str):
    forward, backward = layer_cost(ROWS[groups], groups=False)
    require({"forward, one kernel": forward, "backward, one kernel": backward})


def test_a_second_kernel_for_each_group_is_found(monkeypatch: pytest.MonkeyPatch):
    product = packing._product
    monkeypatch.setattr(packing, "_product", lambda how, query, *more, **named: product(how, query * 1, *more, **named))
    forward, _ = layer_cost(ROWS["4 groups"])
    with pytest.raises(AssertionError, match="above the ceiling"):
        require({"forward, 4 groups": forward})


def test_a_decoded_token():
    found, more = token_cost(2), token_cost(3)
    layer = more["kernels"] - found["kernels"]
    require({"token of a layer": layer, "waits of a token": found["waits"], "copies of a token": found["copies"]})


def test_factors_made_narrow_for_every_token_are_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(NarrowCopies, "of", lambda _, weight, kind: weight.to(kind))
    with pytest.raises(AssertionError, match="above the ceiling"):
        require({"token of a layer": token_cost(3)["kernels"] - token_cost(2)["kernels"]})


@pytest.mark.parametrize(("name", "step"), [("an sft", sft_step), ("a ppo", ppo_step)])
def test_a_step(name: str, step: Callable[[], dict[str, int]]):
    found = step()
    require({f"{what} of {name} step": found[what] for what in ("waits", "copies")})


def test_a_hidden_wait_in_a_step_is_found(monkeypatch: pytest.MonkeyPatch):
    forward = LanguageModeling.forward

    def looking(self: LanguageModeling, batch: SupervisedBatch) -> Any:
        loss, numbers = forward(self, batch)
        assert loss > 0
        return loss, numbers

    monkeypatch.setattr(LanguageModeling, "forward", looking)
    with pytest.raises(AssertionError, match="above the ceiling"):
        require({"waits of an sft step": sft_step()["waits"]})


def test_a_tensor_left_on_the_host_is_found(monkeypatch: pytest.MonkeyPatch):
    moved = SupervisedBatch.to

    def left(self: SupervisedBatch, device: torch.device) -> SupervisedBatch:
        found = moved(self, device)
        found.targets_M = self.targets_M
        return found

    monkeypatch.setattr(SupervisedBatch, "to", left)
    with pytest.raises(RuntimeError, match="same device"):
        sft_step()


# ------------------------------------------------------------------------------------------------------------ types
def census(load: Load, narrow: bool) -> dict[str, str]:
    """The type of everything that a step of supervised tuning and one of a reward model hold or make."""
    policy, judge = role(load=load), role(head=True, load=load)
    objective, seen = LanguageModeling(policy).train(), dict[str, torch.dtype]()
    layer = policy.tree.model.layers[0]
    query, norm = layer.self_attn.q_proj, layer.input_layernorm
    query.register_forward_hook(lambda _, given, found: seen.update({"products of linear layers": found.dtype}))
    norm.register_forward_hook(lambda _, given, found: seen.update({"results of norms": found.dtype}))
    layer.register_forward_hook(lambda _, given, found: seen.update({"hidden states between layers": found.dtype}))
    batch = objective.collate(token_rows(4)).to(GPU)
    with torch.autocast(GPU.type, torch.bfloat16, enabled=narrow):
        hidden_MD = packed_hidden(policy.tree, batch.packed)[batch.source_M]
        logprobs_M = chosen_logprobs(policy, hidden_MD, batch.targets_M)
        scores_M = judge.scores(batch.packed, batch.source_M)
    loss = -logprobs_M.sum()
    loss.backward()
    own = next(p for p in policy.parameters() if p.requires_grad)
    optimizer = make_optimizer([{"params": [own], "lr": 1e-3}], SFT())
    optimizer.step()
    held = {"base weights": query.base_layer.weight, "adapter weights": own}
    made = {"log-probabilities": logprobs_M, "scores and values": scores_M, "loss": loss, "adapter gradients": own.grad}
    moments = {"Adam's moments": optimizer.state[own]["exp_avg"]}
    found = {**held, **{k: torch.empty(0, dtype=v) for k, v in sorted(seen.items())}, **made, **moments}
    return {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in found.items()}


def test_the_census_of_types_is_that_of_the_docs():
    """Beside today's types, what must be so: what is trained, its gradients, losses and scores are in float32."""
    ways = {"`load=bf16`, `auto`": (Load.bf16, True), "`load=fp32`, `auto`": (Load.fp32, True)}
    ways |= {"`load=bf16`, `off`": (Load.bf16, False), "`load=fp32`, `off`": (Load.fp32, False)}
    found = {name: census(*way) for name, way in ways.items()}
    wide = ("adapter weights", "log-probabilities", "scores and values", "loss", "adapter gradients", "Adam's moments")
    assert {types[name] for types in found.values() for name in wide} == {"float32"}
    names = list(next(iter(found.values())))
    rows = [[name, *(types[name] for types in found.values())] for name in names]
    lines = [["what", *found], ["---"] * (1 + len(found)), *rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    assert table in (ROOT / "docs/gpu.md").read_text(encoding="utf-8"), f"docs/gpu.md is to have\n{table}"


# ------------------------------------------------------------------------------------------------------------- runs
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the samples that a supervised stage keeps to be read."""
    monkeypatch.setattr(supervised, "greedy_samples", lambda *_: [])


@pytest.fixture(scope="module")
def chain() -> Path:
    """Every stage of RLHF in bfloat16, with recomputed activations, and its result."""
    ppo = ["stages.ppo.micro_tokens=64", "stages.ppo.gradient_checkpointing=true"]
    words = ["adapter=lora", "stages.sft.gradient_checkpointing=true", "stages.reward_model.adapter=vera", *ppo, *BF16]
    with pytest.MonkeyPatch.context() as patch:
        few_tokens(patch)
        return made("rlhf", "name=chain", *words)


def test_the_chain_in_bfloat16(chain: Path):
    record = read(chain / "run.json")
    assert record["status"] == "done" and len(record["stages"]) == 4
    step0 = next(stage for stage in record["stages"] if stage["name"] == "ppo")["metrics"]["step0"]
    assert step0["ratio_dev"] <= 1e-6 and step0["kl"] == 0.0, step0


def test_its_result_is_merged_exported_and_spoken_with(
    chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(loaded, "Bases", lambda folder, identity, _: Bases(folder, identity, GPU))
    assert main(["merge", f"{chain}/ppo", f"to={tmp_path / 'merged'}"]) == 0
    assert main(["export", f"{chain}/ppo", f"to={tmp_path / 'peft'}"]) == 0
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hi\n")))
    capfd.readouterr()
    assert main(["chat", str(chain), "max_new_tokens=4"]) == 0
    assert capfd.readouterr().out.strip()


def test_a_stopped_stage_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    few_tokens(monkeypatch)
    words = ["name=n", "stages.sft.save_minutes=1e-9", "stages.sft.max_steps=3", "data.conversations.eval_share=0"]
    whole = made("sft", *words, out=tmp_path / "whole")
    offer = StateSaver.offer

    def stopped(self: StateSaver, updater: Updater, step: int, more: dict[str, Any]) -> None:
        offer(self, updater, step, more)
        if step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(resume, "_SHARE", 0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StateSaver, "offer", stopped)
        made("sft", *words, out=tmp_path / "stopped")
    again = made("sft", *words, out=tmp_path / "stopped")
    found, expected = ((run / "sft/metrics.jsonl").read_text() for run in (again, whole))
    assert found == expected


OPTIONS = {
    "prefix": ["adapter.num_virtual_tokens=4"],
    "prompt": ["adapter.num_virtual_tokens=4"],
    "feature_extraction": ["adapter.last_blocks=1"],
    "lora": ["adapter.dora=true", "model.load=bf16"],
}


KINDS = {"full", "lora", "adalora", "delta_lora", "prefix", "bottleneck"}
"""Methods that move weights, draw numbers or have layers of their own; the others are for the grid."""


@pytest.mark.parametrize("method", grid_beyond([name for name in adapters.names() if name != "qlora"], KINDS))
def test_every_method(method: str, monkeypatch: pytest.MonkeyPatch):
    few_tokens(monkeypatch)
    words = [f"adapter={method}", *OPTIONS.get(method, []), "stages.sft.max_steps=1", "data.conversations.eval_share=0"]
    assert read(made("sft", f"name={method}", *words) / "run.json")["status"] == "done"

"""Plain peft adapters, made elsewhere, as parents; and our adapters in plain peft."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import HRAConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from align.checkpoints.checkpoint import Checkpoint
from align.checkpoints.compatibility import ParentMode, adapter_of
from align.checkpoints.lineage import lineage
from align.config.registries import adapters
from align.config.schema import Load, OnParent
from data_prep.core.errors import UserError
from tests.tiny_chain import HOME, base, bases, fresh, logits, made, read, refused, run, sentences, sft

CLOSE = 1e-5
"""Logits of size 0.5 in fp32, which stock peft sums in another order; a weight that is missing moves them by 1e-2."""

ALL_LINEAR = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}
RANK_4 = ["stages.sft.adapter=lora", "stages.sft.adapter.rank=4", "stages.sft.adapter.alpha=12"]


def plain_model():
    return AutoModelForCausalLM.from_pretrained(base(), dtype=torch.float32)


def save_plain(folder: Path, config) -> Path:
    """An adapter as anyone makes one with peft, its tensors moved as training would."""
    torch.manual_seed(1)
    model = get_peft_model(plain_model(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(str(folder))
    return folder


@cache
def plain() -> Path:
    """A LoRA adapter made by peft alone; never to be changed in place."""
    return save_plain(HOME / "plain", LoraConfig(r=4, lora_alpha=12, **ALL_LINEAR))


@torch.no_grad()
def peft_logits(folder: Path) -> torch.Tensor:
    """Stock peft's logits of every row, one by one, those of virtual tokens left out."""
    return rows_of(PeftModel.from_pretrained(plain_model(), str(folder)).eval())


@torch.no_grad()
def rows_of(model) -> torch.Tensor:
    rows = [(ids, model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]) for ids in sentences()]
    return torch.cat([found[-len(ids) :] for ids, found in rows])


@cache
def continued() -> Path:
    """A chain whose SFT continues the plain adapter."""
    return made("rlhf", f"stages.sft.init={plain()}", "stages.sft.on_parent=continue", *RANK_4, "adapter.rank=4")


@pytest.mark.parametrize("mode", list(OnParent)[1:], ids=lambda mode: mode.name)
def test_a_stage_starts_as_the_plain_adapter(mode):
    parent = Checkpoint.open(plain()).require(base(), [str(base())])
    role = bases().fresh(parent, adapter_of(parent), ParentMode(mode, Load.fp32), "policy")
    atol = CLOSE if mode is OnParent["continue"] else 1e-4
    torch.testing.assert_close(logits(role), peft_logits(plain()), rtol=0, atol=atol)


def test_a_chain_on_a_plain_adapter_runs_and_shows_it(capfd):
    folder = continued()
    err = capfd.readouterr().err
    said = [line for line in err.splitlines() if "is a plain peft adapter" in line]
    assert not err or len(said) == 1
    assert not said or ("rank=4" in said[0] and "unknown: its revision" in said[0] and "precision" in said[0])
    nodes = {node["stage"]: node for node in lineage(folder)["nodes"]}
    assert nodes["foreign"]["foreign"] and nodes["foreign"]["method"] == "lora" and not nodes["sft"]["foreign"]
    sft_record = Checkpoint.open(folder / "sft").record
    assert sft_record["on_parent"] == "continue" and sft_record["options"]["rank"] == 4
    assert sft_record["parents"][0]["digest"] == Checkpoint.open(plain()).digest == nodes["foreign"]["digest"]
    assert all(check["ok"] for check in Checkpoint.open(folder / "ppo").verify())


def test_a_plain_adapter_changed_later_is_seen(tmp_path):
    own = Path(shutil.copytree(plain(), tmp_path / "plain"))
    folder = made("sft", f"stages.sft.init={own}", "stages.sft.on_parent=stack", out=tmp_path / "runs")
    weights = bytearray((own / "adapter_model.safetensors").read_bytes())
    weights[-3] ^= 1
    (own / "adapter_model.safetensors").write_bytes(weights)
    checks = Checkpoint.open(folder / "sft").verify()
    wrong = {check["name"]: check["detail"] for check in checks if not check["ok"]}
    assert "another checkpoint than it was trained from" in wrong["parents"]


def test_continuing_needs_its_options_and_the_refusal_gives_them(capfd, tmp_path):
    words = sft(tmp_path, f"stages.sft.init={plain()}", "stages.sft.on_parent=continue")
    said = refused(*run(capfd, *words))
    assert "adapter=lora adapter.rank=4 adapter.alpha=12" in said


FAULTS = {
    "r": (8, "do not fit this base"),
    "use_rslora": (True, None),
    "modules_to_save": (["lm_head"], "modules_to_save"),
    "bias": ("all", "bias"),
    "layers_to_transform": ([0], "layers_to_transform"),
    "rank_pattern": ({"q_proj": 2}, "rank_pattern"),
    "target_modules": (".*q_proj", "target_modules"),
    "init_lora_weights": ("pissa", "init_lora_weights"),
    "task_type": ("SEQ_CLS", "task_type"),
    "trainable_token_indices": ([3], "trainable_token_indices"),
    "a_key_of_the_future": (1, "a_key_of_the_future"),
    "peft_type": ("HRA", "peft_type"),
    "base_model_name_or_path": ("someone/else", "model.aliases=[someone/else]"),
}


@pytest.mark.parametrize("key", FAULTS)
def test_what_is_not_known_is_refused_by_name(key, tmp_path, capfd):
    value, said = FAULTS[key]
    own = Path(shutil.copytree(plain(), tmp_path / "plain"))
    config = json.loads((own / "adapter_config.json").read_text())
    (own / "adapter_config.json").write_text(json.dumps(config | {key: value}))
    code, err = run(capfd, *sft(tmp_path, f"stages.sft.init={own}"))
    if said is None:
        assert code == 0, err
    else:
        assert said in refused(code, err)


def test_an_alias_says_that_two_names_are_one_model(tmp_path):
    own = Path(shutil.copytree(plain(), tmp_path / "plain"))
    config = json.loads((own / "adapter_config.json").read_text())
    (own / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/tiny"}))
    folder = made("sft", f"stages.sft.init={own}", "model.aliases=[org/tiny]", out=tmp_path)
    assert read(folder / "run.json")["status"] == "done"


def test_tensors_must_fit_exactly(tmp_path, capfd):
    from safetensors.torch import load_file, save_file

    own = Path(shutil.copytree(plain(), tmp_path / "plain"))
    tensors = load_file(own / "adapter_model.safetensors")
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, own / "adapter_model.safetensors")
    assert "1 missing, 0 unexpected" in refused(*run(capfd, *sft(tmp_path, f"stages.sft.init={own}")))


def test_other_plain_methods(tmp_path, capfd):
    known = save_plain(tmp_path / "vera", VeraConfig(r=8, save_projection=False, **ALL_LINEAR))
    role = bases().realise(Checkpoint.open(known).require(base()), "policy", Load.fp32)
    torch.testing.assert_close(logits(role), peft_logits(known), rtol=0, atol=CLOSE)
    other = save_plain(tmp_path / "hra", HRAConfig(r=2, **ALL_LINEAR))
    code, err = run(capfd, *sft(tmp_path, f"stages.sft.init={other}"))
    assert "unknown peft_type (got HRA" in refused(code, err)


def test_a_plain_adapter_is_no_reward_model_and_no_record(capfd, tmp_path):
    words = [f"stages.ppo.reward={plain()}", "pipeline=ppo", "model=hf", f"model.path={base()}", f"out={tmp_path}"]
    assert "where a reward is needed" in refused(*run(capfd, *words))
    from align.checkpoints.resolve import resolve_checkpoint

    with pytest.raises(UserError, match="without a record"):
        resolve_checkpoint(str(plain()), str(tmp_path))


def test_our_checkpoint_without_its_record_is_not_taken_for_a_plain_adapter(tmp_path):
    own = Path(shutil.copytree(continued() / "sft", tmp_path / "sft"))
    (own / "checkpoint.json").unlink()
    with pytest.raises(UserError, match=r"checkpoint\.json is missing"):
        Checkpoint.open(own)


PORTABLE = sorted(
    name
    for name, cls in adapters.items()
    if not cls.traits.owns_weights and cls().quantization() is None and getattr(cls.traits, "portable", True)
)


@pytest.mark.parametrize("method", PORTABLE)
def test_our_adapters_give_equal_logits_in_plain_peft(method, tmp_path):
    role = fresh(method, Load.fp32)
    role.adapter.save(role.carrier, tmp_path)
    if not (tmp_path / "adapter_config.json").is_file():
        pytest.skip(f"{method} is not in peft's format")
    torch.testing.assert_close(peft_logits(tmp_path), logits(role), rtol=0, atol=CLOSE)


def test_qlora_gives_equal_logits_in_plain_peft_on_the_same_four_bits(tmp_path):
    from align.models.shared_base import _four_bit

    role = fresh("qlora", Load.nf4)
    role.adapter.save(role.carrier, tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(
        base(), quantization_config=_four_bit(torch.device("cpu")), dtype=torch.float32, device_map={"": "cpu"}
    )
    model = PeftModel.from_pretrained(stock, str(tmp_path)).train()  # in training mode 4-bit layers stay as they are
    torch.testing.assert_close(rows_of(model), logits(role), rtol=0, atol=CLOSE)

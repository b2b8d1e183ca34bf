"""Low-rank terms as a plain LoRA adapter folder that stock peft, transformers and vLLM load."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from peft import LoraConfig, TaskType
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from align.models.low_rank import LowRankTerms


def write_lora(folder: Path, terms: LowRankTerms, base_id: str, tree: PreTrainedModel) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`; scales are folded into B, so alpha is the rank.

    Args:
        folder: where to; made if missing.
        terms: module name -> term; ranks may differ.
        base_id: what `base_model_name_or_path` shall say.
        tree: the model that the adapter stands on, for the names of its layers.
    """
    ranks = {name: term.down_RI.shape[0] for name, term in terms.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    unusual = {name: rank for name, rank in ranks.items() if rank != usual}
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base_id,
        r=usual,
        lora_alpha=usual,
        rank_pattern=unusual,
        alpha_pattern=dict(unusual),
        target_modules=_targets(list(terms), tree),
        fan_in_fan_out=any(isinstance(tree.get_submodule(name), Conv1D) for name in terms),
        inference_mode=True,
    )
    tensors = {}
    for name, term in terms.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = term.down_RI.float().cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = (term.up_OR.float() * term.scale).cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    _sort_sets(folder / "adapter_config.json")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _targets(names: list[str], tree: PreTrainedModel) -> list[str]:
    """The short form that other tools expect (`q_proj`) where it selects exactly these layers, else full names."""
    short = sorted({name.rpartition(".")[2] for name in names})
    linear = [name for name, module in tree.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    selected = {name for name in linear if name.rpartition(".")[2] in short}
    return short if selected == set(names) else sorted(names)


def _sort_sets(path: Path) -> None:
    """peft keeps targets in a set; sorted, equal adapters have equal files."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

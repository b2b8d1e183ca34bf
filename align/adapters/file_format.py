"""Methods with a file format of this project: tensors of the tree by name, and a type that stock peft refuses."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.adapters.base import Adapter
from data_prep.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass
class OwnFormat(Adapter):
    """Fills attach, save and load from `insert` and `tensors`; the carrier is the tree itself."""

    def insert(self, tree: PreTrainedModel, trainable: bool) -> None:
        """Put the method's tensors into the tree."""
        raise NotImplementedError

    def tensors(self, tree: PreTrainedModel) -> dict[str, Tensor]:
        """The method's tensors by the names they have in the file."""
        raise NotImplementedError

    def attach(self, tree: PreTrainedModel, trainable: bool) -> PreTrainedModel:
        for problem in self.check(tree.config.to_dict()):
            raise problem
        self.insert(tree, trainable)
        tree.eval()
        return tree

    def save(self, carrier: Any, folder: Path) -> None:
        from safetensors.torch import save_file

        tensors = {name: value.detach().contiguous() for name, value in self.tensors(carrier).items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        write_own_config(folder, str(getattr(self, "method", "")))

    def load(self, tree: PreTrainedModel, folder: Path, trainable: bool) -> PreTrainedModel:
        import torch

        from align.models.sharding import part_like

        carrier = self.attach(tree, trainable)
        own = self.tensors(carrier)
        shapes = {name: tuple(value.shape) for name, value in own.items()}
        with torch.no_grad():
            for name, value in read_exactly(folder / "adapter_model.safetensors", shapes).items():
                own[name].copy_(part_like([value], own[name]))
        return carrier


def read_exactly(file: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors of a file, which must be those of `shapes` and no other.

    Raises:
        UserError: a tensor is missing, left over or of another shape.
    """
    from safetensors.torch import load_file

    saved = load_file(file)
    refuse_mismatch(file, shapes, {name: tuple(value.shape) for name, value in saved.items()})
    return saved


def write_own_config(folder: Path, kind: str) -> None:
    """An adapter_config.json of a type unknown to stock peft, so that it refuses rather than computes wrongly."""
    text = json.dumps({"peft_type": f"ALIGN_{kind.upper()}", "task_type": "CAUSAL_LM"}, indent=2)
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")


def refuse_mismatch(file: Path, expected: dict[str, Any], saved: dict[str, Any]) -> None:
    """Zero missing, zero unexpected, equal shapes; peft itself only warns."""
    missing, unexpected = sorted(expected.keys() - saved.keys()), sorted(saved.keys() - expected.keys())
    wrong = [name for name in expected.keys() & saved.keys() if expected[name] != saved[name]]
    if missing or unexpected or wrong:
        first = (missing or unexpected or wrong)[0]
        raise UserError(
            f"adapter tensors do not fit this base ({len(missing)} missing, {len(unexpected)} unexpected, "
            f"{len(wrong)} of another shape; first: {first})",
            file=str(file),
        )

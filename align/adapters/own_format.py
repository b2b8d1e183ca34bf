"""Methods with a file format of this project: tensors of the tree by name, and a type that stock peft refuses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.adapters.base import Adapter
from align.adapters.tensors import read_exactly, write_own_config

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

        carrier = self.attach(tree, trainable)
        own = self.tensors(carrier)
        shapes = {name: tuple(value.shape) for name, value in own.items()}
        with torch.no_grad():
            for name, value in read_exactly(folder / "adapter_model.safetensors", shapes).items():
                own[name].copy_(value)
        return carrier

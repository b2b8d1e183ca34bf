"""Methods that peft implements well: everything but the configuration is written once, here.

Checkpoints keep the PEFT format, so they load in peft, transformers and vLLM wherever those know the method.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.adapters.base import Adapter
from align.adapters.file_format import refuse_mismatch
from align.adapters.shapes import linear_layers
from align.adapters.targets import peft_targets
from data_prep.core.errors import UserError

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel


@dataclass
class PeftAdapter(Adapter):
    """Fills every call of the protocol except `peft_config` and the counts."""

    def peft_config(self) -> PeftConfig:
        """The method's peft configuration for a causal language model."""
        raise NotImplementedError

    def place(self, config: Any, tree: PreTrainedModel) -> None:
        """Fill in what depends on the names of the tree's modules: the targeted layers."""
        options: Any = self
        if hasattr(self, "target_modules"):
            names = list(linear_layers(tree))
            config.target_modules = peft_targets(names, options.target_modules, getattr(self, "layers", "all"))

    def freeze(self, carrier: PeftModel) -> None:
        """Freeze those of peft's tensors that the method does not train, and set up what it does in backward."""

    def attach(self, tree: PreTrainedModel, trainable: bool) -> PeftModel:
        from peft import get_peft_model

        from align.adapters.layers.own_linear import use_own

        for problem in self.check(tree.config.to_dict()):
            raise problem
        config = self.peft_config()
        self.place(config, tree)
        try:
            carrier = get_peft_model(tree, config)
        except ValueError as error:
            raise UserError(f"cannot attach {self.__class__.__name__} to {type(tree).__name__} ({error})") from error
        use_own(carrier)
        return self._set_trainable(carrier, trainable)

    def load(self, tree: PreTrainedModel, folder: Path, trainable: bool) -> PeftModel:
        from peft import get_peft_model_state_dict, set_peft_model_state_dict
        from safetensors.torch import load_file

        carrier = self.attach(tree, trainable=True)
        file = folder / "adapter_model.safetensors"
        saved = load_file(file)
        expected = get_peft_model_state_dict(carrier, save_embedding_layers=False)
        refuse_mismatch(file, {k: v.shape for k, v in expected.items()}, {k: v.shape for k, v in saved.items()})
        set_peft_model_state_dict(carrier, saved)
        return self._set_trainable(carrier, trainable)

    def merge(self, carrier: PeftModel) -> PreTrainedModel:
        merged: PreTrainedModel = carrier.merge_and_unload()
        return merged

    def save(self, carrier: PeftModel, folder: Path) -> None:
        carrier.save_pretrained(str(folder), save_embedding_layers=False)

    def _set_trainable(self, carrier: PeftModel, trainable: bool) -> PeftModel:
        if trainable:
            self.freeze(carrier)
        else:
            carrier.requires_grad_(False)
        carrier.eval()
        return carrier

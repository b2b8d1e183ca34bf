"""AdaLoRA: LoRA as P diag(E) Q, whose directions are dropped where they matter least, over all layers together.

"AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", arXiv 2303.10512: eq. 3 (the form), eq. 4
(orthogonality), eq. 7 to 10 (importance) and eq. 11 (budget). Differs from the paper and from peft in that the course
of the budget follows from the stage's number of steps, that the orthogonality term enters as its gradient before every
step (peft adds it in a forward pass that other loops do not call), that the scale is alpha / rank throughout, and that
what is saved is a plain LoRA of the first rank with zeros for dropped directions (`align compress` takes them out). A
continued adapter keeps its directions. Cost: LoRA's at the first rank while training, with two running means per
number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from align.adapters.base import Counts, adapter
from align.adapters.file_format import read_exactly
from align.adapters.lora import Init, Lora
from align.adapters.shapes import linear_shapes
from data_prep.core.errors import UserError
from data_prep.core.options import option

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

_STATE_FILE = "adalora.safetensors"


@adapter("adalora")
@dataclass
class AdaLora(Lora):
    """LoRA that moves its ranks to the layers that need them."""

    method: str = "adalora"
    rank: int = option(8, "average rank that stays", low=1)
    init_rank: int = option(0, "rank of every layer at the beginning (0: one and a half times rank)")
    hold: float = option(0.1, "share of the steps before anything is dropped", below=1)
    settle: float = option(0.3, "share of the steps, at the end, with a fixed choice", below=1)
    every: int = option(10, "steps between choices", low=1)
    memory: float = option(0.85, "decay of the running importance", below=1)
    orthogonality: float = option(0.5, "weight of the pull of P and Q towards orthogonal rows")

    lr_factor: ClassVar[float] = 10.0

    @property
    def first_rank(self) -> int:
        """Rank of every layer at the beginning."""
        return self.init_rank or -(-3 * self.rank // 2)

    def check(self, model_config: dict[str, Any]) -> list[UserError]:
        wrong = {
            "dora": self.dora,
            "init": self.init is not Init.default,
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": self.alpha_pattern,
            "trainable_tokens": self.trainable_tokens,
        }
        for name, given in wrong.items():
            if given:
                return [UserError("does not go with adalora", field=f"adapter.{name}", code="bad_value")]
        if self.first_rank < self.rank:
            return [UserError(f"must be at least rank ({self.rank})", field="adapter.init_rank", code="bad_value")]
        if self.hold + self.settle >= 1:
            return [UserError("and adapter.settle leave no step for choices", field="adapter.hold", code="bad_value")]
        return super().check(model_config)

    def ranks(self, model_config: dict[str, Any]) -> dict[str, int]:
        return dict.fromkeys(linear_shapes(model_config, self.target_modules, self.layers), self.first_rank)

    def peft_config(self) -> LoraConfig:
        config = super().peft_config()
        config.r = self.first_rank
        return config

    def count(self, model_config: dict[str, Any]) -> Counts:
        found = super().count(model_config)
        more = sum(self.ranks(model_config).values())
        return replace(found, trainable=found.trainable + more, total=found.total + more, saved=found.trainable)

    def attach(self, tree: PreTrainedModel, trainable: bool) -> PeftModel:
        from align.adapters.layers.adalora import put_diagonal

        carrier = self._scaled(super().attach(tree, trainable))
        put_diagonal(carrier)
        if not trainable:
            carrier.requires_grad_(False)
        return carrier

    def begin(self, tree: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        from align.adapters.layers.adalora import Allocation, add_orthogonality, observe
        from align.adapters.layers.lora_offset import lora_layers

        layers = len(lora_layers(tree))
        hold, final = round(self.hold * steps), max(1, steps - round(self.settle * steps))
        vars(tree)["allocation"] = Allocation(
            self.first_rank * layers, self.rank * layers, hold, final, self.every, self.memory
        )
        observe(tree)
        if self.orthogonality:
            add_orthogonality(tree, optimizer, self.orthogonality)

    def after_step(self, tree: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        vars(tree)["allocation"].after_step(tree, step)

    def state(self, carrier: PeftModel) -> dict[str, torch.Tensor]:
        from align.adapters.layers.adalora import state

        return state(carrier)

    def files(self) -> tuple[str, ...]:
        return (*super().files(), _STATE_FILE)

    def save(self, carrier: PeftModel, folder: Path) -> None:
        from safetensors.torch import save_file

        from align.adapters.layers.lora_offset import save_with_offset

        save_with_offset(carrier, folder)
        save_file({n: t.detach().contiguous() for n, t in self._own(carrier).items()}, folder / _STATE_FILE)

    def load(self, tree: PreTrainedModel, folder: Path, trainable: bool) -> PeftModel:
        """Frozen, the plain LoRA is read; to be trained further, its three factors."""
        import torch
        from peft import set_peft_model_state_dict

        from align.adapters.layers.adalora import put_diagonal
        from align.adapters.layers.lora_offset import plain_shapes

        carrier = self._scaled(super().attach(tree, trainable))
        saved = read_exactly(folder / "adapter_model.safetensors", plain_shapes(carrier))
        if not trainable:
            set_peft_model_state_dict(carrier, saved)
            return carrier
        put_diagonal(carrier)
        own = self._own(carrier)
        with torch.no_grad():
            for name, value in read_exactly(folder / _STATE_FILE, {n: tuple(t.shape) for n, t in own.items()}).items():
                own[name].copy_(value)
        return carrier

    def _scaled(self, carrier: PeftModel) -> PeftModel:
        from align.adapters.layers.lora_offset import lora_layers

        for layer in lora_layers(carrier).values():
            layer.scaling["default"] = self.alpha / (self.rank**0.5 if self.rslora else self.rank)
        return carrier

    def _own(self, carrier: PeftModel) -> dict[str, Any]:
        """The three factors of every layer, and what has been decided about them."""
        named = {**dict(carrier.named_parameters()), **dict(carrier.named_buffers())}
        kept = ("lora_A.default.weight", "lora_B.default.weight", "lora_E", "pruned", "fixed")
        return {name: value for name, value in named.items() if name.endswith(kept)}

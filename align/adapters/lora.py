"""LoRA: a trained low-rank term beside frozen linear layers.

"LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, eq. 3: h = W0 x + (alpha / r) B A x. `rslora`
scales by alpha / sqrt(r) instead (arXiv 2312.03732, eq. 9). `dora` trains the length of every output row apart from its
direction: h = m (W0 + s B A) x / |W0 + s B A| (arXiv 2402.09353, eq. 5). `init=pissa` starts A and B as the first r
singular directions of W0 (arXiv 2404.02948, eq. 3 to 5). peft's implementation: A is drawn Kaiming-uniform, where the
paper has a Gaussian; B starts at zero either way. Differs from peft's PiSSA in that the shared W0 stays as it is: the
start is subtracted as a frozen term, and what is saved is a plain LoRA of rank 2r. The default is every linear layer
instead of the paper's query and value, as in QLoRA (arXiv 2305.14314, section 4).
`trainable_tokens` trains the rows of new tokens beside the terms (peft's `trainable_token_indices`).
Cost: r (in + out) trained parameters per layer; DoRA adds out, 2.4 times the activations, and cannot be stacked on.
"""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from align.adapters.base import Counts, Traits, adapter
from align.adapters.peft_backed import PeftAdapter
from align.adapters.shapes import base_parameters, linear_shapes, meta_model
from align.adapters.targets import fits, layers_option, targets_option
from align.adapters.token_rows import head_with_bias, numbers_per_token, token_rows
from data_prep.core.errors import UserError
from data_prep.core.options import listing, mapping, option

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

    from align.models.low_rank import LowRankTerms


class Init(Enum):
    """What A and B start as."""

    default = "default"
    pissa = "pissa"


@adapter("lora")
@dataclass
class Lora(PeftAdapter):
    """Train a low-rank term beside every linear layer."""

    method: str = "lora"
    rank: int = option(16, "rank r of the trained term", low=1)
    alpha: float = option(32.0, "scale: the term is multiplied by alpha / rank", above=0)
    dropout: float = option(0.0, "dropout on the term's input during supervised training; always off in PPO", below=1)
    rslora: bool = option(False, "scale by alpha / sqrt(rank) instead of alpha / rank")
    dora: bool = option(False, "train the length of each output row apart from its direction")
    init: Init = option(Init.default, "default (A random, B zero)|pissa (first singular directions of the weight)")
    target_modules: Any = targets_option()
    layers: Any = layers_option()
    rank_pattern: dict[str, int] = mapping("other ranks by layer name or pattern: {q_proj: 8, '*.layers.3.*': 4}")
    alpha_pattern: dict[str, float] = mapping("other alphas by layer name or pattern")
    trainable_tokens: list[str] = listing(
        "tokens whose rows of embedding and head are trained too, as new ones need: ['<think>']"
    )

    traits: ClassVar[Traits] = Traits()
    peft_type: ClassVar[str] = "LORA"
    peft_names: ClassVar[dict[str, str]] = {
        "rank": "r",
        "alpha": "lora_alpha",
        "dropout": "lora_dropout",
        "rslora": "use_rslora",
        "dora": "use_dora",
        "target_modules": "target_modules",
    }

    def __post_init__(self) -> None:
        if self.dora:  # its row lengths are those of the weights it sees
            self.traits = replace(type(self).traits, low_rank=False, reads_weights=True)  # type: ignore[misc]
        elif self.trainable_tokens:
            self.traits = replace(type(self).traits, low_rank=False)  # type: ignore[misc]

    @property
    def named_tokens(self) -> list[str]:
        return self.trainable_tokens

    def check(self, model_config: dict[str, Any]) -> list[UserError]:
        if self.dora and self.init is Init.pissa:
            return [UserError("goes with init=default alone", field="adapter.dora", code="bad_value")]
        if self.trainable_tokens and self.has_offset:
            return [UserError("goes with init=default alone", field="adapter.trainable_tokens", code="bad_value")]
        if self.trainable_tokens and (biased := head_with_bias(meta_model(model_config))):
            return [biased]
        try:
            ranks = self.ranks(model_config)
        except UserError as problem:
            return [problem]
        shapes = linear_shapes(model_config, self.target_modules, self.layers)
        problems = [
            UserError(
                f"must be at least 1 and at most the width {min(shapes[name])} of {name} (got {rank})",
                field="adapter.rank",
                code="bad_value",
                hint="lower it, or set rank_pattern for narrow layers",
            )
            for name, rank in ranks.items()
            if not 1 <= rank <= min(shapes[name]) and not (min(shapes[name]) == 1 and self._gates_go_along)
        ]
        for pattern in [*self.rank_pattern, *self.alpha_pattern]:
            if not any(fits(pattern, name) for name in shapes):
                field = "adapter.rank_pattern" if pattern in self.rank_pattern else "adapter.alpha_pattern"
                problems.append(UserError(f"'{pattern}' matches no targeted layer", field=field, code="no_target"))
        return problems[:1]

    @property
    def _gates_go_along(self) -> bool:
        """Whether layers with one output (gates of shared experts) take any rank: all-linear means them too."""
        return self.target_modules == "all-linear" and self.init is Init.default

    def ranks(self, model_config: dict[str, Any]) -> dict[str, int]:
        """Rank of the term of every targeted layer, by full name; the last pattern that fits counts."""
        shapes = linear_shapes(model_config, self.target_modules, self.layers)
        return {name: _latest(self.rank_pattern, name, self.rank) for name in shapes}

    def peft_config(self) -> LoraConfig:
        from peft import LoraConfig, TaskType

        return LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # peft takes any number
            lora_dropout=self.dropout,
            use_rslora=self.rslora,
            use_dora=self.dora,
        )

    def place(self, config: Any, tree: PreTrainedModel) -> None:
        super().place(config, tree)
        if self.trainable_tokens:
            config.trainable_token_indices = token_rows(tree, self.trainable_tokens)
        if not (self.rank_pattern or self.alpha_pattern):
            return
        ranks = self.ranks(tree.config.to_dict())
        alphas = {name: _latest(self.alpha_pattern, name, self.alpha) for name in ranks}
        config.rank_pattern = {re.escape(name): rank for name, rank in ranks.items() if rank != self.rank}
        config.alpha_pattern = {re.escape(name): alpha for name, alpha in alphas.items() if alpha != self.alpha}

    def count(self, model_config: dict[str, Any]) -> Counts:
        shapes = linear_shapes(model_config, self.target_modules, self.layers)
        ranks = self.ranks(model_config)
        trainable = sum(ranks[name] * (rows + columns) for name, (rows, columns) in shapes.items())
        frozen = trainable if self.init is Init.pissa else 0
        if self.dora:
            trainable += sum(rows for rows, _ in shapes.values())
        trainable += self.count_tokens(model_config)
        return Counts(trainable, frozen, base_parameters(model_config) + trainable + frozen, trainable + frozen)

    def count_tokens(self, model_config: dict[str, Any]) -> int:
        """Parameters of the rows of `trainable_tokens`."""
        wanted = len(set(self.trainable_tokens))
        return wanted * numbers_per_token(meta_model(model_config)) if wanted else 0

    @property
    def has_offset(self) -> bool:
        """Whether a frozen term is subtracted, so that what is saved is a LoRA of twice the rank."""
        return self.init is Init.pissa

    def attach(self, tree: PreTrainedModel, trainable: bool) -> PeftModel:
        from align.models.sharding import whole_for_now

        with whole_for_now(tree) if self.dora else nullcontext():  # its row lengths begin as those of the weights
            carrier = super().attach(tree, trainable)
        if self.init is Init.pissa:
            from align.adapters.layers.lora_offset import start_at_principal

            start_at_principal(carrier)
        return carrier

    def load(self, tree: PreTrainedModel, folder: Path, trainable: bool) -> PeftModel:
        if not self.has_offset:
            return super().load(tree, folder, trainable)
        from align.adapters.layers.lora_offset import read_with_offset

        carrier = super().attach(tree, trainable)
        read_with_offset(carrier, folder / "adapter_model.safetensors")
        return carrier

    def save(self, carrier: PeftModel, folder: Path) -> None:
        from align.adapters.layers.lora_offset import save_with_offset

        save_with_offset(carrier, folder) if self.has_offset else super().save(carrier, folder)

    def merge(self, carrier: PeftModel) -> PreTrainedModel:
        if not self.traits.low_rank:
            return super().merge(carrier)
        return self.fold(carrier, self.low_rank_terms(carrier))

    def fold(self, carrier: PeftModel, terms: LowRankTerms) -> PreTrainedModel:
        """Fold the carrier's terms into the weights of its tree."""
        from align.adapters.layers.lora_offset import drop_offsets
        from align.models.low_rank import merge

        tree: PreTrainedModel = carrier.unload()
        drop_offsets(tree, terms)
        merge(tree, terms)
        return tree

    def low_rank_terms(self, carrier: PeftModel) -> LowRankTerms:
        from align.adapters.layers.lora_offset import own_terms

        return own_terms(carrier)


def _latest(pattern: dict[str, Any], name: str, default: Any) -> Any:
    """The value of the last pattern that fits a name."""
    return next((value for key, value in reversed(pattern.items()) if fits(key, name)), default)

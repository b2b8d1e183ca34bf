"""The two forward passes everything here is made of, and the check that an architecture computes them rightly.

Shape suffixes: N packed tokens, M selected tokens, D width, V vocabulary.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from align.models.memory import OutOfMemory, is_out_of_memory, told_of
from align.models.own_modules import is_plain
from align.models.packing import ATTENTION, Packed, pack
from align.models.row_features import reader_of
from align.models.trunk import above_trunk
from align.models.virtual_tokens import lead_of
from data_prep.core.errors import UserError, said_by


def packed_hidden(tree: PreTrainedModel, packed: Packed, cache: Cache | None = None) -> Tensor:
    """Last hidden states of every packed token, [N, D]; `cache` is given keys and values, virtual tokens' first."""
    backbone = getattr(tree, tree.base_model_prefix)
    inputs: dict[str, Any] = {"input_ids": packed.ids_1N}
    first = 0
    if (lead := lead_of(tree)) is not None:
        inputs, packed, first = lead.before(tree, packed)
    if reader_of(tree) is not None:
        inputs["features"] = packed.features
    keeping: dict[str, Any] = {"use_cache": False} if cache is None else {"use_cache": True, "past_key_values": cache}
    with told_of(packed.tokens), above_trunk(tree, packed) if cache is None else nullcontext():
        layout = replace(packed.layout, runs=None) if is_plain(tree) else packed.layout
        out = backbone(**inputs, position_ids=packed.positions_1N, layout=layout, **keeping)
    return out.last_hidden_state[0, first:]  # type: ignore[no-any-return]


def head_logits(tree: PreTrainedModel, hidden_MD: Tensor) -> Tensor:
    """The language-model head on hidden states, [M, D] -> [M, V], with the scale or soft cap the architecture has."""
    config = tree.config.get_text_config()
    logits_MV: Tensor = tree.get_output_embeddings()(hidden_MD)
    if (scale := _logit_scale(config)) != 1.0:
        logits_MV = logits_MV * scale
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits_MV = torch.tanh(logits_MV / cap) * cap
    return logits_MV


def linear_head(tree: PreTrainedModel) -> tuple[Tensor, Tensor | None, float] | None:
    """Weight [V, D], bias [V] and scale of a head that is a linear layer, and that an own function may stand in for.

    None where something else is: a soft cap, a layer that an adapter has wrapped, or a model that is to be plain.
    """
    head, config = tree.get_output_embeddings(), tree.config.get_text_config()
    if is_plain(tree) or type(head) is not torch.nn.Linear:
        return None
    if getattr(config, "final_logit_softcapping", None) is not None or head._forward_hooks:
        return None
    return head.weight, head.bias, _logit_scale(config)


def _logit_scale(config: Any) -> float:
    scale, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    return float(1.0 if scale is None else scale) / float(1.0 if divisor is None else divisor)


@torch.no_grad()
def require_supported(model: PreTrainedModel, exact: bool) -> None:
    """Refuse an architecture whose packed logits are not those of transformers' own forward of each row.

    Some attention layers do not pass the layout on, so that packed rows would see each other without an error.
    """
    vocabulary = model.config.get_text_config().vocab_size
    rows = [[(7 * i + 3 * length) % vocabulary for i in range(length)] for length in (5, 9, 2)]
    try:
        packed = pack(rows).to(model.device)
        ours = head_logits(model, packed_hidden(model, packed)).float()
        model.set_attn_implementation("eager")
        theirs = torch.cat([model(torch.tensor([row], device=model.device), use_cache=False).logits[0] for row in rows])
        model.set_attn_implementation(ATTENTION)
    except (TypeError, AttributeError, ValueError, RuntimeError, KeyError, IndexError) as error:
        if is_out_of_memory(error):
            raise OutOfMemory(sum(map(len, rows))) from None
        reason = said_by(error)
        raise _unsupported(model, f"packed rows do not pass through it: {type(error).__name__}: {reason}") from error
    gap, size = float((ours - theirs).abs().max()), float(theirs.abs().max())
    if not math.isfinite(size):
        raise UserError(
            "the model's own logits are not finite: its weights overflow, or are damaged", code="not_finite"
        )
    if not gap <= (1e-4 if exact else 5e-2) * max(1.0, size):
        raise _unsupported(model, f"packed logits differ by {gap:.1e} from its own")


def _unsupported(model: PreTrainedModel, reason: str) -> UserError:
    name = model.config.model_type
    return UserError(f"architecture {name} is not supported ({reason})", code="unsupported_architecture")

"""The two forward passes everything here is made of, and the check that an architecture computes them rightly.

Shape suffixes: N packed tokens, M selected tokens, D width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from align.models.packing import ATTENTION, Packed, pack
from align.models.virtual_tokens import lead_of
from data_prep.core.errors import UserError


def packed_hidden(tree: PreTrainedModel, packed: Packed) -> Tensor:
    """Last hidden states of every packed token, [N, D]."""
    backbone = getattr(tree, tree.base_model_prefix)
    inputs, first = {"input_ids": packed.ids_1N}, 0
    if (lead := lead_of(tree)) is not None:
        inputs, packed, first = lead.before(tree, packed)
    out = backbone(**inputs, position_ids=packed.positions_1N, layout=packed.layout, use_cache=False)
    return out.last_hidden_state[0, first:]  # type: ignore[no-any-return]


def head_logits(tree: PreTrainedModel, hidden_MD: Tensor) -> Tensor:
    """The language-model head on hidden states, [M, D] -> [M, V], with the scale or soft cap the architecture has."""
    config = tree.config.get_text_config()
    logits_MV: Tensor = tree.get_output_embeddings()(hidden_MD)
    if (scale := getattr(config, "logit_scale", None)) is not None:
        logits_MV = logits_MV * scale
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        logits_MV = logits_MV / divisor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits_MV = torch.tanh(logits_MV / cap) * cap
    return logits_MV


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
        reason = " ".join(str(error).split())[:120]
        raise _unsupported(model, f"packed rows do not pass through it: {type(error).__name__}: {reason}") from error
    gap, size = float((ours - theirs).abs().max()), float(theirs.abs().max())
    if not gap <= (1e-4 if exact else 5e-2) * max(1.0, size):
        raise _unsupported(model, f"packed logits differ by {gap:.1e} from its own")


def _unsupported(model: PreTrainedModel, reason: str) -> UserError:
    name = model.config.model_type
    return UserError(f"architecture {name} is not supported ({reason})", code="unsupported_architecture")

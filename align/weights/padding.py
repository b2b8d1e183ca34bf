"""Padding of a written folder: one id in config and tokenizer that never ends a reply, and batches compared on both
sides.

Shape suffixes: B rows, T tokens of the longest, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from align.weights.drift import Logits

SIDES = ("right", "left")
_NEW = "<|pad|>"


def padded_tokenizer(tokenizer: Any, side: str, never: int | None = None) -> Any:
    """A copy of a tokenizer that can pad: with its own token, else another that no text has, else its end token.

    Args:
        tokenizer: left as it is.
        side: where it pads unless it is told otherwise: left to go on writing, right to read.
        never: an id that padding must not be, because readers take the last token that is no padding; a token is
            added where there is no other.
    """
    found = copy.deepcopy(tokenizer)
    found.padding_side = side
    own = (found.pad_token_id, found.unk_token_id, found.bos_token_id)
    last = found.eos_token_id if never is None else None
    spare = [place for place, token in sorted(found.added_tokens_decoder.items()) if token.special]
    choices = [one for one in (*own, last, *spare) if one is not None and one != never]
    if found.pad_token_id is None or found.pad_token_id == never:
        found.add_special_tokens({"pad_token": found.convert_ids_to_tokens(choices[0]) if choices else _NEW})
    return found


def agree(model: PreTrainedModel, tokenizer: Any) -> None:
    """Let a model's configuration name the tokenizer's padding, with a row of the embedding for it."""
    pad = int(tokenizer.pad_token_id)
    embedding: Any = model.get_input_embeddings()
    if pad >= embedding.weight.shape[0]:
        model.resize_token_embeddings(pad + 1, mean_resizing=False)
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = pad
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.pad_token_id = pad


def ending_at(tokenizer: Any, end: str) -> None:
    """Let a chat template stop at the end of the last reply, where its score is read, not behind what follows it."""
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = tokenizer.apply_chat_template(talk, tokenize=False)
    if not text.endswith(end) and text.rstrip().endswith(end):
        tokenizer.chat_template = f"{{% set whole %}}{tokenizer.chat_template}{{% endset %}}{{{{ whole.rstrip() }}}}"


@torch.no_grad()
def outputs_of_batch(model: Any, tokenizer: Any, rows: Sequence[Sequence[int]], side: str) -> tuple[Tensor, Tensor]:
    """What a stock model gives for rows in one padded batch, and where its rows are no padding, [B, T]."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = side
    batch = tokenizer.pad({"input_ids": [list(row) for row in rows]}, return_tensors="pt").to(model.device)
    mask_BT = batch["attention_mask"]
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if side == "left" and "position_ids" in inspect.signature(inner.forward).parameters:  # as stock `generate` does
        batch["position_ids"] = (mask_BT.cumsum(-1) - 1).clamp_min(0)
    return model(**batch, use_cache=False).logits, mask_BT.bool()


def of_batch(model: Any, tokenizer: Any, rows: Sequence[Sequence[int]], side: str) -> Logits:
    """Logits of a stock model for rows that it computed in one padded batch."""
    logits_BTV, mask_BT = outputs_of_batch(model, tokenizer, rows, side)
    own_BTV = logits_BTV[:, -mask_BT.shape[1] :]  # behind virtual tokens
    known = {tuple(row): own_BTV[place][mask_BT[place]] for place, row in enumerate(rows)}
    return lambda row: known[tuple(row)]

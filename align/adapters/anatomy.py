"""Which linear layer of a block is what: known by the names that transformers gives them."""

from __future__ import annotations

from collections.abc import Iterable

from align.adapters.targets import fits

KEYS = ("k_proj", "key", "wk", "key_proj", "k_lin", "SelfAttention.k", "EncDecAttention.k")
VALUES = ("v_proj", "value", "wv", "value_proj", "v_lin", "SelfAttention.v", "EncDecAttention.v")
FUSED = ("c_attn", "query_key_value", "qkv_proj", "qkv", "Wqkv", "wqkv")
"""Queries, keys and values in one layer."""
_ATTENTION_OUT = (
    "o_proj",
    "out_proj",
    "attn.c_proj",
    "attention.dense",
    "self_attention.dense",
    "self_attn.dense",
    "attention.output.dense",
    "out_lin",
    "SelfAttention.o",
    "EncDecAttention.o",
    "attention.wo",
)
_FEEDFORWARD_OUT = (
    "down_proj",
    "fc2",
    "mlp.c_proj",
    "dense_4h_to_h",
    "fc_out",
    "w2",
    "output.dense",
    "lin2",
    "DenseReluDense.wo",
)


def called(names: Iterable[str], choices: Iterable[str]) -> list[str]:
    """Those of the full names that end in one of the choices."""
    listed = tuple(choices)
    return [name for name in names if any(fits(choice, name) for choice in listed)]


def attention_outputs(names: Iterable[str]) -> list[str]:
    """The layers whose outputs attention hands on."""
    return called(names, _ATTENTION_OUT)


def feedforward_outputs(names: Iterable[str]) -> list[str]:
    """The last layers of the feed-forward parts."""
    listed = list(names)
    others = set(attention_outputs(listed))
    return [name for name in called(listed, _FEEDFORWARD_OUT) if name not in others]

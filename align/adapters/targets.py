"""Which linear layers a method targets: by name, by pattern or all of them, in all blocks or in some."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from data_prep.core.errors import UserError
from data_prep.core.options import option

_ENDS = re.compile(r"embed|lm_head|\bwte\b|\bwpe\b")
"""Names of input embeddings and output heads."""


def targets_option() -> Any:
    """The option field shared by every method that targets linear layers."""
    return option(
        "all-linear",
        "linear layers to adapt: all-linear (the head excepted), a name, a pattern as '*.mlp.*', or a list of them",
    )


def layers_option() -> Any:
    """The option field of methods that can be put into some blocks alone."""
    return option("all", "blocks to adapt: all, top_K (the last K), or a list of their numbers")


def fits(pattern: str, name: str) -> bool:
    """Whether a name (`q_proj`, `mlp.up_proj`) or a pattern with `*` means the module of this full name."""
    return name == pattern or name.endswith("." + pattern) or fnmatchcase(name, pattern)


def chosen(names: Sequence[str], targets: Any, layers: Any = "all") -> list[str]:
    """Those of the linear layers `names` that the options select.

    Raises:
        UserError: a target that matches nothing, or blocks that the model does not have.
    """
    wanted = _listed(targets)
    found = list(names)
    if wanted != ["all-linear"]:
        for pattern in wanted:
            if not any(fits(pattern, name) for name in names):
                ends = _ENDS.search(pattern)
                what = "is none of the layers that adapters train: embeddings and output head stay as they are"
                raise UserError(
                    f"'{pattern}' {what if ends else 'matches no linear layer'} "
                    f"(could match: {', '.join(short_names(names))})",
                    field="adapter.target_modules",
                    code="no_target",
                    hint="rows of new tokens: adapter.trainable_tokens=['<think>'] (LoRA); adapter=full trains all"
                    if ends
                    else None,
                )
        found = [name for name in names if any(fits(pattern, name) for pattern in wanted)]
    blocks = block_numbers(layers, names)
    if blocks is None:
        return found
    inside = [name for name in found if block_of(name) in blocks]
    if not inside:
        raise UserError("no targeted layer lies in the chosen blocks", field="adapter.layers", code="no_target")
    return inside


def peft_targets(names: Sequence[str], targets: Any, layers: Any = "all") -> list[str]:
    """What peft takes for these options: last parts of names where these select the same layers, else full names.

    Never peft's own "all-linear", which it turns into expert weights on some mixtures of experts.
    """
    found = chosen(names, targets, layers)
    short = short_names(found)
    return short if chosen(names, short) == found else found


def block_numbers(layers: Any, names: Iterable[str]) -> set[int] | None:
    """The block numbers that `layers` means, or None for all."""
    if layers == "all":
        return None
    count = 1 + max((block for name in names if (block := block_of(name)) is not None), default=-1)
    if isinstance(layers, str) and (top := re.fullmatch(r"top_(\d+)", layers)):
        if 1 <= int(top[1]) <= count:
            return set(range(count - int(top[1]), count))
    elif isinstance(layers, list | tuple | int) and not isinstance(layers, bool):
        numbers = [layers] if isinstance(layers, int) else list(layers)
        if numbers and all(isinstance(n, int) and 0 <= n < count for n in numbers):
            return set(numbers)
    raise UserError(
        f"is no choice of blocks (got {layers}; expected all, top_1 to top_{count}, or numbers from 0 to {count - 1})",
        field="adapter.layers",
        code="bad_value",
    )


def block_of(name: str) -> int | None:
    """The number of the block a module lies in, from its full name."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else None


def short_names(names: Iterable[str]) -> list[str]:
    """The last parts of full names, each once."""
    return sorted({name.rpartition(".")[2] for name in names})


def _listed(targets: Any) -> list[str]:
    """The option's value as a list."""
    listed = [targets] if isinstance(targets, str) else [str(name) for name in targets or []]
    if not listed:
        raise UserError(
            "is empty",
            field="adapter.target_modules",
            code="bad_value",
            hint="give names such as [q_proj,v_proj], or all-linear",
        )
    return listed


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

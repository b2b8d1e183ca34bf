"""The tokenizer part of a GGUF file: byte-level BPE of tokenizer.json, told by how it splits text before merging.

llama.cpp has the splitting in its own code, under names; a tokenizer that splits in another way is refused.
"""

from __future__ import annotations

import json
from typing import Any

import gguf

from data_prep.core.errors import UserError

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBER"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BY_REGEX = {_WORDS.replace("NUMBER", r"\p{N}"): "qwen2", _WORDS.replace("NUMBER", r"\p{N}{1,3}"): "llama-bpe"}
"""The regex of a split before the bytes -> llama.cpp's name for it."""
_WHOLE_WORDS_FIRST = ("llama-bpe",)
"""Names under which llama.cpp takes a word that is a token before it merges (`ignore_merges`)."""
_PLAIN = {"dropout": None, "byte_fallback": False, "continuing_subword_prefix": None, "end_of_word_suffix": None}


def splitting(parts: dict[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer.json splits text.

    Raises:
        UserError: it is no byte-level BPE, or llama.cpp has no such splitting.
    """
    model, steps = parts["model"], _steps(parts.get("pre_tokenizer"))
    if model["type"] != "BPE" or any((model.get(key) or value) != value for key, value in _PLAIN.items()):
        raise _refused(f"its tokenizer is no plain byte-level BPE ({model['type']})")
    if (parts.get("normalizer") or {"type": "NFC"})["type"] != "NFC":
        raise _refused(f"its tokenizer normalises text ({parts['normalizer']['type']})")
    kinds = [step["type"] for step in steps]
    last = steps[-1] if steps else {}
    if kinds[-1:] != ["ByteLevel"] or last.get("add_prefix_space"):
        raise _refused("its tokenizer does not work on bytes as GPT-2's does")
    words = last.get("use_regex", True)
    name = None
    if kinds == ["ByteLevel"] and words:
        name = "gpt-2"
    elif kinds == ["Digits", "ByteLevel"] and words and steps[0].get("individual_digits"):
        name = "smollm"
    elif kinds == ["Split", "ByteLevel"] and not words:
        split = steps[0]
        usual = split.get("behavior") == "Isolated" and not split.get("invert")
        name = _BY_REGEX.get(split["pattern"].get("Regex", "")) if usual else None
    if name is None:
        raise _refused("llama.cpp does not split text before merging as its tokenizer does")
    if bool(model.get("ignore_merges")) != (name in _WHOLE_WORDS_FIRST):
        raise _refused(f"its tokenizer merges in another order than llama.cpp's '{name}'")
    return name


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, end: int, rows: int, bare: bool = False) -> None:
    """Write tokens, merges, special tokens and chat template.

    Args:
        writer: of the file.
        tokenizer: a fast tokenizer of transformers.
        end: the id that ends a turn.
        rows: rows of the embedding; those without a token get a name that no text has.
        bare: whether texts shall get no bos token, because a template that stands elsewhere writes it.

    Raises:
        UserError: llama.cpp would read other tokens from a text.
    """
    parts = parts_of(tokenizer)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting(parts))
    names = {place: f"[PAD{place}]" for place in range(rows)}
    kinds = dict.fromkeys(range(rows), gguf.TokenType.UNUSED)
    for name, place in parts["model"]["vocab"].items():
        names[place], kinds[place] = name, gguf.TokenType.NORMAL
    for token in parts["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise _refused(f"its token {token['content']} takes the space beside it")
        special = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
        names[token["id"]], kinds[token["id"]] = token["content"], special
    if len(names) > rows:
        raise _refused(f"its tokenizer has {len(names)} tokens, and its embedding {rows} rows")
    writer.add_token_list([names[place] for place in range(rows)])
    writer.add_token_types([kinds[place] for place in range(rows)])
    pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in parts["model"]["merges"]]
    writer.add_token_merges(pairs)
    writer.add_add_bos_token(begins(tokenizer) and not bare)
    writer.add_eos_token_id(end if tokenizer.eos_token_id is None else tokenizer.eos_token_id)
    writer.add_eot_token_id(end)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)


def parts_of(tokenizer: Any) -> dict[str, Any]:
    """tokenizer.json of a fast tokenizer.

    Raises:
        UserError: it is none.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise _refused("its tokenizer has no tokenizer.json")
    found: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return found


def begins(tokenizer: Any) -> bool:
    """Whether texts begin with the bos token.

    Raises:
        UserError: something else is put around them.
    """
    around, bare = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    if around not in (bare, [tokenizer.bos_token_id, *bare]):
        raise _refused("its tokenizer puts tokens around a text that llama.cpp does not")
    return bool(around != bare)


def _steps(pre: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer, first to last."""
    if pre is None:
        return []
    return list(pre["pretokenizers"]) if pre["type"] == "Sequence" else [pre]


def _refused(why: str) -> UserError:
    return UserError(f"no GGUF of this model: {why}", code="not_for_gguf", hint="to=folder or to=vllm writes it")

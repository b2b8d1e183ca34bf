"""A tokenizer and a model small enough for every test; both are the same on every call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONTROLS = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}"
    "{{ '<|assistant|>' }}{% generation %}{{ m['content'] + '<|end|>' }}{% endgeneration %}"
    "{% elif m['role'] == 'user' %}{{ '<|user|>' + m['content'] + '<|end|>' }}"
    "{% elif m['role'] == 'system' %}{{ '<|system|>' + m['content'] + '<|end|>' }}"
    "{% else %}{{ raise_exception('unknown role ' + m['role']) }}{% endif %}"
    "{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MERGES = [
    ("t", "h"),
    ("th", "e"),
    ("Ġ", "the"),
    ("a", "n"),
    ("an", "d"),
    ("Ġ", "a"),
    ("o", "u"),
    ("y", "ou"),
    ("l", "l"),
]


def tiny_tokenizer(
    template: str | None = TEMPLATE, merges: list[tuple[str, str]] | None = None, split_words: bool = True
) -> Any:
    """A byte-level BPE tokenizer with five control tokens (ids 0 to 4), all bytes and a few merges.

    Args:
        template: the chat template; None for none.
        split_words: split at words before merging, as GPT-2 does; False lets merges cross spaces and signs.
        merges: merges in byte-level spelling ("Ġ" is the space, "Ċ" the newline); None for a few English ones.

    Returns:
        A `PreTrainedTokenizerFast`; eos is `<|end|>`, pad is `<|pad|>`, there is no bos.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pairs = MERGES if merges is None else merges
    vocab = {name: number for number, name in enumerate(CONTROLS)}
    for piece in [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in pairs)]:
        vocab.setdefault(piece, len(vocab))
    backend = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split_words)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in CONTROLS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", pad_token="<|pad|>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = template
    return tokenizer


def save_tiny_llama(
    folder: str | Path,
    seed: int = 0,
    vocab: int | None = None,
    hidden: int = 32,
    layers: int = 2,
    template: str | None = TEMPLATE,
) -> Path:
    """Write a random Llama and the tiny tokenizer into `folder`.

    Args:
        folder: where to (made if missing).
        seed: of the weights.
        vocab: rows of the embedding; at least (and by default) the tokenizer's.
        hidden, layers: width and depth; two heads, fp32, tied embeddings.
        template: the chat template of the tokenizer.

    Returns:
        The folder: config.json, model.safetensors, tokenizer files.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer(template)
    size = len(tokenizer) if vocab is None else vocab
    if size < len(tokenizer):
        raise ValueError(f"vocab must be at least {len(tokenizer)}, got {size}")
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(torch.float32)
    tensors = {name: value.contiguous() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = torch.float32
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_jsonl(path: str | Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSON lines; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path

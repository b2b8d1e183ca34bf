"""A base from nothing: a tokenizer trained on the run's own text, and random weights of a given shape.

This is how the embedded base `nano` began (`experiment=nano_pretrain`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align.config.schema import ModelOptions
from data_prep.core.errors import UserError
from data_prep.options import DataOptions


def make_blank(model: ModelOptions, data: DataOptions, seed: int, folder: Path, weights: bool = True) -> Path:
    """Write a model folder with fresh weights; deterministic for a seed. Returns `folder`.

    Raises:
        UserError: `model.tokenizer` or `model.config` lacks what is needed.
    """
    if (folder / "model.safetensors").is_file():
        return folder
    for key in ("vocab_size", "template"):
        if key not in model.tokenizer:
            raise UserError("a fresh model needs this", field=f"model.tokenizer.{key}")
    folder.mkdir(parents=True, exist_ok=True)
    specials = _train_tokenizer(model.tokenizer, data, folder)
    _random_weights(model.config, specials, seed if weights else None, folder)
    return folder


def _texts(data: DataOptions) -> Iterator[str]:
    from data_prep.records.mixing import sources_for
    from data_prep.records.stream import open_stream
    from data_prep.types import DOCUMENT

    for source in sources_for(data, DOCUMENT):
        stream = open_stream(source.given, DOCUMENT, 0)
        yield from (document.text for document in stream)
        stream.tally.check_whole()


def _train_tokenizer(options: dict[str, Any], data: DataOptions, folder: Path) -> dict[str, int]:
    """Byte-level BPE on the run's text; returns the ids of pad, end and the vocabulary's size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    end, pad = str(options.get("end_token", "<|end|>")), str(options.get("pad_token", "<|pad|>"))
    extra = [str(token) for token in options.get("control_tokens", [])]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=int(options["vocab_size"]),
        special_tokens=[pad, end, *extra],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(data), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "pad_token": pad,
        "extra_special_tokens": extra,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(str(options["template"]), encoding="utf-8")
    ids = {"pad": tokenizer.token_to_id(pad), "end": tokenizer.token_to_id(end), "size": tokenizer.get_vocab_size()}
    return {name: int(number or 0) for name, number in ids.items()}


def _random_weights(config: dict[str, Any], specials: dict[str, int], seed: int | None, folder: Path) -> None:
    """Write weights drawn from `seed` and their config.json; with None the config.json alone."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if "model_type" not in config:
        raise UserError("a fresh model needs an architecture", field="model.config.model_type")
    fields = {
        **config,
        "vocab_size": specials["size"],
        "pad_token_id": specials["pad"],
        "eos_token_id": specials["end"],
    }
    fields["bos_token_id"] = None
    architecture = AutoConfig.for_model(**fields)
    if seed is None:
        architecture.save_pretrained(folder)
        return
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(architecture)
    model.generation_config.eos_token_id = specials["end"]
    model.generation_config.pad_token_id = specials["pad"]
    model.save_pretrained(folder)

"""The tokenizer of a model folder, or one line that says what is missing of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_prep.core.errors import UserError, said_by

_VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json", "spiece*", "tokenizer.txt")
"""Files that hold the words of a tokenizer; without one of them transformers fails, or makes an empty one up."""


def open_tokenizer(folder: Path) -> Any:
    """The stock tokenizer of a folder; no code from the folder is run.

    Raises:
        UserError: the folder holds none, or one that cannot be read.
    """
    from transformers import AutoTokenizer

    if not any(next(folder.glob(pattern), None) for pattern in _VOCABULARIES):
        raise UserError(
            "no tokenizer in this folder",
            code="no_tokenizer",
            file=str(folder),
            hint="copy tokenizer.json, tokenizer_config.json and chat_template.jinja of the model it was made from",
        )
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # damaged files end in any of a dozen types, the library's own Exception among them
        reason = said_by(error)
        raise UserError(
            f"its tokenizer cannot be read ({type(error).__name__}: {reason})",
            code="no_tokenizer",
            file=str(folder),
            hint="get its tokenizer files again; a tokenizer.model alone needs the package sentencepiece",
        ) from error

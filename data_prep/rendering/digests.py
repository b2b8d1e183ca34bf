"""Content hashes of a tokenizer and of a chat template, read from files or from a live tokenizer.

Neither torch nor transformers is imported: `align verify` and the pipeline's wiring checks must stay fast.
What is hashed is what changes token ids: the tokenizer's model, added tokens, normaliser, pre-tokeniser and decoder,
the names of the bos, eos, pad and unk tokens and whether a bos is added. The order of keys, old and new spellings of
merges, truncation and padding settings left in the file, and the post-processor (rendering never uses it) are not.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from data_prep.core.errors import UserError
from data_prep.core.hashing import sha256_json

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
_OTHER_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt", "tekken.json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as problem:
        raise UserError(f"cannot be read as JSON: {problem}", code="tokenizer_file", file=str(path)) from problem
    if not isinstance(value, dict):
        raise UserError("is not a JSON object", code="tokenizer_file", file=str(path))
    return value


def _token_name(value: Any) -> str | None:
    """A token's text, from its string or its {"content": ...} form."""
    if isinstance(value, dict):
        value = value.get("content")
    return str(value) if value is not None else None


def canonical_tokenizer(content: dict[str, Any]) -> dict[str, Any]:
    """The parts of a `tokenizer.json` object that decide token ids, in one spelling."""
    model = dict(content.get("model") or {})
    merges = model.get("merges")
    if isinstance(merges, list):
        model["merges"] = [m.split(" ") if isinstance(m, str) else list(m) for m in merges]
    added = sorted(content.get("added_tokens") or [], key=lambda token: int(token["id"]))
    parts = {key: content.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")}
    return {"model": model, "added_tokens": added, **parts}


def tokenizer_names(folder: Path) -> dict[str, Any]:
    """Names of the bos, eos, pad and unk tokens of a folder, and `add_bos` (False when not said)."""
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            config.update({k: v for k, v in _read_json(folder / name).items() if v is not None})
    names: dict[str, Any] = {key: _token_name(config.get(key)) for key in _SPECIAL}
    names["add_bos"] = bool(config.get("add_bos_token", False))
    return names


def combine(parts: Any, names: dict[str, Any]) -> str:
    """The tokenizer digest of canonical parts and special names."""
    return sha256_json({"tokenizer": parts, "names": names})


def tokenizer_digest(folder: str | Path) -> str:
    """Hex sha256 of the tokenizer saved in `folder`.

    Raises:
        UserError: there is no tokenizer in the folder, or its files cannot be read.
    """
    folder = Path(folder)
    names = tokenizer_names(folder)
    if (folder / "tokenizer.json").exists():
        return combine(canonical_tokenizer(_read_json(folder / "tokenizer.json")), names)
    found = [name for name in _OTHER_FILES if (folder / name).exists()]
    if not found:
        raise UserError(
            "there is no tokenizer in this folder (expected tokenizer.json)", code="tokenizer_file", file=str(folder)
        )
    return combine({name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in found}, names)


def template_text(folder: str | Path) -> str | None:
    """The chat template of a folder: `chat_template.jinja`, else the key in `tokenizer_config.json`, else None."""
    folder = Path(folder)
    if (folder / "chat_template.jinja").exists():
        with (folder / "chat_template.jinja").open(encoding="utf-8", newline="") as file:
            return file.read()
    value: Any = None
    for name in ("chat_template.json", "tokenizer_config.json"):
        if value is None and (folder / name).exists():
            value = _read_json(folder / name).get("chat_template")
    if isinstance(value, list):
        value = {entry["name"]: entry["template"] for entry in value}
    if isinstance(value, dict):
        value = value.get("default")
    return str(value) if value is not None else None


def digest_of_template(text: str) -> str:
    """Hex sha256 of a template's text; line ends and the one last newline that Jinja drops do not count."""
    text = text.replace("\r\n", "\n").removesuffix("\n")
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def template_digest(folder: str | Path) -> str:
    """Hex sha256 of the chat template saved in `folder`.

    Raises:
        UserError: the folder has no chat template.
    """
    text = template_text(folder)
    if text is None:
        raise no_template(str(folder))
    return digest_of_template(text)


def no_template(file: str | None = None) -> UserError:
    """The error for a tokenizer without a chat template."""
    return UserError(
        "this tokenizer has no chat template, so conversations cannot be rendered",
        code="no_template",
        hint="set model.template=plain, or chatml, or the path of a template file",
        file=file,
    )


def digest_of_tokenizer(tokenizer: Any) -> str:
    """Hex sha256 of a live tokenizer; the same as that of the folder it was loaded from, when it still is that one.

    Some tokenizer classes rebuild their pipeline while loading, so the files are preferred as long as the live
    vocabulary and special names agree with them; a tokenizer changed in memory is hashed as it stands.
    """
    folder = Path(str(getattr(tokenizer, "name_or_path", "") or ""))
    live: dict[str, Any] = {key: _token_name(getattr(tokenizer, key, None)) for key in _SPECIAL}
    live["add_bos"] = bool(getattr(tokenizer, "add_bos_token", False))
    if folder.name and (folder / "tokenizer.json").exists():
        saved = tokenizer_names(folder)
        same_names = all(saved[key] in (None, live[key]) for key in _SPECIAL)
        content = _read_json(folder / "tokenizer.json")
        if same_names and _vocabulary(content) == tokenizer.get_vocab():
            return combine(canonical_tokenizer(content), saved)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return combine(canonical_tokenizer(json.loads(backend.to_str())), live)
    if folder.name and folder.is_dir():
        return tokenizer_digest(folder)
    return combine(tokenizer.get_vocab(), live)


def _vocabulary(content: dict[str, Any]) -> dict[str, int]:
    """Token to id, added tokens included, of a `tokenizer.json` object."""
    vocab = (content.get("model") or {}).get("vocab") or {}
    if isinstance(vocab, list):
        vocab = {entry[0]: index for index, entry in enumerate(vocab)}
    added = {token["content"]: int(token["id"]) for token in content.get("added_tokens") or []}
    return {**vocab, **added}

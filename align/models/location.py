"""Where the base model of a configuration lies: embedded, a folder, or the hub's cache."""

from __future__ import annotations

import re
from pathlib import Path

from data_prep.core.errors import UserError, nearest, said_by

EMBEDDED = Path(__file__).parent


def model_folder(path: str, revision: str | None = None) -> Path:
    """The folder of a base: a path, `package:nano`, or a hub id that is (or can be) downloaded.

    Raises:
        UserError: there is no such folder; says what is there, or the nearest name.
    """
    if path.startswith("package:"):
        name, names = path.removeprefix("package:"), sorted(p.parent.name for p in EMBEDDED.glob("*/config.json"))
        if name not in names:
            raise UserError(f"no embedded model '{name}'", hint=f"there is: {', '.join(names) or 'none'}")
        return EMBEDDED / name
    folder = Path(path).expanduser()
    if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") != 1:
        if folder.is_dir():
            return folder.resolve()
        raise _no_folder(path, folder)
    return _from_hub(path, revision)


def _no_folder(path: str, folder: Path) -> UserError:
    """What is wrong with a path that is no folder."""
    if folder.exists():
        hint = "give the folder that has config.json and *.safetensors in it"
        return UserError(f"a model is a folder, and this is a file: {path}", code="missing_model", hint=hint)
    if "://" in path:
        page = re.fullmatch(r"https?://huggingface\.co/([^/]+/[^/?#]+).*", path)
        hint = f"model.path={page[1]} takes it from the hub" if page else "download it, and give its folder"
        return UserError(f"is an address, and not a folder: {path}", code="missing_model", hint=hint)
    found = nearest(folder.name, [p.name for p in folder.parent.iterdir()]) if folder.parent.is_dir() else None
    hint = f"did you mean {folder.parent / found}?" if found else "models of the hub are named ORG/NAME"
    return UserError(f"model folder does not exist: {path}", code="missing_model", hint=hint)


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "*.txt", "README.md"]
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=["consolidated*"])
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"'{name}' is no folder here, and the hub cannot be reached or has no such model ({said_by(error)})",
            code="hub_unreachable",
            hint="give the path of a downloaded model folder: model.path=PATH",
        ) from None

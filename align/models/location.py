"""Where the base model of a configuration lies: embedded, a folder, or the hub's cache."""

from __future__ import annotations

from pathlib import Path

from data_prep.core.errors import UserError, nearest

EMBEDDED = Path(__file__).parent


def model_folder(path: str, revision: str | None = None) -> Path:
    """The folder of a base: a path, `package:nano`, or a hub id that is (or can be) downloaded."""
    if path.startswith("package:"):
        folder = EMBEDDED / path.removeprefix("package:")
        if not folder.is_dir():
            names = sorted(p.name for p in EMBEDDED.iterdir()) if EMBEDDED.is_dir() else []
            raise UserError(f"no embedded model '{folder.name}'", hint=f"there is: {', '.join(names) or 'none'}")
        return folder
    folder = Path(path).expanduser()
    if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") != 1:
        if not folder.is_dir():
            found = nearest(folder.name, [p.name for p in folder.parent.iterdir()]) if folder.parent.is_dir() else None
            hint = f"did you mean {folder.parent / found}?" if found else None
            raise UserError(f"model folder does not exist: {path}", code="missing_model", hint=hint)
        return folder.resolve()
    return _from_hub(path, revision)


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "*.txt", "README.md"]
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=["consolidated*"])
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UserError(
            f"'{name}' is no folder here, and the hub cannot be reached or has no such model ({reason})",
            code="hub_unreachable",
            hint="give the path of a downloaded model folder: model.path=PATH",
        ) from None

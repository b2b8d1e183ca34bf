"""A written folder on the Hugging Face hub: its name there, what an upload would send, and the upload."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants

from data_prep.core.errors import UserError, said_by

_ID = re.compile(r"(?!.*(?:--|\.\.|\.git$))(?:\w[\w.-]*/)?\w[\w.-]{0,94}(?<![-.])", re.ASCII)
"""What the hub's client takes as the id of a repository."""


def repository(asked: str | None, checkpoint: Path) -> str:
    """The id of the repository: as asked for, else RUN-STAGE.

    Raises:
        UserError: the hub takes no such id.
    """
    own = f"{checkpoint.resolve().parent.name}-{checkpoint.name}"
    name = asked or re.sub(r"[^A-Za-z0-9_.-]+|--+|\.\.+", "-", own).strip("-.")
    if not _ID.fullmatch(name):
        raise UserError(f"the hub takes no repository '{name}'", field="repo", hint="repo=OWNER/NAME", code="bad_value")
    return name


def require_login() -> None:
    """Refuse an upload that could not be made, before anything is written.

    Raises:
        UserError: offline, out of reach, or nobody is logged in.
    """
    if constants.HF_HUB_OFFLINE:
        hint = "unset HF_HUB_OFFLINE, or leave push=true out: the folder is then written and nothing is uploaded"
        raise UserError("HF_HUB_OFFLINE is set: nothing can be uploaded", field="push", hint=hint, code="hub")
    with _one_line("nobody is logged in at the hub, or it cannot be reached", "log in: hf auth login"):
        HfApi().whoami()


def listing(folder: Path) -> dict[str, int]:
    """Every file of a folder, by its name in there, and its size in bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def upload(folder: Path, repo: str, private: bool, message: str) -> str:
    """Make the repository where there is none, send the folder as one commit, and say where it is."""
    with _one_line(f"the upload of {folder} failed", "the same command again goes on"):
        made = HfApi().create_repo(repo, private=private, exist_ok=True)
        HfApi().upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message=message)
    return str(made)


@contextmanager
def _one_line(what: str, hint: str) -> Iterator[None]:
    """Problems of the hub's client as one line; its HTTP library, and so what it raises, is another in each version."""
    try:
        yield
    except Exception as problem:
        raise UserError(f"{what} ({said_by(problem)})", code="hub", hint=hint) from None

"""Adapter files, read strictly: no tensor may be missing, left over or of another shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def read_exactly(file: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors of a file, which must be those of `shapes` and no other.

    Raises:
        UserError: a tensor is missing, left over or of another shape.
    """
    from safetensors.torch import load_file

    saved = load_file(file)
    refuse_mismatch(file, shapes, {name: tuple(value.shape) for name, value in saved.items()})
    return saved


def write_own_config(folder: Path, kind: str) -> None:
    """An adapter_config.json of a type unknown to stock peft, so that it refuses rather than computes wrongly."""
    text = json.dumps({"peft_type": f"ALIGN_{kind.upper()}", "task_type": "CAUSAL_LM"}, indent=2)
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")


def refuse_mismatch(file: Path, expected: dict[str, Any], saved: dict[str, Any]) -> None:
    """Zero missing, zero unexpected, equal shapes; peft itself only warns."""
    missing, unexpected = sorted(expected.keys() - saved.keys()), sorted(saved.keys() - expected.keys())
    wrong = [name for name in expected.keys() & saved.keys() if expected[name] != saved[name]]
    if missing or unexpected or wrong:
        first = (missing or unexpected or wrong)[0]
        raise UserError(
            f"adapter tensors do not fit this base ({len(missing)} missing, {len(unexpected)} unexpected, "
            f"{len(wrong)} of another shape; first: {first})",
            file=str(file),
        )

"""Where a base is looked for, and what is said of a path that is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.models.location import EMBEDDED, model_folder
from data_prep.core.errors import UserError


def test_an_embedded_model_and_a_folder_are_found(tmp_path: Path) -> None:
    assert model_folder("package:nano") == EMBEDDED / "nano"
    assert model_folder(f"{tmp_path}/") == tmp_path.resolve()


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("package:", "no embedded model ''; there is: nano"),
        ("package:loading.py", "there is: nano"),
        ("package:../models/nano", "there is: nano"),
        ("{0}/a.gguf", "a model is a folder, and this is a file: "),
        ("/dev/null", "a model is a folder, and this is a file: "),
        ("https://huggingface.co/org/name", "model.path=org/name takes it from the hub"),
        ("https://huggingface.co/org/name/tree/main?x=1", "model.path=org/name takes it from the hub"),
        ("s3://bucket/model", "is an address, and not a folder: s3://bucket/model; download it"),
        ("{0}/bsae", "did you mean {0}/base?"),
        ("gpt2", "models of the hub are named ORG/NAME"),
    ],
)
def test_what_is_no_model_folder_is_told(path: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    (tmp_path / "base").mkdir()
    (empty := tmp_path / "empty").mkdir()
    monkeypatch.chdir(empty)
    with pytest.raises(UserError) as caught:
        model_folder(path.format(tmp_path))
    assert said.format(tmp_path) in str(caught.value) and caught.value.exit_code == 2

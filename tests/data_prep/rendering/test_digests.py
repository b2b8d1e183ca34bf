"""Digests of tokenizers and templates: from files and from live tokenizers alike, and without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_prep.core.errors import UserError
from data_prep.rendering.digests import template_digest, template_text, tokenizer_digest
from data_prep.rendering.renderer import Renderer
from tests.tiny import TEMPLATE, tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def load(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps(content))


def test_files_memory_and_reload_agree(folder: Path, tmp_path: Path) -> None:
    live, loaded = Renderer(tiny_tokenizer()), Renderer(load(folder))
    assert tokenizer_digest(folder) == live.tokenizer_digest == loaded.tokenizer_digest
    assert template_digest(folder) == live.template_digest == loaded.template_digest
    loaded.tokenizer.save_pretrained(tmp_path / "again")
    assert tokenizer_digest(tmp_path / "again") == live.tokenizer_digest


def test_what_does_not_change_ids_does_not_count(folder: Path) -> None:
    before = tokenizer_digest(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    content["truncation"] = {"max_length": 3}
    (folder / "tokenizer.json").write_text(json.dumps(content, indent=3, sort_keys=True))
    edit(folder / "tokenizer_config.json", model_max_length=7)
    assert tokenizer_digest(folder) == before


@pytest.mark.parametrize(
    "changes", [{"eos_token": "<|pad|>"}, {"bos_token": {"content": "<|user|>"}}, {"add_bos_token": True}]
)
def test_names_count(folder: Path, changes: dict[str, Any]) -> None:
    before = tokenizer_digest(folder)
    edit(folder / "tokenizer_config.json", **changes)
    assert tokenizer_digest(folder) != before


def test_a_changed_vocabulary_counts_on_disk_and_in_memory(folder: Path) -> None:
    before = tokenizer_digest(folder)
    tokenizer = load(folder)
    tokenizer.add_tokens(["new"])
    changed = Renderer(tokenizer).tokenizer_digest
    assert changed != before
    tokenizer.save_pretrained(folder)
    assert tokenizer_digest(folder) == changed


def test_template_places(folder: Path, tmp_path: Path) -> None:
    before = template_digest(folder)
    (folder / "chat_template.jinja").write_bytes(TEMPLATE.encode() + b"\r\n")
    assert template_digest(folder) == before
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"no chat template.*model\.template"):
        template_digest(folder)
    edit(folder / "tokenizer_config.json", chat_template=TEMPLATE)
    assert template_digest(folder) == before
    edit(
        folder / "tokenizer_config.json",
        chat_template=[{"name": "default", "template": "x"}, {"name": "rag", "template": "y"}],
    )
    assert template_text(folder) == "x" and template_digest(folder) != before


def test_folders_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer in this folder"):
        tokenizer_digest(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"abc")
    first = tokenizer_digest(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"abd")
    assert tokenizer_digest(tmp_path) != first
    (tmp_path / "tokenizer.json").write_text("{oops")
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot be read as JSON"):
        tokenizer_digest(tmp_path)


def test_importing_data_prep_is_light() -> None:
    code = (
        "import sys, data_prep.prepare, data_prep.formats as f; f.FORMATS.names(); "
        "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

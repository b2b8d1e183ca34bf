"""The files that docs/tutorial.md makes are what its commands take them for, and its rows are those it speaks of."""

from __future__ import annotations

import contextlib
import io

from align.cli.own_files import with_files
from tests.docs.pages import blocks, pages


def test_the_files_of_the_tutorial(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = next(page for page in pages() if page.shown == "docs/tutorial.md")
    (code,) = [text for language, text in blocks(page) if language == "python"]
    exec(compile(code, "make_shop.py", "exec"), {})
    with contextlib.redirect_stderr(io.StringIO()) as said:
        alone, both = with_files(["talk.jsonl"]), with_files(["talk.jsonl", "pairs.jsonl"])
    assert "pipeline=sft" in alone and "pipeline=rlhf" in both
    assert said.getvalue().splitlines()[0] in page.text, "what the page shows under `align check talk.jsonl`"
    assert {len((tmp_path / name).read_text().splitlines()) for name in ("talk.jsonl", "pairs.jsonl")} == {96}

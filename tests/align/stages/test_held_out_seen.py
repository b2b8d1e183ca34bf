"""An evaluation that asks what conversations of the same run train on says so."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from align.stages.evaluate import Evaluate
from data_prep.options import DataOptions, LengthOptions, SourceOptions
from data_prep.prepare.prepare import prepare
from data_prep.rendering.renderer import Renderer
from data_prep.types import RowKind
from tests.tiny import tiny_tokenizer, write_jsonl

LONG = LengthOptions(max_length=64)


def warned(folder: Path, asked: list[str], count: int = 40) -> list[tuple[str, str, str]]:
    """What an evaluation of held-out questions says of conversations about `question 0` and on, a fifth held out."""
    talks = [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(count)]
    held = [{"prompt": text, "split": "eval"} for text in asked]
    data = DataOptions(
        conversations=SourceOptions(path=str(write_jsonl(folder / "talks.jsonl", talks)), eval_share=0.2),
        prompts=SourceOptions(path=str(write_jsonl(folder / "asked.jsonl", [{"prompt": "to train on"}, *held]))),
    )
    renderer, said = Renderer(tiny_tokenizer()), []

    def rows(kind: str) -> Any:
        return prepare(RowKind[kind], data, renderer, LONG, 0)

    context: Any = SimpleNamespace(rows=rows, spec=SimpleNamespace(data=data), warn=lambda *words: said.append(words))
    Evaluate()._doubt_held_out(context, rows("prompts"))
    return said


@pytest.mark.parametrize("kept", [False, True], ids=["made", "from the cache"])
def test_held_out_prompts_that_conversations_train_on_are_named(kept, tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    if kept:
        from data_prep.prepare import prepare as module

        monkeypatch.setattr(module, "LEAST_BYTES", 0)
        warned(tmp_path, ["Question 1!", "question 2"])
    talks = [f"question {n}" for n in range(40)]
    ((code, message, hint),) = warned(tmp_path, [*talks, "quite new"])
    seen = int(message.split()[0])
    assert code == "held_out_seen" and 25 <= seen < 40 and " of 41 held-out prompts" in message and "eval_share" in hint
    assert "asked.jsonl:" in message and "\n" not in message + hint


def test_prompts_of_their_own_are_no_matter(tmp_path):
    assert warned(tmp_path, ["quite new", "newer still"]) == []

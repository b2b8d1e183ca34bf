"""Real public files, where they are present (ALIGN_SHARED, or ../shared beside the repository)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from data_prep.errors import UserError
from data_prep.options import DataOptions, LengthOptions, OnBadRow, SourceOptions
from data_prep.prepare import (
    Renderer,
    prepare_conversations,
    prepare_preferences,
    prepare_prompts,
    prepare_text,
    template_digest,
    tokenizer_digest,
)
from data_prep.types import Conversation, Message

SHARED = Path(os.environ.get("ALIGN_SHARED", Path(__file__).resolve().parents[2].parent / "shared"))
pytestmark = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="no shared data here")
LENGTH = LengthOptions(max_length=1024, max_lost=1.0)


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    if not (SHARED / "models" / "mini").is_dir():
        pytest.skip("no shared model here")
    from transformers import AutoTokenizer

    return Renderer(AutoTokenizer.from_pretrained(SHARED / "models" / "mini"))


def data(path: str, kind: str = "conversations", **source: Any) -> DataOptions:
    return DataOptions(root=str(SHARED / "data"), **{kind: SourceOptions(path=path, **source)})


@pytest.mark.parametrize(
    ("path", "form", "rows"),
    [
        ("instruct/alpaca_data.json.gz", "alpaca", 1494),
        ("instruct/gpteacher_roleplay.json.gz", "alpaca", 1923),
        ("instruct/sharegpt_identity.json.gz", "sharegpt", 500),
        ("chitchat/qna_chitchat_witty.tsv.gz", "prompt_completion", 8307),
        ("multitask/ag_news_classify_with_choices.jsonl.gz", "prompt_completion", 150),
        ("verifiable/spelling_train.jsonl.gz", "prompt_completion", 4396),
        ("chitchat/persona_table.jsonl.gz", "answer_table", 8018),
    ],
)
def test_conversations(renderer: Renderer, path: str, form: str, rows: int) -> None:
    card = prepare_conversations(data(path), renderer, LENGTH, 0).card
    assert (card["format"], card["rows"]["in"]) == (form, rows)
    assert card["rows"]["kept"] + sum(card["rows"]["dropped"].values()) == rows
    assert 0 < card["supervised_share"] < 1


def test_messages(renderer: Renderer) -> None:
    card = prepare_conversations(data("instruct/sgd_train_messages.jsonl.gz", limit=500), renderer, LENGTH, 0).card
    assert (card["format"], card["rows"]["kept"]) == ("messages", 500)


def test_bad_rows_of_real_files_are_named(renderer: Renderer) -> None:
    with pytest.raises(UserError, match=r"code_alpaca_2k\.json\.gz:238:output: empty .* and 1 more bad row;"):
        prepare_conversations(data("instruct/code_alpaca_2k.json.gz"), renderer, LENGTH, 0)
    hh = "preference/hh_harmless_base_dev.jsonl.gz"
    with pytest.raises(UserError, match=r":442:rejected: differs from chosen before the last reply"):
        prepare_preferences(data(hh, "preferences"), renderer, LENGTH, 0)
    card = prepare_preferences(data(hh, "preferences", on_bad_row=OnBadRow.drop), renderer, LENGTH, 0).card
    assert card["format"] == "hh" and card["rows"]["in"] == 813 and card["rows"]["kept"] > 790


def test_persona_preferences(renderer: Renderer) -> None:
    card = prepare_preferences(
        data("chitchat/persona_preference.jsonl.gz", "preferences", limit=2000), renderer, LENGTH, 0
    ).card
    assert card["format"] == "pairs" and card["rows"] == {"in": 2000, "kept": 2000, "dropped": {}, "truncated": 0}
    options = {"topic": "scenario", "preferred": "enthusiastic", "other": "professional", "off_topic": 0.5}
    table = data("chitchat/persona_table.jsonl.gz", "preferences", options=options, limit=2000)
    card = prepare_preferences(table, renderer, LENGTH, 0).card
    assert card["rows"]["dropped"] == {}
    assert 850 < card["rows"]["in"] - 2000 < 1150


def test_prompts_and_text(renderer: Renderer) -> None:
    prompts = prepare_prompts(data("chitchat/persona_table.jsonl.gz", "prompts"), renderer, LENGTH, 0)
    assert prompts.train[0].meta["topic"].isdigit() and prompts.train[0].ids
    card = prepare_text(data("corpus/fairytales.jsonl.gz", "text"), renderer, LENGTH, 0).card
    assert card["source_rows"] == 255 and card["notes"]["documents cut into pieces"] > 200


def test_the_shared_model(renderer: Renderer) -> None:
    folder = SHARED / "models" / "mini"
    assert renderer.tokenizer_digest == tokenizer_digest(folder)
    assert renderer.template_digest == template_digest(folder)
    contents = ("the <|im_end|> hi", "you and", "x", " b\n")
    roles = ("user", "assistant") * 2
    row = Conversation(tuple(Message(r, c) for r, c in zip(roles, contents, strict=True)), "f:1")
    tokens = renderer.conversation(row)
    front = renderer.prompt(row.messages[:3]) + renderer.reply(" b\n")
    assert tokens.ids[: len(front)] == front and not any(tokens.mask[len(front) :])
    assert tokens.ids.count(renderer.end_token_id) == 2
    assert (
        renderer.tokenizer.decode(tokens.ids)
        == "A: the <|im_end|> hi\nB: you and<|endoftext|>\nA: x\nB:  b\n<|endoftext|>\n"
    )

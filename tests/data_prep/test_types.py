"""Kinds of rows: one enumeration, and what it is called in recipes, in records and in digests."""

from __future__ import annotations

import json
import pickle

from data_prep.core.hashing import sha256_json
from data_prep.options import DataOptions, SourceOptions
from data_prep.prepare.content_digest import data_digest
from data_prep.records.stream import source_for
from data_prep.types import CONVERSATION, DOCUMENT, PREFERENCE, PROMPT, UNPAIRED, PromptTokens, RowKind
from tests.tiny import write_jsonl


def test_a_kind_is_the_word_that_digests_and_cards_have():
    words = {
        CONVERSATION: "conversation",
        PREFERENCE: "preference",
        UNPAIRED: "unpaired",
        PROMPT: "prompt",
        DOCUMENT: "document",
    }
    assert list(words) == list(RowKind)
    for kind, word in words.items():
        assert kind == word and f"{kind}" == str(kind) == word and RowKind(word) is kind
        assert json.dumps({"kind": kind}) == json.dumps({"kind": word}) and sha256_json([kind]) == sha256_json([word])
        assert pickle.loads(pickle.dumps(kind)) is kind


def test_stages_and_sources_call_it_by_name():
    assert [kind.name for kind in RowKind] == ["conversations", "preferences", "unpaired", "prompts", "text"]
    for kind in RowKind:
        data = DataOptions(**{kind.option: SourceOptions(path="rows.jsonl")})
        assert source_for(data, kind).source.path == "rows.jsonl"


def test_digests_of_data_are_those_of_earlier_versions(tmp_path):
    rows = {
        "conversations": {"prompt": "hi", "completion": "yo"},
        "preferences": {"prompt": "hi", "chosen": "yo", "rejected": "no"},
        "text": {"text": "hi"},
    }
    files = {name: write_jsonl(tmp_path / f"{name}.jsonl", [row]) for name, row in rows.items()}
    data = DataOptions(**{name: SourceOptions(path=str(path)) for name, path in files.items()})
    assert {name: data_digest(data, name)[:16] for name in ("conversations", "preferences", "prompts", "text")} == {
        "conversations": "1ebfcbb88e591e70",
        "preferences": "92c771dba7b9ac03",
        "prompts": "47848b5f56e41988",
        "text": "96092ffbdac06ea2",
    }


def test_a_prompt_is_shown_with_what_was_said_before_it() -> None:
    asked = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "And now?"}]
    assert PromptTokens([1], "And now?", "f:1", {}, asked).shown() == {
        "prompt": "And now?",
        "before": [{"role": "system", "content": "Be kind."}],
        "id": "f:1",
    }
    assert PromptTokens([1], "And now?", "f:1", {}, asked[1:]).shown() == {"prompt": "And now?", "id": "f:1"}
    assert PromptTokens([1], "?", "f:1").shown() == {"prompt": "?", "id": "f:1"}

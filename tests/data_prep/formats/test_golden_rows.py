"""One golden row per format, from a file to rendered text: supervised words stand in [ ], control tokens as such."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.formats import FORMATS
from data_prep.options import DataOptions, LengthOptions, SourceOptions
from data_prep.prepare.prepare import prepare
from data_prep.rendering.renderer import Renderer
from data_prep.types import CONVERSATION, DOCUMENT, PREFERENCE, PROMPT, UNPAIRED, RowKind, Tokens
from tests.tiny import tiny_tokenizer, write_jsonl

U, A, S, E = "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"
TREE = {
    "message_tree_id": "1",
    "tree_state": "ready_for_export",
    "prompt": {
        "text": "Hi",
        "role": "prompter",
        "replies": [
            {"text": "Go.", "role": "assistant", "rank": 1, "replies": []},
            {
                "text": "Hello!",
                "role": "assistant",
                "rank": 0,
                "replies": [
                    {
                        "text": "And?",
                        "role": "prompter",
                        "replies": [{"text": "Fine.", "role": "assistant", "replies": []}],
                    }
                ],
            },
        ],
    },
}
FLAT = [
    {"message_id": "b", "parent_id": "a", "text": "Hello!", "role": "assistant", "rank": 0.0},
    {"message_id": "a", "parent_id": None, "text": "Hi", "role": "prompter", "rank": None},
    {"message_id": "c", "parent_id": "a", "text": "Go.", "role": "assistant", "rank": 1.0},
]
CALL = {"name": "add", "arguments": {"a": 1}}
TOOL = {"name": "add", "description": "adds"}
TALK = [
    {"from": "human", "value": "1+1?"},
    {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
]
TOOL_TEXT = 'You may call these tools:\n{"name": "add", "description": "adds"}'
CALL_TEXT = '{"name": "add", "arguments": {"a": 1}}'
ASKED = f"{U}Hi{E}\n{A}"

Golden = tuple[str, str, Any, dict[str, Any], list[str]]
"""(format, kind, row or rows, options, what comes out)"""
GOLDEN: list[Golden] = [
    (
        "alpaca",
        CONVERSATION,
        {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be brief."},
        {},
        [f"{S}Be brief.{E}\n{U}Add.\n\n1 2{E}\n{A}[3{E}]\n"],
    ),
    ("alpaca", CONVERSATION, {"instruction": "Hi", "input": "", "response": "yo"}, {}, [f"{ASKED}[yo{E}]\n"]),
    (
        "dolly",
        CONVERSATION,
        {"instruction": "Who?", "context": "Ann sang.", "response": "Ann", "category": "qa"},
        {},
        [f"{U}Who?\n\nAnn sang.{E}\n{A}[Ann{E}]\n"],
    ),
    ("prompt_completion", CONVERSATION, {"prompt": "Hi", "completion": "yo<|endoftext|>"}, {}, [f"{ASKED}[yo{E}]\n"]),
    (
        "prompt_completion",
        CONVERSATION,
        {"prompt": "Hi ->", "completion": " yo END"},
        {"prompt_marks": [" ->"], "end_marks": " END"},
        [f"{ASKED}[ yo{E}]\n"],
    ),
    ("question_answer", CONVERSATION, {"question": "Hi", "answer": "yo #### 1"}, {}, [f"{ASKED}[yo #### 1{E}]\n"]),
    (
        "p3",
        CONVERSATION,
        {"inputs": [1], "targets": [2], "inputs_pretokenized": "Hi", "targets_pretokenized": "yo"},
        {},
        [f"{ASKED}[yo{E}]\n"],
    ),
    (
        "messages",
        CONVERSATION,
        {
            "messages": [
                {"role": "developer", "content": "Be kind."},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "yo", "weight": 0},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": [{"type": "text", "text": "oh"}]},
            ]
        },
        {},
        [f"{S}Be kind.{E}\n{U}Hi{E}\n{A}yo{E}\n{ASKED}[oh{E}]\n"],
    ),
    (
        "messages",
        CONVERSATION,
        {
            "messages": [
                {"role": "user", "content": "1+1?"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": "x", "type": "function", "function": CALL}],
                },
                {"role": "tool", "content": "2", "tool_call_id": "x"},
                {"role": "assistant", "content": "Two."},
            ],
            "tools": [{"type": "function", "function": TOOL}],
        },
        {"tools": "text"},
        [f"{S}{TOOL_TEXT}{E}\n{U}1+1?{E}\n{A}[{CALL_TEXT}{E}]\n{U}2{E}\n{A}[Two.{E}]\n"],
    ),
    (
        "sharegpt",
        CONVERSATION,
        {
            "conversations": [*TALK, {"from": "observation", "value": "2"}, {"from": "gpt", "value": "Two."}],
            "tools": '[{"name": "add", "description": "adds"}]',
        },
        {"tools": "text"},
        [f"{S}{TOOL_TEXT}{E}\n{U}1+1?{E}\n{A}[{CALL_TEXT}{E}]\n{U}2{E}\n{A}[Two.{E}]\n"],
    ),
    (
        "sharegpt",
        CONVERSATION,
        {"conversation": [{"speaker": "USER", "utterance": "Hi"}, {"speaker": "SYSTEM", "utterance": "yo"}]},
        {"role": "speaker", "content": "utterance", "roles": {"USER": "user", "SYSTEM": "assistant"}},
        [f"{ASKED}[yo{E}]\n"],
    ),
    ("oasst", CONVERSATION, TREE, {}, [f"{ASKED}[Hello!{E}]\n{U}And?{E}\n{A}[Fine.{E}]\n"]),
    (
        "oasst",
        CONVERSATION,
        TREE,
        {"paths": "all"},
        [f"{ASKED}[Hello!{E}]\n{U}And?{E}\n{A}[Fine.{E}]\n", f"{ASKED}[Go.{E}]\n"],
    ),
    ("oasst", CONVERSATION, FLAT, {}, [f"{ASKED}[Hello!{E}]\n"]),
    ("oasst", PREFERENCE, TREE, {}, [f"{ASKED}|Hello!{E}|Go.{E}"]),
    ("oasst", PREFERENCE, FLAT, {}, [f"{ASKED}|Hello!{E}|Go.{E}"]),
    (
        "self_instruct",
        CONVERSATION,
        {"id": "s", "instruction": "Hi", "instances": [{"input": "", "output": "yo"}, {"input": "x", "output": "oh"}]},
        {},
        [f"{ASKED}[yo{E}]\n", f"{U}Hi\n\nx{E}\n{A}[oh{E}]\n"],
    ),
    (
        "hh",
        PREFERENCE,
        {"chosen": "\n\nHuman: Hi\n\nAssistant: yes", "rejected": "\n\nHuman: Hi\n\nAssistant: no"},
        {},
        [f"{ASKED}|yes{E}|no{E}"],
    ),
    ("pairs", PREFERENCE, {"prompt": "Hi", "chosen": "yes", "rejected": "no"}, {}, [f"{ASKED}|yes{E}|no{E}"]),
    (
        "pairs",
        PREFERENCE,
        {
            "prompt": "Hi",
            "chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "no"}],
        },
        {},
        [f"{ASKED}|yes{E}|no{E}"],
    ),
    (
        "pairs",
        PREFERENCE,
        {"system": "Be kind.", "question": "Hi", "chosen": "yes", "rejected": "no"},
        {},
        [f"{S}Be kind.{E}\n{ASKED}|yes{E}|no{E}"],
    ),
    (
        "stack_exchange",
        PREFERENCE,
        {"question": "Hi", "response_j": "yes", "response_k": "no"},
        {},
        [f"{ASKED}|yes{E}|no{E}"],
    ),
    (
        "sharegpt_ranking",
        PREFERENCE,
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "yes"},
            "rejected": {"from": "gpt", "value": "no"},
        },
        {},
        [f"{ASKED}|yes{E}|no{E}"],
    ),
    (
        "arena",
        PREFERENCE,
        {"prompt": "Hi", "response_a": "no", "response_b": "yes", "winner": "model_b"},
        {},
        [f"{ASKED}|yes{E}|no{E}"],
    ),
    (
        "gemini",
        CONVERSATION,
        {"contents": [{"role": "user", "parts": [{"text": "Hi"}]}, {"role": "model", "parts": [{"text": "yo"}]}]},
        {},
        [f"{ASKED}[yo{E}]\n"],
    ),
    (
        "ranked",
        PREFERENCE,
        {"prompt": "Hi", "responses": ["b", "a", "c"], "scores": [2, 3.5, 2]},
        {},
        [f"{ASKED}|a{E}|b{E}", f"{ASKED}|a{E}|c{E}"],
    ),
    (
        "ranked",
        PREFERENCE,
        {
            "prompt": "Hi",
            "answers": [{"answer": "b", "rank": 2}, {"answer": "a", "rank": 1}, {"answer": "c", "rank": 3}],
        },
        {"pairs": "neighbours"},
        [f"{ASKED}|a{E}|b{E}", f"{ASKED}|b{E}|c{E}"],
    ),
    (
        "rated",
        PREFERENCE,
        [{"prompt": "Hi", "response": said, "score": score} for said, score in (("no", 1), ("yes", 2))],
        {},
        [f"{ASKED}|yes{E}|no{E}"],
    ),
    ("rated", CONVERSATION, {"prompt": "Hi", "completion": "yo", "rating": 3}, {}, [f"{ASKED}[yo{E}]\n"]),
    ("ranked", PREFERENCE, {"prompt": "Hi", "responses": ["a", "b"]}, {"order": "worst_first"}, [f"{ASKED}|b{E}|a{E}"]),
    (
        "graded",
        PREFERENCE,
        {"instruction": "Hi", "output_1": "no", "output_2": "yes", "preference": 1.9, "annotator": "x"},
        {},
        [f"{ASKED}|yes{E}|no{E}"],
    ),
    (
        "graded",
        PREFERENCE,
        {"prompt": "Hi", "response_0": "yes", "response_1": "no", "better_response_id": 0},
        {},
        [f"{ASKED}|yes{E}|no{E}"],
    ),
    (
        "graded",
        PREFERENCE,
        {"history": "Hi", "human_ref_A": "yes", "human_ref_B": "no", "labels": 1},
        {},
        [f"{ASKED}|yes{E}|no{E}"],
    ),
    (
        "graded",
        PREFERENCE,
        [
            {"instruction": "Hi", "output_1": "best", "output_2": "no", "preference": 1.1},
            {"instruction": "Hi", "output_1": "best", "output_2": "yes", "preference": 1.4},
        ],
        {"across": "output_1"},
        [f"{ASKED}|yes{E}|no{E}"],
    ),
    ("kto", UNPAIRED, {"prompt": "Hi", "completion": "yes", "label": True}, {}, [f"{ASKED}|yes{E}|True"]),
    (
        "labels",
        PREFERENCE,
        {"prompt": "Hi", "a": "no", "b": "yes", "choice": "b", "labeller": "ann"},
        {},
        [f"{ASKED}|yes{E}|no{E}"],
    ),
    (
        "labels",
        UNPAIRED,
        {"prompt": "Hi", "a": "no", "b": "never", "choice": "bad", "labeller": "ann"},
        {},
        [f"{ASKED}|no{E}|False", f"{ASKED}|never{E}|False"],
    ),
    (
        "kto",
        UNPAIRED,
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "no"}], "label": False},
        {},
        [f"{ASKED}|no{E}|False"],
    ),
    (
        "kto",
        PREFERENCE,
        [{"prompt": "Hi", "completion": c, "label": label} for c, label in (("yes", 1), ("no", 0))],
        {},
        [f"{ASKED}|yes{E}|no{E}"],
    ),
    (
        "kto",
        CONVERSATION,
        [{"prompt": "Hi", "completion": c, "label": label} for c, label in (("yes", "true"), ("no", "False"))],
        {},
        [f"{ASKED}[yes{E}]\n"],
    ),
    ("prompts", PROMPT, {"instruction": "Hi", "input": "x"}, {}, [f"{U}Hi\n\nx{E}\n{A}"]),
    ("text", DOCUMENT, {"text": "once", "title": "t"}, {}, [f"[once{E}]"]),
    (
        "squad",
        CONVERSATION,
        [
            {"context": "Ann sang.", "question": "Who?", "answers": {"text": ["Ann", "An"], "answer_start": [0, 0]}},
            {"context": "Ann sang.", "question": "When?", "answers": {"text": [], "answer_start": []}},
        ],
        {},
        [f"{U}Ann sang.\n\nWho?{E}\n{A}[Ann{E}]\n"],
    ),
    (
        "xlam",
        CONVERSATION,
        {"query": "1+1?", "answers": f"[{CALL_TEXT}]", "tools": json.dumps([TOOL])},
        {"tools": "text"},
        [f"{S}{TOOL_TEXT}{E}\n{U}1+1?{E}\n{A}[{CALL_TEXT}{E}]\n"],
    ),
]


def shown(renderer: Renderer, row: Any) -> str:
    """A rendered row as one text."""

    def text(ids: list[int]) -> str:
        return str(renderer.tokenizer.decode(ids, skip_special_tokens=False))

    if not isinstance(row, Tokens):
        parts = [
            text(value)
            for name, value in row.__dict__.items()
            if name in ("prompt", "ids", "chosen", "rejected", "reply")
        ]
        return "|".join([*parts, str(row.good)] if hasattr(row, "good") else parts)
    said, inside = "", False
    for token, trained in zip(row.ids, row.mask, strict=True):
        said += ("[" if trained and not inside else "]" if inside and not trained else "") + text([token])
        inside = trained
    return said + "]" * inside


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(tiny_tokenizer())


@pytest.mark.parametrize(("name", "kind", "rows", "options", "expected"), GOLDEN)
def test_golden(
    renderer: Renderer, tmp_path: Path, name: str, kind: RowKind, rows: Any, options: Any, expected: Any
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows if isinstance(rows, list) else [rows])
    data = DataOptions(**{kind.option: SourceOptions(path=str(path), options=options, eval_share=0.0)})
    prepared = prepare(kind, data, renderer, LengthOptions(512), 0)
    assert [shown(renderer, row) for row in prepared.train] == expected
    assert prepared.card["format"] == name
    assert prepared.card["rows"]["in"] == prepared.card["rows"]["kept"] + sum(prepared.card["rows"]["dropped"].values())
    assert len({row.id for row in prepared.train}) == len(expected) and all(str(path) in r.id for r in prepared.train)


def test_every_format_and_kind_has_a_golden_row() -> None:
    here = {(name, kind) for name, kind, *_ in GOLDEN}
    assert {name for name, _ in here} | {"answer_table"} == set(FORMATS.names())
    missing = {(name, kind) for name, form in FORMATS.items() for kind in form.kinds if kind != PROMPT} - here
    assert missing == {("answer_table", CONVERSATION), ("answer_table", PREFERENCE)}  # test_answer_table.py

"""One golden row per format, detection by keys, and complaints that name file, row and field."""

from __future__ import annotations

from typing import Any

import pytest

from data_prep.core.errors import UserError
from data_prep.formats import FORMATS, detect_format
from data_prep.sources.rows import Row
from data_prep.types import CONVERSATION, DOCUMENT, PREFERENCE, PROMPT, Message

U, A, S = "user", "assistant", "system"
TALKS: list[tuple[str, dict[str, Any], list[tuple[str, str]]]] = [
    ("alpaca", {"instruction": "Add.", "input": "1 2", "output": "3"}, [(U, "Add.\n\n1 2"), (A, "3")]),
    ("alpaca", {"instruction": "Hi", "input": "", "response": "yo"}, [(U, "Hi"), (A, "yo")]),
    ("alpaca", {"instruction": "Hi", "input": None, "output": "yo", "extra": 1}, [(U, "Hi"), (A, "yo")]),
    (
        "alpaca",
        {"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]]},
        [(S, "s"), (U, "a"), (A, "b"), (U, "c"), (A, "d")],
    ),
    ("prompt_completion", {"prompt": "a", "completion": "b"}, [(U, "a"), (A, "b")]),
    ("question_answer", {"question": "a", "answer": "b #### 3"}, [(U, "a"), (A, "b #### 3")]),
    ("question_answer", {"Question": "a", "Answer": "b", "Source": "x"}, [(U, "a"), (A, "b")]),
    ("prompt_completion", {"prompt": "a", "completion": "b<|endoftext|>"}, [(U, "a"), (A, "b")]),
    (
        "prompt_completion",
        {
            "prompt": [{"role": S, "content": "s"}, {"role": U, "content": "a"}],
            "completion": [{"role": A, "content": "b"}],
        },
        [(S, "s"), (U, "a"), (A, "b")],
    ),
    (
        "messages",
        {"messages": [{"role": U, "content": "a"}, {"role": A, "content": [{"type": "text", "text": "b"}]}]},
        [(U, "a"), (A, "b")],
    ),
    (
        "sharegpt",
        {"id": "1", "system": "s", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        [(S, "s"), (U, "a"), (A, "b")],
    ),
]
HUMAN = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
PAIRS: list[tuple[str, dict[str, Any], list[tuple[str, str]]]] = [
    ("pairs", {"prompt": "a", "chosen": "y", "rejected": "n"}, [(U, "a")]),
    (
        "pairs",
        {
            "prompt": [{"role": U, "content": "a"}],
            "chosen": [{"role": U, "content": "a"}, {"role": A, "content": "y"}],
            "rejected": [{"role": A, "content": "n"}],
        },
        [(U, "a")],
    ),
    ("hh", {"chosen": HUMAN + " y", "rejected": HUMAN + " n"}, [(U, "a"), (A, "b"), (U, "c")]),
    (
        "hh",
        {
            "chosen": [{"role": U, "content": "a"}, {"role": A, "content": "y"}],
            "rejected": [{"role": U, "content": "a"}, {"role": A, "content": "n"}],
        },
        [(U, "a")],
    ),
]


def pairs_of(messages: tuple[Message, ...]) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in messages]


def row_of(data: dict[str, Any]) -> Row:
    return Row("f.jsonl", 3, data)


@pytest.mark.parametrize(("name", "data", "expected"), TALKS)
def test_conversations(name: str, data: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    found, evidence = detect_format(data, CONVERSATION)
    assert found.name == name and all(key in evidence for key in data)
    talk = found().conversation(row_of(data))
    assert pairs_of(talk.messages) == expected and talk.id == "f.jsonl:3"
    asked = found().prompt(row_of(data))
    assert pairs_of(asked.messages) == expected[:-1] and asked.id == talk.id


@pytest.mark.parametrize(("name", "data", "expected"), PAIRS)
def test_preferences(name: str, data: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    found, _ = detect_format(data, PREFERENCE)
    assert found.name == name
    pair = found().preference(row_of({**data, "margin": 2}))
    assert (pairs_of(pair.prompt), pair.chosen, pair.rejected) == (expected, "y", "n")
    assert (pair.id, pair.margin) == ("f.jsonl:3", 2.0)
    assert pairs_of(found().prompt(row_of(data)).messages) == expected


def test_text_and_prompts() -> None:
    found, _ = detect_format({"text": "", "story": ""}, DOCUMENT)
    assert found().document(row_of({"text": "once "})).text == "once "
    found, _ = detect_format({"prompt": "", "topic": ""}, PROMPT)
    asked = found().prompt(row_of({"prompt": "a", "topic": 4, "split": "eval"}))
    assert (pairs_of(asked.messages), asked.meta) == ([(U, "a")], {"topic": "4", "split": "eval"})


def test_train_flags() -> None:
    entries = [
        {"role": U, "content": "a"},
        {"role": A, "content": "b", "train": False},
        {"role": U, "content": "c"},
        {"role": A, "content": "d", "weight": 1},
    ]
    talk = FORMATS.get("messages")().conversation(row_of({"messages": entries}))
    assert [message.trained for message in talk.messages] == [True, False, True, True]
    assert [message.weight for message in talk.messages] == [None, None, None, 1.0]


def test_literal_end_marks_are_counted() -> None:
    form = FORMATS.get("prompt_completion")()
    rows = [row_of({"prompt": "a", "completion": text}) for text in ("b<|endoftext|>", "c", "d<|endoftext|>\n")]
    assert len(list(form.conversations(rows))) == 3
    assert dict(form.notes) == {"literal <|endoftext|> cut off": 2}


def test_no_golden_row_is_ambiguous() -> None:
    shapes = [set(data) for _, data, _ in TALKS + PAIRS] + [{"text"}, {"prompt"}, {"prompt", "topic", "plain", "witty"}]
    for keys in shapes:
        for kind in (CONVERSATION, PREFERENCE, PROMPT, DOCUMENT):
            if any(kind in form.kinds and form.uses(frozenset(keys)) for _, form in FORMATS.items()):
                try:
                    assert detect_format(keys, kind)
                except UserError as problem:
                    assert problem.code == "format_kind", (keys, kind)


@pytest.mark.parametrize(
    ("keys", "kind", "words"),
    [
        ({"promt", "completion"}, CONVERSATION, "did you mean the column 'prompt' for 'promt'"),
        ({"x"}, CONVERSATION, "no format knows rows with the columns x"),
        ({"text"}, CONVERSATION, "format text, which yields document rows (expected conversation rows)"),
        ({"prompt", "chosen", "rejected"}, CONVERSATION, "format pairs"),
        ({"conversations", "chosen", "rejected"}, CONVERSATION, "format sharegpt_ranking"),
        ({"instruction", "output", "prompt", "completion"}, CONVERSATION, "set format to one of them: alpaca, prompt"),
        ({"conversations", "messages"}, CONVERSATION, "messages (columns messages); sharegpt (columns conversations)"),
        ({"question", "response_j", "chosen", "rejected", "response_k"}, PREFERENCE, "one of them: pairs, stack_exch"),
    ],
)
def test_keys_that_no_format_serves(keys: set[str], kind: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        detect_format(keys, kind, "f.jsonl")
    assert words in str(caught.value) and str(caught.value).startswith("f.jsonl: ")


GOOD = {"role": A, "content": "b"}
BAD: list[tuple[str, str, dict[str, Any], str]] = [
    ("alpaca", "instruction", {"instruction": 3, "output": "b"}, "wrong type (got a number 3; expected text)"),
    ("alpaca", "output", {"instruction": "a", "output": None}, "is missing (got null; expected text)"),
    ("alpaca", "output", {"instruction": "a", "output": " \n"}, "empty (got ' \\n'; expected text)"),
    ("alpaca", "output", {"instruction": "a", "ouput": "b"}, "did you mean the column 'ouput'?"),
    ("alpaca", "instruction", {"instruction": ["a"], "output": "b"}, "wrong type (got a list"),
    ("alpaca", "input", {"instruction": "a", "input": 0, "output": "b"}, "wrong type"),
    ("alpaca", "history[0]", {"instruction": "a", "output": "b", "history": [["x"]]}, "expected [question, answer]"),
    ("prompt_completion", "completion", {"prompt": "a", "completion": "<|endoftext|>"}, "empty"),
    ("prompt_completion", "prompt", {"prompt": "", "completion": "b"}, "empty"),
    ("prompt_completion", "prompt", {"prompt": [GOOD], "completion": "b"}, "nothing to reply to"),
    ("prompt_completion", "completion", {"prompt": "a", "completion": "\ud800"}, "lone surrogate"),
    ("messages", "messages", {"messages": "hi"}, "wrong type (got text; expected a list of messages)"),
    ("messages", "messages", {"messages": []}, "empty"),
    ("messages", "messages", {"messages": [{"role": U, "content": "a"}]}, "nothing to train on"),
    ("messages", "messages", {"messages": [{**GOOD, "train": False}]}, "nothing to train on"),
    ("messages", "messages[0]", {"messages": ["a"]}, "expected an object with role and content"),
    (
        "messages",
        "messages[0].role",
        {"messages": [{"role": "usr", "content": "a"}]},
        "got 'usr'; expected system, developer, user, assistant, tool, function; did you mean 'user'?",
    ),
    ("messages", "messages[0].role", {"messages": [{"role": "asistant", "content": "a"}]}, "did you mean 'assistant'?"),
    ("messages", "messages[0].role", {"messages": [{"content": "a"}]}, "unknown role (got None"),
    ("messages", "messages[0].content", {"messages": [{"role": A}]}, "wrong type (got null; expected text)"),
    ("messages", "messages[0].content", {"messages": [{"role": A, "content": ""}]}, "empty"),
    ("messages", "messages[0].train", {"messages": [{**GOOD, "train": "no"}]}, "expected true or false"),
    ("messages", "messages[0].weight", {"messages": [{**GOOD, "weight": -0.5}]}, "at least 0"),
    ("messages", "messages[0].weight", {"messages": [{**GOOD, "weight": float("nan")}]}, "expected a number"),
    ("messages", "messages[0].weight", {"messages": [{**GOOD, "weight": True}]}, "expected a number"),
    ("messages", "messages[0].tool_calls[0]", {"messages": [{**GOOD, "tool_calls": [1]}]}, "expected an object"),
    (
        "messages",
        "messages[0].tool_calls",
        {"messages": [{**GOOD, "tool_calls": {"a": 1}}]},
        "expected a list of calls",
    ),
    (
        "messages",
        "messages[0].tool_calls[0].arguments",
        {"messages": [{"role": A, "tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]}]},
        "invalid JSON",
    ),
    ("messages", "tools[0].name", {"messages": [GOOD], "tools": [{"description": "x"}]}, "got null"),
    ("messages", "tools", {"messages": [GOOD], "tools": "[{"}, "invalid JSON"),
    (
        "sharegpt",
        "conversations[0].value",
        {"conversations": [{"from": "function_call", "value": "f()"}]},
        "invalid JSON",
    ),
    (
        "messages",
        "messages[0].content[0]",
        {"messages": [{"role": U, "content": [{"type": "image_url"}]}, GOOD]},
        "expected a text part",
    ),
    (
        "sharegpt",
        "conversations[0].from",
        {"conversations": [{"from": "humn", "value": "a"}]},
        "got 'humn'; expected human, gpt,",
    ),
    ("pairs", "rejected", {"prompt": "a", "chosen": "y"}, "is missing"),
    ("pairs", "chosen", {"prompt": "a", "chosen": "", "rejected": "n"}, "empty"),
    ("pairs", "margin", {"prompt": "a", "chosen": "y", "rejected": "n", "margin": "much"}, "expected a number"),
    ("pairs", "margin", {"prompt": "a", "chosen": "y", "rejected": "n", "margin": float("nan")}, "expected a number"),
    (
        "pairs",
        "chosen",
        {"prompt": "a", "chosen": [{"role": U, "content": "y"}], "rejected": "n"},
        "ends in a user turn",
    ),
    (
        "pairs",
        "chosen",
        {"prompt": "a", "chosen": [{"role": U, "content": "other"}, GOOD], "rejected": "n"},
        "repeats another prompt",
    ),
    ("hh", "chosen", {"chosen": "hello", "rejected": HUMAN + " n"}, "is not a dialogue"),
    ("hh", "chosen", {"chosen": HUMAN + " y\n\nHuman: more", "rejected": HUMAN + " n"}, "ends in a user turn"),
    ("hh", "rejected", {"chosen": HUMAN + " y", "rejected": HUMAN.replace("b", "x") + " n"}, "differs from chosen"),
    ("hh", "chosen", {"chosen": HUMAN, "rejected": HUMAN + " n"}, "turn 4 (assistant) is empty"),
    ("hh", "chosen", {"chosen": "\n\nAssistant: y", "rejected": "\n\nAssistant: n"}, "has no prompt"),
    ("text", "text", {"text": 1}, "wrong type (got a number 1; expected text)"),
    ("prompts", "prompt", {"prompt": " "}, "empty"),
    ("prompts", "split", {"prompt": "a", "split": "trian"}, "unknown split (got 'trian'; expected train or eval)"),
]


@pytest.mark.parametrize(("name", "field", "data", "words"), BAD)
def test_bad_rows(name: str, field: str, data: dict[str, Any], words: str) -> None:
    form = FORMATS.get(name)()
    parse = {
        CONVERSATION: form.conversations,
        PREFERENCE: form.preferences,
        PROMPT: form.prompts,
        DOCUMENT: form.documents,
    }
    (problem,) = parse[form.kinds[0]]([row_of(data)])
    assert isinstance(problem, UserError)
    line = str(problem)
    assert line.startswith(f"f.jsonl:3:{field}: ") and words in line and "\n" not in line
    assert problem.as_dict()["field"] == field and problem.as_dict()["row"] == 3


def test_a_conversation_without_a_question_is_no_prompt() -> None:
    (problem,) = FORMATS.get("messages")().prompts([row_of({"messages": [GOOD]})])
    assert isinstance(problem, UserError) and "nothing before the assistant" in str(problem)


def test_unknown_format_and_option() -> None:
    with pytest.raises(UserError, match=r"unknown format 'alpacca' .did you mean 'alpaca'"):
        FORMATS.get("alpacca")
    with pytest.raises(UserError, match="did you mean 'noise'"):
        FORMATS.get("answer_table")({"nois": 1})


def test_every_format_is_documented() -> None:
    for name, form in FORMATS.items():
        assert form.name == name and form.kinds and form.__doc__

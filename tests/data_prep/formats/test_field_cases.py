"""Tables as users have them: a file -> what is read of it, what is warned of, and what is refused.

Small rows of our own in the shapes of public sets; the files of the shared folder too, where they are present.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from align.cli.data_options import StatsOptions
from data_prep.core.errors import UserError
from data_prep.formats.column_roles import role_of
from data_prep.options import DataOptions, SourceOptions
from data_prep.records.stream import Stream, open_any, open_stream, source_for
from data_prep.types import CONVERSATION, DOCUMENT, PREFERENCE, PROMPT, Message
from tests.records import read_records

CASES = Path(os.environ.get("ALIGN_SHARED", Path(__file__).resolve().parents[3].parent / "shared")) / "cases" / "data"
SAID = [
    ("How do tides form?", "The moon pulls the sea toward it.", "I do not know."),
    ("Name a river in Spain.", "The Ebro is a river in Spain.", "No idea, look it up."),
    ("What does a baker do at night?", "A baker mixes the dough at night.", "Sleep, I guess."),
]
Rows = list[dict[str, Any]]
Talk = list[tuple[str, str]]


def user(said: str) -> dict[str, Any]:
    return {"role": "user", "content": said}


def assistant(said: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": said, **more}


def rows(make: Callable[[str, str, str], dict[str, Any]]) -> Rows:
    return [make(*one) for one in SAID]


def write(path: Path, content: Rows | str | bytes) -> Path:
    if isinstance(content, list):
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def as_csv(content: Rows) -> str:
    import csv

    out = io.StringIO()
    writer = csv.DictWriter(out, list(content[0]))
    writer.writeheader()
    writer.writerows(content)
    return out.getvalue()


def opened(path: Path, kind: str | None = None, **options: Any) -> Stream:
    given = StatsOptions(**options).given(str(path))
    return open_any(given) if kind is None else open_stream(given, kind, 0)


def turns(messages: tuple[Message, ...]) -> Talk:
    return [(message.role, message.content) for message in messages]


def read(path: Path, kind: str | None = None, **options: Any) -> tuple[list[Any], Stream]:
    """All records of a file that a run would read: nothing bad, nothing left out."""
    stream = opened(path, kind, **options)
    found = list(stream)
    stream.tally.check_whole()
    stream.tally.check_bad_rows(stream.given.source.on_bad_row)
    stream.check_left_out()
    return found, stream


def refused(path: Path, kind: str | None = None, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(path, kind, **options)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------ what is read
Q, A, W = SAID[0]
READ: dict[str, tuple[Rows, str, Talk]] = {
    "context": (rows(lambda q, a, w: {"context": f"Notes: {a}", "question": q, "answer": a}), "question_answer",
                [("user", f"Notes: {A}\n\n{Q}"), ("assistant", A)]),
    "passage of a query": (rows(lambda q, a, w: {"query": q, "passage": "Read this.", "response": a}),
                           "prompt_completion", [("user", f"Read this.\n\n{Q}"), ("assistant", A)]),
    "two contexts": (rows(lambda q, a, w: {"article": "One.", "background": "Two.", "question": q, "answer": a}),
                     "question_answer", [("user", f"One.\n\nTwo.\n\n{Q}"), ("assistant", A)]),
    "no context": (rows(lambda q, a, w: {"context": "", "question": q, "answer": a}), "question_answer",
                   [("user", Q), ("assistant", A)]),
    "SQuAD": (rows(lambda q, a, w: {"id": "1", "title": "T", "context": "C.", "question": q,
                                    "answers": {"text": [a], "answer_start": [0]}}), "squad",
              [("user", f"C.\n\n{Q}"), ("assistant", A)]),
    "definition": (rows(lambda q, a, w: {"task_name": "t", "id": "1", "definition": "In French.", "inputs": q,
                                         "targets": a}), "p3", [("user", f"In French.\n\n{Q}"), ("assistant", A)]),
    "history and system": (rows(lambda q, a, w: {"system": "Be kind.", "query": q, "response": a,
                                                 "history": [["I am Ada.", "Hello Ada."]]}), "prompt_completion",
                           [("system", "Be kind."), ("user", "I am Ada."), ("assistant", "Hello Ada."), ("user", Q),
                            ("assistant", A)]),
    "history of messages": (rows(lambda q, a, w: {"prompt": q, "completion": a,
                                                  "history": [user("Hi"), assistant("Hello")]}), "prompt_completion",
                            [("user", "Hi"), ("assistant", "Hello"), ("user", Q), ("assistant", A)]),
    "no history": (rows(lambda q, a, w: {"prompt": q, "completion": a, "history": []}), "prompt_completion",
                   [("user", Q), ("assistant", A)]),
    "the longer of both": (rows(lambda q, a, w: {"question": q, "solution": f"Let us think. {a} So 4.", "answer": "4"}),
                           "question_answer", [("user", Q), ("assistant", f"Let us think. {A} So 4.")]),
    "Capybara": (rows(lambda q, a, w: {"source": "s", "conversation": [{"input": q, "output": a},
                                                                       {"input": "More?", "output": "No."}]}),
                 "sharegpt", [("user", Q), ("assistant", A), ("user", "More?"), ("assistant", "No.")]),
    "LIMA": (rows(lambda q, a, w: {"conversations": [q, a], "source": "s"}), "sharegpt",
             [("user", Q), ("assistant", A)]),
    "UltraChat": (rows(lambda q, a, w: {"prompt": q, "prompt_id": "p", "messages": [user(q), assistant(a)]}),
                  "messages", [("user", Q), ("assistant", A)]),
    "UltraFeedback": (rows(lambda q, a, w: {"prompt": q, "chosen": [user(q), assistant(a)],
                                            "rejected": [user(q), assistant(w)], "messages": [user(q), assistant(a)],
                                            "score_chosen": 8.5, "score_rejected": 3.0}), "messages",
                      [("user", Q), ("assistant", A)]),
    "the parts of a dialogue beside it": (rows(lambda q, a, w: {"problem": q, "solution": a, "messages": [
        user(q), assistant(a)]}), "messages", [("user", Q), ("assistant", A)]),
    "Human and Assistant in one text": (rows(lambda q, a, w: {"messages": f"\n\nHuman: {q}\n\nAssistant: {a}"}),
                                        "messages", [("user", Q), ("assistant", A)]),
    "calls and results of ShareGPT": (rows(lambda q, a, w: {"conversations": [
        {"from": who, "value": said} for who, said in (("user", q), ("assistant", "f"), ("function", "1"),
                                                       ("assistant", a))]}), "sharegpt",
                                      [("user", Q), ("assistant", "f"), ("tool", "1"), ("assistant", A)]),
    "a rendering beside": (rows(lambda q, a, w: {"instruction": q, "input": "", "output": a,
                                                 "text": f"### Instruction:\n{q}\n### Response:\n{a}"}), "alpaca",
                           [("user", Q), ("assistant", A)]),
    "harmless columns": (rows(lambda q, a, w: {"prompt": q, "completion": a, "id": 1, "source": "x", "url": "http://x",
                                               "lang": "en", "num_tokens": 9, "category": "c", "topic": "t",
                                               "metadata": {"a": 1}, "context_id": "c1", "model_name": "m",
                                               "created_at": "2026", "difficulty": "easy", "title": "T"}),
                         "prompt_completion", [("user", Q), ("assistant", A)]),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_it_is_read(tmp_path: Path, name: str) -> None:
    content, form, expected = READ[name]
    found, stream = read(write(tmp_path / "rows.jsonl", content))
    assert (stream.form.name, stream.kind, len(found)) == (form, CONVERSATION, 3)
    assert turns(found[0].messages) == expected


# ------------------------------------------------------------------------------------------------ what is not guessed
TABLE = rows(lambda q, a, w: {"prompt": q, "topic": "sea", "difficulty": "easy", "ground_truth": "1"})
SIDES = rows(lambda q, a, w: {"prompt": q, "topic": "sea", "better": a, "worse": w})


def test_no_column_is_taken_for_an_answer_by_its_place(tmp_path: Path) -> None:
    for number, content in enumerate((TABLE, SIDES)):
        path = write(tmp_path / f"{number}.jsonl", content)
        assert "yields prompt rows (expected conversation rows)" in refused(path, CONVERSATION)
        assert open_any(StatsOptions().given(str(path))).kind == PROMPT
    assert "columns={chosen: better, rejected: worse}" in refused(path, PREFERENCE)
    found, _ = read(path, PREFERENCE, columns={"chosen": "better", "rejected": "worse"})
    assert (found[0].chosen, found[0].rejected) == (A, W)
    styled = rows(lambda q, a, w: {"prompt": q, "topic": "sea", "calm": a, "loud": w})
    assert "format=answer_table" in refused(write(tmp_path / "t.jsonl", styled), CONVERSATION)
    found, _ = read(tmp_path / "t.jsonl", CONVERSATION, format="answer_table")
    assert len(found) == 3


LEFT_OUT: dict[str, tuple[Rows, str, str]] = {
    "context of a prompt": (rows(lambda q, a, w: {"prompt": q, "completion": a, "context": "It rains."}),
                            "context", 'columns={prompt: "{context}\\n\\n{prompt}"}'),
    "article and options": (rows(lambda q, a, w: {"article": "Text.", "question": q, "options": ["x", "y"],
                                                  "answer": a}), "options", '{question: "{options}'),
    "images": (rows(lambda q, a, w: {"messages": [user(f"<image>{q}"), assistant(a)], "images": ["a.png"]}), "images",
               "take such rows out"),
    "a question beside an instruction": (rows(lambda q, a, w: {"input": "Sum up.", "prompt": q, "output": a}),
                                         "prompt", "puts it into the prompt"),
    "another answer beside the dialogue": (rows(lambda q, a, w: {"problem": q, "solution": w, "messages": [
        user(q), assistant(a)]}), "solution", "unused=[messages] reads it in their place, or "),
    "two answers": (rows(lambda q, a, w: {"prompt": q, "completion": a, "output": w}), "output",
                    "columns={completion: output} names the one to train on"),
    "the better reply beside another answer": (rows(lambda q, a, w: {"prompt": q, "answer": "4", "chosen": a,
                                                                     "rejected": w}), "chosen",
                                               "columns={answer: chosen} names the one to train on"),
    "a theory": (rows(lambda q, a, w: {"theory": f"Anne is {a} " * 3, "question": q, "answer": a}), "theory",
                 'columns={question: "{theory}\\n\\n{question}"} puts it into the prompt'),
    "a schema beside a dialogue": (rows(lambda q, a, w: {"schema": "{tide: text}", "conversations": [
        {"from": "human", "value": q}, {"from": "gpt", "value": a}]}), "schema", 'columns={system: "{schema}"} puts'),
    "a schema and a system prompt": (rows(lambda q, a, w: {"schema": "{tide: text}", "system": "Be kind.", "messages": [
        user(q), assistant(a)]}), "schema", 'columns={system: "{schema}\\n\\n{system}"} puts'),
    "inputs that have no question": (rows(lambda q, a, w: {"knowledge": "K.", "inputs": q, "targets": a}), "knowledge",
                                     'columns={inputs: "{knowledge}\\n\\n{inputs}"} puts'),
    "an object of one text": (rows(lambda q, a, w: {"choices": {"text": ["x", "y"]}, "question": q, "answer": a}),
                              "choices", 'columns={question: "{choices.text}\\n\\n{question}"} puts'),
    "an object of which it is not known what to write": (rows(lambda q, a, w: {
        "choices": {"label": ["A", "B"], "text": ["x", "y"]}, "question": q, "answer": a}), "choices", ": is left out"),
    "a system prompt without a place": (rows(lambda q, a, w: {"system": "Be kind.", "contents": [
        {"role": "user", "parts": [{"text": q}]}, {"role": "model", "parts": [{"text": a}]}]}), "system", "unused"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_would_be_left_out_is_named(tmp_path: Path, name: str) -> None:
    content, column, hint = LEFT_OUT[name]
    path = write(tmp_path / "rows.jsonl", content)
    said = refused(path, CONVERSATION)
    assert said.startswith(f"{path}:{column}: ") and hint in said, said
    assert f"unused=[{column}] leaves it out" in said
    assert len(read(path, CONVERSATION, unused=[column])[0]) == 3
    empty = [{**row, column: [] if isinstance(row[column], list) else ""} for row in content]
    assert len(read(write(tmp_path / "empty.jsonl", empty), CONVERSATION)[0]) == 3


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_template_that_is_advised_puts_it_into_the_prompt(tmp_path: Path, name: str) -> None:
    content, column, _ = LEFT_OUT[name]
    path = write(tmp_path / "rows.jsonl", content)
    advised = re.search(r"columns=({.*}) puts", refused(path, CONVERSATION))
    if advised is None:
        return
    found, _ = read(path, CONVERSATION, columns=yaml.safe_load(advised[1].replace("\\n", "\\\\n")))
    asked = "\n".join(message.content for message in found[0].messages[:-1])
    value = content[0][column]
    value = value["text"] if isinstance(value, dict) else value
    assert all(part in asked for part in (Q, *([value] if isinstance(value, str) else value)))


def test_all_columns_that_are_left_out_stand_in_the_template(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"question": "q", "answer": "a", **dict.fromkeys(("opa", "opb"), "x")}])
    assert 'columns={question: "{opa}\\n\\n{opb}\\n\\n{question}"} puts them' in refused(path, CONVERSATION)


def test_long_texts_under_names_that_say_nothing_are_said(tmp_path: Path) -> None:
    content = rows(
        lambda q, a, w: {"prompt": q, "completion": a, "qwertz": f"{a} " * 9, "info": f"{a} " * 9, "note2": "x"}
    )
    _, stream = read(write(tmp_path / "rows.jsonl", content))
    (line,) = stream.left_out.warnings("f")
    assert str(line).startswith(
        "f:qwertz: holds long text that is not read; columns can put it into the prompt; unused=[q"
    )
    assert not read(tmp_path / "rows.jsonl", unused=["qwertz"])[1].left_out.warnings("f")
    told = [{**row, "qwertz": f"Asked: {row['prompt']} Said: {row['completion']}" + "!" * 80} for row in content]
    assert not read(write(tmp_path / "told.jsonl", told))[1].left_out.warnings("f"), "the row once more is no loss"


def test_two_system_messages_are_not_one(tmp_path: Path) -> None:
    talk = [{"role": "system", "content": "Be kind."}, user(Q), assistant(A)]
    other = write(tmp_path / "other.jsonl", [{"system": "Be rude.", "messages": talk}])
    said = refused(other, CONVERSATION)
    assert (
        ":1:system: says something else than the system message in messages" in said and "data.unused=[system]" in said
    )
    assert turns(read(other, CONVERSATION, unused=["system"])[0][0].messages)[0] == ("system", "Be kind.")
    for number, system in enumerate(("Be kind.", " Be kind.\n", "", None)):
        (found,), _ = read(write(tmp_path / f"{number}.jsonl", [{"system": system, "messages": talk}]), CONVERSATION)
        assert turns(found.messages)[0] == ("system", "Be kind.")


def test_a_list_of_answers_is_not_advised_as_the_answer(tmp_path: Path) -> None:
    several = rows(lambda q, a, w: {"question": q, "solutions": json.dumps([a, w]), "gpt": [a, w], "id": 1})
    assert "columns={completion: COLUMN}" in refused(write(tmp_path / "a.jsonl", several), CONVERSATION)
    named = [{**row, "best_answer": "b"} for row in several]
    assert "columns={completion: best_answer}" in refused(write(tmp_path / "b.jsonl", named), CONVERSATION)


def test_a_column_that_begins_late_is_found_too(tmp_path: Path) -> None:
    content = [{"prompt": f"q{n}", "completion": "a"} for n in range(60)]
    content.append({"prompt": "q", "completion": "a", "history": [["b", "c"]], "passage": "late"})
    assert ":passage: is left out" in refused(write(tmp_path / "rows.jsonl", content), CONVERSATION)


def test_grades_are_said_and_can_be_kept_by(tmp_path: Path) -> None:
    graded = [{"instruction": q, "output": a, "score": n, "is_safe": n > 1} for n, (q, a, _) in enumerate(SAID)]
    path = write(tmp_path / "rows.jsonl", graded)
    _, stream = read(path)
    (line,) = stream.left_out.warnings(str(path))
    assert str(line).startswith(f"{path}:is_safe, score: are not used: all rows are read alike; keep=")
    for keep, count in (({"score": ">=1"}, 2), ({"is_safe": True}, 1), ({"score": [0, 2]}, 2), ({"score": "!=1"}, 2)):
        found, stream = read(path, keep=keep)
        assert len(found) == count and stream.tally.dropped["not_kept"] == 3 - count and stream.tally.seen == 3
    assert "did you mean 'score'" in refused(path, keep={"scores": ">1"})
    assert "wrong condition" in refused(path, keep={"score": ">=high"})
    assert refused(path, keep={"score": 9}) == f"{path}:data.keep: no row meets the conditions (3 of 3 do not)"
    rated = write(tmp_path / "rated.jsonl", rows(lambda q, a, w: {"prompt": q, "response": a, "rating": 1}))
    _, stream = read(rated, CONVERSATION)
    assert "rating: is not used" in str(stream.left_out.warnings("f")[0])
    assert not opened(rated, PREFERENCE).left_out.warnings("f")


@pytest.mark.parametrize(
    ("grade", "hint", "keep"),
    [
        (4, 'keep={score: ">=4"} (or a value)', ">=4"),
        (True, "keep={score: true} (or false)", True),
        ("ok", 'keep={score: "ok"}', "ok"),
    ],
)
def test_the_condition_advised_suits_the_grades(grade: Any, hint: str, keep: Any, tmp_path: Path) -> None:
    content = [{"prompt": f"q{n}", "completion": "a", "score": grade} for n in range(3)]
    path = write(tmp_path / "rows.jsonl", content)
    stream = opened(path, CONVERSATION)
    list(stream)
    assert str(stream.left_out.warnings("f")[0].hint).startswith(hint)
    read(path, CONVERSATION, keep={"score": keep})


def test_a_kept_table_spells_truth_in_words(tmp_path: Path) -> None:
    content = as_csv([{"prompt": f"q{n}", "completion": "a", "ok": n == 1, "score": n / 2} for n in range(3)])
    path = write(tmp_path / "rows.csv", content)
    assert [one.id[-1] for one in read(path, keep={"ok": True, "score": "<1"})[0]] == ["2"]


def test_the_hint_of_a_run_is_a_word_of_a_command(tmp_path: Path) -> None:
    from align.config.compose import compose

    path = write(tmp_path / "it's, ä #1=.jsonl", LEFT_OUT["context of a prompt"][0])
    words = ["pipeline=sft", "data=files", f"data.path={path}"]
    given = source_for(compose(words).stages[0].data, CONVERSATION)
    with pytest.raises(UserError) as caught:
        open_stream(given, CONVERSATION, 0).check_left_out()
    one, other = str(caught.value.hint).removesuffix(" leaves it out").split(" puts it into the prompt, or ")
    assert one.startswith("data.conversations.columns=") and other == "data.unused=[context]"
    for word, asked in ((one, f"It rains.\n\n{Q}"), (other, Q)):
        stream = open_stream(source_for(compose([*words, word]).stages[0].data, CONVERSATION), CONVERSATION, 0)
        stream.check_left_out()
        assert turns(next(iter(stream)).messages)[0] == ("user", asked)


def test_an_answer_that_is_advised_is_the_reply(tmp_path: Path) -> None:
    for name in ("the better reply beside another answer", "another answer beside the dialogue", "two answers"):
        content, column, _ = LEFT_OUT[name]
        path = write(tmp_path / "rows.jsonl", content)
        advised = re.search(r"(columns|unused)=(\S+(?: \w+})?) (?:names|reads)", refused(path, CONVERSATION))
        assert advised is not None
        found, _ = read(path, CONVERSATION, **{advised[1]: yaml.safe_load(advised[2])})
        assert found[0].messages[-1].content == content[0][column]
    named = read(path, CONVERSATION, columns={"completion": "output"})[0]
    assert named[0].messages[-1].content == W, "what a recipe names is not asked for again"
    talk = write(tmp_path / "talk.jsonl", rows(lambda q, a, w: {"messages": [user(q), assistant(a)], "answer": w}))
    assert refused(talk, CONVERSATION).endswith("(in 3 of 3 rows looked at); unused=[answer] leaves it out")
    assert "completion: may be the answer" in refused(talk, CONVERSATION, columns={"completion": "answer"})


def test_text_beside_a_question_or_an_answer_is_no_document(tmp_path: Path) -> None:
    thought = write(tmp_path / "a.jsonl", rows(lambda q, a, w: {"question": q, "thought": w, "content": a}))
    said = refused(thought, DOCUMENT)
    assert "content: stands beside question" in said
    assert open_any(StatsOptions().given(str(thought))).kind == PROMPT
    advised = re.search(r"columns=({.*?}) reads both", said)
    assert advised is not None
    found, _ = read(thought, CONVERSATION, columns=yaml.safe_load(advised[1]))
    assert turns(found[0].messages) == [("user", Q), ("assistant", A)]
    assert read(thought, DOCUMENT, format="text")[0][0].text == A
    plain = rows(lambda q, a, w: {"text": a * 9, "title": "T", "url": "u", "score": 3, "summary": w * 90, "prompt": ""})
    _, stream = read(write(tmp_path / "b.jsonl", plain), DOCUMENT)
    grades, unread = map(str, stream.left_out.warnings("f"))
    assert grades.startswith("f:score: is not used") and unread.startswith("f:summary: holds long text")


def test_text_is_a_document_by_its_name_and_what_stands_beside_it_is_said(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows(lambda q, a, w: {"source": "s", "prompt": q, "text": a}))
    found, stream = read(path, DOCUMENT)
    assert found[0].text == A
    (said,) = map(str, stream.left_out.warnings("f"))
    assert said.startswith("f:prompt: holds text that is not read")
    advised = {"text": "{prompt}\n\n{text}"}
    found, stream = read(path, DOCUMENT, columns=advised)
    assert found[0].text == f"{Q}\n\n{A}" and not stream.left_out.warnings("f")
    whole = write(tmp_path / "b.jsonl", rows(lambda q, a, w: {"prompt": q, "completion": a, "text": f"{q}\n{a}"}))
    assert not read(whole, DOCUMENT)[1].left_out.warnings("f"), "a rendered text leaves nothing out"


def test_the_better_dialogues_can_be_imitated(tmp_path: Path) -> None:
    sides: tuple[Callable[[str, str], Any], ...] = (
        lambda q, a: f"\n\nHuman: {q}\n\nAssistant: {a}",
        lambda q, a: [user(q), assistant(a)],
    )
    for side in sides:
        both = rows(lambda q, a, w, side=side: {"chosen": side(q, a), "rejected": side(q, w)})
        path = write(tmp_path / "rows.jsonl", both)
        assert "columns={messages: chosen}" in refused(path, CONVERSATION)
        found, _ = read(path, CONVERSATION, columns={"messages": "chosen"})
        assert turns(found[0].messages) == [("user", Q), ("assistant", A)]


def test_a_part_of_an_object_is_advised_and_read(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", rows(lambda q, a, w: {"question": q, "answer": {"aliases": [w], "value": a}}))
    said = refused(path, CONVERSATION)
    assert "columns={answer: answer.value} takes one part of it, here of value" in said
    found, _ = read(path, CONVERSATION, columns={"answer": "answer.value"})
    assert found[0].messages[-1].content == A


def test_columns_that_nothing_is_like_are_not_guessed_at(tmp_path: Path) -> None:
    odd = write(tmp_path / "a.jsonl", rows(lambda q, a, w: {"emotion": q, "head": a, "tags": w, "conversation_id": 1}))
    assert "did you mean" not in refused(odd, CONVERSATION)
    ticket = write(tmp_path / "b.jsonl", rows(lambda q, a, w: {"subject": "S", "text2": q, "answer": a}))
    assert "name the columns: columns={prompt: COLUMN, completion: answer}" in refused(ticket, CONVERSATION)
    talk = [{"speaker": "YOU", "words": Q}, {"speaker": "bot", "words": A}]
    path = write(tmp_path / "c.jsonl", [{"services": ["x", "y"], "turns2": talk}] * 2)
    assert "columns={messages: turns2}" in refused(path, CONVERSATION)
    named = {"columns": {"messages": "turns2"}}
    assert "options.role=KEY and options.content=KEY" in refused(path, CONVERSATION, **named)
    options = {"role": "speaker", "content": "words", "roles": {"YOU": "user", "bot": "assistant"}}
    assert turns(read(path, CONVERSATION, **named, options=options)[0][0].messages) == [("user", Q), ("assistant", A)]


def test_an_answer_that_is_left_out_is_not_put_into_the_prompt(tmp_path: Path) -> None:
    row = {"instruction": "say owl", "output": "owl", "prompt": "say cat", "completion": "cat"}
    data = DataOptions(path=str(write(tmp_path / "a.jsonl", [row])), conversations=SourceOptions(format="alpaca"))
    with pytest.raises(UserError) as caught:
        open_stream(source_for(data, CONVERSATION), CONVERSATION, 0).check_left_out()
    assert "{prompt}" in str(caught.value.hint) and "{completion}" not in str(caught.value.hint)


# ------------------------------------------------------------------------------------------------- lists in a column
def numpy_text(messages: list[dict[str, Any]]) -> str:
    return "[" + "\n ".join(map(repr, messages)) + "]"


@pytest.mark.parametrize("spell", [repr, numpy_text, json.dumps, lambda one: f"array({one!r}, dtype=object)"])
def test_messages_that_a_table_holds_as_text(tmp_path: Path, spell: Callable[[Any], str]) -> None:
    tricky = "It's {a} '} {' b"
    pairs = [{"prompt": q, "chosen": spell([user(q), assistant(f"{a} {tricky}")]),
              "rejected": spell([user(q), assistant(w)])} for q, a, w in SAID]  # fmt: skip
    found, _ = read(write(tmp_path / "pairs.csv", as_csv(pairs)), PREFERENCE)
    assert (found[0].chosen, found[0].rejected) == (f"{A} {tricky}", W)
    talks = [{"messages": spell([user(q), assistant(a)])} for q, a, _ in SAID]
    found, _ = read(write(tmp_path / "talks.csv", as_csv(talks)), CONVERSATION)
    assert turns(found[0].messages) == [("user", Q), ("assistant", A)]
    other = [{"instruction": q, "output": spell([assistant(a)])} for q, a, _ in SAID]
    assert "output: spells messages" in refused(write(tmp_path / "other.csv", as_csv(other)))


def test_messages_that_are_cut_off_are_no_text(tmp_path: Path) -> None:
    content = rows(lambda q, a, w: {"prompt": q, "completion": repr([assistant(a)])[:-8]})
    said = refused(write(tmp_path / "rows.jsonl", content))
    assert ":completion: begins as a list of messages and is none" in said


# ------------------------------------------------------------------------------------------------------ tool calls
def tool(name: str, **properties: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


def called(name: str, **arguments: Any) -> dict[str, Any]:
    return {"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}}


def test_a_table_of_tool_calls_says_what_the_lines_say(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    calls = [called("weather", city="C"), called("add", x=2, y=1)]
    tools = [[tool("weather", city={"type": "string"})], [tool("add", x={"type": "integer", "description": "d"})]]
    content = [
        {"messages": [user("Do"), assistant(None, tool_calls=[call]), assistant("Done")], "tools": own}
        for call, own in zip(calls, tools, strict=True)
    ]
    pa.parquet.write_table(pa.Table.from_pylist(content), tmp_path / "rows.parquet")
    lines, _ = read(write(tmp_path / "rows.jsonl", content))
    table, stream = read(tmp_path / "rows.parquet")
    assert [(one.messages, one.tools) for one in table] == [(one.messages, one.tools) for one in lines]
    null, order = sorted(stream.form.notes.items(), reverse=True)
    assert null[0].startswith("null members of tool calls") and null[1] == 5
    assert order == ("dialogues with two turns of one role after one another", 2)
    given = [{"messages": [user("Do"), assistant(None, tool_calls=[called("a", b=None)])]}]
    (record,), _ = read(write(tmp_path / "null.jsonl", given))
    assert record.messages[1].calls[0]["arguments"] == {"b": None}, "what a line says itself stays"


def test_questions_answered_by_calls(tmp_path: Path) -> None:
    answers = json.dumps([{"name": "tide", "arguments": {"port": "P"}}])
    content = rows(lambda q, a, w: {"id": 1, "query": q, "answers": answers, "tools": json.dumps([tool("tide")])})
    found, stream = read(write(tmp_path / "rows.jsonl", content))
    assert stream.form.name == "xlam" and found[0].tools == (tool("tide"),)
    assert found[0].messages[1].calls == ({"name": "tide", "arguments": {"port": "P"}},)


# ---------------------------------------------------------------------------------------------------------- prompts
def test_prompts_follow_the_format_that_is_settled(tmp_path: Path) -> None:
    for name in ("UltraChat", "UltraFeedback"):
        path = write(tmp_path / f"{name}.jsonl", READ[name][0])
        found, stream = read(path, PROMPT)
        assert stream.form.name == "messages" and turns(found[0].messages) == [("user", Q)]
    options = SourceOptions(columns={"question": "Frage", "answer": "Antwort"}, eval_share=0.3)
    german = write(tmp_path / "g.jsonl", rows(lambda q, a, w: {"Frage": q, "Antwort": a}))
    given = source_for(DataOptions(path=str(german), conversations=options), PROMPT)
    assert given.source.columns == options.columns and given.source.eval_share == 0.3
    assert turns(read_records(given, PROMPT, 0)[0][0].messages) == [("user", Q)]


def test_prompts_take_no_options_of_another_format(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", READ["UltraFeedback"][0])
    data = DataOptions(path=str(path), preferences=SourceOptions(options={"order": "best_first"}))
    assert len(read_records(source_for(data, PROMPT), PROMPT, 0)[0]) == 3
    wrong = DataOptions(path=str(path), preferences=SourceOptions(options={"ordre": "best_first"}))
    with pytest.raises(UserError, match="unknown option of the format messages 'ordre'"):
        read_records(source_for(wrong, PROMPT), PROMPT, 0)


def test_a_question_alone_is_a_prompt_and_its_truth_is_kept(tmp_path: Path) -> None:
    content = [{"messages": [user(f"{n}+1?")], "ground_truth": str(n + 1), "dataset": "math"} for n in range(3)]
    path = write(tmp_path / "rows.jsonl", content)
    found, stream = read(path)
    assert stream.kind == PROMPT and found[1].meta == {"ground_truth": "2"}
    assert "there is no assistant turn to train on; give prompts to PPO" in refused(path, CONVERSATION)
    verl = [{"prompt": [user("q")], "reward_model": {"ground_truth": "4", "style": "rule"}, "ability": "math"}]
    assert read(write(tmp_path / "verl.jsonl", verl), PROMPT)[0][0].meta == {"ground_truth": "4"}
    longer = [{"messages": [user("a"), assistant("b"), user("c")], "ground_truth": 3}]
    (record,), _ = read(write(tmp_path / "longer.jsonl", longer), PROMPT)
    assert turns(record.messages)[-1] == ("user", "c") and record.meta["ground_truth"] == 3


def test_rows_are_judged_by_the_kind_asked_for(tmp_path: Path) -> None:
    """What is wrong with the replies is no fault of a prompt."""
    whole = {"chosen": f"\n\nHuman: {Q}\n\nAssistant: same", "rejected": f"\n\nHuman: {Q}\n\nAssistant: same"}
    unlabelled = {"prompt": Q, "completion": "", "label": "perhaps"}
    for number, row in enumerate((whole, unlabelled, {"instruction": Q, "output": ""})):
        (found,), _ = read(write(tmp_path / f"{number}.jsonl", [row]), PROMPT)
        assert turns(found.messages) == [("user", Q)]


# ------------------------------------------------------------------------------------------------------------ hints
def test_turns_by_another_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows(lambda q, a, w: {"dialog": [q, a], "act": [1, 2]}))
    assert "name the column of the turns: columns={messages: dialog}" in refused(path, CONVERSATION)
    assert turns(read(path, columns={"messages": "dialog"})[0][0].messages) == [("user", Q), ("assistant", A)]
    pairs = write(tmp_path / "b.jsonl", rows(lambda q, a, w: {"system": "s", "input": q, "chosen": a, "rejected": w}))
    assert turns(read(pairs, PREFERENCE)[0][0].prompt) == [("system", "s"), ("user", Q)]


def test_columns_in_capitals_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows(lambda q, a, w: {"Question": q, "Thoughts": "t", "Response": a}))
    assert "name the columns: columns={question: Question, response: Response}" in refused(path, CONVERSATION)
    path = write(tmp_path / "b.csv", as_csv(rows(lambda q, a, w: {"Prompt": q, "Chosen": a, "rejected": w})))
    assert "name the columns: columns={chosen: Chosen, prompt: Prompt}" in refused(path, PREFERENCE)
    assert len(read(path, PREFERENCE, columns={"chosen": "Chosen", "prompt": "Prompt"})[0]) == 3


def test_plain_text_is_for_pretraining_or_taken_apart(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows(lambda q, a, w: {"text": f"### Human: {q}### Assistant: {a}"}))
    said = refused(path, CONVERSATION)
    assert "plain text trains with pipeline=pretrain" in said and "parse={text: 'Q: {prompt} A: {completion}'}" in said
    found, _ = read(path, CONVERSATION, parse={"text": "### Human: {prompt}### Assistant: {completion}"})
    assert turns(found[0].messages) == [("user", Q), ("assistant", A)]


def test_alternatives_and_steps_are_no_ranking(tmp_path: Path) -> None:
    several = write(tmp_path / "a.jsonl", rows(lambda q, a, w: {"question": q, "answers": [a, w]}))
    assert "where all are right answers, columns={answer: answers.0}" in refused(several, PREFERENCE)
    assert "columns={answer: answers.0} imitates the first" in refused(several, CONVERSATION)
    assert len(read(several, CONVERSATION, columns={"answer": "answers.0"})[0]) == 3
    found, _ = read(several, PREFERENCE, options={"order": "best_first"})
    assert found[0].chosen == A
    steps = rows(lambda q, a, w: {"prompt": q, "completions": [a, w], "labels": [True, False]})
    said = refused(write(tmp_path / "s.jsonl", steps), PREFERENCE)
    assert "no stage reads stepwise rewards" in said and "order" not in said


# ------------------------------------------------------------------------------------------------------------ tables
TABLES: dict[str, str] = {
    "quoted.tsv": 'prompt\tcompletion\n"Wie heißt es?"\t"Es heißt ""S"", glaube ich."\n"Und das?"\t"T."\n',
    "sep.csv": 'sep=;\r\nprompt;completion\r\nWie heißt es?;"Es heißt ""S"", glaube ich."\r\nUnd das?;T.\r\n',
    "empty.csv": 'prompt,completion,,\nWie heißt es?,"Es heißt ""S"", glaube ich.",,\nUnd das?,T.,,\n',
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_as_spreadsheets_write_them(tmp_path: Path, name: str) -> None:
    found, _ = read(write(tmp_path / name, TABLES[name]))
    assert turns(found[0].messages) == [("user", "Wie heißt es?"), ("assistant", 'Es heißt "S", glaube ich.')]
    assert turns(found[1].messages)[1][1] == "T."


def test_a_value_without_a_name_is_no_row(tmp_path: Path) -> None:
    said = refused(write(tmp_path / "rows.csv", "prompt,completion,,\nq,a,,x\n"))
    assert ":1: a value under a column without a name (got 'x' in column 4; expected nothing" in said
    plain = write(tmp_path / "rows.tsv", 'prompt\tcompletion\n"a"\tb\nc\td\n')
    assert read(plain)[0][0].messages[0].content == '"a"', "quotes are ordinary where not every field has them"


# -------------------------------------------------------------------------------------------------- splits and sides
@pytest.mark.parametrize(
    ("split", "side"),
    [
        *((name, "train") for name in ("train", "Train", "training", "train_sft", "train_prefs", "train1", "train-v2")),
        *((name, "eval") for name in ("val", "valid1", "validation", "dev", "test_sft", "test", "eval", "held_out")),
    ],
)
def test_names_of_splits(tmp_path: Path, split: str, side: str) -> None:
    (record,), _ = read(write(tmp_path / "a.jsonl", [{"prompt": "q", "completion": "a", "split": split}]))
    assert record.meta["split"] == side


def test_the_evaluation_rows_may_be_of_another_format(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", rows(lambda q, a, w: {"prompt": q, "completion": a}))
    held = write(tmp_path / "b.jsonl", [{"messages": [user("Why?"), assistant("So.")]}])
    given = source_for(DataOptions(conversations=SourceOptions(path=str(train), eval_path=str(held))), CONVERSATION)
    records, tally, about = read_records(given, CONVERSATION, 0)
    assert [one.meta["split"] for one in records] == ["train"] * 3 + ["eval"] and not tally.problems
    assert turns(records[-1].messages) == [("user", "Why?"), ("assistant", "So.")]
    assert "of eval_path messages" in about["evidence"]


def test_names_are_told_by_their_words() -> None:
    assert {role_of(name) for name in ("chatHistory", "Context", "few_shot_examples", "image_url", "option_a")} == {
        "context"
    }
    for name in ("context_id", "num_passages", "article_url", "document_title", "source", "history_length", "meta"):
        assert role_of(name) is None, name


# ----------------------------------------------------------------------------------------------- the shared small files
SHARED: dict[str, tuple[str, str | None, str, str]] = {
    # file -> (format, kind, "read" | "refused" | "warned", words of the line, or of the first record)
    "bool_answer.jsonl": ("question_answer", CONVERSATION, "read", "true"),
    "context_question_answer.jsonl": ("question_answer", CONVERSATION, "read", "Notes about the matter: "),
    "definition_inputs_targets.jsonl": ("p3", CONVERSATION, "read", "In this task answer the question in French."),
    "empty_cols.csv": ("prompt_completion", CONVERSATION, "read", "Sie heißt S0, glaube ich."),
    "image_col.jsonl": ("messages", CONVERSATION, "refused", "images: is left out, as models here read text alone"),
    "input_output_turns.jsonl": ("sharegpt", CONVERSATION, "read", "No more."),
    "lima.jsonl": ("sharegpt", CONVERSATION, "read", "How do tides form?"),
    "message_lists_as_python.csv": ("pairs", PREFERENCE, "read", "I do not know."),
    "prompt_chosen_rejected_messages.jsonl": ("messages", PROMPT, "read", "q0"),
    "prompt_messages.jsonl": ("messages", PROMPT, "read", "How do tides form?"),
    "prompt_topic_better_worse.jsonl": ("", PREFERENCE, "refused", "columns={chosen: better, rejected: worse}"),
    "prompt_topic_difficulty.jsonl": ("", CONVERSATION, "refused", "yields prompt rows"),
    "prompts_with_ground_truth.jsonl": ("messages", PROMPT, "read", "ground_truth"),
    "query_answers_tools.jsonl": ("xlam", CONVERSATION, "read", "get_tide"),
    "query_response_history.jsonl": ("prompt_completion", CONVERSATION, "read", "My name is Ada."),
    "question_solution_answer.jsonl": ("question_answer", CONVERSATION, "read", "Let us think."),
    "quoted.tsv": ("prompt_completion", CONVERSATION, "read", "content='Wie heißt Stadt 0?'"),
    "sep_line.csv": ("prompt_completion", CONVERSATION, "read", "content='Wie heißt Stadt 0?'"),
    "starts_assistant.jsonl": ("messages", CONVERSATION, "read", "q0"),
    "tool_calls.jsonl": ("messages", CONVERSATION, "read", "weather"),
    "tool_calls_arrow.parquet": ("messages", CONVERSATION, "read", "weather"),
    "ultrafeedback_binarized.jsonl": ("messages", CONVERSATION, "warned", "score_chosen, score_rejected: are not used"),
}  # fmt: skip


@pytest.mark.skipif(not CASES.is_dir(), reason="no shared cases here")
@pytest.mark.parametrize("name", SHARED)
def test_the_shared_cases(name: str) -> None:
    form, kind, what, words = SHARED[name]
    if what == "refused":
        assert words in refused(CASES / name, kind)
        return
    records, stream = read(CASES / name, kind)
    assert stream.form.name == form and records
    warned = [str(line) for line in stream.left_out.warnings("f")]
    assert words in (repr(records[0]) if what == "read" else warned[0])


@pytest.mark.skipif(not CASES.is_dir(), reason="no shared cases here")
def test_every_shared_case_is_looked_at() -> None:
    assert {path.name for path in CASES.iterdir()} >= SHARED.keys()
    lines, table = (read(CASES / name)[0] for name in ("tool_calls.jsonl", "tool_calls_arrow.parquet"))
    assert [(one.messages, one.tools) for one in lines] == [(one.messages, one.tools) for one in table]

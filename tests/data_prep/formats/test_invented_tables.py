"""Tables of random columns with marked contents: what trains without a word says what is marked."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from align.cli.data_options import StatsOptions
from data_prep.core.errors import UserError
from data_prep.records.stream import open_stream
from data_prep.types import CONVERSATION


def names(text: str) -> list[str]:
    return text.split()


PLAIN = names("""
    id source url lang num_tokens category topic difficulty title model metadata created_at dataset prompt_id domain
    license author uuid idx conversation_id language timestamp task_id subset style turn tags version hash generator
    data_source ability
""")
"""Columns that change no answer."""
WORDS = names("""
    context history passage article document background options choices definition input system system_prompt
    instructions knowledge persona hint evidence examples text paragraph premise hypothesis documents retrieved_docs
    table schema sql_context few_shot chat_history scenario theory story description facts rules tools_description
    code sentence starter_code search_results image_caption report transcript review email post lyrics abstract
    dialogue scene setting situation guidelines reference notes patient law claim body content observation plan
    memory previous_turns sentence2 source_text input_text user_profile personality environment case news tweet
    source_document
""")
"""Columns that a question may be about."""
ASKED = names("prompt question instruction query inputs messages problem user human Question conversations input")
ANSWERED = names("""
    completion answer output response targets solution chosen assistant reply Answer answers final_answer label_text
    target summary highlights canonical_solution best_answer
""")
TOGETHER = names("""
    prompt+completion question+answer instruction+output query+response inputs+targets problem+solution messages
    conversations prompt+response instruction+response user+assistant input+output question+response prompt+answer
    question+solution problem+answer question+answers prompt+chosen instruction+input+output question+context+answer
    prompt+history+response instruction+input+history+output system+prompt+response system+messages
""")
GRADED = names("score label rating is_correct quality helpfulness toxic is_safe upvotes")
FILLER = " and further words, so that it is as long as real contents are: more than eighty characters"


def user(said: str) -> dict[str, str]:
    return {"role": "user", "content": said}


def invented(draw: random.Random) -> dict[str, Any]:
    """A row of random columns; contents that matter begin with a mark."""
    own = draw.sample(PLAIN, draw.randint(0, 4)) + draw.sample(WORDS, draw.choice((0, 0, 1, 1, 2, 3)))
    if draw.random() < 0.85:
        own += draw.choice(TOGETHER).split("+")
    else:
        own += draw.sample(ASKED, 1) + draw.sample(ANSWERED, 1)
    own += draw.sample([*ASKED, *ANSWERED], 1) if draw.random() < 0.2 else []
    own += draw.sample(GRADED, draw.choice((0, 0, 1)))
    if draw.random() < 0.2:  # a name that nobody has thought of
        own.append("".join(draw.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(draw.randint(4, 9))))
    own = list(dict.fromkeys(own))
    draw.shuffle(own)
    row: dict[str, Any] = {name: f"<{name} {draw.random()}>" + FILLER * (name not in PLAIN) for name in own}
    first = [{"role": "system", "content": "<own>"}] if draw.random() < 0.3 else []
    lists = {
        "messages": [*first, user(f"<asked>{FILLER}"), {"role": "assistant", "content": "<said>"}],
        "conversations": [{"from": "human", "value": f"<asked>{FILLER}"}, {"from": "gpt", "value": "<said>"}],
        "answers": [row.get("answers")],
    }
    row |= {name: value for name, value in lists.items() if name in row}
    for name in set(row) & set(WORDS):
        if draw.random() < 0.15:
            row[name] = [["<before>", "<back>"]] if name == "history" else [row[name], "<second>"]
    return row | ({"label": draw.random() < 0.9} if "label" in row else {})


def marks(value: Any) -> Iterator[str]:
    """The marks of a value."""
    if isinstance(value, str) and value.startswith("<"):
        yield value[: value.index(">") + 1]
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from marks(one)


@pytest.mark.parametrize("seed", [12, *(pytest.param(seed, marks=pytest.mark.grid) for seed in range(5))])
def test_what_trains_without_a_warning_says_what_is_marked(tmp_path: Path, seed: int) -> None:
    draw, path, trained = random.Random(seed), tmp_path / "rows.jsonl", 0
    for _ in range(1000 if seed == 12 else 3000):
        row = invented(draw)
        path.write_text(json.dumps(row) + "\n", "utf-8")
        try:
            stream = open_stream(StatsOptions().given(str(path)), CONVERSATION, 0)
            records = list(stream)
            stream.tally.check_bad_rows(stream.given.source.on_bad_row)
            stream.check_left_out()
        except UserError:
            continue
        if not records or stream.left_out.warnings("f"):
            continue
        trained += 1
        messages = records[0].messages
        assert messages[-1].content in {
            "<said>",
            *(str(row.get(name)) for name in ANSWERED),
            *row.get("answers", ()),
        }, row
        before = "\n".join(message.content for message in messages[:-1])
        for name in row.keys() - {*PLAIN, *GRADED, *ANSWERED}:
            assert all(mark in before for mark in marks(row[name]) if mark != "<said>"), (name, row, before)
    assert trained > 100, "the test looks at something"

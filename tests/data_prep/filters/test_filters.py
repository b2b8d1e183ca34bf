"""Declared filters: what is planted is found, what is clean stays, and every drop is counted by its reason."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields
from typing import Any

import pytest

from data_prep.core.errors import UserError
from data_prep.filters.refusal import Refusal
from data_prep.filters.repetition import repeated_share
from data_prep.options import DataOptions, LengthOptions, OnLeak, SourceOptions
from data_prep.prepare.prepare import Renderer, data_digest, prepare
from data_prep.records.filter import FILTERS, Filtering, make_filters
from data_prep.records.stream import source_for
from data_prep.sources.rows import Skip
from data_prep.types import (
    CONVERSATION,
    PREFERENCE,
    PROMPT,
    UNPAIRED,
    Conversation,
    Document,
    Labelled,
    Message,
    Preference,
    Prompt,
    RowKind,
)
from tests.records import read_records
from tests.tiny import tiny_tokenizer, write_jsonl

WORDS = [f"word{n}" for n in range(16)]


def talk(question: str, answer: str, row: int = 1, **meta: Any) -> Conversation:
    return Conversation((Message("user", question), Message("assistant", answer)), f"a.jsonl:{row}", meta)


def pair(question: str, chosen: str, rejected: str, row: int = 1) -> Preference:
    return Preference((Message("user", question),), chosen, rejected, f"a.jsonl:{row}")


def run(declared: dict[str, Any], records: list[Any], kind: str = CONVERSATION) -> tuple[list[int], Counter[str]]:
    """(row numbers that stay, drops by reason)."""
    results = list(Filtering(make_filters(declared, kind)).through(records))
    kept = [int(record.id.rpartition(":")[2]) for record in results if not isinstance(record, Skip)]
    return kept, Counter(record.reason for record in results if isinstance(record, Skip))


# ------------------------------------------------------------------------------------------------ duplicates
def test_exact_duplicates_go_and_the_first_stays():
    rows = [talk("Who?", "Me.", 1), talk("who? ", " ME.", 2), talk("Who?", "You.", 3), talk("Who", "Me.", 4)]
    assert run({"dedup": {}}, rows) == ([1, 3, 4], {"duplicate": 1})
    assert run({"dedup": {"by": "question"}}, rows) == ([1], {"duplicate": 3})


def test_roles_and_calls_make_rows_differ():
    called, other = (Message("assistant", "", calls=({"name": name, "arguments": {}},)) for name in "fg")
    rows = [
        Conversation((Message("user", "a"), Message("assistant", "b")), "a:1"),
        Conversation((Message("system", "a"), Message("assistant", "b")), "a:2"),
        Conversation((Message("user", "a"), called), "a:3"),
        Conversation((Message("user", "ab"), Message("assistant", "")), "a:4"),
        Conversation((Message("user", "a"), other), "a:5"),
    ]
    assert run({"dedup": {}}, rows)[0] == [1, 2, 3, 4, 5]


def test_near_duplicates_go_when_asked_for():
    changed = [*WORDS[:7], "other", *WORDS[8:]]
    rows = [talk("Count.", " ".join(WORDS), 1), talk("Count.", " ".join(changed), 2), talk("Count.", "No.", 3)]
    assert run({"dedup": {}}, rows)[0] == [1, 2, 3]
    assert run({"dedup": {"near": 0.7}}, rows) == ([1, 3], {"near_duplicate": 1})
    assert run({"dedup": {"near": 1.0}}, rows)[0] == [1, 2, 3]


def test_an_opposite_verdict_is_no_duplicate():
    rows = [pair("Tea?", " ".join(WORDS), "No.", 1), pair("Tea?", "No.", " ".join(WORDS), 2), pair("a", "b", "c", 3)]
    assert run({"dedup": {"near": 0.7}}, rows, PREFERENCE)[0] == [1, 2, 3]
    assert run({"dedup": {"near": 0.7}, "contradictory": {}}, rows, PREFERENCE) == ([3], {"contradictory": 2})
    labels = [Labelled((Message("user", "a"),), " ".join(WORDS), n == 1, f"a:{n}") for n in range(2)]
    assert run({"dedup": {"near": 0.7}}, labels, UNPAIRED)[0] == [0, 1]


def test_a_row_on_both_sides_is_no_duplicate():
    rows = [talk("a", "b", 1, split="train"), talk("a", "b", 2, split="eval"), talk("a", "b", 3, split="eval")]
    assert run({"dedup": {}}, rows) == ([1, 2], {"duplicate": 1})


def test_documents_and_prompts_are_compared_too():
    texts = [Document("The end.", "a:1"), Document("the  end.", "a:2")]
    assert run({"dedup": {}}, texts, "document") == ([1], {"duplicate": 1})
    prompts = [Prompt((Message("user", text),), f"a:{n}") for n, text in enumerate(("x", "y", "X"))]
    assert run({"dedup": {}}, prompts, PROMPT) == ([0, 1], {"duplicate": 1})


# ------------------------------------------------------------------------------------------------ pairs
def test_contradictory_pairs_go_all():
    rows = [
        pair("Tea?", "Yes.", "No.", 1),
        pair("Tea?", "Well.", "No.", 2),
        pair("Tea?", "no.", "Yes. ", 3),
        pair("Milk?", "No.", "Yes.", 4),
        pair("Tea?", "Yes.", "No.", 5),
    ]
    assert run({"contradictory": {}}, rows, PREFERENCE) == ([2, 4], {"contradictory": 3})
    assert make_filters({"contradictory": {}}, CONVERSATION) == [], "a filter of pairs lets dialogues pass"


def test_pair_numbers_of_the_card(tmp_path):
    rows = [
        {"prompt": "Tea?", "chosen": "Yes, please.", "rejected": "No.", "margin": 0},
        {"prompt": "Tea?", "chosen": "No.", "rejected": "Yes, please."},
        *({"prompt": f"Cup {n}?", "chosen": "c" * (n + 1), "rejected": "r" * 4} for n in range(8)),
    ]
    data = DataOptions(preferences=SourceOptions(path=str(write_jsonl(tmp_path / "p.jsonl", rows)), eval_rows=0))
    card = prepare(RowKind.preferences, data, Renderer(tiny_tokenizer()), LengthOptions(64), 0).card
    assert card["pairs"] == {
        "contradictory": 2,
        "tied": 1,
        "chosen_longer": 0.5,
        "both_orders": {"pairs": 1, "of": 9, "rows": 2, "against": 1},
        "chosen_shorter": 0.4,
        "chosen_chars": 5.1,
        "rejected_chars": 4.7,
    }


# ------------------------------------------------------------------------------------------------ leaks
def test_rows_of_a_benchmark_leave_training(tmp_path):
    question = " ".join(WORDS) + "?"
    near = " ".join([*WORDS[:7], "other", *WORDS[8:]]) + "?"
    benchmark = write_jsonl(tmp_path / "bench.jsonl", [{"prompt": question}, {"prompt": "Who are you?"}])
    rows = [talk("who  are YOU", "Me.", 1), talk(near, "x", 2), talk("Who is she?", "Her.", 3), talk(question, "y", 4)]
    found = {"against": ["bench.jsonl"]}
    filters = make_filters({"leakage": found}, CONVERSATION)
    kept = [r for r in Filtering(filters, str(tmp_path)).through(rows) if not isinstance(r, Skip)]
    assert [r.id for r in kept] == ["a.jsonl:2", "a.jsonl:3"]
    found = {"against": [str(benchmark)], "near": 0.7}
    assert run({"leakage": found}, rows) == ([3], {"leak": 2, "near_leak": 1})
    with pytest.raises(UserError, match=r"bench.json: no such file or folder \(did you mean"):
        run({"leakage": {"against": [str(tmp_path / "bench.json")]}}, rows)


def test_near_copies_of_evaluation_rows_leave_training_and_evaluation_stays():
    near = " ".join([*WORDS[:7], "other", *WORDS[8:]])
    rows = [talk(near, "x", 1, split="train"), talk(" ".join(WORDS), "y", 2, split="eval")]
    assert run({"leakage": {"near": 0.7}}, rows) == ([2], {"near_leak": 1})


def test_whole_rows_can_be_compared(tmp_path):
    bench = write_jsonl(tmp_path / "bench.jsonl", [{"prompt": "a", "completion": "b"}])
    rows = [talk("a", "b", 1), talk("a", "c", 2)]
    assert run({"leakage": {"against": [str(bench)], "by": "row"}}, rows) == ([2], {"leak": 1})


# ------------------------------------------------------------------------------------------------ replies
@pytest.mark.parametrize(
    "reply",
    [
        "I'm sorry, but I can't assist with that.",
        "I\u2019m sorry, I can\u2019t help with this request.",
        "I cannot provide instructions for that.",
        "Unfortunately, I am unable to answer.",
        "As an AI language model, I have no opinions.",
        "I must decline.",
        "Sorry, but as an AI I don't eat.",
        "I apologize, but I'm not able to write that.",
        "I won't do that.",
    ],
)
def test_refusals(reply):
    assert Refusal().refuses(reply)


@pytest.mark.parametrize(
    "reply",
    [
        "I'm sorry to hear that. What happened?",
        "I can't wait to see you!",
        "I cannot believe it.",
        "Unfortunately, the museum is closed on Mondays.",
        "The fox said: I'm sorry, but I can't help you.",
        "As an artist, I like blue.",
        "Sorry, no.",
        "As an aim, this is fine.",
    ],
)
def test_answers_that_are_no_refusals(reply):
    assert not Refusal().refuses(reply)


def test_refusals_go_and_own_phrases_take_their_place():
    rows = [talk("a", "I cannot help with that.", 1), talk("a", "Nein, das geht nicht.", 2), talk("a", "Sure.", 3)]
    assert run({"refusal": {}}, rows) == ([2, 3], {"refusal": 1})
    assert run({"refusal": {"phrases": ["nein, das"]}}, rows) == ([1, 3], {"refusal": 1})
    quiet = Conversation((Message("user", "a"), Message("assistant", "I cannot help.", False)), "a:1")
    assert run({"refusal": {}}, [quiet])[0] == [1], "a turn that is not trained on teaches nothing"


def test_repetition():
    assert repeated_share("a b c d e f g h", 5) == 0
    assert repeated_share("a b c d e " * 2, 5) == 0.5
    assert repeated_share("no " * 100) == 99 / 100
    assert repeated_share("a b c d e x a b c d e f y", 5) == 5 / 13
    stuck, verse = "I go on and on and I ", "Row, row, row your boat, gently down the stream. "
    rows = [talk("a", stuck * 9, 1), talk("a", verse, 2), talk("a", "ha " * 8, 3), talk("a", " ".join(WORDS) * 1, 4)]
    assert run({"repetition": {}}, rows) == ([2, 3, 4], {"repetition": 1})
    plan = " ".join(f"Day {n}: warm up for 5 minutes, then do 4 sets of exercise {n}." for n in range(7))
    assert run({"repetition": {}}, [talk("a", plan, 1)])[0] == [1], "a plan repeats phrases and says something new"


# ------------------------------------------------------------------------------------------------ languages, encodings
def test_languages():
    pytest.importorskip("py3langid")
    rows = [
        talk("How was the walk by the river?", "It was a long and quiet walk.", 1),
        talk("Wie war der Spaziergang am Fluss?", "Es war ein langer und ruhiger Spaziergang.", 2),
        talk("2 + 3?", "5", 3),
    ]
    filters = make_filters({"language": {"keep": ["en"]}}, CONVERSATION)
    filtering = Filtering(filters)
    kept = [r.id for r in filtering.through(rows) if not isinstance(r, Skip)]
    assert kept == ["a.jsonl:1", "a.jsonl:3"]
    assert filtering.card()[0]["notes"] == {"language not certain, kept": 1}
    with pytest.raises(UserError, match=r"data.filters.language.keep: unknown language 'eng' \(did you mean"):
        run({"language": {"keep": ["eng"]}}, rows)
    with pytest.raises(UserError, match="at least one language"):
        make_filters({"language": {}})


def test_repairs_are_made_only_on_request_and_counted():
    pytest.importorskip("ftfy")
    broken, curly = "cafÃ© dâ€™Or", "\u201cna\u00efve\u201d \ufb01sh \uff01"
    rows = [talk("a", broken, 1), talk("a", curly, 2), talk("a", "plain", 3)]
    filtering = Filtering(make_filters({"repair": {}}, CONVERSATION))
    replies = [row.messages[1].content for row in filtering.through(rows)]
    assert replies == ["café d\u2019Or", curly, "plain"]
    assert filtering.card()[0]["notes"] == {"rows repaired by ftfy": 1}
    assert next(row.messages[1].content for row in Filtering([]).through(rows)) == broken


# ------------------------------------------------------------------------------------------------ the recipe
def test_order_counts_and_card(tmp_path):
    rows = [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(60)]
    rows += [rows[0], {"prompt": "x", "completion": "I cannot help with that."}] * 2
    source = SourceOptions(path=str(write_jsonl(tmp_path / "a.jsonl", rows)))
    card = {}
    for declared in ({"refusal": {}, "dedup": None}, {"dedup": None, "refusal": {}}):
        data = DataOptions(conversations=source, filters=declared)
        prepared = prepare(RowKind.conversations, data, Renderer(tiny_tokenizer()), LengthOptions(64), 0)
        card[next(iter(declared))] = prepared.card
        numbers = prepared.card["rows"]
        assert numbers["in"] == numbers["kept"] + sum(numbers["dropped"].values()) == 64
    assert card["refusal"]["rows"]["dropped"] == {"duplicate": 2, "refusal": 2}
    assert card["dedup"]["rows"]["dropped"] == {"duplicate": 3, "refusal": 1}
    assert [(f["name"], f["in"], f["dropped"]) for f in card["dedup"]["filters"]] == [
        ("dedup", 64, 3),
        ("refusal", 61, 1),
    ]
    assert card["dedup"]["digest"] == card["refusal"]["digest"], "the same rows are left"


def test_filters_are_part_of_the_data(tmp_path):
    bench = write_jsonl(tmp_path / "bench.jsonl", [{"prompt": "a"}])
    source = SourceOptions(path=str(write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}])))

    def digest(filters: dict[str, Any], on_leak: OnLeak = OnLeak.refuse) -> str:
        source.on_leak = on_leak
        return data_digest(DataOptions(conversations=source, filters=filters), "conversations")

    leakage = {"leakage": {"against": [str(bench)]}}
    different = [digest({}), digest({"dedup": {}}), digest({"dedup": {"near": 0.8}}), digest(leakage)]
    different += [digest({"dedup": {}, "refusal": {}}), digest({"refusal": {}, "dedup": {}})]
    write_jsonl(bench, [{"prompt": "b"}])
    different.append(digest(leakage))
    assert len(set(different)) == len(different)
    assert digest({}) == digest({}, OnLeak.drop) == digest({"contradictory": {}}), "what does not touch the rows"


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"dedupe": {}}, r"data.filters.dedupe: unknown filter 'dedupe' \(did you mean 'dedup'\?"),
        ({"dedup": {"neer": 0.8}}, r"data.filters.dedup.neer: unknown option \(did you mean 'data.filters.dedup.near'"),
        ({"dedup": {"near": "much"}}, r"data.filters.dedup.near: expected a number \(got 'much'\)"),
        ({"dedup": {"near": 0}}, r"data.filters.dedup.near: out of range \(got 0(.0)?; expected more than 0"),
        ({"dedup": {"by": "rows"}}, r"data.filters.dedup.by: unknown choice 'rows' \(did you mean 'row'\?"),
        ({"repetition": 3}, r"data.filters.repetition: expected a mapping \{key: value\} \(got 3\)"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_line(declared, message):
    with pytest.raises(UserError, match=message):
        make_filters(declared)


@pytest.mark.parametrize("name", FILTERS.names())
def test_filters_explain_themselves(name):
    cls = FILTERS.get(name)
    assert (cls.__doc__ or "").strip()
    assert not [item.name for item in fields(cls) if item.init and not item.metadata.get("help")]


# ------------------------------------------------------------------------------------------------ clean data
@pytest.mark.parametrize("kind", [CONVERSATION, PREFERENCE])
def test_the_embedded_data_is_clean(kind):
    """No false alarm: no duplicate, contradiction, refusal or repetition in all the generated rows."""
    declared = {"dedup": None, "refusal": None, "repetition": None, "contradictory": None}
    given = {"topic": "topic", "styles": {"plain": 0.5, "cheerful": 0.25, "pirate": 0.25}, "preferred": "cheerful"}
    source = SourceOptions(generator="smalltalk", format="answer_table", options={**given, "other": ["plain"]})
    data = DataOptions(filters=declared, **{f"{kind}s": source})
    records, tally, _ = read_records(source_for(data, kind), kind, 0)
    assert len(records) == tally.seen > 6000 and not tally.dropped

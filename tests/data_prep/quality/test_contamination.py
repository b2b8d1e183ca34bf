"""Documents of a benchmark that stand in training rows."""

from __future__ import annotations

from data_prep.quality.contamination import Documents
from data_prep.types import Conversation, Document, Message

LONG = "Which of these rivers flows through the city of Vienna on its way to the Black Sea?"


def talk(question: str, answer: str, row: int) -> Conversation:
    return Conversation((Message("user", question), Message("assistant", answer)), f"a.jsonl:{row}")


def test_a_document_is_found_as_a_question_or_inside_a_longer_text() -> None:
    documents = Documents(["2 + 2?", LONG, "Name a colour.", "Which river flows through the city of Prague?"])
    rows = [
        talk("2  + 2?", "4", 1),
        Document(f"A quiz of last year. {LONG.upper()} The Danube does, as most people know.", "b.txt:7"),
        talk("Say 2 + 2? or another sum. Name a colour. Then stop.", "no", 2),
    ]
    assert documents.look_through(rows) == 3
    assert documents.found == {0: "a.jsonl:1", 1: "b.txt:7"}


def test_most_of_a_documents_words_are_enough_and_half_of_them_are_not() -> None:
    documents = Documents([LONG])
    documents.look_through([Document("Which of these rivers flows through the city?", "x:1")])
    assert documents.found == {}
    documents.look_through([Document(LONG.replace("Vienna", "Graz"), "x:2")])
    assert documents.found == {0: "x:2"}


def test_nothing_to_look_for_finds_nothing() -> None:
    assert Documents([]).look_through([Document(LONG, "x:1")]) == 1
    assert Documents([""]).found == {}

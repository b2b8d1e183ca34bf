"""The embedded small-talk data: what its docstring promises, and that nothing held out leaks."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict

import pytest

from data_prep.core.errors import UserError
from data_prep.generators import smalltalk
from data_prep.generators.smalltalk import PERSONAS, normalised
from data_prep.generators.smalltalk_texts import FOLDER, PARTS, frames, topics
from data_prep.sources.generated import find_generator

DIGEST = (
    "import hashlib, json; from data_prep.generators import smalltalk as s; "
    "print(hashlib.sha256(json.dumps([s.rows({}), s.text({'documents': 3000})]).encode()).hexdigest())"
)


DIGESTS = {"1": "0c68cc8bc9d983bd020c973dd3847261d538038a44292bc7268cd3b4613e6771"}
"""What `DIGEST` prints for each version: what a run read is recorded by the version, so other texts need another."""


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return smalltalk.rows({})


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return smalltalk.text({})


@pytest.fixture(scope="module")
def held_out() -> list[str]:
    """The held-out wordings without opener and closer, normalised."""
    return [
        normalised(line.wording.text) for group in smalltalk._phrasings().values() for line in group if line.held_out
    ]


def _words(text: str) -> int:
    return len(normalised(text).split())


def test_registered() -> None:
    assert find_generator("smalltalk") is smalltalk.SmallTalk
    assert smalltalk.SmallTalk.version == smalltalk.version == "1"
    assert find_generator("smalltalk").rows({}) == smalltalk.rows({})


def test_same_content_in_every_process() -> None:
    digests = set()
    for seed in ("0", "4711"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", DIGEST], env=environment, capture_output=True, text=True, check=True
        )
        digests.add(done.stdout.strip())
    assert len(digests) == 1
    assert digests.pop() == DIGESTS[smalltalk.version]


def test_every_file_of_texts_is_read() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == {*PARTS, "frames"}
    for value in (*frames(), *(value for topic in topics() for value in topic)):
        assert not isinstance(value, list), "shared by all callers"


def test_calls_do_not_share_state() -> None:
    first = smalltalk.rows({})
    first[0]["prompt"] = "changed"
    assert smalltalk.rows({})[0]["prompt"] != "changed"
    assert smalltalk.text({"documents": 50}) == smalltalk.text({"documents": 200})[:50]


def test_counts_are_those_of_the_docstring(rows: list[dict[str, str]], documents: list[str]) -> None:
    splits = Counter(row["split"] for row in rows)
    assert (len(topics()), len(rows), splits) == (76, 6080, {"train": 5624, "eval": 456})
    assert len(documents) == smalltalk.DOCUMENTS == 14_000
    size = sum(map(len, documents))
    assert 1_600_000 <= size <= 1_700_000
    text = " ".join([*documents, *(" ".join(row.values()) for row in rows)])
    assert 1_150 <= len(set(normalised(text).split())) <= 1_250
    promised = smalltalk.__doc__ or ""
    for number in ("76 topics", "80 user", "6,080", "228", "14,000", "1.65 million", "1,200", "456"):
        assert number in promised, number
    assert abs(size - 1_650_000) < 25_000


def test_every_topic_is_full(rows: list[dict[str, str]]) -> None:
    groups: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        assert list(row) == ["topic", "prompt", *PERSONAS, "split"]
        groups[row["topic"]].append(row)
    assert set(groups) == {topic.name for topic in topics()}
    for topic in topics():
        group = groups[topic.name]
        assert 5 <= len(topic.ask) <= 9, topic.name
        assert len(group) == smalltalk.PHRASINGS_PER_TOPIC, topic.name
        assert sum(row["split"] == "eval" for row in group) == smalltalk.HELD_OUT_PER_TOPIC, topic.name
        assert len({tuple(row[persona] for persona in PERSONAS) for row in group}) == 1


def test_prompts_and_wordings_belong_to_one_topic(rows: list[dict[str, str]]) -> None:
    assert len({normalised(row["prompt"]) for row in rows}) == len(rows)
    owners: dict[str, set[str]] = defaultdict(set)
    for topic in topics():
        for wording in smalltalk._wordings(topic):
            owners[normalised(wording.text)].add(topic.name)
    assert not {wording: names for wording, names in owners.items() if len(names) > 1}


def test_answers() -> None:
    answers = [getattr(topic, persona) for topic in topics() for persona in PERSONAS]
    assert len({normalised(answer) for answer in answers}) == len(answers) == 228
    for topic in topics():
        for persona in PERSONAS:
            answer = getattr(topic, persona)
            assert 4 <= _words(answer) <= 14, answer
            assert set(normalised(" ".join(topic.words)).split()) & set(normalised(answer).split()), answer
            assert answer[0].isupper() and answer[-1] in ".!?", answer


def test_held_out_wordings_stay_out(rows: list[dict[str, str]], documents: list[str], held_out: list[str]) -> None:
    assert len(set(held_out)) == 456
    train = "\n".join(f" {normalised(row['prompt'])} " for row in rows if row["split"] == "train")
    corpus = "\n".join(f" {normalised(document)} " for document in documents)
    for wording in held_out:
        assert f" {wording} " not in train, wording
        assert f" {wording} " not in corpus, wording
    for row in rows:
        if row["split"] == "eval":
            assert any(f" {wording} " in f" {normalised(row['prompt'])} " for wording in held_out)


def test_larger_corpus_does_not_leak(held_out: list[str]) -> None:
    corpus = "\n".join(f" {normalised(text)} " for text in smalltalk.text({"documents": 30_000}))
    assert not [wording for wording in held_out if f" {wording} " in corpus]


def test_held_out_words_are_known_to_training() -> None:
    for name, group in smalltalk._phrasings().items():
        seen = {word for line in group if not line.held_out for word in normalised(line.prompt).split()}
        for line in group:
            if line.held_out:
                assert set(normalised(line.wording.text).split()) <= seen, (name, line.prompt)
                assert any(not other.held_out and other.wording.core == line.wording.core for other in group)


def test_form_of_prompts(rows: list[dict[str, str]]) -> None:
    for row in rows:
        prompt = row["prompt"]
        assert 3 <= _words(prompt) <= 14, prompt
        assert prompt[-1] in ".!?" or prompt == prompt.lower(), prompt


def test_plain_ascii_and_clean_spaces(rows: list[dict[str, str]], documents: list[str]) -> None:
    for text in [*documents, *(text for row in rows for text in row.values())]:
        assert text.isascii() and text == text.strip(), text
        assert "  " not in text and " \n" not in text and "\n\n" not in text, text
        assert not re.search(r"[{}<>|*\t]| [?.!,]", text), text


def test_about_a_third_of_the_transcripts_answer_wrongly(rows: list[dict[str, str]], documents: list[str]) -> None:
    asked = {normalised(row["prompt"]): row["topic"] for row in rows}
    answered = {row[persona]: row["topic"] for row in rows for persona in PERSONAS}
    right = []
    for document in documents:
        for question, answer in re.findall(r"(?:^|\n)Q: (.*)\nA: (.*)", document):
            right.append(asked[normalised(question)] == answered[answer])
    assert len(right) > 1_000
    assert 0.28 < 1 - sum(right) / len(right) < 0.38


def test_corpus_shows_every_topic_and_answer(documents: list[str]) -> None:
    corpus = "\n".join(documents)
    for topic in topics():
        for text in (topic.plain, topic.cheerful, topic.pirate, *topic.facts, topic.about):
            assert text in corpus, text


def test_bad_options_are_named() -> None:
    with pytest.raises(UserError, match="documents"):
        smalltalk.text({"document": 5})
    with pytest.raises(UserError, match="unknown option"):
        smalltalk.rows({"seed": 1})
    for wrong in (0, -1, True, "many", 2.5):
        with pytest.raises(UserError, match="whole number"):
            smalltalk.text({"documents": wrong})


def test_a_document_takes_few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """The phrasings are made once, and a document looks at some of them, not at all."""
    smalltalk._phrasings.cache_clear()
    smalltalk.rows({})
    assert smalltalk._phrasings.cache_info().misses == 1
    drawn = []
    blake2b = hashlib.blake2b
    monkeypatch.setattr(smalltalk.hashlib, "blake2b", lambda *given: drawn.append(1) or blake2b(*given))
    smalltalk.text({"documents": 500})
    assert smalltalk._phrasings.cache_info().misses == 1
    assert 500 <= len(drawn) < 500 * 100


def test_corpus_is_varied(documents: list[str]) -> None:
    digests = {hashlib.sha256(document.encode()).digest() for document in documents}
    assert len(digests) > 0.85 * len(documents)

"""Near duplicates: the similarity is exact, the index finds what it must, and the same in every process."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.quality import minhash as near
from data_prep.quality.minhash import NearIndex, band_rows, signature, similarity, word_hashes, word_pairs
from data_prep.quality.text_keys import question_text, texts_apart, whole_text, words
from data_prep.types import Conversation, Document, Labelled, Message, Preference, Prompt
from tests.docs.pages import ROOT

TEXTS = st.lists(st.sampled_from(["a", "b", "c", "d,", ".", "7", "Ä", "日", "it"]), max_size=12).map(" ".join)


def jaccard(left: str, right: str) -> float:
    """The definition, with counted pairs: what numpy computes from hashes must be this."""
    first, second = (
        Counter(itertools.pairwise(listed)) if len(listed) > 1 else Counter(listed)
        for listed in (words(left), words(right))
    )
    either = sum((first | second).values())
    return sum((first & second).values()) / either if either else 0.0


@settings(max_examples=300, deadline=None)
@given(TEXTS, TEXTS)
def test_similarity_is_the_jaccard_index_of_counted_word_pairs(left, right):
    assert similarity(word_pairs(left), word_pairs(right)) == jaccard(left, right)


MESSAGES = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), TEXTS), min_size=1, max_size=5)


@settings(max_examples=100, deadline=None)
@given(MESSAGES, TEXTS, TEXTS)
def test_words_of_question_and_rest_are_those_of_the_whole(turns, reply, other):
    messages = tuple(Message(role, text) for role, text in turns)
    for record in (
        Conversation(messages, "r:1"),
        Preference(messages, reply, other, "r:1"),
        Labelled(messages, reply, True, "r:1"),
        Prompt(messages, "r:1"),
        Document(reply, "r:1"),
    ):
        asked, rest = map("\n".join, texts_apart(record))
        assert words(asked) + words(rest) == words(whole_text(record)) and asked == question_text(record)


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("aB9 .\t\u3000\u65e5\u672c\u00dfI\u0130_-\u0345\x1c\ud800"), max_size=50))
def test_hashes_of_words_are_those_of_each_word_alone(text):
    hashed, counts = word_hashes([text, "", text, "x"])
    alone, each = word_hashes(words(text))
    assert counts.tolist() == [len(alone), 0, len(alone), 1] and (each == 1).all() and len(alone) == len(words(text))
    assert hashed.tolist() == [*alone, *alone, *word_hashes(["x"])[0]]


def test_hashes_of_words_are_the_polynomial_of_their_bytes():
    def expected(word: str) -> int:
        total = sum(int(near._BYTES[b]) * pow(int(near._LEFT), i + 1, 1 << 64) for i, b in enumerate(word.encode()))
        total &= (1 << 64) - 1
        total = (total ^ total >> 32) * int(near._TIMES) & ((1 << 64) - 1)
        return total ^ total >> 29

    texts = ["naïve Ünïted", "a", "bb ! _", "日本", "x" * 4096]
    assert word_hashes(texts)[0].tolist() == [expected(word) for text in texts for word in words(text)]
    assert len(set(word_hashes([f"word{n} w{n}ord" for n in range(5000)])[0].tolist())) == 10000


def test_words_are_split_where_scripts_have_no_spaces():
    assert words("It's 2+3, 日本語! Straße") == ["it", "'", "s", "2", "+", "3", ",", "日", "本", "語", "!", "strasse"]


def sentences(count: int, length: int, seed: int = 0) -> list[list[str]]:
    draw = random.Random(seed)
    vocabulary = [f"w{n}" for n in range(3000)]
    return [draw.choices(vocabulary, k=length) for _ in range(count)]


def test_every_row_with_one_word_changed_is_found():
    """Planted: 300 of 900 rows again with one word changed, of 15 to 60 words: a similarity of 0.75 and more."""
    draw = random.Random(1)
    rows = [row for length in (15, 30, 60) for row in sentences(300, length, length)]
    index = NearIndex(0.7)
    for number, row in enumerate(rows):
        assert index.find_or_add(word_pairs(" ".join(row)), number) is None, "no false alarm"
    for number in draw.sample(range(len(rows)), 300):
        changed = list(rows[number])
        changed[draw.randrange(len(changed))] = "another"
        assert index.find(word_pairs(" ".join(changed))) == number


def test_rows_below_the_threshold_are_left_alone():
    row = sentences(1, 40)[0]
    half = [*row[:20], *sentences(1, 20, 5)[0]]
    index = NearIndex(0.7)
    index.add(word_pairs(" ".join(row)), "row")
    assert index.find(word_pairs(" ".join(half))) is None
    assert NearIndex(0.7).find(word_pairs("")) is None and index.find_or_add(word_pairs(""), "empty") is None


def test_a_candidate_is_measured_not_estimated():
    """Just below the threshold signatures often agree enough; the word pairs themselves do not."""
    for seed in range(100):
        row = sentences(1, 60, seed)[0]
        other = [*row[:50], *sentences(1, 12, seed + 500)[0]]
        left, right = word_pairs(" ".join(row)), word_pairs(" ".join(other))
        index = NearIndex(0.7)
        index.add(left, "row")
        assert 0.6 < similarity(left, right) < 0.7 and index.find(right) is None


def test_signatures_agree_as_often_as_the_jaccard_index_says():
    row = sentences(1, 400)[0]
    for kept in (100, 200, 300):
        other = [*row[:kept], *sentences(1, 400 - kept, kept)[0]]
        left, right = word_pairs(" ".join(row)), word_pairs(" ".join(other))
        agree = float((signature(left) == signature(right)).mean())
        assert abs(agree - similarity(left, right)) < 0.15  # 128 draws: four standard errors are 0.17 at most


def test_a_long_text_has_the_signature_of_its_whole():
    text = " ".join(sentences(1, 9000)[0])
    pairs = word_pairs(text)
    parts = [signature(pairs[:5000]), signature(pairs[5000:])]
    assert (signature(pairs) == np.minimum(*parts)).all()


def test_bands_miss_few_pairs_at_the_threshold():
    for threshold in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0):
        rows = band_rows(threshold)
        assert (1 - threshold**rows) ** (128 // rows) <= 0.002
    assert band_rows(0.9) > band_rows(0.7) > band_rows(0.5)


def test_hashes_are_the_same_in_another_process():
    """Python's own hash of texts is not."""
    code = "from data_prep.quality.minhash import *; print(int(signature(word_pairs('a b c d'))[7]))"
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={"PYTHONHASHSEED": seed, "PATH": "", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert seen == {f"{int(signature(word_pairs('a b c d'))[7])}\n"}

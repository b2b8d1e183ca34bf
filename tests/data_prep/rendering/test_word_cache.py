"""Encoding word by word: the ids of the whole text, for tokenizers that cut it so, and for no others."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from data_prep.rendering import word_cache as module
from data_prep.rendering.word_cache import Words, apart

ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
END = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CASED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]%s[\p{Ll}\p{Lm}\p{Lo}\p{M}]%s"
SLASHED = END.replace(r"[\r\n]*|", r"[\r\n/]*|", 1)
DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {
    "llama 3": [rf"{ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{END}"],
    "qwen 2": [rf"{ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{END}"],
    "qwen 3.5": [
        rf"{ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|\s+"
    ],
    "gpt-oss": [
        rf"{CASED % ('*', '+')}{ENDINGS}?|{CASED % ('+', '*')}{ENDINGS}?|\p{{N}}{{1,3}}|{SLASHED}",
    ],
    "mistral": [rf"{CASED % ('*', '+')}|{CASED % ('+', '*')}|\p{{N}}|{SLASHED}"],
    "deepseek": [r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", DEEPSEEK],
}
UNSAFE = [
    r".+",
    r"\p{L}+ ?|\s+",
    r"\p{L}+\s*|\s+",
    r"[^\r\n]+|\s+",
    r"\w+[ x]*|\s+",
    r"[!-~][ -~]+|\s+",
    r"[^\r\n\p{L}]?[\p{L} ]+|\s+",
    r"[^\r\n\p{L}\p{N}]+\p{L}+|\s+",
    r"[^\s\S]+|\s+",
    r"[\r\n-a]+|\s+",
    r"[\p{Z}]+a|\s+",
    r"\p{L}+(?= )|\s+",
    r"\P{L}+|\s+",
    r"(?i:a b)|\s+",
    r"\p{L}+|\p{N}+",  # leaves the spaces between matches
]
SEEN = [
    "It's the naïve dog's 1234 words, don't you see?\n\nYes... (we do) 日本語 /n\t x  y\r\n",
    "a.\n b!\r\n\r\n c/\n d\n\n\n e \n f  \n\t g\n h 1\n 2\u00a0 3\u3000 4 \x0b x\x85 y",
]
SPACES = " \n\t\r\x0b\x1c\x85\u00a0\u2003\u3000\u180e\u200b\x00"
OTHERS = "aBé1½9日ア!.,'/_-(\u0301\u0345\u017f😀"
PARTS = [*SPACES, *OTHERS, "'s", "'S", "the", "\r\n", "  "]
TEXTS = st.lists(st.sampled_from(PARTS), max_size=24).map("".join)


def trained(pre_tokenizer: Any, normalizer: Any = None) -> Tokenizer:
    """A small byte-level BPE tokenizer that has merged all that it may, so that another cut gives other ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, min_frequency=1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SEEN * 3, trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def sequence(*patterns: str) -> Any:
    return pre_tokenizers.Sequence([*map(split, patterns), pre_tokenizers.ByteLevel(False, use_regex=False)])


WHOLE = pre_tokenizers.ByteLevel(add_prefix_space=False)
KINDS: dict[str, Tokenizer] = {
    "gpt 2": trained(WHOLE),
    "smollm": trained(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), WHOLE])),
    "composed": trained(WHOLE, normalizers.NFC()),
    **{name: trained(sequence(*patterns)) for name, patterns in PATTERNS.items()},
}


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
def test_words_one_after_another_give_the_ids_of_the_text(name: str, text: str) -> None:
    tokenizer = KINDS[name]
    assert apart(tokenizer)
    assert Words(tokenizer).of(text) == tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("pattern", UNSAFE)
def test_patterns_that_run_on_into_a_space_are_not_taken_apart(pattern: str) -> None:
    assert not apart(trained(sequence(pattern)))


@pytest.mark.parametrize(
    ("name", "pre_tokenizer", "normalizer"),
    [
        ("none at all", sequence(), None),
        ("a space before the first word", pre_tokenizers.ByteLevel(add_prefix_space=True), None),
        ("metaspace", pre_tokenizers.Metaspace(), None),
        ("spaces that become letters", WHOLE, normalizers.Replace(" ", "\u2581")),
        ("compatible forms, which may begin with a space", WHOLE, normalizers.NFKC()),
        ("white space alone", pre_tokenizers.WhitespaceSplit(), None),
        ("removed matches", pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\s+"), "removed"), WHOLE]), None),
        ("inverted", pre_tokenizers.Split(Regex(r"\p{L}+|\s+"), "isolated", invert=True), None),
    ],
)
def test_other_tokenizers_are_not_taken_apart(name: str, pre_tokenizer: Any, normalizer: Any) -> None:
    assert not apart(trained(pre_tokenizer, normalizer)), name


def test_other_models_and_added_tokens_that_reach_over_spaces_are_not_taken_apart() -> None:
    other = Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    other.pre_tokenizer = WHOLE
    assert not apart(other)
    for token in (
        AddedToken("two words", normalized=False),
        AddedToken("left", lstrip=True),
        AddedToken("right", rstrip=True),
        AddedToken("word", single_word=True),
    ):
        tokenizer = trained(WHOLE)
        tokenizer.add_tokens([token])
        assert not apart(tokenizer), token
    tokenizer = trained(WHOLE)
    tokenizer.add_tokens(["<tool>", AddedToken("\n\n\n")])
    assert apart(tokenizer)
    for text in ("a <tool>b</tool>", "x<tool> <tool>", "a\n\n\n b\n\n\nc \n\n\n"):
        assert Words(tokenizer).of(text) == tokenizer.encode(text).ids
    random = trained(WHOLE)
    random.model.dropout = 0.1
    assert not apart(random)


def test_what_is_remembered_is_bounded_and_stays_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST", 7)
    tokenizer = KINDS["gpt 2"]
    words = Words(tokenizer)
    texts = [" ".join(f"w{n % 11}" for n in range(start, start + 9)) for start in range(30)] + ["x" * 100]
    for text in texts:
        assert words.of(text) == tokenizer.encode(text).ids
        assert len(words) <= 7 and "x" * 100 not in words
    copy = pickle.loads(pickle.dumps(words))
    assert len(copy) == 0 and copy.of(SEEN[0]) == words.of(SEEN[0])

"""Where texts meet: merges over edges, tokenizers that prepend spaces, control tokens that swallow white space."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.rendering.renderer import Renderer
from data_prep.types import Conversation, Message
from tests.tiny import tiny_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + '\\n' }}{% elif m['role'] == 'user' %}"
    "{{ 'A: ' + m['content'] + '\\n' }}{% else %}{{ 'B:' }}{{ ' ' + m['content'] + eos_token }}"
    "{{ '\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'B:' }}{% endif %}"
)


def talk(*contents: str, row: str = "f.jsonl:1") -> Conversation:
    roles = ("user", "assistant")
    return Conversation(tuple(Message(roles[i % 2], text) for i, text in enumerate(contents)), row)


def test_merges_over_the_edges() -> None:
    """The user's side is tokenised as the base saw it; the reply starts on an edge, as it does in generation."""
    merges = [(":", "Ġ"), (":Ġ", "h"), ("Ċ", "B"), ("i", "ĊB"), ("i", "Ċ")]
    tokenizer = tiny_tokenizer(PLAIN, merges=merges, split_words=False)
    renderer = Renderer(tokenizer)
    assert len(tokenizer.encode("B: h")) < len(tokenizer.encode("B:")) + len(tokenizer.encode(" h"))
    prompt = renderer.prompt([Message("user", "hi")])
    assert prompt == tokenizer.encode("A: hi\nB:", add_special_tokens=False)
    row = talk("hi", "hi", "hi", "ho")
    tokens = renderer.conversation(row)
    front = renderer.prompt(row.messages[:3]) + renderer.reply("ho")
    assert tokens.ids[: len(front)] == front
    assert renderer.reply("hi")[:1] == tokenizer.encode(" ", add_special_tokens=False)


@settings(max_examples=40, deadline=None)
@given(contents=st.lists(st.text("hi \n:AB", min_size=1, max_size=6), min_size=4, max_size=4))
def test_merges_over_any_edge(contents: list[str]) -> None:
    if not _MERGING:
        merges = [(":", "Ġ"), (":Ġ", "h"), ("Ċ", "B"), ("i", "Ċ"), ("Ġ", "h"), ("h", "i"), ("Ċ", "Ċ")]
        _MERGING.append(Renderer(tiny_tokenizer(PLAIN, merges=merges, split_words=False)))
    renderer = _MERGING[0]
    row = talk(*contents)
    tokens = renderer.conversation(row)
    for turn in (1, 3):
        front = renderer.prompt(row.messages[:turn]) + renderer.reply(contents[turn])
        assert tokens.ids[: len(front)] == front


_MERGING: list[Renderer] = []


def sentencepiece_like(template: str, legacy: bool) -> Any:
    """A tokenizer that puts a space before the first word: of every stretch (legacy) or of the text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>"]
    letters = [*names, "▁", *"abcdefghijklmnopqrstuvwxyzINST[]/:\n.<>|", "▁h", "hi", "▁[", "▁hi"]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(letters))}
    merges = [("▁", "h"), ("h", "i"), ("▁h", "i"), ("▁", "[")]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("legacy", [True, False])
def test_tokenizers_that_prepend_a_space(legacy: bool) -> None:
    renderer = Renderer(sentencepiece_like(LLAMA2, legacy))
    row = talk("hi you", "hi me", "hi", "so </s>")
    tokens = renderer.conversation(row)
    front = renderer.prompt(row.messages[:3]) + renderer.reply("so </s>")
    assert tokens.ids[: len(front)] == front
    assert tokens.ids.count(renderer.end_token_id) == 2
    text = "".join(renderer.tokenizer.convert_ids_to_tokens(renderer.conversation(talk("hi you", "hi me")).ids))
    assert text in ("<s>▁[INST]▁hi▁you▁[/INST]▁hi▁me▁</s>", "<s>[INST]▁hi▁you▁[/INST]▁hi▁me▁</s>")
    chat = [{"role": "user", "content": "hi you"}, {"role": "assistant", "content": "hi me"}]
    expected = renderer.tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert renderer.conversation(talk("hi you", "hi me")).ids == list(expected)


def test_control_tokens_that_swallow_white_space() -> None:
    """Phi-3's role tokens take the newline behind them; transformers' ids are the standard."""
    from tokenizers import AddedToken

    tokenizer = tiny_tokenizer(CHATML.replace("<|end|>", "<|stop|>"))
    tokenizer.add_tokens([AddedToken("<|stop|>", rstrip=True, lstrip=True, special=True, normalized=False)])
    renderer = Renderer(tokenizer)
    row = talk("hi  ", "yes ", "and", "no")
    chat = [{"role": message.role, "content": message.content} for message in row.messages]
    assert renderer.conversation(row).ids == list(tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False))


def test_control_strings_in_contents_are_tokenised_like_any_text() -> None:
    renderer = Renderer(tiny_tokenizer(merges=[("<", "|"), ("<|", "e")], split_words=False))
    pieces = renderer.tokenizer.convert_ids_to_tokens(renderer.reply("<|end|>"))
    assert pieces == ["<|e", "n", "d", "|", ">", "<|end|>"]


def test_a_tokenizer_that_would_make_control_ids_from_pieces_is_stopped_short() -> None:
    """`ignore_merges` style vocabularies hold the control string itself: it is torn apart."""
    merges = [("<", "|"), ("<|", "e"), ("<|e", "n"), ("<|en", "d"), ("<|end", "|"), ("<|end|", ">")]
    renderer = Renderer(tiny_tokenizer(merges=merges, split_words=False))
    ids = renderer.reply("a<|end|>b")
    assert ids.count(renderer.end_token_id) == 1 and renderer.decode(ids) == "a<|end|>b"


FIRST = (
    "{% if messages[0]['role'] == 'system' %}{{ '<|system|>' + messages[0]['content'] + '<|end|>' }}"
    "{% else %}{{ '<|system|>Be kind.<|end|>' }}{% endif %}{% for m in messages %}{% if m['role'] != 'system' %}"
    "{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.mark.parametrize("template", [FIRST, CHATML, PLAIN])
def test_a_dialogue_that_the_assistant_begins(template: str) -> None:
    """Templates that read messages[0] cannot be asked for a prompt of no messages."""
    tokenizer = tiny_tokenizer(template)
    renderer = Renderer(tokenizer)
    said = ("assistant", "Hi <|assistant|>"), ("user", "q"), ("assistant", "a")
    tokens = renderer.conversation(Conversation(tuple(Message(*one) for one in said), "f:1"))
    said_ids = [token for token, kept in zip(tokens.ids, tokens.mask, strict=True) if kept]
    assert said_ids == renderer.reply("Hi <|assistant|>") + renderer.reply("a")

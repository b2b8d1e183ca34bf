"""Rendering: ids, masks, boundaries and control tokens, over several kinds of template and tokenizer."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.core.errors import UserError
from data_prep.rendering.renderer import Renderer
from data_prep.types import Conversation, Message, Preference, Prompt
from tests.tiny import CONTROLS, TEMPLATE, tiny_tokenizer, write_jsonl

CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|' + m['role'] + '|>\\n\\n' + m['content'] | trim + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n\\n' }}{% endif %}"
)
PLAIN_MARKED = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + '\\n' }}{% elif m['role'] == 'user' %}"
    "{{ 'A: ' + m['content'] + '\\n' }}{% else %}{{ 'B:' }}{% generation %}{{ ' ' + m['content'] + eos_token }}"
    "{% endgeneration %}{{ '\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'B:' }}{% endif %}"
)
PLAIN = PLAIN_MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
MARK_SHORT = TEMPLATE.replace(
    "m['content'] + '<|end|>' }}{% endgeneration %}", "m['content'] }}{% endgeneration %}<|end|>"
)
MARK_LONG = TEMPLATE.replace("'<|end|>' }}{% endgeneration %}", "'<|end|>\\n' }}{% endgeneration %}")
EOS_AT_THE_END = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ '</s>' }}{% endif %}"
)
TWO_ENDS = CHATML.replace("'<|end|>\\n'", "'<|end|></s>\\n'")
PROMPTLESS = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
TEMPLATES = {
    "tiny": TEMPLATE,
    "chatml": CHATML,
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "plain marked": PLAIN_MARKED,
    "plain": PLAIN,
    "mark stops before the end token": MARK_SHORT,
    "mark takes the newline too": MARK_LONG,
    "eos after the last turn": EOS_AT_THE_END,
    "two end tokens": TWO_ENDS,
    "no generation prompt": PROMPTLESS,
}
EXTRA = ["<s>", "</s>"]


def tokenizer_for(template: str, **options: Any) -> Any:
    tokenizer = tiny_tokenizer(template, **options)
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": ["</s>"]})
    return tokenizer


@pytest.fixture(scope="module")
def renderers() -> dict[str, Renderer]:
    return {name: Renderer(tokenizer_for(template)) for name, template in TEMPLATES.items()}


@pytest.fixture(scope="module")
def tiny() -> Renderer:
    return Renderer(tiny_tokenizer())


def talk(*contents: str, row: str = "f.jsonl:1") -> Conversation:
    roles = ("user", "assistant")
    return Conversation(tuple(Message(roles[i % 2], text) for i, text in enumerate(contents)), row)


def said(renderer: Renderer, ids: list[int], mask: list[bool]) -> list[str]:
    """Texts of the runs of supervised tokens."""
    runs: list[list[int]] = []
    for (before, now), token in zip(pairwise([False, *mask]), ids, strict=True):
        if now and not before:
            runs.append([])
        if now:
            runs[-1].append(token)
    return [renderer.tokenizer.decode(run, skip_special_tokens=False) for run in runs]


# ------------------------------------------------------------------------------------------------ ids and masks
@pytest.mark.parametrize("name", TEMPLATES)
def test_conversation_is_prompt_and_reply_and_tail(renderers: dict[str, Renderer], name: str) -> None:
    renderer = renderers[name]
    for contents in (["hi there", "the answer"], ["hi", " yes", "and you\n", "the\nend", "x", "  "], ["one two", "."]):
        row = talk(*contents)
        tokens = renderer.conversation(row)
        for turn in range(1, len(contents), 2):
            front = renderer.prompt(row.messages[:turn]) + renderer.reply(contents[turn])
            assert tokens.ids[: len(front)] == front
            assert tokens.ids[len(front) - 1] == renderer.end_token_id
        assert not any(tokens.mask[len(front) :])


@pytest.mark.parametrize("name", TEMPLATES)
def test_mask_covers_the_replies_and_their_end_and_nothing_else(renderers: dict[str, Renderer], name: str) -> None:
    renderer = renderers[name]
    tokens = renderer.conversation(talk("hi there", "first", "and", "second one"))
    runs = said(renderer, tokens.ids, tokens.mask)
    assert len(tokens.mask) == len(tokens.ids) and len(runs) == 2
    end = renderer.tokenizer.convert_ids_to_tokens(renderer.end_token_id)
    for run, content in zip(runs, ("first", "second one"), strict=True):
        assert run.endswith(end) and content in run
        rest = run.replace(content, "", 1)
        assert rest.replace("<|end|>", "").replace("</s>", "").replace("assistant:", "").strip() == ""


@pytest.mark.parametrize("name", TEMPLATES)
def test_same_ids_as_transformers_where_it_is_right(renderers: dict[str, Renderer], name: str) -> None:
    """Harmless contents, no merge over the reply's edge: the ids are those of apply_chat_template."""
    renderer = renderers[name]
    row = talk("hi there", "the answer", "and", "so")
    chat = [{"role": message.role, "content": message.content} for message in row.messages]
    expected = renderer.tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert renderer.conversation(row).ids == list(expected)


def test_mask_of_a_marked_template_is_that_of_transformers(tiny: Renderer) -> None:
    row = talk("hi there", "the answer", "and", "so")
    chat = [{"role": message.role, "content": message.content} for message in row.messages]
    expected = tiny.tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    assert [int(flag) for flag in tiny.conversation(row).mask] == list(expected["assistant_masks"])


def test_end_token(renderers: dict[str, Renderer]) -> None:
    ends = {name: r.tokenizer.convert_ids_to_tokens(r.end_token_id) for name, r in renderers.items()}
    assert ends.pop("two end tokens") == "</s>"
    assert set(ends.values()) == {"<|end|>"}


def test_golden_row(tiny: Renderer) -> None:
    tokens = tiny.conversation(talk("the cat", "and you"))
    text = [tiny.tokenizer.decode([token]) for token in tokens.ids]
    assert text == [
        "<|user|>",
        "the",
        " ",
        "c",
        "a",
        "t",
        "<|end|>",
        "\n",
        "<|assistant|>",
        "and",
        " ",
        "you",
        "<|end|>",
        "\n",
    ]
    assert tokens.mask == [False] * 9 + [True] * 4 + [False]
    assert tokens.id == "f.jsonl:1"


def test_train_false_leaves_a_turn_out_without_changing_ids(tiny: Renderer) -> None:
    row = talk("a", "b", "c", "d")
    quiet = Message("assistant", "b", train=False)
    other = Conversation((row.messages[0], quiet, *row.messages[2:]), row.id)
    all_of_it, some = tiny.conversation(row), tiny.conversation(other)
    assert some.ids == all_of_it.ids
    assert said(tiny, some.ids, some.mask) == ["d<|end|>"]


def test_pair_and_prompts(tiny: Renderer) -> None:
    asked = (Message("system", "be kind"), Message("user", "hi"))
    pair = tiny.pair(Preference(asked, "good", "bad", "f:3", margin=0.5))
    assert pair.prompt == tiny.prompt(asked) and pair.margin == 0.5 and pair.id == "f:3"
    assert (pair.chosen, pair.rejected) == (tiny.reply("good"), tiny.reply("bad"))
    whole = tiny.conversation(Conversation((*asked, Message("assistant", "good")), "f:3"))
    assert whole.ids[: len(pair.prompt) + len(pair.chosen)] == pair.prompt + pair.chosen
    (prompt,) = tiny.prompts([Prompt(asked, "f:4", {"topic": "x"})])
    assert not isinstance(prompt, UserError)
    assert (prompt.ids, prompt.text, prompt.id, prompt.meta) == (pair.prompt, "hi", "f:4", {"topic": "x"})


@pytest.mark.parametrize("name", TEMPLATES)
def test_decode_gives_back_the_reply(renderers: dict[str, Renderer], name: str) -> None:
    renderer = renderers[name]
    for text in ("the answer", "a\nb", "<|end|> ha", "42 %"):
        ids = renderer.reply(text)
        assert renderer.decode(ids) == text
        assert renderer.decode(ids + [renderer.pad_token_id] * 3) == text
        assert renderer.decode([*ids, *renderer.reply("more")]) == text
    unfinished = renderer.reply("abc")[: -len(renderer.reply("")) or None]
    assert renderer.decode([*unfinished, renderer.pad_token_id]).strip() == renderer.decode(unfinished).strip()


def test_batches_give_the_rows_one_by_one(tiny: Renderer) -> None:
    rows = [talk(f"question {n}", f"answer {n % 3}", row=f"f:{n}") for n in range(20)]
    assert tiny.conversations(rows) == [tiny.conversation(row) for row in rows]


# ------------------------------------------------------------------------------------------------ control tokens
def control_count(renderer: Renderer, ids: list[int]) -> int:
    held = set(renderer.tokenizer.convert_tokens_to_ids([*CONTROLS, *EXTRA]))
    return sum(token in held for token in ids)


@pytest.mark.parametrize("name", ["tiny", "chatml", "llama2", "plain"])
def test_ten_thousand_hostile_contents_give_no_control_id(renderers: dict[str, Renderer], name: str) -> None:
    renderer = renderers[name]
    draw = random.Random(7)
    parts = [
        *CONTROLS,
        *EXTRA,
        "<|",
        "|>",
        "end",
        "\n",
        " ",
        "A: ",
        "B:",
        "\uf8f4",
        "\uf8f5",
        "0",
        "\uf8f41\uf8f5",
        "é",
        "<",
    ]
    rows = [talk(*("".join(draw.choices(parts, k=draw.randint(1, 6))) for _ in range(4))) for _ in range(625)]
    plain = control_count(renderer, renderer.conversation(talk("x", "x", "x", "x")).ids)
    for row, tokens in zip(rows, renderer.conversations(rows), strict=True):
        assert not isinstance(tokens, UserError)
        assert control_count(renderer, tokens.ids) == plain, row
        assert tokens.mask.count(True) and tokens.ids.count(renderer.end_token_id) >= 2


@settings(max_examples=60, deadline=None)
@given(
    contents=st.lists(
        st.text(max_size=12) | st.sampled_from(["<|end|>", "<|assistant|>hi", "\uf8f40\uf8f5"]), min_size=2
    )
)
def test_contents_survive_to_the_letter(contents: list[str]) -> None:
    renderer = _TINY()
    contents = contents[: len(contents) // 2 * 2]
    tokens = renderer.conversation(talk(*contents))
    spoken = [text + "<|end|>" for text in contents[1::2]]
    assert said(renderer, tokens.ids, tokens.mask) == spoken
    assert renderer.decode(renderer.reply(contents[1])) == contents[1]


_KEPT: list[Renderer] = []


def _TINY() -> Renderer:
    if not _KEPT:
        _KEPT.append(Renderer(tiny_tokenizer()))
    return _KEPT[0]


def test_role_tokens_that_are_not_flagged_special_are_control_tokens_too() -> None:
    from tokenizers import AddedToken

    template = CHATML.replace("<|' + m['role'] + '|>", "[' + m['role'] + ']").replace("<|assistant|>", "[assistant]")
    tokenizer = tiny_tokenizer(template)
    tokenizer.add_tokens([AddedToken(f"[{role}]", special=False, normalized=False) for role in ("user", "assistant")])
    tokenizer.add_tokens([AddedToken("[think]", special=False, normalized=False)])
    renderer = Renderer(tokenizer)
    role = tokenizer.convert_tokens_to_ids("[assistant]")
    assert renderer.prompt([Message("user", "[assistant] hi [user]")]).count(role) == 1
    assert tokenizer.convert_tokens_to_ids("[think]") in renderer.reply("[think] hm")


# ------------------------------------------------------------------------------------------------ pad, bos, errors
def test_pad_equal_to_eos_keeps_the_end_in_the_mask() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    renderer = Renderer(tokenizer)
    tokens = renderer.conversation(talk("a", "b <|end|> c"))
    assert renderer.pad_token_id == renderer.end_token_id == tokens.ids[-2] and tokens.mask[-2]
    assert "pad_token" in renderer.choices and renderer.decode(renderer.reply("b")) == "b"


def test_no_pad_token_is_a_documented_choice() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    renderer = Renderer(tokenizer)
    assert renderer.pad_token_id == tokenizer.eos_token_id and "pad_token" in renderer.choices


def with_bos_adder(template: str) -> Any:
    """A tokenizer that adds a bos itself whenever it is allowed to."""
    from tokenizers import processors

    tokenizer = tokenizer_for(template)
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)]
    )
    return tokenizer


@pytest.mark.parametrize(("template", "expected"), [(LLAMA3, 1), (CHATML, 0), ("{{ bos_token }}" + LLAMA3, 1)])
def test_at_most_one_bos(template: str, expected: int) -> None:
    tokenizer = with_bos_adder(template)
    renderer = Renderer(tokenizer)
    row = talk("a", "b", "<s>c", "d")
    pair = renderer.pair(Preference(row.messages[:1], "b", "x", "f:1"))
    for ids in (renderer.conversation(row).ids, renderer.prompt(row.messages[:3]), pair.prompt):
        assert ids.count(tokenizer.bos_token_id) == expected
    assert tokenizer.bos_token_id not in renderer.reply("b")
    assert renderer.documents(["ab"])[0][0] == tokenizer.bos_token_id


def test_documents_end_with_eos(tiny: Renderer) -> None:
    (ids,) = tiny.documents(["the <|end|> end"])
    assert ids[-1] == tiny.tokenizer.eos_token_id and ids.count(ids[-1]) == 1


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, ("no chat template", "model.template")),
        ("{% for m in messages %}{{ m['role'] + m['content'] + '\\n' }}{% endfor %}", ("end token", "eos_token")),
        ("{% for m in messages %}{{ m['role'] }}<|end|>{% endfor %}", ("0 times",)),
        (CHATML.replace("{{ '<|assistant|>\\n' }}", "{{ 'go:' }}"), ("generation prompt", "go:")),
        ("{% for m in messages %}{{ m.content.nothing() }}{% endfor %}", ("refuses",)),
        ("{% for m in messages %}", ("refuses",)),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", ("refuses", "unsafe")),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", ("refuses",)),
        ("{{ lipsum.__globals__['os'].system('id') }}", ("refuses",)),
        ("{{ messages.__class__.__base__.__subclasses__()[0] }}", ("refuses",)),
        ("{{ messages.append({}) }}", ("refuses", "unsafe")),
        ("{{ raise_exception.__globals__['__builtins__'] }}", ("refuses",)),
        ("{{ self._TemplateReference__context.name.x }}", ("refuses",)),
        ("{% include '/etc/passwd' %}", ("refuses",)),
        ("{{ ''.format.__func__.__globals__ }}", ("refuses",)),
        ("{{ '{0.__class__.__mro__}'.format(messages) }}", ("refuses",)),
        ("{% for x in range(10 ** 9) %}{{ x }}{% endfor %}", ("refuses", "range")),
    ],
)
def test_templates_that_cannot_be_used(template: str | None, words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        Renderer(tiny_tokenizer(template))
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize("arguments", [{}, {"city": "Rome"}])
def test_a_call_that_the_template_does_not_print_is_no_empty_reply(tiny: Renderer, arguments: dict[str, str]) -> None:
    """Without a tool's turn beside it nothing else in the row makes the template complain."""
    called = Message("assistant", "", calls=({"name": "weather", "arguments": arguments},))
    for turns in ((Message("user", "a"), called), (Message("user", "a"), called, Message("assistant", "b"))):
        with pytest.raises(UserError, match=r"leaves out tool calls; set options\.tools=text"):
            tiny.conversation(Conversation(turns, "f.jsonl:1"))


def test_a_row_that_the_template_refuses_is_named(tiny: Renderer) -> None:
    bad = Conversation((Message("user", "a"), Message("tool", "t"), Message("assistant", "b")), "f.jsonl:7")
    with pytest.raises(UserError, match="unknown role tool") as caught:
        tiny.conversation(bad)
    assert (caught.value.file, caught.value.row) == ("f.jsonl", 7)
    good = talk("a", "b")
    first, second = tiny.conversations([bad, good])
    assert isinstance(first, UserError) and second == tiny.conversation(good)


def test_turns_that_the_template_rewrites_are_refused_unless_left_out() -> None:
    """A template that opens every reply with a thought but drops it from earlier turns (Qwen3.5)."""
    template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
        "{% if m['role'] == 'assistant' and loop.last %}{{ '{}' }}{% endif %}{{ m['content'] + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>{}' }}{% endif %}"
    )
    renderer = Renderer(tiny_tokenizer(template))
    assert renderer.conversation(talk("a", "b")).mask.count(True) == 2
    row = talk("a", "b", "c", "d")
    with pytest.raises(UserError, match="message 2 cannot be trained on"):
        renderer.conversation(row)
    quiet = Conversation((row.messages[0], Message("assistant", "b", train=False), *row.messages[2:]), row.id)
    tokens = renderer.conversation(quiet)
    assert said(renderer, tokens.ids, tokens.mask) == ["d<|end|>"]
    front = renderer.prompt(row.messages[:3]) + renderer.reply("d")
    assert tokens.ids[: len(front)] == front


def test_a_template_that_prints_the_date_says_so() -> None:
    template = "{{ strftime_now('%Y') }}" + TEMPLATE
    assert "date" in Renderer(tiny_tokenizer(template)).choices
    fixed = "{% if not date_string is defined %}{% set date_string = strftime_now('%d') %}{% endif %}{{ date_string }}"
    renderer = Renderer(tiny_tokenizer(fixed + TEMPLATE))
    assert "date" not in renderer.choices
    assert "26 Jul 2024" in renderer.tokenizer.decode(renderer.prompt([Message("user", "a")]))


def test_special_tokens_that_contents_may_hold(tmp_path: Path) -> None:
    """Contents never become control tokens, and what they spell is counted; named ones are read as what they are."""
    from data_prep.options import DataOptions, LengthOptions, SourceOptions
    from data_prep.prepare.prepare import prepare
    from data_prep.types import CONVERSATION, DOCUMENT

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    renderer = Renderer(tokenizer)
    said = "<think>hm</think>yes"
    rows = [{"prompt": f"Is <think> a word, {n}?", "completion": said} for n in range(4)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    source = SourceOptions(path=str(path), eval_share=0.0)

    def prepared(*tokens: str) -> Any:
        data = DataOptions(conversations=source, special_tokens=list(tokens))
        return prepare(CONVERSATION, data, renderer, LengthOptions(512), 0)

    ids = dict(zip(("<think>", "</think>"), tokenizer.convert_tokens_to_ids(["<think>", "</think>"]), strict=True))
    plain = prepared()
    assert not set(ids.values()) & set(plain.train[0].ids)
    notes = plain.card["notes"]
    assert notes == {f"rows whose text spells '{one}', a special token, read as plain text": 4 for one in ids}
    read = prepared(*ids)
    row = read.train[0]
    assert [row.ids.count(one) for one in ids.values()] == [2, 1] and not read.card["notes"]
    kept = [token for token, trained in zip(row.ids, row.mask, strict=True) if trained]
    hm, yes = (tokenizer.encode(one, add_special_tokens=False) for one in ("hm", "yes"))
    assert kept == [ids["<think>"], *hm, ids["</think>"], *yes, renderer.end_token_id]
    assert tokenizer.decode(row.ids) == tokenizer.decode(plain.train[0].ids) and read.digest != plain.digest
    assert "contents may hold <think>, </think>" in read.card["choices"]["special_tokens"]
    documents = DataOptions(
        text=SourceOptions(path=str(write_jsonl(tmp_path / "t.jsonl", [{"text": said}]))), special_tokens=["<think>"]
    )
    (document,) = prepare(DOCUMENT, documents, renderer, LengthOptions(512), 0).train
    assert document.ids[0] == ids["<think>"] and ids["</think>"] not in document.ids
    for token, words in (("<thonk>", "did you mean '<think>'"), ("<|end|>", "ends a turn")):
        with pytest.raises(UserError, match=words):
            prepared(token)

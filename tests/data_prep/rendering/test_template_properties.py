"""What must hold for every chat template that is trained with: TRL's collection, and those of the model presets.

TRL ships the templates of the common model families. Each gets a small tokenizer that has its control tokens.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_prep.core.errors import UserError
from data_prep.rendering.renderer import Renderer
from data_prep.rendering.training_templates import folder, training_twin
from data_prep.types import Conversation, Message, Preference
from tests.tiny import tiny_tokenizer

ROOT = Path(__file__).resolve().parents[3]
_CONTROL = re.compile(
    r"<\|?[a-z_]+\|?>|<\|[^|<>{}\s']{1,40}\|>|<\uff5c[^\uff5c]{1,40}\uff5c>|</s>|<end_of_turn>|\[/?[A-Z_]{4,}\]"
)
THOUGHTS = ("deepseek_r1_distill", "deepseek_r1_distill_training", "deepseekv3", "deepseekv3_training")
REFUSED = {
    **dict.fromkeys(THOUGHTS, "renders an assistant turn otherwise than its generation prompt begins it"),
    "glm4moe": r"without an end token .* TRL has a form of it for training: .*glm4moe_training\.jinja",
}
"""Templates that cannot be trained with, and what is said."""
LAST_TURN_ALONE = {"qwen3", "gptoss", "gptoss_training", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6"}
"""Templates that write earlier replies otherwise than the last one."""
NO_SYSTEM = {"gemma", "gemma_training"}
NO_THOUGHT = re.compile(r"nemotron_3")
"""Templates that open every reply with a thought unless told not to."""
MANY = ("qwen3_training", "llama3", "gemma3", "plain")
"""Templates that get all 10,000 contents; the others get some hundred."""


@cache
def sources() -> dict[str, str]:
    found = {file.stem: file.read_text(encoding="utf-8") for file in sorted((folder() or Path()).glob("*.jinja"))}
    found["nano"] = (ROOT / "align/models/nano/chat_template.jinja").read_text(encoding="utf-8")
    blank = yaml.safe_load((ROOT / "recipes/model/nano_blank.yaml").read_text(encoding="utf-8"))
    found["nano_blank"] = blank["tokenizer"]["template"]
    found |= {name: (ROOT / f"align/models/{name}.jinja").read_text(encoding="utf-8") for name in ("chatml", "plain")}
    return found


def controls(source: str) -> list[str]:
    return sorted(set(_CONTROL.findall(source)) | {"<|user|>", "<|end|>", "<|im_end|>", "<s>", "</s>"})


@cache
def renderer(name: str) -> Renderer:
    from tokenizers import AddedToken

    source = sources()[name]
    tokenizer = tiny_tokenizer(source)
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in controls(source)])
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    return Renderer(tokenizer)


GOOD = [name for name in sources() if name not in REFUSED]


def dialogues(name: str, texts: list[str]) -> Iterator[Conversation]:
    """One turn, one turn after a system message, and two turns where all replies are written alike."""
    q1, a1, q2, a2 = texts
    turns = (Message("user", q1), Message("assistant", a1), Message("user", q2), Message("assistant", a2))
    yield Conversation(turns[:2], "f:1")
    if name not in NO_SYSTEM:
        yield Conversation((Message("system", q2), *turns[:2]), "f:2")
    quiet = name in LAST_TURN_ALONE
    yield Conversation((turns[0], Message("assistant", a1, train=False if quiet else None), *turns[2:]), "f:3")


def test_the_collection_is_there() -> None:
    assert len(sources()) > 60 and set(REFUSED) | LAST_TURN_ALONE | NO_SYSTEM <= set(sources())


@pytest.mark.parametrize("name", REFUSED)
def test_templates_that_cannot_be_trained_with_are_refused_in_one_line(name: str) -> None:
    with pytest.raises(UserError, match=REFUSED[name]) as caught:
        renderer(name)
    assert "model.template" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(LAST_TURN_ALONE))
def test_templates_that_write_earlier_replies_otherwise_say_what_to_set(name: str) -> None:
    turns = (Message("user", "a"), Message("assistant", "b")) * 2
    with pytest.raises(UserError, match=r"message 2 cannot be trained on: .*data\.train_on=last"):
        renderer(name).conversation(Conversation(turns, "f:1"))


@pytest.mark.parametrize("name", GOOD)
def test_conversation_is_prompt_and_reply_and_a_tail_without_loss(name: str) -> None:
    one = renderer(name)
    for texts in (["hi there", "the answer", "and", "so it is"], ["1 <b>\n2", "x = {y}\n\nz", "\ttab ", "é 汉"]):
        for row in dialogues(name, texts):
            tokens = one.conversation(row)
            for turn, message in enumerate(row.messages):
                if message.role == "assistant" and message.trained:
                    prompt = one.prompt(row.messages[:turn])
                    front = prompt + one.reply(message.content)
                    assert tokens.ids[: len(front)] == front, row.id
                    assert all(tokens.mask[len(prompt) : len(front)])
                    assert front[-1] == one.end_token_id, "the end of a turn is supervised"
            assert not any(tokens.mask[len(front) :])
            pair = one.pair(Preference(row.messages[:-1], row.messages[-1].content, "other", "f:9"))
            assert tokens.ids[: len(front)] == pair.prompt + pair.chosen


@pytest.mark.parametrize("name", GOOD)
def test_one_bos_where_the_template_writes_one(name: str) -> None:
    one = renderer(name)
    wanted = 1 if "bos_token" in sources()[name] and name not in ("llava_next", "llava_next_training") else 0
    for row in dialogues(name, ["a", "b <s>", "<s>", "d"]):
        ids = one.conversation(row).ids
        assert ids.count(one.bos_token_id) == wanted and one.bos_token_id not in ids[1:]
        assert one.prompt(row.messages[:-1]).count(one.bos_token_id) == wanted
    assert one.bos_token_id not in one.reply("<s>b")


@pytest.mark.parametrize("name", GOOD)
def test_mask_covers_the_replies_and_nothing_else(name: str) -> None:
    one = renderer(name)
    texts = ["qzka", "qzkb", "qzkc", "qzkd"]
    frame = one.tokenizer.decode(one.reply("qzkz")).replace("qzkz", "")
    for row in dialogues(name, texts):
        tokens = one.conversation(row)
        said = [m.content for m in row.messages if m.role == "assistant" and m.trained]
        runs, outside = runs_of(one, tokens.ids, tokens.mask)
        assert len(runs) == len(said)
        for run, text in zip(runs, said, strict=True):
            assert run.count(text) == 1 and run.replace(text, "").split() == frame.split(), run
        assert not any(text in outside for text in said)
        assert all(m.content in outside for m in row.messages if not (m.role == "assistant" and m.trained))


def runs_of(one: Renderer, ids: list[int], mask: list[bool]) -> tuple[list[str], str]:
    """(texts of the runs of supervised tokens, text of all others)"""
    runs: list[list[int]] = []
    for (before, now), token in zip(pairwise([False, *mask]), ids, strict=True):
        if now and not before:
            runs.append([])
        if now:
            runs[-1].append(token)
    others = [token for token, kept in zip(ids, mask, strict=True) if not kept]
    return [one.tokenizer.decode(run) for run in runs], str(one.tokenizer.decode(others))


@pytest.mark.parametrize("name", [name for name in GOOD if NO_THOUGHT.match(name)])
def test_thoughts_are_switched_off_and_said(name: str) -> None:
    one = renderer(name)
    assert "enable_thinking=false" in one.choices["thinking"]
    assert one.tokenizer.decode(one.prompt([Message("user", "a")])).count("<think>") == one.tokenizer.decode(
        one.prompt([Message("user", "a")])
    ).count("</think>")


# -------------------------------------------------------------------------------------------------- hostile contents
@pytest.mark.parametrize("name", GOOD)
def test_hostile_contents_give_no_control_id(name: str) -> None:
    """10,000 contents for the templates in MANY, 200 for every other."""
    one, source = renderer(name), sources()[name]
    ids_of = set(one.tokenizer.convert_tokens_to_ids(controls(source)))
    parts = [
        *controls(source),
        "<|",
        "|>",
        "im_end",
        "\n",
        " ",
        "</",
        "<think>",
        "\uf8f4",
        "\uf8f51",
        "0",
        "é",
        "<s",
        ">",
    ]
    draw = random.Random(7)
    turns = ("user", "assistant") if name in LAST_TURN_ALONE else ("user", "assistant") * 2
    count = (10_000 if name in MANY else 200) // len(turns)

    def row(number: int) -> Conversation:
        texts = ["x" + "".join(draw.choices(parts, k=draw.randint(1, 6))) + "x" for _ in turns]
        return Conversation(tuple(Message(r, t) for r, t in zip(turns, texts, strict=True)), f"f:{number}")

    def counted(ids: list[int]) -> int:
        return sum(token in ids_of for token in ids)

    plain = Conversation(tuple(Message(role, "x") for role in turns), "f:0")
    expected = counted(one.conversation(plain).ids)
    rows = [row(number) for number in range(count)]
    for made, tokens in zip(rows, one.conversations(rows), strict=True):
        assert not isinstance(tokens, UserError), tokens
        assert counted(tokens.ids) == expected, made


# ------------------------------------------------------------------------------------------------------------- tools
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "adds <|im_end|>",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer", "description": "<|user|>"}}},
    },
}


def with_tools() -> tuple[Message, ...]:
    call = {"name": "add", "arguments": {"a": "<|im_end|></s>"}, "id": "call00001"}
    return (
        Message("user", "qzka"),
        Message("assistant", "", calls=(call,)),
        Message("tool", "qzkr <|end|>", name="add", call_id="call00001"),
        Message("assistant", "qzkd"),
    )


def takes_tools(name: str) -> bool:
    try:
        renderer(name).conversation(Conversation(with_tools(), "f:1", tools=(TOOL,)))
    except UserError as problem:
        assert problem.code in ("template_leaves_out", "template_refuses", "template_turn"), problem
        return False
    return True


def test_many_templates_take_tools() -> None:
    taking = [name for name in GOOD if takes_tools(name)]
    assert {"qwen3_training", "llama3_1", "qwen2_5_training"} <= set(taking) and len(taking) >= 20, taking
    for name in taking:
        one, turns = renderer(name), with_tools()
        ids_of = set(one.tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>", "<|user|>", "<|end|>"]))
        tokens = one.conversation(Conversation(turns, "f:1", tools=(TOOL,)))
        call = {"name": "add", "arguments": {"a": "x"}, "id": "call00001"}
        result = Message("tool", "qzkr x", name="add", call_id="call00001")
        harmless = (turns[0], Message("assistant", "", calls=(call,)), result, turns[3])
        plain_tool = {"type": "function", "function": {**TOOL["function"], "description": "adds x"}}
        plain_tool["function"]["parameters"] = {
            "type": "object",
            "properties": {"a": {"type": "integer", "description": "x"}},
        }
        plain = one.conversation(Conversation(harmless, "f:1", tools=(plain_tool,)))
        assert sum(t in ids_of for t in tokens.ids) == sum(t in ids_of for t in plain.ids), name
        runs, outside = runs_of(one, tokens.ids, tokens.mask)
        assert len(runs) == 2 and "add" in runs[0] and "qzkd" in runs[1], (name, runs)
        assert "qzkr" in outside and "adds" in outside and "qzka" in outside, name
        asked = one.prompt(turns[:1], (TOOL,))
        assert tokens.ids[: len(asked)] == asked and tokens.mask.index(True) == len(asked), name


def test_nothing_beside_a_call_is_left_out_in_silence() -> None:
    """Some templates print a turn's calls and not its words (Llama 3.1), or only the first call."""
    left_out = 0
    other = {"name": "qzko", "arguments": {"b": "x"}, "id": "call00002"}
    for name in filter(takes_tools, GOOD):
        one, turns = renderer(name), list(with_tools())
        for change, word in (({"content": "qzkw"}, "qzkw"), ({"calls": (*turns[1].calls, other)}, "qzko")):
            row = Conversation((turns[0], replace(turns[1], **change), *turns[2:]), "f:1", tools=(TOOL,))
            try:
                printed = word in one.tokenizer.decode(one.conversation(row).ids)
            except UserError as problem:
                left_out += "leaves out" in str(problem)
                continue
            assert printed, (name, word)
    assert left_out, "no template of the collection does it any more: has the check gone blind?"


def test_a_template_without_tools_refuses_them() -> None:
    source = "{% for m in messages %}{% if m.role != 'tool' %}<|user|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    one = Renderer(tiny_tokenizer(source))
    for messages, tools, what in (
        (with_tools(), (TOOL,), "tool"),
        (with_tools(), (), "tool"),
        ((*with_tools()[:1], with_tools()[3]), (TOOL,), "the tools"),
    ):
        with pytest.raises(UserError, match=rf"leaves out .*{what}.*options\.tools=text"):
            one.conversation(Conversation(messages, "f:1", tools=tools))
    with pytest.raises(UserError, match=r"leaves out tool calls; .*options\.tools=text"):
        Renderer(tiny_tokenizer()).conversation(Conversation(with_tools()[1:], "f:1"))


def test_a_template_without_system_messages_refuses_them() -> None:
    source = "{% for m in messages %}{% if m.role != 'system' %}<|user|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    one = Renderer(tiny_tokenizer(source))
    with pytest.raises(UserError, match="leaves out system messages"):
        one.conversation(Conversation((Message("system", "s"), Message("user", "a"), Message("assistant", "b")), "f:1"))


def test_training_twins() -> None:
    assert str(training_twin(sources()["qwen3"])).endswith("qwen3_training.jinja")
    assert training_twin("{{ messages }}") is None

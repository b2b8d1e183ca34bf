"""`align ship to=ollama`: what Ollama makes of the Modelfile is what the policy was trained to read, to the character.

Ollama is no part of the tests: a small reader of Modelfiles and of Go's template language, written after their
documentation, stands in for it.
"""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from align.cli.dispatch import main
from align.weights import ollama
from align.weights.go_template import changes
from data_prep.core.errors import UserError
from data_prep.rendering.renderer import Renderer
from data_prep.types import Message
from tests.tiny import TEMPLATE, tiny_tokenizer
from tests.tiny_chain import made, refused

_MODELS = Path(__file__).parents[3] / "align" / "models"
_LOOP = "{% for m in messages %}"
_ASK = "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
_QWEN = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|system|>You are {kind}, \"really\".<|end|>\n' }}{% endif %}"
    + TEMPLATE
)
_FOLDED = (
    "{{ bos_token }}{% set first = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' %}"
    + _LOOP
    + "{% if m['role'] == 'user' %}{{ '<|user|>' + (first if loop.index0 < 2 else '') + m['content'] + '<|end|>' }}"
    "{% elif m['role'] == 'assistant' %}{{ '<|assistant|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}" + _ASK
)
_TRIMS = TEMPLATE.replace("'<|user|>' + m['content']", "'<|user|>' + m['content'] | trim")
_SAYABLE = {
    "tiny": TEMPLATE,
    "nano": (_MODELS / "nano" / "chat_template.jinja").read_text("utf-8"),
    "plain": (_MODELS / "plain.jinja").read_text("utf-8"),
    "bos": "{{ bos_token }}" + TEMPLATE,
    "system by default": _QWEN,
    "system in the first message": _FOLDED,
    "odd characters": TEMPLATE.replace("'\\n'", "' {{\t\u00a0\"\\\\'"),
    "blanks trimmed": _TRIMS,
}


def renderer(template: str) -> Renderer:
    tokenizer = tiny_tokenizer(template)
    tokenizer.bos_token = "<|pad|>" if "bos_token" in template else None
    return Renderer(tokenizer)


def opened(template: str) -> Any:
    found = renderer(template)
    return SimpleNamespace(renderer=found, tokenizer=found.tokenizer, context=100_000, base_folder=Path("nowhere"))


# --------------------------------------------------------------------------------------- Ollama, as it is documented
def instructions(text: str) -> list[tuple[str, str]]:
    """(word, value) of the lines of a Modelfile; three quotes hold lines."""
    lines = re.findall(
        r'^(FROM|PARAMETER \w+|TEMPLATE|SYSTEM|LICENSE) ("""(?:.|\n)*?"""(?=\n)|.*)$', text, re.MULTILINE
    )
    assert "".join(f"{word} {value}\n" for word, value in lines) == text
    return [(word, value.removeprefix('"""').removesuffix('"""')) for word, value in lines]


def go(template: str, messages: list[dict[str, str]]) -> str:
    """A Go template run over messages: range, if, else, eq, ne, and, printf, fields, variables and strings."""
    parts = re.split(r"\{\{ (.*?) \}\}", template)

    def block(at: int, live: bool, dot: Any, names: dict[str, Any]) -> tuple[str, int]:
        """Text from part `at` to the `else` or `end` that closes this block, and the place of that."""
        said = ""
        while at < len(parts):
            if at % 2 == 0:
                said += parts[at] if live else ""
            elif re.match(r"else|end", parts[at]):
                return said, at
            elif parts[at].startswith("range "):
                after = at
                assert parts[at] in ("range .Messages", "range $i, $_ := .Messages")
                for number, message in enumerate(dot["Messages"] or [{"Role": "", "Content": ""}]):
                    text, after = block(at + 1, live and bool(dot["Messages"]), message, {**names, "$i": number})
                    said += text
                at = after
            elif parts[at].startswith("if "):
                taken, word = False, parts[at].removeprefix("if ")
                while True:
                    this = live and not taken and (word == "" or value(word, dot, names))
                    text, at = block(at + 1, bool(this), dot, names)
                    said, taken = said + text, taken or bool(this)
                    if parts[at] == "end":
                        break
                    word = parts[at].removeprefix("else").strip().removeprefix("if ")
            elif live:
                said += value(parts[at], dot, names)
            at += 1
        return said, at

    def value(words: str, dot: Any, names: dict[str, Any]) -> Any:
        stack: list[list[Any]] = [[]]
        for word in re.findall(r'"(?:\\.|[^"\\])*"|[()]|[^\s()]+', words):
            if word == "(":
                stack.append([])
            elif word == ")":
                done = called(stack.pop())
                stack[-1].append(done)
            else:
                stack[-1].append(operand(word, dot, names))
        return called(stack.pop())

    def called(words: list[Any]) -> Any:
        calls = {
            "eq": lambda a, b: a == b,
            "ne": lambda a, b: a != b,
            "and": lambda a, b: a and b,
            "printf": lambda form, text: text[: int(re.fullmatch(r"%\.(\d+)s", form)[1])],
        }
        return words[0] if len(words) == 1 else calls[words[0]](*words[1:])

    def operand(word: str, dot: Any, names: dict[str, Any]) -> Any:
        if word.startswith('"'):
            return json.loads(re.sub(r"\\U0000(....)", r"\\u\1", word))
        if word.startswith("."):
            return dot[word[1:]]
        return names.get(word, int(word) if word.isdigit() else word)

    return block(0, True, {"Messages": [{"Role": m["role"], "Content": m["content"]} for m in messages]}, {})[0]


# ------------------------------------------------------------------------------------------------------ the template
@pytest.mark.parametrize("name", _SAYABLE)
def test_ollama_writes_what_the_policy_reads_to_the_character(name):
    found = opened(_SAYABLE[name])
    turns, prompt = ollama.turns_of(found), ollama.prompt_of(found)
    template = dict(instructions(ollama.modelfile(found, turns, "model.gguf", None)))["TEMPLATE"]
    texts = ("hi", '{{ .Role }} said: "a"', "two\nlines", "caf\u00e9 \U0001f642")
    for system, rounds, shift in product((True, False), range(4), range(len(texts))):
        roles = ["system"] * system + ["user", "assistant"] * rounds + ["user"]
        talk = [Message(role, texts[(place + shift) % len(texts)]) for place, role in enumerate(roles)]
        assert go(template, [message.as_dict() for message in talk]) == prompt(talk)


def test_a_reply_that_ollama_hands_back_with_its_blank_is_written_once():
    found = opened(_SAYABLE["plain"])
    template = ollama.turns_of(found).go()
    said = [("user", "hi"), ("assistant", " ho"), ("user", "so")]
    plain = [Message(role, content.strip()) for role, content in said]
    assert go(template, [{"role": role, "content": text} for role, text in said]) == ollama.prompt_of(found)(plain)


def test_the_template_reads_as_people_write_it():
    assert ollama.turns_of(opened(TEMPLATE)).go() == (
        '{{ range .Messages }}{{ if eq .Role "system" }}<|system|>{{ .Content }}<|end|>\n'
        '{{ else if eq .Role "user" }}<|user|>{{ .Content }}<|end|>\n'
        '{{ else if eq .Role "assistant" }}<|assistant|>{{ .Content }}<|end|>\n'
        "{{ end }}{{ end }}<|assistant|>"
    )


def test_what_the_template_does_to_contents_is_told():
    found = opened(_TRIMS)
    assert changes(ollama.turns_of(found), ollama.prompt_of(found)) == [
        "the chat template changes blanks at the ends of a message; Ollama leaves it as it is"
    ]
    found = opened(TEMPLATE)
    assert changes(ollama.turns_of(found), ollama.prompt_of(found)) == []
    thinks = TEMPLATE.replace(
        "m['content'] + '<|end|>' }}{% end", "m['content'].split('</think>')[-1] + '<|end|>' }}{% end"
    )
    found = opened(thinks)
    assert any("the thought in a reply" in one for one in changes(ollama.turns_of(found), ollama.prompt_of(found)))


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (TEMPLATE.replace("'<|user|>'", "'<|user|>' ~ loop.index"), "it writes .* where it wrote"),
        (TEMPLATE.replace("'<|user|>' +", "'<|user|>' + m['content'] +"), r"the content of a turn \(user\) 2 times"),
        (
            TEMPLATE.replace("m['content'] + '<|end|>' }}{% e", "m['content'] + ' <|end|>' }}{% e"),
            "ends a reply with ' '",
        ),
        ("{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}" + TEMPLATE, "prints today's date"),
        (
            TEMPLATE.replace("'<|user|>' +", "'<|user|>' + m['content'][:0] + ('#' if '<' in m['content'] else '') +"),
            "writes '#5 < 6",
        ),
    ],
)
def test_a_template_that_go_cannot_say_is_refused_by_name(template, why):
    with pytest.raises(UserError, match=f"{why}.*; to=gguf writes a file"):
        ollama.turns_of(opened(template))


def test_a_template_without_system_messages_takes_none():
    found = opened(TEMPLATE.replace("m['role'] == 'system'", "false"))
    turns = ollama.turns_of(found)
    assert turns.system is None and changes(turns, ollama.prompt_of(found)) == [
        "the chat template takes no system message: Ollama leaves one out"
    ]
    with pytest.raises(UserError, match="system: the chat template takes no system message"):
        ollama.modelfile(found, turns, "model.gguf", "be kind")


# ----------------------------------------------------------------------------------------------------- the Modelfile
def test_the_modelfile_draws_as_chat_does_and_holds_any_text_or_refuses(tmp_path):
    found = opened(TEMPLATE)
    found.base_folder = tmp_path
    turns = ollama.turns_of(found)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    system = 'Be "kind".\n"Always"'
    lines = instructions(ollama.modelfile(found, turns, "model.gguf", system))
    assert lines[0] == ("FROM", "./model.gguf") and dict(lines)["SYSTEM"] == system and lines[-1] == ("LICENSE", "mit")
    assert [line for line in lines if line[0].startswith("PARAMETER")] == [
        ("PARAMETER stop", "<|end|>"),
        ("PARAMETER num_ctx", "8192"),
        ("PARAMETER temperature", "0.7"),
        ("PARAMETER top_k", "0"),
        ("PARAMETER top_p", "1"),
        ("PARAMETER repeat_penalty", "1"),
    ]
    (tmp_path / "LICENSE").write_text("All\u00a0yours.\f\n")
    assert dict(instructions(ollama.modelfile(found, turns, "m", None)))["LICENSE"] == "All yours."
    for text, why in (('a """ b', "three quotes"), ("a\u00a0b", r"the character '\\xa0'")):
        with pytest.raises(UserError, match=f"a Modelfile cannot hold {why} in the system prompt"):
            ollama.modelfile(found, turns, "m", text)


@pytest.mark.parametrize(
    ("folder", "name"), [("My Run_1/sft", "my-run_1-sft"), ("..a..b/ppo", "a-b-ppo"), ("é/x", "x")]
)
def test_a_name_that_ollama_takes(folder, name, tmp_path):
    assert ollama.name_of(tmp_path / folder) == name


# --------------------------------------------------------------------------------------------------------- the verb
def shipped() -> Path:
    return made("sft", "name=to-ollama", "data.system=Be kind.") / "sft"


def test_the_chain_is_shipped_with_its_modelfile(tmp_path, capfd):
    gguf = pytest.importorskip("gguf")
    shipped()
    capfd.readouterr()
    assert main(["ship", str(shipped()), "to=ollama", "load=fp16", f"folder={tmp_path}/x"]) == 0
    out = capfd.readouterr().out
    assert f"  ollama create to-ollama-sft -f {tmp_path}/x/Modelfile" in out and "KL" in out
    assert {path.name for path in (tmp_path / "x").iterdir()} == {
        "Modelfile",
        "model.gguf",
        "README.md",
        "align_export.json",
    }
    lines = dict(instructions((tmp_path / "x" / "Modelfile").read_text("utf-8")))
    assert (tmp_path / "x" / lines["FROM"]).is_file() and lines["SYSTEM"] == "Be kind."
    assert "ollama create to-ollama-sft -f Modelfile" in (tmp_path / "x" / "README.md").read_text("utf-8")
    assert not gguf.GGUFReader(tmp_path / "x" / "model.gguf").fields["tokenizer.ggml.add_bos_token"].contents()
    capfd.readouterr()
    assert main(["ship", str(shipped()), "to=ollama", "system=", f"folder={tmp_path}/y"]) == 0
    assert "SYSTEM" not in (tmp_path / "y" / "Modelfile").read_text("utf-8")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["to=folder", "system=x"], "system: to=folder has no such option; it is for to=ollama"),
        (["to=ollama", "adapter=true"], "adapter: to=ollama has no such option; it is for to=folder or to=hub"),
        (["to=ollama", "load=bf16"], "load: to=ollama is written at fp32 or fp16"),
    ],
    ids=str,
)
def test_what_ollama_cannot_have_is_a_line(words, line, tmp_path, capfd):
    target = str(shipped())
    capfd.readouterr()
    code = main(["ship", target, *words, f"folder={tmp_path}/x"])
    assert line in refused(code, capfd.readouterr().err) and not list(tmp_path.iterdir())

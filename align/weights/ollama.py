"""`align ship to=ollama`: the Modelfile beside a GGUF file, from which `ollama create` makes a model.

A Modelfile is read line by line. Texts stand in three quotes and have no escapes, so that what they cannot hold is
refused. Replies are drawn as `align chat` draws them: Ollama's own defaults cut unlikely tokens and punish repetition.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import TemplateError

from align.checkpoints.card import licence_of
from align.inference.loaded import Opened
from align.models.chat_template import bare
from align.serving.options import ChatOptions
from align.weights.go_template import Render, Turns, learn
from data_prep.core.errors import UserError
from data_prep.types import Message

FILE = "Modelfile"
CONTEXT = 8192
"""Most tokens of context that are asked for: Ollama takes memory for all of them at once."""
_QUOTES = '"""'


def turns_of(opened: Opened) -> Turns:
    """The chat template as texts around turns.

    Raises:
        UserError: it cannot be said in Go's template language.
    """
    renderer, tokenizer = opened.renderer, opened.tokenizer
    problem = None
    if "date" in renderer.choices:
        problem = "it prints today's date"
    elif after := renderer.reply_edges[1]:
        problem = f"it ends a reply with {after!r}, which Ollama would take for a part of it"
    if problem:
        raise UserError(f"no template for Ollama: {problem}", code="not_for_ollama", hint="to=gguf writes a file")

    def whole(messages: Sequence[Message]) -> str:
        try:
            talk = [message.as_dict() for message in messages]
            return str(tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=False))
        except TemplateError as error:
            raise UserError(str(error), code="bad_template") from None

    return learn(prompt_of(opened), whole, tokenizer.bos_token or "")


def prompt_of(opened: Opened) -> Render:
    """Text of messages and of what asks for a reply: of the very ids that the policy was trained to read."""
    renderer, tokenizer = opened.renderer, opened.tokenizer

    def text(messages: Sequence[Message]) -> str:
        ids = renderer.prompt(messages)
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return text


def name_of(checkpoint: Path) -> str:
    """What the model is called in Ollama: RUN-STAGE, in the letters that it takes."""
    own = f"{checkpoint.resolve().parent.name}-{checkpoint.name}".lower()
    return re.sub(r"[^a-z0-9_.-]+|\.\.+", "-", own).strip("-.")[:100] or "model"


def modelfile(opened: Opened, turns: Turns, file: str, system: str | None) -> str:
    """The text of the Modelfile.

    Args:
        opened: the checkpoint.
        turns: its chat template.
        file: name of the GGUF file beside it.
        system: the system prompt of talks that have none.

    Raises:
        UserError: a text that it cannot hold, or a system prompt for a template that takes none.
    """
    if system and turns.system is None:
        raise UserError("the chat template takes no system message", field="system", hint="leave it out")
    drawn = ChatOptions()
    lines = [
        f"FROM ./{file}",
        f"TEMPLATE {_quoted(turns.go(), 'the chat template')}",
        *([f"SYSTEM {_quoted(system, 'the system prompt')}"] if system else []),
        f"PARAMETER stop {_quoted(opened.tokenizer.decode([opened.renderer.end_token_id]), 'the end of a reply')}",
        f"PARAMETER num_ctx {min(opened.context, CONTEXT)}",
        f"PARAMETER temperature {drawn.temperature}",
        "PARAMETER top_k 0",
        "PARAMETER top_p 1",
        "PARAMETER repeat_penalty 1",
        *([f"LICENSE {_quoted(licence, 'the licence')}"] if (licence := _licence(opened.base_folder)) else []),
    ]
    return "\n".join(lines) + "\n"


def _licence(folder: Path) -> str | None:
    """The licence of the base: its text where the folder has it, else its name."""
    for path in sorted(bare(folder).glob("LICENSE*")):
        text = path.read_text(encoding="utf-8", errors="replace").strip()
        return "".join(char if char.isprintable() or char == "\n" else " " for char in text)
    return licence_of(folder)


def _quoted(text: str, what: str) -> str:
    """A text as a Modelfile has it.

    Raises:
        UserError: it holds three quotes, or a character that Ollama leaves out.
    """
    lost = next((char for char in text if not (char.isprintable() or char in "\n\t")), None)
    if lost or _QUOTES in text:
        found = f"the character {lost!r}" if lost else "three quotes"
        raise UserError(f"a Modelfile cannot hold {found} in {what}", code="not_for_ollama", hint="to=gguf")
    return f"{_QUOTES}{text}{_QUOTES}"

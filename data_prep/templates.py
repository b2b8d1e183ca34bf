"""A chat template as text with known provenance: which characters are control tokens of the template, and which
characters the assistant says.

Message contents are escaped before Jinja sees them: every control string inside a content becomes a private-use
sequence, so that whatever the template does (trim, split, tojson), the control tokens found in the rendered text are
the template's own. Contents are unescaped only after the text has been cut into control tokens and plain sections.
The environment is transformers' sandboxed one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from data_prep.digests import no_template
from data_prep.errors import UserError
from data_prep.types import Message

_OPEN, _CLOSE = "\uf8f4", "\uf8f5"
_MARKED = re.compile(_OPEN + r"(\d+)" + _CLOSE)
_USER, _REPLY = "qzjxu", "qzjxa"
DATE = "26 Jul 2024"  # what Llama 3 templates print when they have no clock: rows must not change with the day
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
Span = tuple[int, int]


class Escapes:
    """Replaces control strings inside contents by private-use sequences, and back."""

    def __init__(self, controls: Iterable[str]) -> None:
        self._strings = [*sorted(set(controls), key=lambda text: (-len(text), text)), _OPEN, _CLOSE]
        self._index = {text: number for number, text in enumerate(self._strings)}
        self._pattern = re.compile("|".join(re.escape(text) for text in self._strings))

    def escape(self, content: str) -> str:
        """`content` without any control string."""
        return self._pattern.sub(lambda found: f"{_OPEN}{self._index[found[0]]}{_CLOSE}", content)

    def unescape(self, text: str) -> str:
        """The original text; halves of a sequence that a template tore apart vanish."""
        if _OPEN not in text and _CLOSE not in text:
            return text
        pieces = _MARKED.split(text)
        for place, piece in enumerate(pieces):
            if place % 2:
                pieces[place] = self._strings[int(piece)]
            else:
                pieces[place] = piece.replace(_OPEN, "").replace(_CLOSE, "")
        return "".join(pieces)


@dataclass(frozen=True)
class Layout:
    """Rendered (still escaped) text, and what each assistant turn says: its span of characters, or why it has none."""

    text: str
    spans: tuple[Span | UserError, ...]


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: a transformers tokenizer with a chat template.

    Attributes:
        controls: control string -> token id. All special tokens, and those added tokens not flagged special that
            the template writes outside the assistant's words (some models keep their role tokens that way).
        reply_prefix, reply_suffix: what the template puts between the generation prompt and the content, and
            between the content and the end token.
        end: the control string that ends an assistant turn.

    Raises:
        UserError: no template, or one whose assistant turn has no end token or does not follow its own
            generation prompt.
    """

    def __init__(self, tokenizer: Any) -> None:
        source = tokenizer.chat_template
        if isinstance(source, dict):
            source = source.get("default")
        if not source:
            raise no_template(str(getattr(tokenizer, "name_or_path", "") or "") or None)
        self.source: str = source
        self.has_markers = bool(GENERATION.search(source))
        self._names = dict(tokenizer.special_tokens_map)
        self.prints_date = "strftime_now" in source
        if self.prints_date and "date_string" in source:
            self.prints_date = False
            self._names["date_string"] = DATE
        added = {str(token): (number, token) for number, token in tokenizer.added_tokens_decoder.items()}
        special = {text for text, (_, token) in added.items() if token.special} | set(tokenizer.all_special_tokens)
        self.escapes = Escapes(special)
        single = self._probe([Message("user", _USER), Message("assistant", _REPLY)])
        outside = single[0] + single[2] + self._system_text()
        special |= {text for text in added if text and text in outside}
        self.controls = {text: int(tokenizer.convert_tokens_to_ids(text)) for text in special if text}
        self.swallow_left = {text for text, (_, token) in added.items() if token.lstrip and text in special}
        self.swallow_right = {text for text, (_, token) in added.items() if token.rstrip and text in special}
        self.escapes = Escapes(self.controls)
        longest_first = sorted(self.controls, key=lambda text: (-len(text), text))
        self.pattern = re.compile("|".join(re.escape(text) for text in longest_first) or r"(?!)")
        self._find_reply(single[1], single[2])
        self._trust_markers = self.has_markers and self._markers_follow_prompts()

    # ---------------------------------------------------------------- probing
    def _probe(self, messages: list[Message]) -> tuple[str, str, str]:
        """(prompt, text between the prompt and the reply's content, text after that content)."""
        prompt, _ = self._render(messages[:-1], True)
        full, _ = self._render(messages, False)
        if not full.startswith(prompt):
            raise UserError(
                "the chat template renders an assistant turn otherwise than its generation prompt begins it "
                f"(got {_tail(prompt)!r} for add_generation_prompt)",
                code="template_prompt",
                hint="make add_generation_prompt print exactly what stands before an assistant's words",
            )
        reply = full[len(prompt) :]
        if reply.count(_REPLY) != 1:
            raise UserError(
                f"the chat template prints an assistant's content {reply.count(_REPLY)} times (expected once)",
                code="template_content",
                hint="mend the folder's chat_template.jinja",
            )
        before, after = reply.split(_REPLY)
        return prompt, before, after

    def _system_text(self) -> str:
        """How a system and a tool message look before a user's, as far as the template takes them."""
        texts = []
        for role in ("system", "tool"):
            try:
                texts.append(self._render([Message(role, _USER), Message("user", _USER)], True)[0])
            except UserError:
                continue
        return "".join(texts)

    def _find_reply(self, before: str, after: str) -> None:
        """Set prefix, suffix and end token: the last control token that follows replies inside and at the end alike."""
        ends = list(self.pattern.finditer(after))
        asked, said = Message("user", _USER), Message("assistant", _REPLY)
        try:
            inside = self._render([asked, said, asked], False)[0].rpartition(_REPLY)[2]
            both = zip(after, inside, strict=False)
            alike = next((place for place, (a, b) in enumerate(both) if a != b), min(len(after), len(inside)))
            ends = [found for found in ends if found.end() <= alike] or ends[:1]
        except UserError:  # a template for single turns
            ends = ends[:1]
        if not ends:
            raise UserError(
                f"the chat template ends an assistant turn without an end token (got {after!r} after the content)",
                code="template_end",
                hint="write eos_token, or another special token, right after the assistant's content",
            )
        self.reply_prefix = before
        self.reply_suffix = after[: ends[-1].start()]
        self.end = ends[-1][0]
        self._ends = len(self.pattern.findall(self.reply_suffix)) + 1

    def _markers_follow_prompts(self) -> bool:
        """Whether generation marks begin at the end of the generation prompt, over two turns."""
        messages = [Message("user", _USER), Message("assistant", _REPLY)] * 2
        text, marks = self._render(messages, False)
        if len(marks) != 2:
            return False
        turns = zip((1, 3), marks, strict=True)
        return all(text[: mark[0]] == self._render(messages[:turn], True)[0] for turn, mark in turns)

    # -------------------------------------------------------------- rendering
    def _render(self, messages: Sequence[Message], generation_prompt: bool) -> tuple[str, list[Span]]:
        """Jinja's text of escaped messages, and the spans of its generation marks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        chat = [{"role": message.role, "content": self.escapes.escape(message.content)} for message in messages]
        try:
            rendered: Any = render_jinja_template(
                conversations=[chat],
                chat_template=self.source,
                add_generation_prompt=generation_prompt,
                return_assistant_tokens_mask=self.has_markers,
                **self._names,
            )
        except Exception as problem:
            roles = ", ".join(message.role for message in messages) or "none"
            raise UserError(
                f"the chat template refuses this conversation: {problem} (roles: {roles})", code="template_refuses"
            ) from problem
        texts, marks = rendered
        return texts[0], [(int(start), int(end)) for start, end in marks[0]] if marks else []

    def layout(self, messages: Sequence[Message], generation_prompt: bool = False) -> Layout:
        """Render messages and find what each assistant turn says, its end token included.

        A span starts where the generation prompt of its turn ends, and ends with the template's end token. Generation
        marks save rendering every prompt again, and a turn they leave out is an error to train on.

        Raises:
            UserError: the template refuses the messages.
        """
        text, marks = self._render(messages, generation_prompt)
        turns = [place for place, message in enumerate(messages) if message.role == "assistant"]
        trusted = self._trust_markers and len(marks) == len(turns)
        starts: list[int | None] = [mark[0] for mark in marks] if trusted else [None] * len(turns)
        pairs = zip(turns, starts, strict=True)
        return Layout(text, tuple(self._span(text, marks, messages[:turn], start) for turn, start in pairs))

    def _span(self, text: str, marks: Sequence[Span], before: Sequence[Message], start: int | None) -> Span | UserError:
        """The span of the assistant turn that follows the messages `before`; an error if it cannot be trained on."""
        if start is None:
            prompt, _ = self._render(before, True)
            if not text.startswith(prompt):
                return _turn_problem(len(before), "renders it otherwise inside the conversation than as a reply")
            start = len(prompt)
        begin = start + len(self.reply_prefix) if text.startswith(self.reply_prefix, start) else start
        found = list(islice(self.pattern.finditer(text, begin), self._ends))
        if len(found) < self._ends or found[-1][0] != self.end:
            return _turn_problem(len(before), f"ends it without the end token {self.end}")
        end = found[-1].end()
        if self.has_markers and not any(mark[0] < end and mark[1] >= start for mark in marks):
            return _turn_problem(len(before), "puts no generation mark around it")
        return start, end


def _turn_problem(turn: int, what: str) -> UserError:
    return UserError(
        f"the assistant's message {turn + 1} cannot be trained on: the chat template {what}",
        code="template_turn",
        hint="set train: false on it, or use a chat_template.jinja that treats all assistant turns alike",
    )


def _tail(text: str) -> str:
    return text if len(text) <= 40 else "..." + text[-40:]

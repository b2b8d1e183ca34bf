"""A chat template as text with known provenance: which characters are control tokens of the template, and which
characters the assistant says.

Message contents are escaped before Jinja sees them: every control string inside a content becomes a private-use
sequence, so that whatever the template does (trim, split, tojson), the control tokens found in the rendered text are
the template's own. Contents are unescaped only after the text has been cut into control tokens and plain sections.
The environment is transformers' sandboxed one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from data_prep.core.errors import UserError
from data_prep.rendering.digests import no_template
from data_prep.rendering.escapes import Escapes
from data_prep.rendering.training_templates import training_twin
from data_prep.types import Message

_USER, _REPLY = "qzjxu", "qzjxa"
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}
_CALL: dict[str, Any] = {"name": "qzjxc", "arguments": {"qzjxp": "qzjxv"}, "id": "qzjxi0000"}
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "qzjxt", "description": "x", "parameters": _NO_PARAMETERS},
}
_AS_TEXT = "set options.tools=text to write tools out as plain text, or use a chat_template.jinja that prints them"
_SORTS = {
    "system": ("system messages", "use a chat_template.jinja that prints them, or leave them out of the rows"),
    "tools": ("the tools", _AS_TEXT),
    "calls": ("tool calls", _AS_TEXT),
    "calls in one turn": ("all but one of a turn's tool calls", _AS_TEXT),
    "words beside calls": ("what is said beside a tool call", _AS_TEXT),
    "tool": ("the results of tools", _AS_TEXT),
}
DATE = "26 Jul 2024"  # what Llama 3 templates print when they have no clock: rows must not change with the day
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
Span = tuple[int, int]
Tools = Sequence[Mapping[str, Any]]


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
        parts: whether contents are given as lists of parts (templates of models that see).
        switches: variables set for the template.
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
        self._tokenizer = tokenizer
        self.has_markers = bool(GENERATION.search(source))
        self._names = dict(tokenizer.special_tokens_map)
        self._printed: set[str] = set()
        self.prints_date = "strftime_now" in source
        if self.prints_date and "date_string" in source:
            self.prints_date = False
            self._names["date_string"] = DATE
        added = {str(token): (number, token) for number, token in tokenizer.added_tokens_decoder.items()}
        special = {text for text, (_, token) in added.items() if token.special} | set(tokenizer.all_special_tokens)
        self.escapes = Escapes(special)
        single = self._find_way()
        outside = single[0] + single[2] + self._system_text()
        special |= {text for text in added if text and text in outside}
        self.controls = {text: int(tokenizer.convert_tokens_to_ids(text)) for text in special if text}
        self.swallow_left = {text for text, (_, token) in added.items() if token.lstrip and text in special}
        self.swallow_right = {text for text, (_, token) in added.items() if token.rstrip and text in special}
        self.escapes = Escapes(self.controls)
        longest_first = sorted(self.controls, key=lambda text: (-len(text), text))
        self.pattern = re.compile("|".join(re.escape(text) for text in longest_first) or r"(?!)")
        try:
            self._find_reply(single[1], single[2])
        except UserError as problem:
            raise self._with_twin(problem) from None
        self.trusts_marks = self.has_markers and self._markers_follow_prompts()

    # ---------------------------------------------------------------- probing
    def _find_way(self) -> tuple[str, str, str]:
        """Parts of a rendered question and reply, in the first way in which the template can be trained with.

        Contents are text, or lists of parts for templates that know nothing else; a template whose generation prompt
        opens a thought that replies do not have is asked for replies without thoughts.

        Raises:
            UserError: no way does; what is wrong with the first.
        """
        problems = []
        switches: list[dict[str, Any]] = [
            {},
            *([{"enable_thinking": False}] if "enable_thinking" in self.source else []),
        ]
        for self.parts, self.switches in ((parts, switch) for parts in (False, True) for switch in switches):
            try:
                return self._probe([Message("user", _USER), Message("assistant", _REPLY)])
            except UserError as problem:
                problems.append(problem)
        raise self._with_twin(problems[0])

    def _with_twin(self, problem: UserError) -> UserError:
        """The problem, with the training form of this template as its hint where TRL is installed and has one."""
        if self._twin:
            problem.hint = f"TRL has a form of it for training: set model.template={self._twin}"
        return problem

    def _works(self, twin: Path) -> bool:
        other = copy(self._tokenizer)
        other.chat_template = twin.read_text(encoding="utf-8")
        try:
            ChatTemplate(other)
        except UserError:
            return False
        return True

    def _probe(self, messages: list[Message]) -> tuple[str, str, str]:
        """(prompt, text between the prompt and the reply's content, text after that content)."""
        prompt, _ = self._render(messages[:-1], True)
        full, _ = self._render(messages, False)
        if not full.startswith(prompt):
            raise UserError(
                "the chat template renders an assistant turn otherwise than its generation prompt begins it "
                f"(got {_tail(prompt)!r} for add_generation_prompt)",
                code="template_prompt",
                hint="set model.template=PATH to one whose add_generation_prompt prints what stands before a reply",
            )
        reply = full[len(prompt) :]
        if reply.count(_REPLY) != 1:
            raise UserError(
                f"the chat template prints an assistant's content {reply.count(_REPLY)} times (expected once)",
                code="template_content",
                hint="set model.template to chatml, plain or a PATH",
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
                hint="set model.template=PATH to one that writes eos_token, or another special token, right after it",
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
    def _chat(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Messages as templates know them, with every text escaped."""
        chat = []
        for message in messages:
            text = self.escapes.escape(message.content)
            content = [{"type": "text", "text": text}] if self.parts else text
            said: dict[str, Any] = {"role": message.role, "content": content}
            if message.calls:
                said["tool_calls"] = [self._call(call) for call in message.calls]
            if message.name is not None:
                said["name"] = self.escapes.escape(str(message.name))
            if message.call_id is not None:
                said["tool_call_id"] = self.escapes.escape(str(message.call_id))
            chat.append(said)
        return chat

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        function = self.escapes.escape_all({"name": call["name"], "arguments": call["arguments"]})
        identity = {"id": self.escapes.escape(call["id"])} if "id" in call else {}
        return {**identity, "type": "function", "function": function}

    def _render(
        self, messages: Sequence[Message], generation_prompt: bool, tools: Tools = ()
    ) -> tuple[str, list[Span]]:
        """Jinja's text of escaped messages, and the spans of its generation marks."""
        try:
            found, marks = self._jinja(self._chat(messages), self.escapes.escape_all(tools) or None, generation_prompt)
        except Exception as problem:
            roles = ", ".join(message.role for message in messages) or "none"
            raise UserError(
                f"the chat template refuses this conversation: {problem} (roles: {roles})",
                code="template_refuses",
                hint=_refused_hint(messages, tools),
            ) from problem
        return found, marks

    def _jinja(self, chat: list[dict[str, Any]], tools: Any, generation_prompt: bool) -> tuple[str, list[Span]]:
        """What transformers' render_jinja_template does for one chat of plain values, at a third of the time."""
        from transformers.utils import chat_template_utils

        compiled = chat_template_utils._compile_jinja_template(self.source)  # compiles once
        given = {
            **compiled.environment.globals,
            "messages": chat,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": generation_prompt,
            **self._names,
            **self.switches,
        }
        written = compiled.root_render_func(compiled.new_context(given, shared=True))  # shared: not copied once more
        if not self.has_markers:
            return "".join(written), []
        blocks: list[str] = []
        marks: list[Span] = []
        with compiled.environment.activate_tracker(blocks, marks):
            for block in written:
                blocks.append(block)  # one by one: the marks are counted from what stands there
        return "".join(blocks), marks

    def _check_printed(self, messages: Sequence[Message], tools: Tools) -> None:
        """Refuse what the template would leave out in silence; each sort of thing is tried once.

        Raises:
            UserError: says what, and what to set.
        """
        sorts = {message.role for message in messages} & {"system", "tool"}
        calling = [message for message in messages if message.calls]
        sorts |= {"calls"} if calling else set()
        sorts |= {"calls in one turn"} if any(len(message.calls) > 1 for message in calling) else set()
        sorts |= {"words beside calls"} if any(message.content.strip() for message in calling) else set()
        sorts |= {"tools"} if tools else set()
        for sort in sorted(sorts - self._printed):
            if self._leaves_out(sort):
                raise UserError(
                    f"the chat template leaves out {_SORTS[sort][0]}", code="template_leaves_out", hint=_SORTS[sort][1]
                )
            self._printed.add(sort)

    def _leaves_out(self, sort: str) -> bool:
        asked = Message("user", _USER)
        called = Message("assistant", "", calls=(_CALL,))
        probe = "qzjxs"
        twice = replace(called, calls=(_CALL, {**_CALL, "name": probe, "id": "qzjxi0001"}))
        worded = replace(called, content=probe)
        answered = Message("tool", probe, name=_CALL["name"], call_id=_CALL["id"])
        tried: dict[str, tuple[list[list[Message]], Tools, str]] = {
            "system": ([[Message("system", probe), asked]], (), probe),
            "tools": ([[asked]], (_TOOL,), "qzjxt"),
            "calls": ([[asked, called], [asked, called, answered]], (), _CALL["name"]),
            "calls in one turn": ([[asked, twice], [asked, twice, answered]], (), probe),
            "words beside calls": ([[asked, worded], [asked, worded, answered]], (), probe),
            "tool": ([[asked, called, answered]], (), probe),
        }
        chats, tools, mark = tried[sort]
        for messages in chats:
            try:
                return mark not in self._render(messages, True, tools)[0]
            except UserError:
                continue
        return False  # it complains itself where it matters

    def layout(self, messages: Sequence[Message], generation_prompt: bool = False, tools: Tools = ()) -> Layout:
        """Render messages and find what each assistant turn says, its end token included.

        A span starts where the generation prompt of its turn ends, and ends with the template's end token. Generation
        marks save rendering every prompt again, and a turn they leave out is an error to train on.

        Raises:
            UserError: the template refuses the messages.
        """
        if tools or any(message.calls or message.role not in ("user", "assistant") for message in messages):
            self._check_printed(messages, tools)
        text, marks = self._render(messages, generation_prompt, tools)
        turns = [place for place, message in enumerate(messages) if message.role == "assistant"]
        trusted = self.trusts_marks and len(marks) == len(turns)
        starts: list[int | None] = [mark[0] for mark in marks] if trusted else [None] * len(turns)
        spans: list[Span | UserError] = []
        for turn, start in zip(turns, starts, strict=True):
            if start is None:
                start = self._start(text, messages[:turn], tools)
            called = self._end_of_call(text, start, messages[: turn + 1], tools) if messages[turn].calls else None
            if start < 0 or (called is None and not self._as_reply(text, start, messages[turn])):
                spans.append(self._turn_problem(turn, "renders it otherwise inside the conversation than as a reply"))
            else:
                spans.append(self._span(text, marks, turn, start, called))
        return Layout(text, tuple(spans))

    def _start(self, text: str, before: Sequence[Message], tools: Tools) -> int:
        """Where the turn behind these messages starts: where their prompt ends; -1 if the text does not begin so.

        Many templates cannot be asked for a prompt of no messages. A turn that stands first starts behind the first
        generation prompt of the text: contents are escaped, so that none of them spells one.
        """
        try:
            prompt, _ = self._render(before, True, tools)
        except UserError:
            if before:
                raise
            prompt = None
        if prompt is not None and (text.startswith(prompt) or before):
            return len(prompt) if text.startswith(prompt) else -1
        asked = [Message("user", _USER)]
        opened, closed = self._render(asked, True)[0], self._render(asked, False)[0]
        opening = opened.removeprefix(closed) if opened.startswith(closed) else ""
        found = text.find(opening) if opening else -1
        return found + len(opening) if found >= 0 else -1

    def _as_reply(self, text: str, start: int, said: Message) -> bool:
        """Whether a turn opens as a reply of that content does (contents with thoughts may change the opening)."""
        if text.startswith(self.reply_prefix, start):
            return True
        asked = Message("user", _USER)
        prompt, full = self._render([asked], True)[0], self._render([asked, said], False)[0]
        return full.startswith(prompt) and text.startswith(self._until_end(full[len(prompt) :]), start)

    def _until_end(self, text: str) -> str:
        return text[: text.rfind(self.end) + len(self.end)] if self.end in text else text

    def _end_of_call(self, text: str, start: int, until: Sequence[Message], tools: Tools) -> int:
        """Where a turn that calls tools ends: behind its last end token, or its last control token; 0 if it has none.

        Templates write control tokens inside such turns, and some end them otherwise than a reply.
        """
        alone, _ = self._render(until, False, tools)
        same = next((p for p, (a, b) in enumerate(zip(alone, text, strict=False)) if a != b), len(alone))
        found = list(self.pattern.finditer(text, start, same))
        ends = [one for one in found if one[0] == self.end] or found
        return ends[-1].end() if ends else 0

    def _span(self, text: str, marks: Sequence[Span], turn: int, start: int, called: int | None) -> Span | UserError:
        """The span of an assistant turn that starts at `start`; an error if it cannot be trained on."""
        if called is not None:
            end = called
        else:
            begin = start + len(self.reply_prefix) if text.startswith(self.reply_prefix, start) else start
            found = list(islice(self.pattern.finditer(text, begin), self._ends))
            end = found[-1].end() if len(found) == self._ends and found[-1][0] == self.end else 0
        if end <= start:
            return self._turn_problem(turn, f"ends it without the end token {self.end}")
        if self.has_markers and not any(mark[0] < end and mark[1] >= start for mark in marks):
            return self._turn_problem(turn, "puts no generation mark around it")
        return start, end

    def _turn_problem(self, turn: int, what: str) -> UserError:
        path = str(self._twin) if self._twin else "PATH to one that treats all turns alike"
        return UserError(
            f"the assistant's message {turn + 1} cannot be trained on: the chat template {what}",
            code="template_turn",
            hint=f"set data.train_on=last, or train: false on it, or model.template={path}",
        )

    @cached_property
    def _twin(self) -> Path | None:
        """The training form of this template that TRL has, where TRL is installed and that form can be trained with."""
        twin = training_twin(self.source)
        return twin if twin and self._works(twin) else None


def _refused_hint(messages: Sequence[Message], tools: Tools) -> str | None:
    """What may help against a template that refuses these messages."""
    if tools or any(message.calls or message.role == "tool" for message in messages):
        return _AS_TEXT
    if next((message.role for message in messages if message.role != "system"), "") == "assistant":
        return "the assistant begins: take its first turn out, or use a chat_template.jinja that takes any order"
    return None


def _tail(text: str) -> str:
    return text if len(text) <= 40 else "..." + text[-40:]

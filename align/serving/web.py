"""`align chat --web`: the conversation on a page of this computer's own.

The server keeps nothing: a page sends its conversation with every message, so several pages do not disturb each other.
One reply is computed at a time; the others wait their turn. A choice between two replies to the same words is a label:
it goes into a file of the run, which is held for that moment alone. `local_page.py` says who may ask.
"""

from __future__ import annotations

import getpass
import json
from collections.abc import AsyncIterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Optional

import anyio
import anyio.to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from align.serving.conversation import Conversation, Ended, Event, Heard, Panel, Said, Turn, broken
from align.serving.labelling import Judgement
from align.serving.labels import Answer, open_labels, pair_key
from align.serving.local_page import LocalPage, asked, body_of, headers
from align.serving.options import ChatOptions
from align.serving.pairs import as_column
from data_prep.core.errors import UserError
from data_prep.types import Message


@dataclass
class Past:
    """An earlier turn as the page remembers it."""

    message: str = ""
    replies: dict[str, str] = field(default_factory=dict)


@dataclass
class Spoken:
    """A message with everything said before it."""

    message: str = ""
    turns: list[Past] = field(default_factory=list)
    system: Optional[str] = None


@dataclass
class Asked(Spoken):
    """A message to be answered."""

    compare: bool = False
    temperature: float = 0.7
    max_new_tokens: float = 256


@dataclass
class Chosen(Spoken, Judgement):
    """A choice between the replies of two policies to a message: the first is a, the second b."""

    replies: dict[str, str] = field(default_factory=dict)
    rewards: dict[str, float] = field(default_factory=dict)


class Page(LocalPage):
    """The application: the page itself, and replies as a stream of JSON lines.

    Args:
        panel: who speaks.
        options: how replies are drawn at first.
        compare: whether all policies answer at first.
        port: where it is served.
        labels: file of the choices between two replies; None for no such choices.
    """

    def __init__(
        self, panel: Panel, options: ChatOptions, compare: bool, port: int, labels: Path | None = None
    ) -> None:
        super().__init__("align chat", "chat.html.jinja", port)
        self.panel = panel
        self.options = options
        self.compare = compare
        self.labels = labels
        self._turn = anyio.Lock()

    def routes(self) -> list[Route]:
        """Replies, and choices between them."""
        return [Route("/reply", self.reply, methods=["POST"]), Route("/vote", self.vote, methods=["POST"])]

    def content(self) -> dict[str, Any]:
        """Who speaks and judges, and how replies are drawn at first."""
        return {
            "label": self.panel.label,
            "judge": self.panel.judge,
            "models": self.panel.names,
            "options": self.options,
            "compare": self.compare,
            "labels": self.labels and self.labels.name,
            "labeller": _own_name(),
        }

    async def reply(self, request: Request) -> Response:
        """A message answered; the stream ends early when the page goes away."""
        if (refusal := self.refusal(request)) is not None:
            return refusal
        body = await body_of(request)
        return StreamingResponse(self._lines(body), media_type="application/x-ndjson", headers=headers())

    async def vote(self, request: Request) -> Response:
        """A choice written, or taken back; answers how many labels the file holds, or what is wrong."""
        if (refusal := self.refusal(request)) is not None:
            return refusal
        try:
            return JSONResponse({"labels": self._kept(asked(Chosen, await body_of(request)))}, headers=headers())
        except UserError as problem:
            return JSONResponse({"problem": str(problem)}, 422, headers=headers())

    def _kept(self, given: Chosen) -> int:
        """Put a choice in the place of the labeller's earlier one on the same pair.

        Raises:
            UserError: no file, not two policies that have seen the same, or the file is in other hands.
        """
        if self.labels is None:
            raise UserError("this chain is in no run folder that could keep choices", code="no_labels")
        if len(given.replies) != 2 or set(given.replies) - set(self.panel.names):
            raise UserError(f"a choice is between two of: {', '.join(self.panel.names)}", code="bad_value")
        talk, main = self._remembered(given), self.panel.main
        first, second = (talk.messages(name, main) for name in given.replies)
        if not all(map(isfinite, given.rewards.values())):
            raise UserError("rewards are finite numbers", field="rewards", code="bad_value")
        if any(map(broken, [given.message, *given.replies.values(), *(one.content for one in first)])):
            raise UserError("a text holds half of a character", code="bad_text")
        if first != second:
            raise UserError("the two have seen different replies before: they answer no common prompt", code="no_pair")
        prompt = as_column((*first, Message("user", given.message)))
        answers = [
            Answer(text, name, self.panel.digest(name), given.rewards.get(name)) for name, text in given.replies.items()
        ]
        with open_labels(str(self.labels)) as file:
            file.take_back(given.labeller, {pair_key(prompt, *given.replies.values())})
            if given.choice is not None:
                file.add(given.label(prompt, given.choice, dict(zip(("a", "b"), answers, strict=True))))
            return len(file.labels)

    def _remembered(self, given: Spoken) -> Conversation:
        """The conversation before the message."""
        if not given.message.strip():
            raise UserError("an empty message", code="bad_value")
        turns = []
        for past in given.turns:
            if not past.replies or set(past.replies) - set(self.panel.names):
                raise UserError(f"turns are answered by: {', '.join(self.panel.names)}", code="bad_value")
            turns.append(Turn(past.message, {name: Said(text, True, 1, None) for name, text in past.replies.items()}))
        return Conversation(given.system, turns)

    async def _lines(self, body: bytes) -> AsyncIterator[str]:
        """The events of a reply, or what is wrong with the request."""
        try:
            given = asked(Asked, body)
            talk = self._remembered(given)
            options = self.options.changed(temperature=given.temperature, max_new_tokens=given.max_new_tokens)
            names = self.panel.names if given.compare else [self.panel.main]
            if self._turn.locked():
                yield _line(kind="remark", text="waiting: another page's reply comes first")
            async with self._turn:
                with closing(self.panel.answer(talk, given.message, names, options, self.leaving.is_set)) as events:
                    while event := await anyio.to_thread.run_sync(next, events, None):
                        yield _told(event)
        except UserError as problem:
            yield _line(kind="problem", text=str(problem))


def _own_name() -> str:
    """Who is at this computer, as the name beside choices to begin with."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may have no name for its user
        return "me"


def _told(event: Event) -> str:
    """An event as the page reads it."""
    if isinstance(event, Heard):
        return _line(kind="heard", model=event.model, text=event.text)
    if isinstance(event, Ended):
        return _line(kind="ended", model=event.model, said=asdict(event.said))
    return _line(kind="remark", text=event.notice)


def _line(**content: Any) -> str:
    return json.dumps(content) + "\n"

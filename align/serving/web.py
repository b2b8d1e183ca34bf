"""`align chat --web`: the conversation on a page of this computer's own.

The server keeps nothing: a page sends its conversation with every message, so several pages do not disturb each other.
One reply is computed at a time; the others wait their turn. `local_page.py` says who may ask.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any, Optional

import anyio
import anyio.to_thread
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from align.serving.conversation import Conversation, Ended, Event, Heard, Panel, Said, Turn
from align.serving.local_page import LocalPage, asked, body_of, headers
from align.serving.options import ChatOptions
from data_prep.core.errors import UserError


@dataclass
class Past:
    """An earlier turn as the page remembers it."""

    message: str = ""
    replies: dict[str, str] = field(default_factory=dict)


@dataclass
class Asked:
    """What the page sends: a message with everything said before it."""

    message: str = ""
    turns: list[Past] = field(default_factory=list)
    compare: bool = False
    system: Optional[str] = None
    temperature: float = 0.7
    max_new_tokens: float = 256


class Page(LocalPage):
    """The application: the page itself, and replies as a stream of JSON lines."""

    def __init__(self, panel: Panel, options: ChatOptions, compare: bool, port: int) -> None:
        super().__init__("align chat", "chat.html.jinja", port)
        self.panel = panel
        self.options = options
        self.compare = compare
        self._turn = anyio.Lock()

    def routes(self) -> list[Route]:
        """Replies."""
        return [Route("/reply", self.reply, methods=["POST"])]

    def content(self) -> dict[str, Any]:
        """Who speaks and judges, and how replies are drawn at first."""
        return {
            "label": self.panel.label,
            "judge": self.panel.judge,
            "models": self.panel.names,
            "options": self.options,
            "compare": self.compare,
        }

    async def reply(self, request: Request) -> Response:
        """A message answered; the stream ends early when the page goes away."""
        if (refusal := self.refusal(request)) is not None:
            return refusal
        body = await body_of(request)
        return StreamingResponse(self._lines(body), media_type="application/x-ndjson", headers=headers())

    def _remembered(self, given: Asked) -> tuple[Conversation, ChatOptions]:
        """The conversation before the message, and how to reply."""
        if not given.message.strip():
            raise UserError("an empty message", code="bad_value")
        turns = []
        for past in given.turns:
            if not past.replies or set(past.replies) - set(self.panel.names):
                raise UserError(f"turns are answered by: {', '.join(self.panel.names)}", code="bad_value")
            turns.append(Turn(past.message, {name: Said(text, True, 1, None) for name, text in past.replies.items()}))
        options = self.options.changed(temperature=given.temperature, max_new_tokens=given.max_new_tokens)
        return Conversation(given.system, turns), options

    async def _lines(self, body: bytes) -> AsyncIterator[str]:
        """The events of a reply, or what is wrong with the request."""
        try:
            given = asked(Asked, body)
            talk, options = self._remembered(given)
            names = self.panel.names if given.compare else [self.panel.main]
            if self._turn.locked():
                yield _line(kind="remark", text="waiting: another page's reply comes first")
            async with self._turn:
                with closing(self.panel.answer(talk, given.message, names, options, self.leaving.is_set)) as events:
                    while event := await anyio.to_thread.run_sync(next, events, None):
                        yield _written(event)
        except UserError as problem:
            yield _line(kind="problem", text=str(problem))


def _written(event: Event) -> str:
    """An event as the page reads it."""
    if isinstance(event, Heard):
        return _line(kind="heard", model=event.model, text=event.text)
    if isinstance(event, Ended):
        return _line(kind="ended", model=event.model, said=asdict(event.said))
    return _line(kind="remark", text=event.notice)


def _line(**content: Any) -> str:
    return json.dumps(content) + "\n"

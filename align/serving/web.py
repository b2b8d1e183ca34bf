"""`align chat --web`: the conversation on a page of this computer's own.

The server listens on 127.0.0.1 alone, answers only requests that name it by that host, carry the token of this start
and come from its own page, and keeps nothing: a page sends its conversation with every message, so several pages do
not disturb each other. One reply is computed at a time; the others wait their turn.
"""

from __future__ import annotations

import json
import secrets
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

from align.serving.conversation import Conversation, Ended, Event, Heard, Panel, Said, Turn
from align.serving.options import ChatOptions
from data_prep.core.errors import UserError
from data_prep.core.options import build

try:
    import anyio
    import anyio.to_thread
    import uvicorn
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
    from starlette.routing import Route
except ImportError as _problem:
    raise UserError(
        f"the page needs the package {_problem.name}",
        hint="in the clone: pip install -e '.[chat]'",
        code="missing_extra",
    ) from _problem

HOST = "127.0.0.1"
PORT = 8417
LONGEST = 2_000_000
"""Bytes of a request; a conversation of any context is shorter."""
INTERRUPTED = 130


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


class Page:
    """The application: the page itself, and replies as a stream of JSON lines."""

    def __init__(self, panel: Panel, options: ChatOptions, compare: bool, port: int) -> None:
        self.panel = panel
        self.options = options
        self.compare = compare
        self.origins = {f"http://{host}:{port}" for host in (HOST, "localhost")}
        self.token = secrets.token_urlsafe(24)
        self.leaving = threading.Event()
        self._turn = anyio.Lock()
        self._template = _template()
        self.app = Starlette(
            routes=[Route("/", self.page), Route("/reply", self.reply, methods=["POST"])],
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"], www_redirect=False)],
        )

    async def page(self, request: Request) -> Response:
        """The page, for who knows the token."""
        if not self._knows(request.query_params.get("token")):
            return _refusal("open the whole address that align chat printed, with its token")
        nonce = secrets.token_urlsafe(16)
        html = self._template.render(
            label=self.panel.label,
            judge=self.panel.judge,
            models=self.panel.names,
            options=self.options,
            compare=self.compare,
            nonce=nonce,
        )
        return HTMLResponse(html, headers=_headers(nonce))

    async def reply(self, request: Request) -> Response:
        """A message answered; the stream ends early when the page goes away."""
        origin = request.headers.get("origin")
        if origin is not None and origin not in self.origins:
            return _refusal("this is another page's request")
        if not self._knows(request.headers.get("x-align-token")):
            return _refusal("the server was started anew; open the address that it printed")
        body = await _body(request)
        return StreamingResponse(self._lines(body), media_type="application/x-ndjson", headers=_headers())

    def _knows(self, token: str | None) -> bool:
        return token is not None and secrets.compare_digest(token.encode(), self.token.encode())

    def _remembered(self, asked: Asked) -> tuple[Conversation, ChatOptions]:
        """The conversation before the message, and how to reply."""
        if not asked.message.strip():
            raise UserError("an empty message", code="bad_value")
        turns = []
        for past in asked.turns:
            if not past.replies or set(past.replies) - set(self.panel.names):
                raise UserError(f"turns are answered by: {', '.join(self.panel.names)}", code="bad_value")
            turns.append(Turn(past.message, {name: Said(text, True, 1, None) for name, text in past.replies.items()}))
        options = self.options.changed(temperature=asked.temperature, max_new_tokens=asked.max_new_tokens)
        return Conversation(asked.system, turns), options

    async def _lines(self, body: bytes) -> AsyncIterator[str]:
        """The events of a reply, or what is wrong with the request."""
        try:
            asked = _asked(body)
            talk, options = self._remembered(asked)
            names = self.panel.names if asked.compare else [self.panel.main]
            if self._turn.locked():
                yield _line(kind="remark", text="waiting: another page's reply comes first")
            async with self._turn:
                with closing(self.panel.answer(talk, asked.message, names, options, self.leaving.is_set)) as events:
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


async def _body(request: Request) -> bytes:
    """The request's body; of one that is too long, enough to be refused."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > LONGEST:
            break
    return body


def _asked(body: bytes) -> Asked:
    if len(body) > LONGEST:
        raise UserError(f"the conversation is longer than {LONGEST:,} bytes", hint="clear it", code="too_long")
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise UserError("the request is not JSON", code="bad_value") from None
    return build(Asked, content, "")


def _headers(nonce: str = "") -> dict[str, str]:
    """What a browser is told on every answer: ask no other host, run no script but the page's own, keep nothing."""
    own = f"'nonce-{nonce}'" if nonce else "'none'"
    policy = (
        f"default-src 'none'; script-src {own}; style-src {own}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {
        "Content-Security-Policy": policy,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "no-store",
    }


def _refusal(text: str) -> Response:
    return PlainTextResponse(text, 403, _headers())


def _template() -> Any:
    import jinja2

    loader = jinja2.FileSystemLoader([Path(__file__).parent, Path(__file__).parent.parent / "report"])
    return jinja2.Environment(loader=loader, autoescape=True).get_template("chat.html.jinja")


class Server(uvicorn.Server):
    """uvicorn for one page; when it is to end, so does the reply at hand."""

    def __init__(self, page: Page) -> None:
        options: dict[str, Any] = {"log_level": "critical", "access_log": False, "lifespan": "off", "ws": "none"}
        super().__init__(uvicorn.Config(page.app, timeout_graceful_shutdown=1, **options))
        self._leaving = page.leaving

    def handle_exit(self, sig: int, frame: Any) -> None:
        self._leaving.set()
        super().handle_exit(sig, frame)


def listen(port: str | None) -> socket.socket:
    """A socket on 127.0.0.1; port 0 takes any free one.

    Raises:
        UserError: no port number, or one that is taken or not to be had.
    """
    number = PORT if port is None else int(port) if port.isdecimal() else -1
    if not 0 <= number <= 65535:
        raise UserError(f"not a port (got {port!r}; expected 0 to 65535)", field="--port", code="bad_flag")
    found = socket.socket()
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((HOST, number))
        found.listen()
    except OSError as problem:
        found.close()
        reason = (problem.strerror or str(problem)).lower()
        hint = "choose another: --port 0 takes any free one"
        raise UserError(f"port {number}: {reason}", field="--port", hint=hint, code="port_taken") from None
    return found


def serve(page: Page, found: socket.socket) -> int:
    """Serve the page until Ctrl-C; returns the exit code."""
    try:
        Server(page).run(sockets=[found])
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0

"""What the local pages of `align chat` and `align label` share: who may ask, what a browser is told, how one is served.

The server listens on 127.0.0.1 alone and answers only requests that name it by that host, carry the token of this start
and come from its own page.
"""

from __future__ import annotations

import json
import secrets
import socket
import threading
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jinja2
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route

from data_prep.core.errors import UserError
from data_prep.core.options import build

HOST = "127.0.0.1"
PORT = 8417
LONGEST = 2_000_000
"""Bytes of a request; a conversation of any context is shorter."""
INTERRUPTED = 130
T = TypeVar("T")


class LocalPage:
    """One page for who knows its token, and the requests of that page. Subclasses add routes and fill the template.

    Args:
        command: what printed the address, for refusals.
        template: file of the page, beside this one.
        port: where it is served.
    """

    def __init__(self, command: str, template: str, port: int) -> None:
        self.command = command
        self.origins = {f"http://{host}:{port}" for host in (HOST, "localhost")}
        self.token = secrets.token_urlsafe(24)
        self.address = f"http://{HOST}:{port}/?token={self.token}"
        self.leaving = threading.Event()
        """Set when the server is to end."""
        self._template = _template(template)
        self.app = Starlette(
            routes=[Route("/", self._page), *self.routes()],
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"], www_redirect=False)],
        )

    def routes(self) -> list[Route]:
        """What the page asks for."""
        raise NotImplementedError

    def content(self) -> dict[str, Any]:
        """What the template shows."""
        raise NotImplementedError

    def refusal(self, request: Request) -> Response | None:
        """The answer to a request that does not come from the page itself; None: it does."""
        origin = request.headers.get("origin")
        if origin is not None and origin not in self.origins:
            return _refusal("this is another page's request")
        if not self._knows(request.headers.get("x-align-token")):
            return _refusal("the server was started anew; open the address that it printed")
        return None

    async def _page(self, request: Request) -> Response:
        if not self._knows(request.query_params.get("token")):
            return _refusal(f"open the whole address that {self.command} printed, with its token")
        nonce = secrets.token_urlsafe(16)
        return HTMLResponse(self._template.render(**self.content(), nonce=nonce), headers=headers(nonce))

    def _knows(self, token: str | None) -> bool:
        return token is not None and secrets.compare_digest(token.encode(), self.token.encode())


async def body_of(request: Request, longest: int = LONGEST) -> bytes:
    """The request's body; of one that is longer, enough to be refused."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > longest:
            break
    return body


def asked(kind: type[T], body: bytes) -> T:
    """What a request says, as the dataclass `kind`.

    Raises:
        UserError: it is too long, no JSON, or not what is expected.
    """
    if len(body) > LONGEST:
        raise UserError(f"the request is longer than {LONGEST:,} bytes", code="too_long")
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise UserError("the request is not JSON", code="bad_value") from None
    return build(kind, content, "")


def headers(nonce: str = "") -> dict[str, str]:
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
    return PlainTextResponse(text, 403, headers())


def _template(name: str) -> jinja2.Template:
    loader = jinja2.FileSystemLoader([Path(__file__).parent, Path(__file__).parent.parent / "report"])
    return jinja2.Environment(loader=loader, autoescape=True).get_template(name)


class Application(Protocol):
    """What can be served."""

    @property
    def app(self) -> Starlette:
        """Its routes."""

    @property
    def leaving(self) -> threading.Event:
        """Set when the server is to end."""


class Server(uvicorn.Server):
    """uvicorn for one application; when it is to end, so do the replies at hand."""

    def __init__(self, page: Application) -> None:
        options: dict[str, Any] = {"log_level": "critical", "access_log": False, "lifespan": "off", "ws": "none"}
        super().__init__(uvicorn.Config(page.app, timeout_graceful_shutdown=1, **options))
        self._leaving = page.leaving

    def handle_exit(self, sig: int, frame: Any) -> None:
        self._leaving.set()
        super().handle_exit(sig, frame)


def listen(port: str | None, host: str = HOST) -> socket.socket:
    """A socket on 127.0.0.1, or on another address of this computer; port 0 takes any free one.

    Raises:
        UserError: no port number, or one that is taken or not to be had.
    """
    number = PORT if port is None else int(port) if port.isdecimal() else -1
    if not 0 <= number <= 65535:
        raise UserError(f"not a port (got {port!r}; expected 0 to 65535)", field="--port", code="bad_flag")
    found = socket.socket()
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, number))
        found.listen()
    except OSError as problem:
        found.close()
        reason = (problem.strerror or str(problem)).lower()
        hint = "choose another: --port 0 takes any free one"
        raise UserError(f"port {number}: {reason}", field="--port", hint=hint, code="port_taken") from None
    return found


def serve(page: Application, found: socket.socket) -> int:
    """Serve an application until Ctrl-C; returns the exit code."""
    try:
        Server(page).run(sockets=[found])
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0

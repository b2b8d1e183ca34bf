"""`align serve`: OpenAI's routes over one engine, for programs on this computer, or for others that know a token.

    GET /health   GET /v1/models   POST /v1/chat/completions   POST /v1/completions

A request is read, checked and rendered, its rows wait for the engine, and a client that goes away takes its rows along.
Mistakes are answered with a 4xx status and one line in OpenAI's form. Browsers' pages are refused: no other origin is
allowed, and on 127.0.0.1 a request must name this computer as its host.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import anyio
import anyio.to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from align.inference.open_batch import Row
from align.serving.engine import Engine, Scoring
from align.serving.local_page import HOST, body_of
from align.serving.openai_reply import Spoken, Wording
from align.serving.openai_request import Asked, ChatRequest, CompletionRequest, asked, read_request
from align.serving.options import ServeOptions
from align.serving.served import Model, Served
from data_prep.core.errors import TrainingStopped, UserError

_OWN_HOSTS = (HOST, "localhost")
_STATUS = {
    "bad_token": 401,
    "other_origin": 403,
    "unknown_model": 404,
    "too_long": 413,
    "busy": 429,
    "leaving": 503,
}
"""Statuses of mistakes; of all others it is 400."""


class Api:
    """The application."""

    def __init__(self, served: Served, engine: Engine, options: ServeOptions) -> None:
        self.served = served
        self.engine = engine
        self.options = options
        self._rendering = anyio.CapacityLimiter(1)
        """Tokenizers work for one thread at a time."""
        self.app = Starlette(
            routes=[
                Route("/health", self.health),
                Route("/v1/models", self._checked(self.models)),
                Route("/v1/models/{name:path}", self._checked(self.model)),
                Route("/v1/chat/completions", self._checked(self.chat), methods=["POST"]),
                Route("/v1/completions", self._checked(self.completion), methods=["POST"]),
            ],
            exception_handlers={HTTPException: _no_route},
        )

    @property
    def leaving(self) -> threading.Event:
        """Set when the server is to end."""
        return self.engine.leaving

    async def health(self, request: Request) -> Response:
        """Whether the server is there, without a token."""
        return JSONResponse({"status": "ok"})

    async def models(self, request: Request) -> Response:
        """Every name that requests may use."""
        return JSONResponse(
            {"object": "list", "data": [_described(name, model) for name, model in self.served.models.items()]}
        )

    async def model(self, request: Request) -> Response:
        """One of them."""
        name = request.path_params["name"]
        return JSONResponse(_described(name, self.served.find(name)))

    async def chat(self, request: Request) -> Response:
        """The next turn of a conversation."""
        return await self._answer(request, ChatRequest)

    async def completion(self, request: Request) -> Response:
        """What follows a text."""
        return await self._answer(request, CompletionRequest)

    # -------------------------------------------------------------------------------------------------- who may ask
    def _checked(self, answer: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """A route that answers who may ask, and says mistakes in OpenAI's form."""

        async def route(request: Request) -> Response:
            try:
                self._check(request)
                return await answer(request)
            except ClientDisconnect:
                return Response(status_code=499)
            except RecursionError:
                return _refusal(UserError("the body is nested too deeply", code="bad_json"))
            except Exception as problem:
                return _refusal(_in_words(problem))

        return route

    def _check(self, request: Request) -> None:
        token, given = self.options.token, request.headers.get("authorization", "")
        if token is not None and not secrets.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise UserError("the token is missing or wrong", code="bad_token", hint="send it as the API key")
        host = request.headers.get("host", "").rpartition("]")[2].split(":")[0]
        if self.options.host in _OWN_HOSTS and host not in _OWN_HOSTS:
            raise UserError("this server answers to 127.0.0.1 and localhost alone", code="other_origin")
        if "origin" in request.headers:
            raise UserError("pages of browsers may not ask", code="other_origin")

    # ------------------------------------------------------------------------------------------------------- answers
    async def _answer(self, request: Request, kind: type[ChatRequest] | type[CompletionRequest]) -> Response:
        body = await body_of(request, self.options.max_bytes)
        if len(body) > self.options.max_bytes:
            raise UserError(f"the body is longer than {self.options.max_bytes:,} bytes", code="too_long")

        def read() -> Asked:
            return asked(read_request(kind, body), self.served, self.options)

        found = await anyio.to_thread.run_sync(read, limiter=self._rendering)
        self.engine.require_room(len(found.rows))
        wording = Wording(found, self.served, secrets.token_hex(12))
        if found.request.stream:
            return _Stream(self._events(wording), found.rows)
        return await _unless_gone(request.receive, self._whole(wording))

    async def _whole(self, wording: Wording) -> Response:
        """The answer in one piece."""
        spoken, found = wording.spoken(), wording.asked
        async for _ in self._growing(spoken):
            pass
        wanted = found.request.best_of or found.request.align.reward
        rewards = await self._rewards(wording, spoken) if wanted else []
        chosen = list(range(len(spoken)))
        if found.request.best_of:
            chosen = [
                place
                for start in range(0, len(spoken), found.each)
                for place in sorted(range(start, start + found.each), key=lambda i: -rewards[i])[: found.request.n]
            ]
        told = [rewards[place] for place in chosen] if found.request.align.reward else []
        return JSONResponse(wording.whole([spoken[place] for place in chosen], spoken, told))

    async def _events(self, wording: Wording) -> AsyncIterator[str]:
        """The answer piece by piece, as server-sent events."""
        spoken, request = wording.spoken(), wording.asked.request
        try:
            for number in range(len(spoken) if wording.chat else 0):
                yield _sent(wording.opening(number))
            async for number, piece in self._growing(spoken):
                over = spoken[number].reason is not None and request.align.reward
                rewards = await self._rewards(wording, [spoken[number]]) if over else []
                yield _sent(wording.event(number, spoken[number], piece, rewards))
            if request.stream_options.include_usage:
                yield _sent(wording.usage_event(spoken))
            yield "data: [DONE]\n\n"
        except Exception as problem:
            said = _in_words(problem)
            yield _sent(_as_json(said, _status(said)))

    async def _growing(self, spoken: Sequence[Spoken]) -> AsyncIterator[tuple[int, str]]:
        """(number, new piece) of rows as they grow, once more for each when it is over."""
        news, loop = asyncio.Event(), asyncio.get_running_loop()

        def grew() -> None:
            with suppress(RuntimeError):  # the loop has ended, and with it whoever asked
                loop.call_soon_threadsafe(news.set)

        for one in spoken:
            one.row.grew = grew
        try:
            self.engine.submit([one.row for one in spoken])
            growing = list(enumerate(spoken))
            while growing:
                await news.wait()
                news.clear()
                for number, one in list(growing):
                    piece = one.more()
                    if one.row.problem is not None:  # asked last: it may have ended the row just before
                        raise one.row.problem
                    if piece or one.reason is not None:
                        yield number, piece
                    if one.reason is not None:
                        growing.remove((number, one))
        finally:
            for one in spoken:
                one.row.left = True

    async def _rewards(self, wording: Wording, spoken: Sequence[Spoken]) -> list[float]:
        """Rewards of replies that are over, by the chain's reward model."""
        done, loop = asyncio.Event(), asyncio.get_running_loop()

        def told() -> None:
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(done.set)

        def pairs() -> list[tuple[Sequence[int], Sequence[int]]]:
            return [(one.row.prompt, wording.scored(one)) for one in spoken]

        judge = str(wording.asked.model.judge)
        scoring = Scoring(judge, await anyio.to_thread.run_sync(pairs, limiter=self._rendering), told)
        self.engine.score(scoring)
        await done.wait()
        if scoring.problem is not None:
            raise scoring.problem
        return scoring.rewards


class _Stream(StreamingResponse):
    """Server-sent events, until the client goes away."""

    def __init__(self, events: AsyncIterator[str], rows: Sequence[Row]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._rows = rows

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(ClientDisconnect, OSError):
                await _unless_gone(receive, self.stream_response(send))
        finally:
            for row in self._rows:
                row.left = True


T = TypeVar("T")


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What is worked out for a client, who may go away before.

    Raises:
        ClientDisconnect: it has; the work is cancelled.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = working, _ = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _described(name: str, model: Model) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "align", "root": model.label}


def _sent(event: dict[str, Any]) -> str:
    return f"data: {json.dumps(event)}\n\n"


def _in_words(problem: Exception) -> UserError | TrainingStopped:
    """A problem as a client may read it; what it cannot mend is told on the server's terminal."""
    if isinstance(problem, UserError | TrainingStopped):
        return problem
    print(f"align: {type(problem).__name__}: {' '.join(str(problem).split())}", file=sys.stderr, flush=True)
    return TrainingStopped("the server failed; its terminal says why", code="internal")


def _as_json(problem: UserError | TrainingStopped, status: int) -> dict[str, Any]:
    """A problem in OpenAI's form."""
    message = f"{problem.message}; {problem.hint}" if problem.hint else problem.message
    where = f"{problem.field}: " if problem.field else ""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": where + message, "type": kind, "param": problem.field, "code": problem.code}}


def _status(problem: UserError | TrainingStopped) -> int:
    return _STATUS.get(problem.code, 400 if isinstance(problem, UserError) else 500)


def _refusal(problem: UserError | TrainingStopped) -> Response:
    status = _status(problem)
    return JSONResponse(_as_json(problem, status), status)


async def _no_route(request: Request, problem: Exception) -> Response:
    """An unknown path, or another method."""
    assert isinstance(problem, HTTPException)
    said = UserError(f"{request.method} {request.url.path}: {problem.detail}", code="no_route")
    return JSONResponse(_as_json(said, problem.status_code), problem.status_code, problem.headers)

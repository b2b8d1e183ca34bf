"""Asking a server over HTTP, again where what is wrong may pass; a fault is told in a few words. No torch."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from http.client import HTTPException
from itertools import count
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

_PASSING = (408, 429)
FoundT = TypeVar("FoundT")


class NoAnswerError(Exception):
    """Why a request has no answer that can be read, and whether that may pass.

    Attributes:
        status: of HTTP, where there is one.
        said: the start of what the server gave as its reason.
    """

    def __init__(self, message: str, passing: bool = False, status: int = 0, said: str = "") -> None:
        super().__init__(message)
        self.passing = passing
        self.status = status
        self.said = said


def is_server(url: str) -> bool:
    """Whether a text is the address of a server."""
    try:
        place = urlsplit(url)
        return place.scheme in ("http", "https") and bool(place.hostname) and url.isascii()
    except ValueError:
        return False


def ask(url: str, asked: dict[str, Any] | None, timeout: float, headers: Mapping[str, str] | None = None) -> str:
    """The text that a server answers to JSON (a POST), or to nothing (a GET); `headers` go along.

    Raises:
        NoAnswerError: there is none.
    """
    body = json.dumps(asked).encode() if asked is not None else None
    try:
        request = Request(url, body, {"Content-Type": "application/json", **(headers or {})})
        with urlopen(request, timeout=timeout) as answer:
            return str(answer.read().decode())
    except HTTPError as problem:
        again = problem.code in _PASSING or problem.code >= 500
        raise NoAnswerError(
            f"answered {problem.code} {problem.reason}", again, problem.code, _body(problem)
        ) from problem
    except TimeoutError as problem:
        raise NoAnswerError(f"did not answer within {timeout:g} s", True) from problem
    except (OSError, HTTPException) as problem:
        raise NoAnswerError(f"cannot be reached ({getattr(problem, 'reason', problem)})", True) from problem
    except ValueError as problem:
        raise NoAnswerError(f"answered no text ({problem})") from problem


def _body(problem: HTTPError) -> str:
    """The beginning of what a server says with an error, if it comes."""
    try:
        return problem.read(400).decode(errors="replace")
    except (OSError, HTTPException):
        return ""


def ask_json(url: str, asked: dict[str, Any] | None, timeout: float, headers: Mapping[str, str] | None = None) -> Any:
    """The same, read as JSON."""
    text = ask(url, asked, timeout, headers)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise NoAnswerError(f"answered no JSON ({problem})") from problem


def patiently(work: Callable[[], FoundT], retries: int, wait: float) -> FoundT:
    """What `work` finds, tried again where what is wrong may pass, after a wait that doubles.

    Raises:
        NoAnswerError: of the last try, with their number.
    """
    for attempt in count():
        try:
            return work()
        except NoAnswerError as problem:
            if not problem.passing or attempt >= retries:
                raise NoAnswerError(f"{problem} (asked {attempt + 1} times)", said=problem.said) from problem
        time.sleep(wait * 2**attempt)
    raise AssertionError

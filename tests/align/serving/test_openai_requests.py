"""Requests to `align serve` that are hostile, mistaken or not allowed: each is a line, and the server goes on."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from align.inference.open_batch import OpenBatch
from align.serving.openai_reply import Spoken
from align.serving.options import ServeOptions
from align.serving.served import Served, speakers_of
from data_prep.core.errors import UserError
from tests.align.serving.openai_server import QUESTION, ask, chat, serving
from tests.tiny_chain import finished


@pytest.fixture(scope="module")
def here():
    """A chain, served."""
    speakers, _ = speakers_of(str(finished()), "runs")
    with serving(Served(speakers, ServeOptions()), max_new_tokens=12) as found:
        yield found


# -------------------------------------------------------------------------------------------------------- who may ask
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost:1"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
    ],
    ids=str,
)
def test_pages_of_browsers_may_not_ask(here, headers, status):
    assert ask(here, "/v1/models", **headers)[0] == status
    assert (
        ask(here, "/v1/chat/completions", {"model": "ppo", "messages": QUESTION, "max_tokens": 1}, **headers)[0]
        == status
    )


def test_a_token_is_asked_for(here, monkeypatch):
    monkeypatch.setattr(here.api, "options", ServeOptions(token="secret", host="0.0.0.0"))
    for given, status in (({}, 401), ({"Authorization": "Bearer x"}, 401), ({"Authorization": "Bearer secret"}, 200)):
        found, answer = ask(here, "/v1/models", Host="elsewhere.example", **given)
        assert found == status and (status == 200 or answer["error"]["code"] == "bad_token")
    assert ask(here, "/health")[0] == 200


DEEP = 60_000
HOSTILE = {
    "not JSON": (b"{", 400, "not JSON"),
    "bytes": (b"\xff\xfe\x00", 400, "not JSON"),
    "nothing": (b"", 400, "not JSON"),
    "a list": (b"[]", 400, "no JSON object"),
    "deep": (b"[" * DEEP + b"]" * DEEP, 400, "not JSON"),
    "a huge number": (b'{"n": ' + b"9" * 5000 + b"}", 400, "not JSON"),
    "huge": (b" " * 2_000_001, 413, "longer than"),
    "half a character": (
        b'{"model": "ppo", "messages": [{"role": "user", "content": "\\ud800"}]}',
        400,
        "half of a char",
    ),
    "no model": ({"model": None}, 400, "model: names no model"),
    "another model": ({"model": "gpt-4"}, 404, "unknown model"),
    "model of a wrong type": ({"model": ["ppo"]}, 400, "model: expected text"),
    "no messages": ({"messages": []}, 400, "messages: empty"),
    "messages of a wrong type": ({"messages": "hi"}, 400, "messages: expected a list"),
    "message of a wrong type": ({"messages": [7]}, 400, "messages[0]: expected a mapping"),
    "role": ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "unknown role"),
    "content": ({"messages": [{"role": "user", "content": {"a": 1}}]}, 400, "messages[0].content"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "text part"),
    "too long": ({"messages": [{"role": "user", "content": "x" * 9000}]}, 400, "context"),
    "max_tokens": ({"max_tokens": 10**6}, 400, "context"),
    "no tokens": ({"max_tokens": 0}, 400, "max_tokens: out of range"),
    "temperature": (
        b'{"model": "ppo", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        400,
        "temp",
    ),
    "infinite": (b'{"model": "ppo", "messages": [], "temperature": Infinity}', 400, "temperature: out of range"),
    "negative n": ({"n": -1}, 400, "n: out of range"),
    "n": ({"n": 10**9}, 400, "at most 128"),
    "half an n": ({"n": 1.5}, 400, "n: expected a whole number"),
    "top_p": ({"top_p": 0}, 400, "top_p: out of range"),
    "seed": ({"seed": 2**70}, 400, "seed: out of range"),
    "stop": ({"stop": [""]}, 400, "stop: expected"),
    "stop of a wrong type": ({"stop": {"a": 1}}, 400, "stop: expected a list"),
    "a penalty": ({"frequency_penalty": 0.5}, 400, "frequency_penalty: cannot be asked for"),
    "a schema": ({"response_format": {"type": "json_object"}}, 400, "response_format: cannot"),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools"),
    "an unknown field": ({"temprature": 1}, 400, "did you mean 'temperature'"),
    "best_of below n": ({"n": 3, "best_of": 2}, 400, "best_of: less than n"),
    "best_of of a stream": ({"best_of": 2, "stream": True}, 400, "cannot be streamed"),
    "likeliest": ({"top_logprobs": 2}, 400, "needs logprobs"),
    "align": ({"align": {"rewards": True}}, 400, "did you mean 'align.reward'"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_body_is_a_line(here, case):
    body, expected, words = HOSTILE[case]
    whole = {"model": "ppo", "messages": QUESTION, **body} if isinstance(body, dict) else body
    status, answer = ask(here, "/v1/chat/completions", whole)
    assert status == expected and set(answer) == {"error"}, answer
    message = answer["error"]["message"]
    assert words in message and "\n" not in message and "Traceback" not in message
    assert answer["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "empty"),
        ([], "empty"),
        ([[]], "empty"),
        ([5, 10**6], "ids are 0 to"),
        ([-1], "ids are"),
        ({"a": 1}, "list"),
        ([[5, "x"]], "whole"),
    ],
    ids=str,
)
def test_a_hostile_prompt_is_a_line(here, prompt, words):
    status, answer = ask(here, "/v1/completions", {"model": "base", "prompt": prompt})
    assert status == 400 and words in answer["error"]["message"], answer


def test_unknown_routes_and_methods_are_told_in_the_same_form(here):
    for path, method, status in (
        ("/v2", "GET", 404),
        ("/v1/chat/completions", "GET", 405),
        ("/v1/models/x", "GET", 404),
    ):
        found, answer = ask(here, path, method=method)
        assert found == status and answer["error"]["message"]


def test_a_model_that_fails_is_told_and_the_server_goes_on(here, monkeypatch, capfd):
    def broken(batch, rows):
        raise RuntimeError("secret insides")

    with monkeypatch.context() as patched:
        patched.setattr(OpenBatch, "admit", broken)
        status, answer = ask(here, "/v1/chat/completions", {"model": "ppo", "messages": QUESTION})
    assert status == 500 and "insides" not in answer["error"]["message"]
    assert "RuntimeError: secret insides" in capfd.readouterr().err
    assert chat(here, temperature=0)["choices"] and torch.is_grad_enabled()


def test_a_problem_between_two_looks_at_a_row_is_not_told_as_a_reply_of_full_length(here, monkeypatch):
    """The engine ends rows in a thread of its own, at any moment."""
    more = Spoken.more

    def ended(spoken):
        if spoken.row.reply.ids:
            spoken.row.end(UserError("the server is leaving", code="leaving"))
        return more(spoken)

    monkeypatch.setattr(Spoken, "more", ended)
    status, answer = ask(here, "/v1/chat/completions", {"model": "ppo", "messages": QUESTION})
    assert status == 503 and "leaving" in answer["error"]["message"]

"""Scorers that are not this project's: a function of the user, and a server. Each fault is one line with its name."""

from __future__ import annotations

import io
import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.message import Message
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest

from align.cli.dispatch import main
from align.rl.ppo import OUTSIDE
from align.rl.signals.base import Site, signal_of
from align.tracking.metrics import read_metrics
from data_prep.core import http
from data_prep.core.errors import TrainingStopped, UserError
from data_prep.options import DataOptions
from tests.align.rl.signals.test_classifier import WHERE, said
from tests.align.training.test_resume import contents
from tests.tiny_chain import finished, made, pipeline_words, read, refused, run

HERE = "scorers_of_a_test"
FUNCTIONS = """
def by_length(prompts, replies, fields):
    assert all(row["id"] and row["finished"] in (True, False) for row in fields)
    return [len(reply) - len(messages[-1]["content"]) for messages, reply in zip(prompts, replies)]

def broken(prompts, replies, fields):
    raise RuntimeError("out of luck")

def short(prompts, replies, fields):
    return [1.0]

def not_a_number(prompts, replies, fields):
    return [float("nan") for reply in replies]

def huge(prompts, replies, fields):
    return [-1e19 for reply in replies]

def words(prompts, replies, fields):
    return ["1.0" for reply in replies]

def narrow(replies):
    return [0.0 for reply in replies]

number = 3
"""


@pytest.fixture
def functions(tmp_path, monkeypatch) -> Iterator[Path]:
    """A module of functions in the working folder."""
    (tmp_path / f"{HERE}.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path / f"{HERE}.py"
    sys.modules.pop(HERE, None)


def by(name: str) -> Any:
    return signal_of({"python": f"{HERE}.{name}"}, WHERE).source


# ---------------------------------------- a function
def test_a_function_is_given_messages_replies_and_fields(functions):
    source = by("by_length")
    source.check(WHERE, DataOptions())
    found = source.open(WHERE, Site(DataOptions(), allow_code=True))(said("a", "bcd"))
    assert [one["score"] for one in found] == [1 - len("say owl "), 3 - 2 * len("say owl ")]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", "failed with RuntimeError: out of luck"),
        ("short", "gave 1 scores for 2 replies"),
        ("not_a_number", "gave no finite score to the reply to f.jsonl:1 \\(got nan\\)"),
        ("huge", r"gave the reply to f.jsonl:1 a score of -1e\+19, and 1e\+18 is the most either way"),
        ("words", "gave something else than a list of numbers"),
    ],
)
def test_a_function_that_fails_is_named(functions, name, message):
    scorer = by(name).open(WHERE, Site(DataOptions(), allow_code=True))
    with pytest.raises(TrainingStopped, match=f"the function {HERE}.{name} {message}"):
        scorer(said("a", "b"))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (f"{HERE}.nothing", "has no function nothing"),
        (f"{HERE}.number", "has no function number"),
        (f"{HERE}.narrow", "cannot be called with prompts, replies and fields"),
        ("no_such_package.score", "no_such_package cannot be imported (ModuleNotFoundError"),
        ("score", "no dotted path of a function (got score)"),
    ],
)
def test_what_is_no_such_function_is_refused(functions, path, message):
    with pytest.raises(UserError) as caught:
        signal_of({"python": path}, WHERE).source.check(WHERE, DataOptions())
    assert message in str(caught.value)


def test_nothing_is_imported_unless_the_run_allows_it(functions, tmp_path, capfd):
    functions.write_text("raise SystemExit('imported')")
    start = f"stages.ppo.init={finished() / 'sft'}"
    for words in ([f"stages.ppo.reward={{python: {HERE}.f}}"], [f"data.gold.signal={{python: {HERE}.f}}"]):
        line = refused(*run(capfd, *pipeline_words("ppo", start, *words, f"out={tmp_path}")))
        assert "set allow_code=true" in line and HERE not in sys.modules
    with pytest.raises(UserError, match="which this run does not allow"):
        by("f").open(WHERE, Site(DataOptions()))


def test_another_text_of_the_function_is_another_result(functions, tmp_path):
    words = ["advantage=reinforce_pp", "updates=1", "max_approx_kl=9", f"init={finished() / 'sft'}"]
    words = [f"stages.ppo.{word}" for word in [*words, f"reward={{python: {HERE}.by_length}}"]]
    stages = []
    for more in ("", "", "# changed\n"):
        functions.write_text(functions.read_text() + more)
        folder = made("ppo", *words, "allow_code=true", "name=f", out=tmp_path)
        stages.append(read(folder / "run.json")["stages"][0])
    assert [stage["skipped"] for stage in stages] == [False, True, False]
    assert "signal/python" in next(iter(read_metrics(folder / "ppo" / "metrics.jsonl")))


def test_a_function_that_is_made_of_others_is_another_result_with_the_module_that_makes_it(functions):
    """What is called may be a library's; what it was made with stands in the user's module."""
    found = []
    for least in (1, 2):
        functions.write_text(f"from functools import partial\nclipped = partial(map, max, [{least}])\n")
        found.append(by("clipped").contents(DataOptions()))
    assert found[0] != found[1]


@pytest.mark.parametrize("path", ["math.hypot", "os.path.join"])
def test_a_function_without_a_file_has_no_contents(path):
    source = signal_of({"python": path}, WHERE).source
    source.check(WHERE, DataOptions())
    assert all(len(digest) == 64 for digest in source.contents(DataOptions()))


# ---------------------------------------- a server
@contextmanager
def server(answer: Callable[[dict[str, Any], int], tuple[int, bytes]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A scorer at work in a thread: its address, and what it was asked. `answer` gets a request and its number."""
    asked: list[dict[str, Any]] = []

    class Scorer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            status, body = answer(asked[-1], len(asked))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words: Any) -> None:
            pass

    found = HTTPServer(("127.0.0.1", 0), Scorer)
    thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{found.server_port}/score", asked
    finally:
        found.shutdown()
        thread.join()
        found.server_close()


def lengths(request: dict[str, Any], number: int = 0) -> tuple[int, bytes]:
    return 200, json.dumps({"scores": [len(reply) for reply in request["replies"]]}).encode()


def at(url: str, **more: Any) -> Any:
    return signal_of({"url": url, "wait": 0.0, **more}, WHERE).source


def test_a_server_is_asked_as_its_contract_says():
    with server(lengths) as (url, asked):
        found = at(url, batch_size=2).open(WHERE, Site(DataOptions()))(said("a", "bcd", ""))
    assert [one["score"] for one in found] == [1, 3, 0]
    assert asked[0] == {"prompts": [], "replies": [], "fields": []} and [len(one["replies"]) for one in asked[1:]] == [
        2,
        1,
    ]
    assert asked[1]["prompts"][1] == [{"role": "user", "content": "say owl say owl "}]
    assert asked[1]["fields"][0] == {"id": "f.jsonl:1", "finished": True}


def test_what_may_pass_is_asked_again_and_what_does_not_is_named():
    def shaky(request: dict[str, Any], number: int) -> tuple[int, bytes]:
        return lengths(request) if number in (1, 4) else ((503, b"") if number < 4 else (500, b""))

    with server(shaky) as (url, asked):
        scorer = at(url, retries=2).open(WHERE, Site(DataOptions()))
        assert scorer(said("ab")) == [{"score": 2.0}] and len(asked) == 4
        with pytest.raises(TrainingStopped, match=r"the scorer http.*/score answered 500 .* \(asked 3 times\)"):
            scorer(said("ab"))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((404, b""), r"answered 404 Not Found \(asked 1 times\)"),
        ((200, b"hello"), "answered no JSON"),
        ((200, b"[" * 100_000), "answered no JSON"),
        ((200, b"[1, 2]"), r'answered no \{"scores": \[...\]\}'),
        ((200, b'{"scores": [1]}'), "gave 1 scores for 2 replies"),
        ((200, b'{"scores": [1, NaN]}'), r"gave no finite score to the reply to f.jsonl:2 \(got nan\)"),
        ((200, b'{"scores": [1, null]}'), "gave something else than a list of numbers"),
        ((200, b'{"scores": [1, 1' + b"0" * 400 + b"]}"), "gave something else than a list of numbers"),
    ],
)
def test_a_wrong_answer_is_named(answer, message):
    with server(lambda request, number: lengths(request) if number == 1 else answer) as (url, asked):
        scorer = at(url).open(WHERE, Site(DataOptions()))
        with pytest.raises(TrainingStopped, match=f"the scorer {url} {message}") as caught:
            scorer(said("a", "b"))
        assert len(asked) == 2 and caught.value.code in OUTSIDE, "the state before it is kept"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((404, b""), "answered 404 Not Found"),
        ((200, b"hello"), "answered no JSON"),
        ((200, b"[" * 100_000), "answered no JSON"),
        ((200, b"[]"), r'answered no \{"scores": \[...\]\}'),
        ((200, b'{"scores": [1]}'), "gave 1 scores for no replies"),
    ],
)
def test_a_server_that_answers_otherwise_is_refused_at_the_start(answer, message):
    with server(lambda request, number: answer) as (url, _), pytest.raises(UserError, match=message) as caught:
        at(url).check(WHERE, DataOptions())
    assert caught.value.field == WHERE and "docs/ppo.md" in caught.value.hint and "\n" not in str(caught.value)


def test_no_answer_in_time_is_named():
    gone = threading.Event()

    def slow(request: dict[str, Any], number: int) -> tuple[int, bytes]:
        gone.wait()
        return lengths(request)

    with server(slow) as (url, _):
        with pytest.raises(UserError, match=r"did not answer within 0\.05 s"):
            at(url, timeout=0.05).check(WHERE, DataOptions())
        gone.set()


def test_an_error_whose_text_does_not_come_is_named_all_the_same(monkeypatch):
    class Stuck(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise TimeoutError("timed out")

    def urlopen(request: Any, timeout: float) -> Any:
        raise HTTPError(request.full_url, 500, "Oops", Message(), Stuck())

    monkeypatch.setattr(http, "urlopen", urlopen)
    with pytest.raises(UserError, match="answered 500 Oops"):
        at("http://127.0.0.1:1/score", retries=0).check(WHERE, DataOptions())


def test_a_server_that_is_down_or_none_is_refused_at_the_start(tmp_path, capfd):
    with server(lengths) as (url, _):
        pass
    words = pipeline_words("ppo", f"stages.ppo.init={finished() / 'sft'}", f"out={tmp_path}", "name=n")
    line = refused(*run(capfd, *words, f"stages.ppo.reward={{url: '{url}'}}"))
    assert f"the scorer {url} cannot be reached" in line and not (tmp_path / "n").exists()
    assert main(["check", *words, f"stages.ppo.reward={{url: '{url}'}}"]) == 2
    for wrong in ("ftp://host/score", "localhost:80", "http://[", "http:///score", "http://host/bewertung-für-alle"):
        with pytest.raises(UserError, match="not the address of a server"):
            at(wrong).check(WHERE, DataOptions())


def test_a_server_that_goes_away_stops_the_stage_and_the_same_command_ends_it(tmp_path):
    words = ["advantage=reinforce_pp", "updates=2", "max_approx_kl=9", "monitor=off", f"init={finished() / 'sft'}"]
    words = [f"stages.ppo.{word}" for word in words]
    until = [2]

    def answer(request: dict[str, Any], number: int) -> tuple[int, bytes]:
        return lengths(request) if number <= until[0] else (410, b"")

    with server(answer) as (url, _):
        words += [f"stages.ppo.reward={{url: '{url}', wait: 0}}", "name=s"]
        with pytest.raises(TrainingStopped, match="answered 410 Gone"):
            made("ppo", *words, out=tmp_path)
        assert read(tmp_path / "s" / "run.json")["status"] == "stopped"
        assert (tmp_path / "s" / ".staging-ppo" / "resume" / "step-1").is_dir()
        until[0] = 10**6
        made("ppo", *words, out=tmp_path)
    assert read(tmp_path / "s" / "run.json")["status"] == "done"


def test_a_gold_judge_that_fails_at_a_look_costs_no_update(tmp_path):
    """What an update has changed is kept, and the look behind it is made again, with the alarms that follow it."""
    words = ["advantage=reinforce_pp", "updates=2", "max_approx_kl=9", "eval_every=1", f"init={finished() / 'sft'}"]
    words += ["reward={rule: repetition}", "on_alarm=warn"]
    fails_at = [3]  # the first is the check, the second the look at the start

    def answer(request: dict[str, Any], number: int) -> tuple[int, bytes]:
        asked = [one for one in requests if one["replies"]]
        return (410, b"") if len(asked) == fails_at[0] - 1 else lengths(request)

    with server(answer) as (url, requests):
        given = [*(f"stages.ppo.{word}" for word in words), f"data.gold.signal={{url: '{url}', wait: 0}}", "name=n"]
        with pytest.raises(TrainingStopped, match="answered 410 Gone"):
            made("ppo", *given, out=tmp_path / "stopped")
        kept = tmp_path / "stopped" / "n" / ".staging-ppo" / "resume"
        assert [path.name for path in kept.iterdir()] == ["step-1"]
        fails_at[0] = 0
        stopped, whole = (made("ppo", *given, out=tmp_path / name) for name in ("stopped", "whole"))
    assert contents(stopped / "ppo") == contents(whole / "ppo")

"""`judge=openai:URL`: both orders, ties, garbled answers, failures and hangs, against a server of the test's own."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest

from align.cli.evaluate import in_full
from align.evaluation.judge import KEY, judge_refusals, judged
from align.evaluation.options import JudgeOptions
from align.stages.evaluate import Evaluate
from data_prep.core.errors import TrainingStopped
from reward.metrics import accuracy_interval

Answer = Callable[[dict[str, Any], int], "tuple[int, str] | None"]
"""(body, number of the request) -> (status, what the judge says), or None to hang."""
ASKED = [[{"role": "user", "content": f"question {i}"}] for i in range(4)]
OWN, BEFORE = ["good"] * 4, ["bad"] * 4


class StandIn:
    """A judge that says what a function of the request says."""

    def __init__(self, answer: Answer) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.over = threading.Event()
        outer, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.bodies.append({"path": self.path, **body})
                    outer.keys.append(self.headers.get("Authorization"))
                    number = len(outer.bodies)
                found = answer(body, number)
                if found is None:
                    outer.over.wait(30)
                    return
                self.send_response(found[0])
                self.end_headers()
                self.wfile.write(json.dumps({"choices": [{"message": {"content": found[1]}}]}).encode())

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"openai:http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.over.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def standing() -> Iterator[Callable[[Answer], StandIn]]:
    """Starts judges, and ends them."""
    made: list[StandIn] = []

    def start(answer: Answer) -> StandIn:
        made.append(StandIn(answer))
        return made[-1]

    yield start
    for one in made:
        one.close()


def options(judge: StandIn, **more: Any) -> JudgeOptions:
    return JudgeOptions(judge=judge.url, judge_model="m", **{"judge_wait": 0.01, "judge_timeout": 20.0, **more})


def parts(body: dict[str, Any]) -> tuple[str, str, str]:
    """(question, reply A, reply B) of a request."""
    text = body["messages"][-1]["content"]
    a, b = text.split("[reply A]\n")[1].split("[reply B]\n")
    return text.split("\n")[1], a.split("\n[end")[0], b.split("\n[end")[0]


def better(body: dict[str, Any], number: int) -> tuple[int, str]:
    return 200, f"I thought of [[C]] first. [[{'A' if parts(body)[1] == 'good' else 'B'}]]"


def test_both_orders_are_asked_and_a_win_is_a_win_in_both(
    standing: Callable[[Answer], StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, "secret")
    judge = standing(better)
    found = judged(options(judge), ASKED, OWN, BEFORE)
    value, low, high = accuracy_interval(4, 4)
    assert (found["value"], found["low"], found["high"], found["n"]) == (value, low, high, 4)
    assert (found["ties"], found["disagree"], found["unread"], found["judge"]) == (0, 0, 0, "m")
    asked = sorted(parts(body) for body in judge.bodies)
    assert asked == sorted((f"question {i}", *pair) for i in range(4) for pair in (("good", "bad"), ("bad", "good")))
    assert {body["path"] for body in judge.bodies} == {"/v1/chat/completions"}
    assert set(judge.keys) == {"Bearer secret"}
    assert judged(options(judge), ASKED, BEFORE, OWN)["value"] == 0.0


def test_orders_that_disagree_are_ties_and_garbled_answers_do_not_count(
    standing: Callable[[Answer], StandIn],
) -> None:
    def answer(body: dict[str, Any], number: int) -> tuple[int, str]:
        question = parts(body)[0]
        if question == "question 0":
            return 200, "[[A]]"  # always the first
        if question == "question 1":
            return 200, "[[C]]"
        return (200, "I cannot say. [A]") if question == "question 2" else better(body, number)

    found = judged(options(standing(answer)), ASKED, OWN, BEFORE)
    assert (found["n"], found["disagree"], found["ties"], found["unread"]) == (3, 1, 1, 1)
    assert found["value"] == pytest.approx((1 + 0.5 + 0.5) / 3)


def test_what_may_pass_is_asked_again(standing: Callable[[Answer], StandIn]) -> None:
    judge = standing(lambda body, number: (500, "") if number <= 2 else better(body, number))
    assert judged(options(judge, judge_parallel=1), ASKED[:1], OWN[:1], BEFORE[:1])["value"] == 1.0
    assert len(judge.bodies) == 4


@pytest.mark.parametrize(
    ("answer", "more", "said"),
    [
        (lambda body, number: (500, ""), {"judge_retries": 1}, "answered 500 .*asked 2 times"),
        (lambda body, number: (401, ""), {}, "answered 401 .*asked 1 times"),
        (lambda body, number: None, {"judge_retries": 0, "judge_timeout": 0.2}, "did not answer within 0.2 s"),
        (lambda body, number: (200, "no idea"), {}, "none of 4 pairs a verdict"),
    ],
)
def test_a_judge_that_gives_nothing_stops_the_stage_in_one_line(
    standing: Callable[[Answer], StandIn], answer: Answer, more: dict[str, Any], said: str
) -> None:
    with pytest.raises(TrainingStopped, match=said) as stopped:
        judged(options(standing(answer), **more), ASKED, OWN, BEFORE)
    assert KEY in str(stopped.value) and "\n" not in str(stopped.value)


def test_an_evaluation_sends_replies_to_its_judge_and_to_nobody_else(
    standing: Callable[[Answer], StandIn], tmp_path: Any, capsys: Any
) -> None:
    from align.cli.dispatch import main
    from tests.tiny_chain import made

    judge = standing(lambda body, number: (200, "[[A]]"))
    run = made("sft", "name=n", out=tmp_path)
    words = ["eval", f"{run}/sft", f"out={tmp_path}", "prompts=3", "max_new_tokens=4", "--json"]
    assert main([*words, f"judge={judge.url}", "judge.model=m"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["judged"]["n"], result["judged"]["disagree"], result["judged"]["against"]) == (3, 3, "base")
    assert result["judged"]["value"] == 0.5 and len(judge.bodies) == 6
    assert any("m prefers sft" in sentence for sentence in result["verdict"]["sentences"])


def test_the_last_policy_is_compared_with_every_one_before_it(standing: Callable[[Answer], StandIn]) -> None:
    stage = Evaluate(**vars(options(standing(better))))
    rows = [SimpleNamespace(messages=asked) for asked in ASKED]
    said = {"base": BEFORE, "sft": OWN, "ppo": OWN}
    answers = {name: SimpleNamespace(texts=texts) for name, texts in said.items()}
    found = stage._judged(SimpleNamespace(phase=nullcontext), rows, answers)  # type: ignore[arg-type]
    assert (found["against"], found["disagree"], list(found["earlier"])) == ("sft", 4, ["base"])
    assert found["earlier"]["base"]["value"] == 1.0


def test_what_is_no_judge_is_refused_before_anything_runs() -> None:
    assert in_full(["judge=openai:http://h/v1", "judge.model=m"]) == [
        "stages.evaluate.judge=openai:http://h/v1",
        "stages.evaluate.judge_model=m",
    ]
    assert not list(judge_refusals(JudgeOptions(), "stages.evaluate"))
    wrong, nameless = judge_refusals(JudgeOptions(judge="http://h/v1"), "stages.evaluate")
    assert "openai:http://HOST" in str(wrong) and "judge.model=NAME" in str(nameless)
    assert not list(judge_refusals(JudgeOptions(judge="openai:https://h/v1", judge_model="m"), "stages.evaluate"))

"""The chat page: strict about who asks, and in a real browser at phone and desktop widths, light and dark."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from align.cli.chat import _labels
from align.cli.dispatch import main
from align.serving.conversation import Ended, Heard, Panel
from align.serving.labels import open_labels, read_labels
from align.serving.local_page import HOST, LONGEST, listen
from align.serving.options import ChatOptions
from align.serving.web import Page
from data_prep.core.options import build
from data_prep.options import DataOptions
from data_prep.records.mixing import sources_for
from data_prep.records.stream import open_stream
from data_prep.types import PREFERENCE
from tests.local_pages import HOSTILE, ask, serving
from tests.tiny_chain import checkpoint, finished, refused, until

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

OPTIONS = ChatOptions(temperature=1.0, max_new_tokens=12, seed=1)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The page of a short chain, served from a thread; `pace` is what every event waits, in seconds, `more` what ppo
    says after its reply."""
    panel = Panel(checkpoint(finished(), "ppo"), OPTIONS)
    panel.load(panel.names)
    answer, state = panel.answer, SimpleNamespace(more="", pace=0.0, tokens=0, asked=0, left=0, held=threading.Event())
    state.held.set()

    def paced(*given):
        state.asked += 1
        try:
            for event in answer(*given):
                state.held.wait(240)
                time.sleep(state.pace)
                state.tokens += 1
                if state.more and isinstance(event, Ended) and event.model == "ppo":
                    yield Heard("ppo", state.more)
                yield event
        except GeneratorExit:
            state.left += 1
            raise

    panel.answer = paced
    state.panel, state.labels = panel, tmp_path_factory.mktemp("run") / "labels.jsonl"
    with serving(lambda port: Page(panel, OPTIONS, False, port, state.labels)) as found:
        vars(state).update(vars(found))
        yield state


def reply(served, **content):
    """The events of one reply."""
    status, _, text = ask(served, "/reply", body=json.dumps(content).encode())
    assert status == 200, text
    return [json.loads(line) for line in text.splitlines()]


# ---------------------------------------- who may ask
def test_only_this_computer_is_listened_to():
    with listen("0") as found:
        assert found.getsockname()[0] == "127.0.0.1"


@pytest.mark.parametrize(
    ("wrong", "status"),
    [
        ({"Host": "evil.example"}, 400),
        ({"Host": None}, 400),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": f"http://{HOST}:1"}, 403),
        ({"X-Align-Token": None}, 403),
        ({"X-Align-Token": "x"}, 403),
        ({"X-Align-Token": "ü"}, 403),
        ({}, 200),
        ({"Origin": None}, 200),
    ],
    ids=str,
)
def test_a_reply_is_only_for_the_page_itself(served, wrong, status):
    body = json.dumps({"message": "say owl"}).encode()
    assert ask(served, "/reply", body=body, **wrong)[0] == status


def test_the_page_needs_its_token_and_lets_nothing_in(served):
    for path in ("/", "/?token=x", "/?token="):
        assert ask(served, path, method="GET")[0] == 403
    assert ask(served, "/docs", method="GET")[0] == 404
    pages = [ask(served, f"/?token={served.page.token}", method="GET", Origin=None) for _ in range(2)]
    for status, headers, text in pages:
        policy = headers["content-security-policy"]
        nonce = re.search(r"script-src 'nonce-([\w-]+)'", policy)[1]
        assert status == 200 and "default-src 'none'" in policy and "unsafe" not in policy
        assert headers["referrer-policy"] == "no-referrer" and headers["cache-control"] == "no-store"
        assert text.count(f'nonce="{nonce}"') == 2 and not re.search(r"https?://|innerHTML|onclick", text)
    assert pages[0][1]["content-security-policy"] != pages[1][1]["content-security-policy"]


# ---------------------------------------- what may be asked
def test_a_reply_is_what_the_panel_says(served):
    events = reply(served, message="say owl", compare=True, temperature="0", max_new_tokens="5")
    ended = {event["model"]: event["said"] for event in events if event["kind"] == "ended"}
    texts = {name: "".join(e["text"] for e in events if e["kind"] == "heard" and e["model"] == name) for name in ended}
    assert sorted(ended) == ["base", "ppo", "sft"]
    assert all(said["text"] == texts[name] and said["reward"] is not None for name, said in ended.items())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "expected a mapping"),
        (b"{}", "empty message"),
        (b'{"message": "x", "temprature": 1}', "did you mean 'temperature'?"),
        (b'{"message": "x", "temperature": ""}', "temperature: expected a number"),
        (b'{"message": "x", "max_new_tokens": "1.5"}', "expected a whole number"),
        (b'{"message": "a\\ud83d"}', "half of a character"),
        (b'{"message": "x", "turns": [{"message": "y", "replies": {}}]}', "turns are answered by: base, sft, ppo"),
        (b'{"message": "x", "turns": [{"message": "y", "replies": {"gpt": "z"}}]}', "turns are answered by"),
        (json.dumps({"message": "all " * 400}).encode(), "message too long"),
        (b'"' + b"x" * LONGEST + b'"', "longer than 2,000,000 bytes"),
    ],
    ids=lambda value: value[:50] if isinstance(value, str) else None,
)
def test_bad_requests_are_answered_with_one_line(served, content, said):
    status, _, text = ask(served, "/reply", body=content)
    (event,) = [json.loads(line) for line in text.splitlines()]
    assert status == 200 and event["kind"] == "problem" and said in event["text"] and "\n" not in event["text"]


def test_a_page_that_goes_away_ends_its_reply(served):
    served.pace, served.tokens, served.left = 0.2, 0, 0
    body = json.dumps({"message": "say owl", "temperature": 50, "max_new_tokens": 200}).encode()
    head = f"POST /reply HTTP/1.1\r\nHost: {HOST}\r\nX-Align-Token: {served.page.token}\r\nContent-Length: {len(body)}"
    with socket.create_connection((HOST, served.port), 10) as gone:
        gone.sendall(head.encode() + b"\r\n\r\n" + body)
        assert b"200 OK" in gone.recv(4096)
        assert until(lambda: served.tokens)
    try:
        assert until(lambda: served.left), "it ends in the middle"
        assert reply(served, message="say owl", max_new_tokens=1)
    finally:
        served.pace = 0.0


def test_one_reply_at_a_time(served):
    served.held.clear()  # the first reply stands still until the others have come
    found, begun = {}, served.asked
    lock = served.page._turn

    def one(name):
        found[name] = reply(served, message=f"say {name}")

    threads = [threading.Thread(target=one, args=(name,)) for name in ("owl", "oat", "ant")]
    try:
        for thread in threads:
            thread.start()
        assert until(lambda: lock.statistics().tasks_waiting == 2)
        assert served.asked == begun + 1
    finally:
        served.held.set()
    for thread in threads:
        thread.join(240)
    assert all(events[-1]["kind"] == "ended" for events in found.values())
    assert sum("waiting" in events[0].get("text", "") for events in found.values()) == 2


# ---------------------------------------- choices between replies
@pytest.fixture
def kept(served):
    """The labels of the page's file, which begins empty."""
    served.labels.unlink(missing_ok=True)
    return lambda: read_labels(served.labels)


TURN = {"message": "hello", "replies": {"sft": "hi"}}
CHOSEN = {
    "message": "say owl",
    "replies": {"sft": "owl", "ppo": "an owl"},
    "rewards": {"sft": 0.5, "ppo": 1.5},
    "choice": "b",
    "labeller": "ann",
    "seconds": 2.5,
}


def vote(served, **content):
    """(status, answer) of a choice."""
    status, _, text = ask(served, "/vote", body=json.dumps({**CHOSEN, **content}).encode())
    return status, json.loads(text)


def test_a_choice_is_a_label_with_its_provenance(served, kept):
    assert vote(served, system="be brief", turns=[TURN]) == (200, {"labels": 1})
    (label,) = kept()
    assert [turn["content"] for turn in label.prompt] == ["be brief", "hello", "hi", "say owl"]
    assert (label.a, label.b, label.choice, label.winner) == ("owl", "an owl", "b", "ppo")
    assert label.rewards == {"a": 0.5, "b": 1.5} and (label.labeller, label.seconds) == ("ann", 2.5)
    assert label.digests == {"a": served.panel.digest("sft"), "b": served.panel.digest("ppo")}
    assert vote(served, rewards={}) == (200, {"labels": 2})
    assert kept()[1].prompt == "say owl" and kept()[1].rewards is None


def test_another_choice_takes_the_place_of_the_first_and_none_takes_it_back(served, kept):
    for choice in ("a", "tie"):
        assert vote(served, choice=choice) == (200, {"labels": 1})
    assert vote(served, labeller="ben", choice="bad") == (200, {"labels": 2})
    assert [(label.labeller, label.choice) for label in kept()] == [("ann", "tie"), ("ben", "bad")]
    assert vote(served, choice=None) == (200, {"labels": 1}) and kept()[0].labeller == "ben"


def test_choices_are_data_at_once(served, kept):
    vote(served)
    vote(served, message="say oat", choice="a")
    (source,) = sources_for(build(DataOptions, {"preferences": {"path": str(served.labels)}}, "data"), PREFERENCE)
    rows = list(open_stream(source.given, PREFERENCE, 0))
    assert [(row.chosen, row.rejected) for row in rows] == [("an owl", "owl"), ("owl", "an owl")]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"replies": {"sft": "x"}}, "a choice is between two of: base, sft, ppo"),
        ({"replies": {"sft": "x", "gpt": "y"}}, "a choice is between two of"),
        ({"choice": "skip"}, "choice is none of a, b, tie, bad"),
        ({"labeller": ""}, "a name of 1 to 80"),
        ({"message": " "}, "an empty message"),
        ({"turns": [{"message": "x", "replies": {"sft": "y", "ppo": "z"}}]}, "have seen different replies"),
        ({"rewards": {"sft": float("inf"), "ppo": 1.0}}, "finite"),
        ({"replies": {"sft": "a\ud83d", "ppo": "b"}}, "half of a character"),
        ({"pair": "x"}, "pair"),
    ],
    ids=str,
)
def test_a_choice_that_is_none_is_one_line_and_nothing_is_written(served, kept, content, said):
    status, answer = vote(served, **content)
    assert status == 422 and said in answer["problem"] and not served.labels.exists()


def test_a_file_in_other_hands_is_one_line_and_a_stranger_cannot_choose(served, kept):
    with open_labels(str(served.labels)):
        status, answer = vote(served)
    assert status == 422 and "another align label has this file" in answer["problem"]
    assert ask(served, "/vote", json.dumps(CHOSEN).encode(), Origin="null")[0] == 403 and not served.labels.exists()


def test_the_file_is_that_of_the_run():
    assert _labels(checkpoint(finished(), "ppo")) == finished().resolve() / "labels.jsonl"
    assert _labels(finished()) is None


# ---------------------------------------- starting and ending
def test_a_port_that_is_taken_is_one_line_with_the_next_step(served, capfd):
    capfd.readouterr()
    code = main(["chat", str(finished()), "--web", "--port", str(served.port)])
    assert "address already in use; choose another: --port 0 takes any free one" in refused(
        code, capfd.readouterr().err
    )


def test_a_missing_extra_is_one_line_with_the_command(capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    for name in ("web", "local_page"):
        monkeypatch.delitem(sys.modules, f"align.serving.{name}")
    capfd.readouterr()
    code = main(["chat", str(finished()), "--web"])
    assert "pip install -e '.[chat]'" in refused(code, capfd.readouterr().err)


SLOW = """
import signal, sys, time
from align.serving import conversation as chat
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would this
more = chat._Voice.next
def slow(self, stop):
    if not self.reply.ids:
        print("saying", flush=True)
    time.sleep(0.2)
    return more(self, stop)
chat._Voice.next = slow
from align.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c_during_a_reply_ends_the_server_at_once():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    words = ["chat", str(finished()), "--web", "--port", "0", "temperature=50", "max_new_tokens=200"]
    command = [sys.executable, "-c", SLOW, *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as child:
        line = child.stdout.readline()
        port, token = re.search(rf"http://{HOST}:(\d+)/\?token=(\S+)", line).groups()
        served = SimpleNamespace(port=int(port), url=f"http://{HOST}:{port}/", page=SimpleNamespace(token=token))
        found = []
        asking = threading.Thread(target=lambda: found.append(reply(served, message="say owl")))
        asking.start()
        while "saying" not in (line := child.stdout.readline()):
            assert line, child.stderr.read()
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=240)
        asking.join(240)
    assert child.returncode == 130 and "Traceback" not in err, err
    assert found[0][-1]["kind"] == "ended" and not found[0][-1]["said"]["finished"]
    assert found[0][-1]["said"]["tokens"] < 200, "it did not wait for the reply to end"


# ---------------------------------------- in a browser
@pytest.fixture
def opened(opened, served):
    """Pages whose replies come at once again at the end."""
    yield opened
    served.pace, served.more = 0.0, ""


def say(page, message):
    """Type a message and press Enter."""
    page.get_by_label("Message").fill(message)
    page.keyboard.press("Enter")


def ready(page):
    """Wait until the page can send again."""
    page.get_by_role("button", name="Send").wait_for()


def test_a_reply_is_seen_as_it_comes(opened, served):
    page = opened()
    served.pace = 0.3
    say(page, "say owl")
    seen = []
    while page.get_by_role("button", name="Stop").is_visible():
        seen.append(page.locator(".words").text_content())
        time.sleep(0.05)
    ready(page)
    whole = page.locator(".words").text_content()
    assert len({text for text in seen if 0 < len(text) < len(whole)}) > 2
    assert all(whole.startswith(text) for text in seen)
    assert re.search(r"reward [+\u2212]\d+\.\d\d · \d+ tokens", page.locator(".about").text_content())
    assert page.locator("#heard").text_content() == whole


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_comparisons_at_every_width_and_in_both_colours(opened, served, width, scheme):
    page = opened(width, 800, scheme)
    served.more = " indeed"
    page.get_by_role("button", name="Compare").click()
    assert page.get_by_role("button", name="Compare").get_attribute("aria-pressed") == "true"
    for message in ("say owl", HOSTILE + " " + "a" * 120):
        say(page, message)
        ready(page)
    page.get_by_role("button", name="Settings").click()
    assert [each.text_content() for each in page.locator(".turn").first.locator(".name").all()] == [
        "base",
        "sft",
        "ppo",
    ]
    assert page.locator(".about b").count() == 6
    tops = {round(each.bounding_box()["y"]) for each in page.locator(".turn").first.locator(".reply").all()}
    assert len(tops) == (3 if width < 400 else 1)
    image = page.screenshot(full_page=True)
    assert struct.unpack(">I", image[16:20])[0] == width, "the page is wider than the window"
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == (scheme == "dark")
    assert page.locator(".log img, .log b:not(.about b)").count() == 0
    assert page.locator(".said").nth(1).text_content().startswith(HOSTILE)


def test_a_choice_by_button_and_by_key_and_the_talk_goes_on_from_it(opened, served, kept):
    page = opened(375, 700)
    page.get_by_role("button", name="Compare").click()
    say(page, "say owl")
    page.get_by_role("status").filter(has_text="sft and ppo say the same.").wait_for()
    page.get_by_role("button", name="Clear").click()
    served.more = " indeed"
    say(page, "say owl")
    ready(page)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Your name").fill("ann")
    page.get_by_role("button", name="Settings").click()
    better = page.get_by_role("button", name="sft is better")
    better.click()
    page.get_by_role("status").filter(has_text="Kept in labels.jsonl; the talk goes on from this reply.").wait_for()
    assert better.get_attribute("aria-pressed") == "true" and page.locator("#message:focus").count() == 1
    better.click()
    page.get_by_role("status").filter(has_text="Taken back.").wait_for()
    assert kept() == []
    page.keyboard.press("2")
    assert page.get_by_label("Message").input_value() == "2", "what is typed stays a message"
    page.get_by_label("Message").fill("")
    for key, choice in (("t", "tie"), ("b", "bad"), ("2", "b"), ("1", "a")):
        page.keyboard.press("Escape")
        page.keyboard.press(key)
        page.locator(f"[data-choice={choice}][aria-pressed=true]").wait_for()
        (label,) = kept()
        assert (label.choice, label.labeller) == (choice, "ann") and label.seconds > 0
    replies = dict(zip(("base", "sft", "ppo"), page.locator(".words").all_text_contents(), strict=True))
    assert (label.a, label.b, label.stages) == (replies["sft"], replies["ppo"], {"a": "sft", "b": "ppo"})
    say(page, "more")
    ready(page)
    assert better.first.is_disabled()
    page.get_by_role("button", name="Both bad").last.click()
    page.get_by_role("status").last.filter(has_text="Kept in labels.jsonl.").wait_for()
    assert [turn["content"] for turn in kept()[1].prompt] == ["say owl", replies["sft"], "more"]
    say(page, "and more")
    ready(page)
    page.get_by_role("status").filter(has_text="sft and ppo have seen different replies before").wait_for()


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stop(opened, served, how):
    page = opened()
    served.pace = 0.1
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("50")
    page.get_by_label("Longest reply").fill("200")
    say(page, "say owl")
    page.locator(".words").filter(has_text=re.compile(".")).wait_for()
    page.get_by_role("button", name="Stop").click() if how == "button" else page.keyboard.press("Escape")
    ready(page)
    served.pace = 0.0
    assert page.locator(".about").text_content() == "stopped"
    page.get_by_label("Longest reply").fill("3")
    say(page, "more")
    page.locator(".about b").wait_for()
    ready(page)
    assert page.locator(".turn").count() == 2


def test_what_cannot_be_sent_comes_back(opened):
    page = opened(375, 700)
    say(page, "all " * 400)
    page.get_by_role("alert").filter(has_text="message too long").wait_for()
    ready(page)
    assert page.locator(".turn").count() == 0 and page.get_by_label("Message").input_value().startswith("all all")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("-1")
    say(page, "say owl")
    page.get_by_role("alert").filter(has_text="temperature: out of range").wait_for()
    page.get_by_label("Temperature").fill("0")
    say(page, "say owl")
    page.locator(".about b").wait_for()
    assert page.locator("#problem").text_content() == ""


def test_the_conversation_goes_with_every_message_until_it_is_cleared(opened, served):
    page = opened()
    sent = []
    page.on("request", lambda request: sent.append(request.post_data) if request.method == "POST" else None)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("be brief")
    for message in ("say owl", "more"):
        say(page, message)
        ready(page)
    page.get_by_role("button", name="Clear").click()
    assert page.locator(".turn").count() == 0
    say(page, "again")
    ready(page)
    turns = [json.loads(body)["turns"] for body in sent]
    assert [len(each) for each in turns] == [0, 1, 0] and turns[1][0]["message"] == "say owl"
    assert all(json.loads(body)["system"] == "be brief" for body in sent)


def test_the_keyboard_is_enough(opened):
    page = opened()
    page.locator("#message:focus").wait_for()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert page.get_by_label("Message").input_value() == "one\ntwo"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.locator(".about b").wait_for()
    for name in ("Clear", "Settings", "Compare"):
        for _ in range(8):
            page.keyboard.press("Shift+Tab")
            if page.evaluate("document.activeElement.textContent") == name:
                break
        assert page.evaluate("document.activeElement.textContent") == name
    page.keyboard.press("Space")
    assert page.get_by_role("button", name="Compare").get_attribute("aria-pressed") == "true"

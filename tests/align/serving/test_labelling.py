"""The page of `align label`: strict about who asks, blind, resumed where left; in a real browser by keys alone."""

from __future__ import annotations

import json
import re
import struct

import pytest

from align.serving.labels import Answer, Pair, open_labels, pair_key, read_labels
from tests.local_pages import HOSTILE, ask, serving

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

COUNT = 24


def pairs():
    """Made-up pairs; the first is hostile, the second a dialogue."""
    found = []
    for n in range(COUNT):
        prompt = f"say {n}" if n else HOSTILE + " " + "a" * 120
        if n == 1:
            turns = (("system", "be brief"), ("user", "say 1"), ("assistant", "one"), ("user", "more"))
            prompt = [{"role": role, "content": content} for role, content in turns]
        texts = (f"the first {n}" if n else HOSTILE, f"the second {n}\nof two lines")
        whose = (("sft", "5f", 0.5, -1.0), ("ppo", "99", 1.0, -2.0))
        answers = [Answer(text, *rest) for text, rest in zip(texts, whose, strict=True)]
        found.append(Pair(pair_key(prompt, *texts), prompt, tuple(answers)))
    return found


@pytest.fixture
def served(tmp_path):
    """The page over made-up pairs, with its file."""
    from align.serving.labelling import LabelPage

    path = tmp_path / "labels.jsonl"
    with (
        open_labels(str(path)) as file,
        serving(lambda port: LabelPage("a-run", pairs(), file, 0, None, port)) as found,
    ):
        found.file = path
        yield found


def vote(served, **content):
    """What the page is to show next."""
    status, _, text = ask(served, "/vote", json.dumps({"labeller": "ann", **content}).encode())
    assert status == 200, text
    return json.loads(text)


# ---------------------------------------- who may ask, and what
@pytest.mark.parametrize(
    ("wrong", "status"),
    [
        ({"Host": "evil.example"}, 400),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"X-Align-Token": None}, 403),
        ({"X-Align-Token": "x"}, 403),
        ({}, 200),
    ],
    ids=str,
)
def test_a_vote_is_only_from_the_page_itself(served, wrong, status):
    key = vote(served)["pair"]["key"]
    body = json.dumps({"labeller": "ann", "pair": key, "choice": "a"}).encode()
    assert ask(served, "/vote", body, **wrong)[0] == status
    assert served.file.exists() == (status == 200)


def test_the_page_does_not_know_whose_a_reply_is(served):
    status, headers, text = ask(served, f"/?token={served.page.token}", method="GET", Origin=None)
    assert status == 200 and "default-src 'none'" in headers["content-security-policy"]
    assert ask(served, "/?token=x", method="GET")[0] == 403 and not re.search(r"https?://|innerHTML|onclick", text)
    for shown in (text, json.dumps(vote(served))):
        assert not re.search(r"\b(sft|ppo|5f|99)\b", shown)


def test_the_script_of_the_page_knows_any_name_of_the_file(tmp_path):
    from align.serving.labelling import LabelPage

    name = 'it\'s \\x <script> "q".jsonl'
    with open_labels(str(tmp_path / name)) as file:
        page = LabelPage("a-run", pairs(), file, 0, None, 1)
        text = page._template.render(**page.content(), nonce="")
    (held,) = re.findall(r'stand in " \+ ("(?:[^"\\]|\\.)*") \+', text)
    assert json.loads(held) == name


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "not JSON"),
        (b"[]", "expected a mapping"),
        (b"{}", "a name of 1 to 80"),
        (b'{"labeller": " \\n "}', "a name of 1 to 80"),
        (b'{"labeller": "a\\ud800"}', "a name of 1 to 80"),
        (b'{"labeller": "ann", "choice": "c"}', "choice is none of a, b, tie, bad, skip"),
        (b'{"labeller": "ann", "choice": "a"}', "is none of this page"),
        (b'{"labeller": "ann", "choice": "a", "pair": "x", "seconds": -1}', "out of range"),
        (b'{"labeller": "ann", "choice": "a", "pair": "x", "seconds": 1e999}', "out of range"),
        (b'{"labeller": "ann", "seconds": 1' + b"0" * 400 + b"}", "seconds: expected a number"),
        (b'{"labeller": "ann", "comment": "\\ud800"}', "all of them whole"),
        (json.dumps({"labeller": "ann", "comment": "x" * 4001}).encode(), "at most 4,000"),
        (b'{"labeler": "ann"}', "did you mean 'labeller'"),
    ],
    ids=lambda value: value[:50] if isinstance(value, str) else None,
)
def test_bad_requests_are_answered_with_one_line(served, content, said):
    status, _, text = ask(served, "/vote", content)
    problem = json.loads(text)["problem"]
    assert status == 422 and said in problem and "\n" not in problem and not served.file.exists()


def test_a_pair_is_judged_once_by_each(served):
    key = vote(served)["pair"]["key"]
    assert vote(served, pair=key, choice="bad")["done"] == 1
    assert ask(served, "/vote", json.dumps({"labeller": "ann", "pair": key, "choice": "a"}).encode())[0] == 422
    assert vote(served, labeller="ben")["pair"]["key"] == key


def test_the_sides_are_drawn_for_each_labeller_and_the_rows_say_them(served):
    sides = []
    for labeller in ("ann", "ben", "cem"):
        state = vote(served, labeller=labeller)
        for _ in range(COUNT):
            pair = state["pair"]
            state = vote(served, labeller=labeller, pair=pair["key"], choice="a", seconds=2.5)
        assert state["pair"] is None and state["done"] == COUNT
    for label in read_labels(served.file):
        first = label.a == HOSTILE or label.a.startswith("the first")
        assert label.stages == ({"a": "sft", "b": "ppo"} if first else {"a": "ppo", "b": "sft"})
        assert label.digests["a"] == ("5f" if first else "99") and label.rewards["a"] == (0.5 if first else 1)
        sides.append(first)
    assert sides[:COUNT] != sides[COUNT : 2 * COUNT] and 0.25 < sum(sides) / len(sides) < 0.75
    assert len(state["agreement"]["between"]) == 3 and state["agreement"]["reward_model"]["n"] == 3 * COUNT


def test_steps_are_taken_back_in_their_order(served):
    keys = [pair.key for pair in pairs()]
    steps = [("a", 1), ("skip", 2), ("tie", 3), ("skip", 4)]
    for (choice, following), key in zip(steps, keys, strict=False):
        assert vote(served, pair=key, choice=choice)["pair"]["key"] == keys[following]
    for place in (3, 2, 1, 0):
        state = vote(served, undo=True)
        assert state["pair"]["key"] == keys[place]
    assert not state["undo"] and state["done"] == state["skipped"] == 0 and read_labels(served.file) == []


def test_skipped_pairs_come_again_at_the_end(served):
    state = vote(served)
    first = state["pair"]["key"]
    state = vote(served, pair=first, choice="skip")
    for _ in range(COUNT - 1):
        state = vote(served, pair=state["pair"]["key"], choice="b")
    assert state["pair"]["key"] == first and state["done"] == COUNT - 1 and state["skipped"] == 1
    assert vote(served, pair=first, choice="skip")["pair"]["key"] == first
    state = vote(served, pair=first, choice="b")
    assert state["pair"] is None and state["skipped"] == 0


def test_a_file_that_something_else_changed_is_left_alone(served):
    key = vote(served)["pair"]["key"]
    served.file.write_text("")
    status, _, text = ask(served, "/vote", json.dumps({"labeller": "ann", "pair": key, "choice": "a"}).encode())
    assert status == 422 and "something else has changed the file" in text and served.file.read_text() == ""


# ---------------------------------------- in a browser
def begin(page, name):
    page.get_by_label("Your name").fill(name)
    page.keyboard.press("Enter")
    page.locator("#pair").wait_for()


def press(page, key, place):
    """Press a key and wait until the page says where it is."""
    page.keyboard.press(key)
    page.locator("#place").filter(has_text=re.compile(f"^{re.escape(place)}$")).wait_for()


def test_twenty_votes_by_keys_then_reload_undo_and_a_second_labeller(opened, served):
    page = opened()
    begin(page, "ann")
    for n, key in enumerate("12tb" * 5, 1):
        press(page, key, f"{n} of {COUNT}")
    assert [label.choice for label in read_labels(served.file)] == ["a", "b", "tie", "bad"] * 5
    assert all(label.seconds > 0 and label.labeller == "ann" for label in read_labels(served.file))
    page.reload()
    page.locator("#pair").wait_for()
    assert page.locator("#place").text_content() == f"20 of {COUNT}"
    press(page, "u", f"19 of {COUNT}")
    press(page, "s", f"19 of {COUNT} · 1 skipped")
    page.keyboard.press("c")
    page.keyboard.type("1 is a number; t is a letter")
    page.keyboard.press("Enter")
    press(page, "2", f"20 of {COUNT} · 1 skipped")
    last = read_labels(served.file)[-1]
    assert last.comment == "1 is a number; t is a letter" and last.choice == "b"
    assert page.locator("#comment").is_hidden()

    other = opened()
    begin(other, "ben")
    for n in range(1, 13):
        press(other, "1", f"{n} of {COUNT}")
    labels = read_labels(served.file)
    assert [label.labeller for label in labels].count("ben") == 12 and len({label.pair for label in labels}) == 20
    other.get_by_text("Agreement").click()
    assert re.search(r"ann and ben agree on \d+ % of 12 pairs, kappa \u2212?\d", other.locator("#told").text_content())
    assert "the reward model prefers the chosen reply in" in other.locator("#told").text_content()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_every_width_and_both_colours(opened, width, scheme):
    page = opened(width, 700, scheme)
    begin(page, "ann")
    image = page.screenshot(full_page=True)
    assert struct.unpack(">I", image[16:20])[0] == width, "the page is wider than the window"
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == (scheme == "dark")
    tops = {round(each.bounding_box()["y"]) for each in page.locator(".reply").all()}
    assert len(tops) == (2 if width < 400 else 1)
    assert page.locator("#pair img, #pair b").count() == 0
    assert HOSTILE in [page.locator("#a").text_content(), page.locator("#b").text_content()]
    page.get_by_role("button", name="Both bad").click()
    page.locator("#place").filter(has_text="1 of").wait_for()
    assert [each.text_content() for each in page.locator("#prompt p").all()] == ["be brief", "say 1", "one", "more"]
    page.get_by_role("button", name="Undo").click()
    page.locator("#place").filter(has_text="0 of").wait_for()
    page.get_by_title("Label under another name").click()
    page.get_by_label("Your name").wait_for()
    assert page.locator("#bottom").is_hidden()

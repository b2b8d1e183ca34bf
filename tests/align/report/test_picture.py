"""The picture of the README, made from files of a run: the usual question, and no text of it is markup."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest

from align.run_record import RunRecord, StageEntry
from benchmarks import picture

HOSTILE = '<script>alert(1)</script> & \x1b[31m "quoted"'


def row(prompt, scores, texts=("well", "good", "very good"), gold=True):
    replies = {}
    for name, text, score in zip(("base", "sft", "ppo"), texts, scores, strict=True):
        replies[name] = {"text": text, "reward": score, "gold": {"score": score} if gold else None, "finished": True}
    return {"prompt": prompt, "replies": replies}


ROWS = [
    row("the best", (0.0, 0.0, 1.0)),
    row("the usual", (0.1, 0.4, 0.8)),
    row("a middling one", (0.2, 0.5, 0.5)),
    row("alike", (0.1, 0.4, 0.75), ("same", "same", "other")),
    row("one of blanks", (0.1, 0.4, 0.75), ("", "a", "b")),
    row("a long one", (0.1, 0.4, 0.75), ("a", "b", "c " * picture.LONGEST)),
]


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "a-run"
    (folder / "evaluate").mkdir(parents=True)
    (folder / "evaluate" / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in ROWS), "utf-8")
    RunRecord(folder, "a-run", stages=[StageEntry("evaluate", "done", digest="x")]).write()
    return folder


def words(svg):
    return [node.text or "" for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_the_question_whose_scores_are_nearest_to_the_means_is_drawn(run, tmp_path, capsys):
    picture.main([str(run), str(tmp_path / "x.svg")])
    found = words((tmp_path / "x.svg").read_text("utf-8"))
    assert found[:3] == ["align chat a-run --compare", "a held-out question", "> the usual"]
    assert found[3:6] == ["gold 0.10 \u00b7 reward +0.10", "base", "well"] and "very good" in found
    assert capsys.readouterr().out.strip() == str(tmp_path / "x.svg")


def test_texts_are_text_and_scores_need_no_gold():
    svg = picture.picture(row(HOSTILE, (-1.25, 0.5, 2.0), (HOSTILE, "two\n\nlines", "x" * 1000), gold=False), "a-run")
    found = words(svg)
    assert "<script" not in svg and "\x1b" not in svg and any("<script>alert(1)</script> &" in text for text in found)
    assert "reward \u22121.25" in found and "gold" not in svg and "prefers-color-scheme: dark" in svg
    assert all(len(text) <= picture.COLUMNS for text in found) and found[-1].endswith("...")
    height = int(ElementTree.fromstring(svg).get("viewBox").split()[3])
    tops = [float(node.get("y")) for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert max(tops) < height


def test_where_no_question_shows_well_any_is_drawn_and_a_run_without_replies_is_a_line(tmp_path):
    alike = row("alike", (0.1, 0.4, 0.75), ("same", "same", "same"))
    assert picture.usual([alike]) == alike
    RunRecord(tmp_path, "none").write()
    with pytest.raises(SystemExit, match="no evaluation with replies; align eval"):
        picture.main([str(tmp_path)])

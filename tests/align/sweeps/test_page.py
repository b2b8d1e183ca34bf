"""The page of a sweep: intervals of shares, settings without effect, and plots whose marks and words all show."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from align.report.plots import Dot, Mark, Quantity, Series, beside, coincide, dot_chart, plot, room, without_overlap
from align.sweeps.comparison import headline, interval, without_effect
from align.sweeps.page import charts
from reward.metrics import Z95, accuracy_interval


def row(job: int, metrics: dict, **varied) -> dict:
    """A finished job."""
    numbers = {"trainable": 10, "total": 100, "share": 0.1, "peak_rss_bytes": 2**20, "seconds": 1.0}
    numbers |= {"weights_bytes": 40, "tokens_per_second": None}
    return {"job": job, "status": "done", "error": None, "metrics": metrics, "varied": varied, "every": {}, **numbers}


def share(value: float, n: int = 64) -> dict:
    return {"gold": value, "gold_se": (value * (1 - value) / n) ** 0.5, "gold_n": n}


def grid(values: dict[tuple[str, float], float]) -> list[dict]:
    """Jobs over adapter and kl_coef, each with its gold score over 64 prompts."""
    return [row(i, share(gold), adapter=a, kl_coef=k) for i, ((a, k), gold) in enumerate(values.items())]


LEVEL = {(adapter, coef): 1 / 64 for adapter in ("lora", "vera", "qlora") for coef in (0.02, 0.05, 0.1)}


def test_the_interval_of_a_share_is_wilsons_and_stays_a_share():
    few = row(0, share(1 / 64))
    assert interval(few, "gold") == accuracy_interval(1, 64)[1:]
    del few["metrics"]["gold_n"]  # as in sweep.json files of earlier versions: the number of prompts from the error
    assert interval(few, "gold") == accuracy_interval(1, 64)[1:]
    low, high = interval(row(0, share(0.0)), "gold")
    assert low == 0 and 0.04 < high < 0.07
    assert interval(row(0, {"win_rate": 0.5, "win_rate_n": 64}), "win_rate") == accuracy_interval(32, 64)[1:]
    assert interval(row(0, {"gold": 0.5}), "gold") is None and interval(row(0, {"eval_loss": 1.2}), "eval_loss") is None
    assert interval(row(0, {"gain": 0.1, "gain_se": 0.01}), "gain") == pytest.approx((0.1 - Z95 / 100, 0.1 + Z95 / 100))
    assert interval(row(0, {"gain": 0.99, "gain_se": 0.01}), "gain")[1] == 1.0


def test_settings_without_effect_are_named():
    (told,) = without_effect(grid(LEVEL), "gold")
    assert told.startswith("adapter and kl_coef make no difference here: with all else equal, gold is the same;")
    near = {key: 0.5 + 0.02 * (key[1] == 0.1) + 0.4 * (key[0] == "vera") for key in LEVEL}
    (told,) = without_effect(grid(near), "gold")
    assert told.startswith("kl_coef makes no clear difference here") and "intervals of gold overlap" in told
    assert told in headline({"rows": grid(near)})["sentences"]
    far = {key: 0.1 + 4 * key[1] + 0.4 * (key[0] == "vera") for key in LEVEL}
    assert without_effect(grid(far), "gold") == []
    never_alone = {("lora", 0.02): 0.5, ("vera", 0.05): 0.5}  # no two jobs differ in one key only
    assert without_effect(grid(never_alone), "gold") == []
    repeats = [row(i, share(0.5), seed=i) for i in range(3)]
    assert without_effect(repeats, "gold") == []
    losses = [row(i, {"eval_loss": 1.0 + i / 1000}, lr=10.0**-i) for i in range(3)]
    assert without_effect(losses, "eval_loss") == []  # unequal, and no interval to say whether that means anything


def marks_of(drawing: str) -> list[tuple[str, float, float]]:
    """(class, x, y) of the circles, squares and triangles of a plot, by the first point of their outline."""
    found = re.findall(r'<path class="(s\d) dot" d="M(\S+) ([\d.]+)', drawing)
    return [(colour, float(x), float(y)) for colour, x, y in found]


def test_equal_series_stand_side_by_side_and_their_lines_share_the_way():
    over, *_ = charts(grid(LEVEL))
    places = sorted(x for _, x, _ in marks_of(over["drawing"]))
    assert len(places) == 9 and min(b - a for a, b in pairwise(places)) > 4
    assert over["drawing"].count("stroke-dasharray") == 3 and "side by side" in over["note"]
    assert len(set(re.findall(r'stroke-dashoffset="(\S+)"', over["drawing"]))) == 3
    two = [Series("a", [Dot(1, 1)]), Series("b", [Dot(1.5, 1)])]
    assert not coincide(two) and coincide([*two, Series("c", [Dot(1, 2)])])
    one = charts(grid({key: gold for key, gold in LEVEL.items() if key[0] == "lora"}))[0]
    assert "stroke-dasharray" not in one["drawing"] and one["note"] == ""


def test_no_whisker_of_a_share_leaves_the_axis():
    drawing = charts(grid(LEVEL))[0]["drawing"]
    assert "\N{MINUS SIGN}" not in drawing


def test_lowest_number_at_the_left_and_first_below_keep_apart():
    drawing = plot([Series("a", [Dot(-4, -2), Dot(2, 6)])], Quantity("x"), Quantity("y"), "a plot")
    left = [
        (float(x), float(y)) for x, y in re.findall(r'<text x="(\S+)" y="(\S+)" dy="\S+" text-anchor="end"', drawing)
    ]
    below = re.findall(r'<text x="(\S+)" y="(\S+)" dy="\S+" text-anchor="middle">([^<]+)', drawing)
    for size in (13, 20):  # as the page sets them, wide and narrow
        lowest = max(y for _, y in left) + 0.36 * size
        assert all(float(y) + 0.03 * size >= lowest for _, y, _ in below)
    assert min(float(x) for x, *_ in below) > max(x for x, _ in left)


def test_labels_of_marks_never_lie_on_each_other():
    crowd = [Mark(100.0 + i, 100.0, f"s{i % 3}", f"0.0{i}") for i in range(9)]
    labels = beside(crowd, [], (40.0, 0.0, 500.0, 250.0))
    assert sorted(label.text for label in labels) == ["0.00, 0.03, 0.06", "0.01, 0.04, 0.07", "0.02, 0.05, 0.08"]
    boxes = [(label.x - (label.anchor == "end") * room(label.text), label.y - 16, room(label.text)) for label in labels]
    for i, (x, y, width) in enumerate(boxes):
        assert all(abs(y - b) >= 20 or x + width <= a or a + w <= x for a, b, w in boxes[:i])
        assert x >= 40 and x + width <= 500
    (told,) = beside([Mark(100.0 + i, 100.0, "s0", str(i)) for i in range(6)], [], (0.0, 0.0, 500.0, 250.0))
    assert told.text == "0 to 5"
    (turned,) = beside([Mark(490.0, 100.0, "s0", "0.05")], [], (40.0, 0.0, 500.0, 250.0))
    assert turned.anchor == "end"


def test_numbers_without_room_are_left_out_powers_of_ten_last():
    kept = without_overlap([0, 30, 60, 200], ["5,000", "10,000", "20,000", "50,000"], [False, True, False, False])
    assert kept == [False, True, False, True]


def test_equal_values_of_one_name_stand_below_each_other():
    drawing = dot_chart([("lora", [Dot(0, 0.5), Dot(0, 0.5), Dot(0, 0.5)])], Quantity("gold"), "a plot")
    heights = [y for _, _, y in marks_of(drawing)]
    assert len(set(heights)) == 3

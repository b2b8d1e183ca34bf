"""The report's drawings and how it spells numbers."""

from __future__ import annotations

from align.report.axes import ticks
from align.report.charts import curve, histogram, interval, reliability, smoothed, thin
from align.report.formatting import MINUS, NONE, duration, fixed, number, percent, plural, signed, size, visible


def test_ticks_enclose_the_range() -> None:
    assert ticks(0.03, 0.97) == [0.0, 0.5, 1.0]
    assert ticks(-1.0, 1.0) == [-1.0, 0.0, 1.0]
    assert ticks(1.27, 4.1) == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert ticks(0.0, 0.0)[0] < 0.0 < ticks(0.0, 0.0)[-1]
    assert ticks(7.0, 7.0)[0] < 7.0 < ticks(7.0, 7.0)[-1]


def test_thinning_keeps_every_extreme() -> None:
    points = [(float(i), 0.0) for i in range(10_000)]
    points[1234], points[1235], points[9999] = (1234.0, 7.0), (1235.0, -7.0), (9999.0, 3.0)
    kept = thin(points)
    assert len(kept) <= 300 and kept == sorted(kept)
    assert {(1234.0, 7.0), (1235.0, -7.0), (9999.0, 3.0)} <= set(kept)
    assert thin(points[:300]) == points[:300]


def test_smoothing_by_hand() -> None:
    """60 points 0..59: windows of 3, so the means are the values, but at the ends, where only two are left."""
    means, window = smoothed([(float(i), float(i)) for i in range(60)])
    assert window == 3 and means[0] == (0.0, 0.5) and means[30] == (30.0, 30.0) and means[-1] == (59.0, 58.5)
    assert smoothed([(float(i), 1.0) for i in range(39)])[1] == 1
    means, window = smoothed([(float(i), 2.0) for i in range(100_000)])
    assert len(means) <= 151 and {y for _, y in means} == {2.0} and window == 5000


def test_a_curve_of_one_point_is_a_dot() -> None:
    drawn = curve([(1.0, 0.5)], [], "x <y>")
    assert "<circle" in drawn and "polyline" not in drawn and "<title>x &lt;y&gt;</title>" in drawn


def test_a_curve_says_what_it_shows() -> None:
    drawn = curve([(1.0, 0.5), (2.0, 3.0), (3.0, 1.0)], [(3.0, 2.0)], "Loss", beside=[(1.0, 9.0), (3.0, 9.0)])
    assert "<desc>0.500 at step 1, 1.00 at step 3; between 0.500 and 3.00</desc>" in drawn
    assert "<title>step 3: 2.00</title>" in drawn and 'class="beside"' in drawn
    assert 'class="raw"' not in drawn and 'class="raw"' in curve(
        [(float(i), 1.0 / (i + 1)) for i in range(50)], [], "x"
    )


def test_odd_values_are_drawn() -> None:
    for values in ((1e300, -1e300), (1e-300, 2e-300), (0.0, 0.0), (1e15, 1e15 + 1)):
        assert "nan" not in curve([(float(i), y) for i, y in enumerate(values)], [], "x")


def test_calibration_is_drawn_where_it_lies() -> None:
    """Confidence 0.75 of 0.5..1 is the middle of 42..310; accuracy 0.5 of 0.25..1 is a third of the way up."""
    drawn = reliability([{"from": 0.7, "to": 0.8, "n": 400, "confidence": 0.75, "accuracy": 0.5}])
    assert '<circle class="value" cx="176" cy="136"' in drawn and "right in 50.0\u202f% of 400 pairs" in drawn


def test_histograms_are_as_tall_as_their_counts() -> None:
    drawn = histogram([1, 4, 0], [0, 10, 20, 30], "tokens")
    assert 'height="66"' in drawn and 'height="16.5"' in drawn and 'height="0"' in drawn
    assert "<title>10 to 20: 4</title>" in drawn


def test_interval_is_clamped_to_its_axis() -> None:
    drawn = interval(0.5, -3.0, 9.0, (0.0, 1.0), 0.5)
    assert 'x1="4.0" x2="156.0" y1="8" y2="8"' in drawn


def test_words() -> None:
    values = (None, 0.0, 3, 82432, 1234.5, 12.345, 0.0412, -0.5, 1.2e-7)
    assert [number(x) for x in values] == [
        NONE, "0", "3", "82,432", "1,234", "12.35", "0.041", f"{MINUS}0.500", f"1.2e{MINUS}7",
    ]  # fmt: skip
    assert (signed(0.39), signed(-0.05), signed(0.004)) == ("+0.39", f"{MINUS}0.05", "+0.004")
    assert (plural(1, "row"), plural(2, "row")) == ("1 row", "2 rows")
    assert visible("a\tb\n\x07\u2066") == "a\tb\n\u2407<U+2066>"
    assert (fixed(-0.436), fixed(0.0), fixed(None)) == (f"{MINUS}0.44", "0.00", NONE)
    assert (percent(0.832), percent(None)) == ("83.2\u202f%", NONE)
    assert (size(1_250_000_000), size(5_680_128), size(1288), size(None)) == ("1.16 GiB", "5.4 MiB", "1.3 KiB", NONE)
    assert (duration(4.21), duration(215), duration(3900), duration(None)) == (
        "4.2 s",
        "3 min 35 s",
        "1 h 05 min",
        NONE,
    )

"""The report's drawings and how it spells numbers."""

from __future__ import annotations

from align.svg import curve, interval, thin, ticks
from align.words import MINUS, NONE, duration, fixed, number, percent, signed, size


def test_ticks_enclose_the_range() -> None:
    assert ticks(0.03, 0.97) == [0.0, 0.5, 1.0]
    assert ticks(-1.0, 1.0) == [-1.0, 0.0, 1.0]
    assert ticks(1.27, 4.1) == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert ticks(0.0, 0.0)[0] < 0.0 < ticks(0.0, 0.0)[-1]
    assert ticks(7.0, 7.0)[0] < 7.0 < ticks(7.0, 7.0)[-1]


def test_curves_are_thinned_to_means() -> None:
    points, every = thin([(float(i), float(i)) for i in range(601)])
    assert every == 3 and len(points) == 201
    assert points[0] == (1.0, 1.0)


def test_a_curve_of_one_point_is_a_dot() -> None:
    drawn = curve([(1.0, 0.5)], [], "x <y>")
    assert "<circle" in drawn and "polyline" not in drawn and 'aria-label="x &lt;y&gt;"' in drawn


def test_interval_is_clamped_to_its_axis() -> None:
    drawn = interval(0.5, -3.0, 9.0, (0.0, 1.0), 0.5)
    assert 'x1="4.0" x2="156.0" y1="8" y2="8"' in drawn


def test_words() -> None:
    values = (None, 0.0, 3, 82432, 1234.5, 12.345, 0.0412, -0.5, 1.2e-7)
    assert [number(x) for x in values] == [
        NONE, "0", "3", "82,432", "1,234", "12.35", "0.041", f"{MINUS}0.500", f"1.2e{MINUS}7",
    ]  # fmt: skip
    assert (signed(0.39), signed(-0.05)) == ("+0.39", f"{MINUS}0.05")
    assert (fixed(-0.436), fixed(0.0), fixed(None)) == (f"{MINUS}0.44", "0.00", NONE)
    assert (percent(0.832), percent(None)) == ("83.2\u202f%", NONE)
    assert (size(1_250_000_000), size(5_680_128), size(None)) == ("1.16 GiB", "5 MiB", NONE)
    assert (duration(4.21), duration(215), duration(3900), duration(None)) == (
        "4.2 s",
        "3 min 35 s",
        "1 h 05 min",
        NONE,
    )

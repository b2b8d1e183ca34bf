"""Numbers as people read them."""

from __future__ import annotations

import re

MINUS, NONE = "\N{MINUS SIGN}", "\N{EN DASH}"
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def number(value: float | None) -> str:
    """A number for people: three digits that count, thousands parted, a true minus sign; an en dash for None."""
    if not isinstance(value, int | float):
        return NONE
    size = abs(value)
    if isinstance(value, int) or size >= 1000:
        text = f"{value:,.0f}"
    elif size >= 1e-3 or value == 0:
        text = f"{value:.{0 if value == 0 else 1 if size >= 100 else 2 if size >= 1 else 3}f}"
    else:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        text = f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return text.replace("-", MINUS)


def signed(value: float) -> str:
    """A change with its sign: +0.39; three decimals where two would hide that it is not 0."""
    return f"{value:+.{3 if 0 < abs(value) < 0.005 else 2}f}".replace("-", MINUS)


def fixed(value: float | None) -> str:
    """A number with two decimals, for columns and for shares of a few hundred prompts: 0.42."""
    return f"{value:.2f}".replace("-", MINUS) if isinstance(value, int | float) else NONE


def percent(value: float | None) -> str:
    """A share as per cent: 83.2 %."""
    return f"{100 * value:.1f}\u202f%" if isinstance(value, int | float) else NONE


def size(count: float | None) -> str:
    """Bytes in KiB, MiB or GiB."""
    if not isinstance(count, int | float):
        return NONE
    if count < 2**20:
        return f"{count / 2**10:.1f} KiB"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def duration(seconds: float | None) -> str:
    """Seconds as 4.2 s, 3 min 20 s or 1 h 05 min."""
    if not isinstance(seconds, int | float):
        return NONE
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def plural(count: float, noun: str) -> str:
    """A count with its noun: 1 row, 3 rows."""
    return f"{number(count)} {noun}" if count == 1 else f"{number(count)} {noun}s"


def visible(text: str) -> str:
    """Text with what cannot be seen made visible: control characters as their pictures, bidi overrides and halves of
    surrogate pairs by their numbers. Tabs and line ends stay."""
    return _UNSEEN.sub(lambda match: _picture(match[0]), text)


def _picture(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    return "\N{SYMBOL FOR DELETE}" if code == 0x7F else f"<U+{code:04X}>"

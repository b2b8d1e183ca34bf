"""Numbers as people read them."""

from __future__ import annotations

MINUS, NONE = "\N{MINUS SIGN}", "\N{EN DASH}"


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
    """A change with its sign: +0.39."""
    return f"{value:+.2f}".replace("-", MINUS)


def fixed(value: float | None) -> str:
    """A number with two decimals, for columns and for shares of a few hundred prompts: 0.42."""
    return f"{value:.2f}".replace("-", MINUS) if isinstance(value, int | float) else NONE


def percent(value: float | None) -> str:
    """A share as per cent: 83.2 %."""
    return f"{100 * value:.1f}\u202f%" if isinstance(value, int | float) else NONE


def size(count: float | None) -> str:
    """Bytes in MiB or GiB."""
    if not isinstance(count, int | float):
        return NONE
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"


def duration(seconds: float | None) -> str:
    """Seconds as 4.2 s, 3 min 20 s or 1 h 05 min."""
    if not isinstance(seconds, int | float):
        return NONE
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"

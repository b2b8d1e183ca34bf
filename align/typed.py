"""Checked dataclasses from plain values: `data_prep/typed.py`, under the name that this package uses."""

from __future__ import annotations

from data_prep.typed import T, build, convert, option_types, plain, shown, unknown_key

__all__ = ["T", "build", "convert", "option_types", "plain", "shown", "unknown_key"]

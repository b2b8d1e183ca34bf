"""Options with help strings and bounds: `data_prep/fields.py`, under the name that this package uses."""

from __future__ import annotations

from data_prep.fields import Bounds, mapping, option

__all__ = ["Bounds", "mapping", "option"]

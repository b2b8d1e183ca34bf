"""One file per data format. A new format is one new file that registers a class here.

A format says which columns it reads (`spellings`, `uses`), which kinds of record it yields (`kinds`), and how one row
becomes records. See base.py.
"""

from __future__ import annotations

from data_prep.formats.base import FORMATS, Format
from data_prep.formats.detection import detect_format

__all__ = ["FORMATS", "Format", "detect_format"]

"""The command `align`."""

from align.cli.dispatch import main

__all__ = ["main"]

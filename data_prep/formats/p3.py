"""p3: {"inputs_pretokenized", "targets_pretokenized"} (bigscience/P3, T0), also {"inputs", "targets"} (FLAN)."""

from __future__ import annotations

from data_prep.formats.base import FORMATS
from data_prep.formats.prompt_completion import PromptCompletion


@FORMATS.register("p3")
class P3(PromptCompletion):
    """A prompt made from a template, and its target."""

    spellings = (("inputs_pretokenized", "targets_pretokenized"), ("inputs", "targets"))

"""p3: {"inputs_pretokenized", "targets_pretokenized"} (bigscience/P3, T0), also {"inputs", "targets"} (FLAN).

A `definition` of the task (Super-NaturalInstructions, arXiv 2204.07705) stands before the input, with a blank line.
"""

from __future__ import annotations

from data_prep.formats.base import FORMATS
from data_prep.formats.column_checks import optional_text
from data_prep.formats.prompt_completion import PromptCompletion
from data_prep.sources.rows import Row


@FORMATS.register("p3")
class P3(PromptCompletion):
    """A prompt made from a template, and its target."""

    spellings = (("inputs_pretokenized", "targets_pretokenized"), ("inputs", "targets"))
    extras = (*PromptCompletion.extras, "definition", "inputs", "targets")

    def question(self, row: Row, field: str, said: str) -> str:
        """The input without marks at its end, behind the task's definition."""
        definition = optional_text(row, "definition")
        asked = super().question(row, field, said)
        return f"{definition}\n\n{asked}" if definition.strip() else asked

"""stack_exchange: {"question", "response_j", "response_k"}, the better answer first (lvwerra/stack-exchange-paired)."""

from __future__ import annotations

from data_prep.formats.base import FORMATS
from data_prep.formats.pairs import Pairs


@FORMATS.register("stack_exchange")
class StackExchange(Pairs):
    """A question and two answers; response_j has more votes."""

    prompts_are = ("question",)
    sides = ("response_j", "response_k")
    spellings = (("question", "response_j", "response_k"),)

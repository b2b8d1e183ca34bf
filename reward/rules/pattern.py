"""Rule "pattern": the reply has the wanted form, as a regular expression says.

As the format reward of "DeepSeek-R1", arXiv 2501.12948, section 2.2.2. Cost: a search.
"""

from __future__ import annotations

import re

from data_prep.core.errors import UserError
from reward.rules import rules


@rules.register("pattern")
class Pattern:
    """Looks for a regular expression.

    Args:
        pattern: in Python's notation; a dot is any sign, line ends too.
        whole: whether the whole reply must fit, white space at its ends aside; else any part of it.

    Raises:
        UserError: no regular expression.
    """

    def __init__(self, pattern: str, whole: bool = True) -> None:
        try:
            self._pattern = re.compile(pattern, re.DOTALL)
        except re.error as problem:
            raise UserError(f"no regular expression ({problem}; got {pattern!r})", code="bad_value") from problem
        self._whole = whole

    def score(self, prompt_text: str, topic: str, reply_text: str, finished: bool) -> dict[str, float]:
        """score: 1.0 where the reply fits, else 0.0; whether it ended does not count."""
        found = self._pattern.fullmatch(reply_text.strip()) if self._whole else self._pattern.search(reply_text)
        return {"score": float(found is not None)}

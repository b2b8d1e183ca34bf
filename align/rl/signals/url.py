"""Signal "url": a scorer that answers over HTTP, for judges in other languages, processes or places.

    POST  {"prompts": [[{"role", "content"}, ...], ...], "replies": [text, ...], "fields": [{"id", ...}, ...]}
    200   {"scores": [number, ...]}    one for each reply

Before anything is trained it is asked for the scores of no replies, {"prompts": [], "replies": [], "fields": []}, and
answers {"scores": []}. Failed connections, timeouts and the states 408, 429 and 5xx are tried again, after a wait that
doubles. Costs the scorer's time; requests of an update follow one another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from align.rl.signals.base import Said, Scorer, Site, Source, Verdict, batches_of, checked, failed, kinds
from data_prep.core.errors import UserError
from data_prep.core.http import NoAnswerError, ask_json, is_server, patiently
from data_prep.core.options import option

if TYPE_CHECKING:
    from data_prep.options import DataOptions

_NOBODY = Said([], [], [])


@kinds.register("url")
@dataclass
class HTTPScorer(Source):
    """Scores replies by asking a server."""

    url: str = option("", "address of a scorer that answers requests of docs/ppo.md")
    timeout: float = option(30.0, "seconds to wait for an answer", above=0)
    retries: int = option(4, "times that a request without an answer is sent again")
    wait: float = option(1.0, "seconds before it is sent again; doubled each time")
    batch_size: int = option(64, "replies in a request", low=1)

    def check(self, where: str, data: DataOptions) -> None:
        """It is there, and keeps to the contract."""
        if not is_server(self.url):
            raise UserError(
                f"not the address of a server (got {self.url})",
                field=where,
                code="bad_value",
                hint="as http://HOST:PORT",
            )
        try:
            found = self._answer(_NOBODY)
            said = f"gave {len(found)} scores for no replies" if found else ""
        except NoAnswerError as problem:
            said = str(problem)
        if said:
            raise UserError(
                f"{self._who} {said}",
                code="no_scorer",
                field=where,
                hint="start it, then the same command; docs/ppo.md says what it is asked",
            )

    def open(self, where: str, site: Site) -> Scorer:
        """What asks it, so many replies at a time."""
        self.check(where, site.data)

        def score(said: Said) -> list[Verdict]:
            parts = batches_of(said, self.batch_size)
            return [verdict for part in parts for verdict in checked(self._who, self._patiently(part), part)]

        return score

    @property
    def _who(self) -> str:
        return f"the scorer {self.url}"

    def _patiently(self, said: Said) -> list[Any]:
        """Its scores, asked for again where what is wrong may pass."""
        try:
            return patiently(lambda: self._answer(said), self.retries, self.wait)
        except NoAnswerError as problem:
            raise failed(self._who, str(problem)) from problem

    def _answer(self, said: Said) -> list[Any]:
        """Its scores of these replies, as it gives them.

        Raises:
            NoAnswerError: there are none.
        """
        asked = {
            "prompts": [row.messages for row in said.prompts],
            "replies": list(said.texts),
            "fields": said.fields(),
        }
        found = ask_json(self.url, asked, self.timeout)
        scores = found.get("scores") if isinstance(found, dict) else None
        if not isinstance(scores, list):
            raise NoAnswerError('answered no {"scores": [...]}')
        return scores

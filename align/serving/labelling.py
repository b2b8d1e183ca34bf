"""`align label`: a page where people choose between two replies, without knowing whose they are.

Everybody who labels has a name and goes through the pairs in one order; the sides are drawn anew for each name. What
has been chosen stands in the file alone (`labels.py`), so that the page goes on where it was left, also under a new
server. Skipped pairs come again at the end. `local_page.py` says who may ask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, ClassVar, Optional

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from align.serving.labels import Answer, Label, LabelFile, Pair, agreement
from align.serving.local_page import LocalPage, asked, body_of, headers
from data_prep.core.errors import UserError
from data_prep.core.hashing import draw
from data_prep.core.options import option
from data_prep.formats.labels import CHOICES

SKIP = "skip"
ENOUGH = 10
"""Labels before agreement is shown: fewer say nothing, and the last one's part in it could be told."""
_NAME = 80
_COMMENT = 4000


@dataclass
class Judgement:
    """What somebody says of two replies, or takes back where nothing is chosen."""

    CHOICES: ClassVar[tuple[str, ...]] = tuple(CHOICES)
    labeller: str = ""
    choice: Optional[str] = None
    seconds: float = option(0.0, "how long the pair was shown", high=1e7)
    comment: Optional[str] = None

    def __post_init__(self) -> None:
        self.labeller = self.labeller.strip()
        self.comment = (self.comment or "").strip() or None
        if not self.labeller or len(self.labeller) > _NAME or not self.labeller.isprintable():
            raise ValueError(f"a name of 1 to {_NAME} printable characters is needed")
        if len(self.comment or "") > _COMMENT or any("\ud800" <= sign <= "\udfff" for sign in self.comment or ""):
            raise ValueError(f"a comment has at most {_COMMENT:,} characters, all of them whole")
        if self.choice is not None and self.choice not in self.CHOICES:
            raise ValueError(f"choice is none of {', '.join(self.CHOICES)} (got {self.choice!r})")

    def label(self, prompt: Any, choice: str, sides: dict[str, Answer]) -> Label:
        """A choice between two answers to a prompt, those that stood before the labeller as a and b."""
        rewards = {side: answer.reward for side, answer in sides.items()}
        return Label(
            prompt=prompt,
            a=sides["a"].text,
            b=sides["b"].text,
            choice=choice,
            labeller=self.labeller,
            seconds=round(self.seconds, 3),
            stages={side: answer.stage for side, answer in sides.items()},
            digests={side: answer.digest for side, answer in sides.items()},
            time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            rewards=None if None in rewards.values() else rewards,  # type: ignore[arg-type]
            comment=self.comment,
        )


@dataclass
class Vote(Judgement):
    """What the page sends. Without a choice it asks what is next; with one it says so of the pair that it shows."""

    CHOICES: ClassVar[tuple[str, ...]] = (*CHOICES, SKIP)
    pair: str = ""
    undo: bool = False


class LabelPage(LocalPage):
    """The application: the page, and what comes next for a labeller.

    Args:
        title: the run or checkpoint that is judged.
        pairs: to judge, in their order.
        file: where the choices go.
        seed: of the sides.
        labeller: who labels, if that is known.
    """

    def __init__(
        self, title: str, pairs: Sequence[Pair], file: LabelFile, seed: int, labeller: str | None, port: int
    ) -> None:
        super().__init__("align label", "label.html.jinja", port)
        self.title, self.file, self.seed, self.labeller = title, file, seed, labeller
        self.pairs = {pair.key: pair for pair in pairs}
        self._skipped: dict[str, list[tuple[str, int]]] = {}
        """Labeller -> pairs to come again, each with the number of labels that there were before it was skipped."""

    def routes(self) -> list[Route]:
        """What is next, a vote, or the last one taken back."""
        return [Route("/vote", self.vote, methods=["POST"])]

    def content(self) -> dict[str, Any]:
        """What is judged, and by whom."""
        return {"title": self.title, "labeller": self.labeller, "file": self.file.path.name}

    async def vote(self, request: Request) -> Response:
        """Take a vote, or one back; answers what the page is to show next, or what is wrong."""
        if (refusal := self.refusal(request)) is not None:
            return refusal
        try:
            return JSONResponse(self.after(asked(Vote, await body_of(request))), headers=headers())
        except UserError as problem:
            return JSONResponse({"problem": str(problem)}, 422, headers=headers())

    def after(self, vote: Vote) -> dict[str, Any]:
        """What a labeller sees after a vote.

        Returns `done` and `of` (pairs), `skipped`, `undo` (whether there is something to take back), `pair`: {key,
        prompt (messages), a, b} or None at the end, and `agreement` (labels.agreement), None with few labels.

        Raises:
            UserError: the pair is not to be judged by this labeller, or the file cannot be written.
        """
        comment = None
        if vote.undo:
            comment = self._take_back(vote.labeller)
        elif vote.choice is not None:
            self._take(vote, vote.choice)
        done, skipped = self._done(vote.labeller), [key for key, _ in self._skipped.get(vote.labeller, [])]
        left = [key for key in self.pairs if key not in done]
        following = next((key for key in left if key not in skipped), skipped[0] if skipped else None)
        return {
            "done": len(done),
            "of": len(self.pairs),
            "skipped": len(skipped),
            "undo": bool(done or skipped),
            "pair": None if following is None else self._shown(vote.labeller, self.pairs[following]),
            "comment": comment,
            "agreement": agreement(self.file.labels) if len(self.file.labels) >= ENOUGH else None,
        }

    def _done(self, labeller: str) -> set[str]:
        """The pairs of this page that a labeller has judged."""
        return {label.pair for label in self.file.labels if label.labeller == labeller} & self.pairs.keys()

    def _sides(self, labeller: str, pair: Pair) -> dict[str, Answer]:
        """Left and right answer as this labeller sees them."""
        answers = pair.answers if draw("sides", self.seed, labeller, pair.key) < 0.5 else pair.answers[::-1]
        return dict(zip(("a", "b"), answers, strict=True))

    def _shown(self, labeller: str, pair: Pair) -> dict[str, Any]:
        prompt = pair.prompt if isinstance(pair.prompt, list) else [{"role": "user", "content": pair.prompt}]
        sides = {side: answer.text for side, answer in self._sides(labeller, pair).items()}
        return {"key": pair.key, "prompt": prompt, **sides}

    def _take(self, vote: Vote, choice: str) -> None:
        """Write a vote, or put its pair to the end."""
        done = self._done(vote.labeller)
        if vote.pair not in self.pairs or vote.pair in done:
            what = "is judged already" if vote.pair in done else "is none of this page"
            raise UserError(f"this pair {what}", hint="load the page again", code="other_pair")
        skipped = [(key, before) for key, before in self._skipped.get(vote.labeller, []) if key != vote.pair]
        if choice == SKIP:
            skipped.append((vote.pair, len(done)))
        else:
            pair = self.pairs[vote.pair]
            self.file.add(vote.label(pair.prompt, choice, self._sides(vote.labeller, pair)))
        self._skipped[vote.labeller] = skipped

    def _take_back(self, labeller: str) -> str | None:
        """Undo a labeller's last step, a skip or a vote; returns the comment of the vote."""
        skipped = self._skipped.get(labeller, [])
        if skipped and skipped[-1][1] == len(self._done(labeller)):  # nothing has been judged since
            skipped.pop()
            return None
        taken = self.file.take_back(labeller, self.pairs)
        return taken.comment if taken else None

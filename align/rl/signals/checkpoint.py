"""Signal "checkpoint": a reward model of this project, beside other signals.

It is a role on the stage's one base and scores token ids, so nothing is rendered again; costs one forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from align.rl.signals.base import Said, Scorer, Site, Source, Verdict, kinds
from data_prep.core.options import option


@kinds.register("checkpoint")
@dataclass
class RewardModel(Source):
    """Scores replies by a reward model that the stage holds as a role."""

    checkpoint: str = option("", "reward model: a stage, RUN/STAGE or a path")

    @property
    def default_name(self) -> str:
        """As the stage that trains one."""
        return "reward_model"

    @property
    def models(self) -> list[str]:
        """Itself."""
        return [self.checkpoint]

    def norm(self, site: Site) -> tuple[float, float]:
        """Of its scores of held-out replies, as its checkpoint records them."""
        return (site.norms[0]["mean"], site.norms[0]["std"]) if site.norms else (0.0, 1.0)

    def open(self, where: str, site: Site) -> Scorer:
        """What the role says of every reply."""

        def score(said: Said) -> list[Verdict]:
            assert said.models_BK is not None
            return [{"score": score} for score in said.models_BK[:, 0].tolist()]

        return score

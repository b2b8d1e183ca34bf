"""ORPO: imitate chosen replies and move their odds away from those of rejected ones, in one stage.

"ORPO: Monolithic Preference Optimization without Reference Model", arXiv 2403.07691, eq. 6 and 7. Takes the place of
SFT and preference tuning together, so that it may start from the base itself. Differs from TRL's trainer as
`align/training/orpo.py` says. Costs one forward and backward over prompt + both replies per pair and epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from align.stages.base import stage
from align.stages.preference import PreferenceStage
from data_prep.core.options import option

if TYPE_CHECKING:
    from align.roles import Role
    from align.training.context import StageContext
    from align.training.objectives import Objective


@stage("orpo")
@dataclass
class ORPO(PreferenceStage):
    """Imitate chosen replies rather than rejected ones, without a reference."""

    needs_data: ClassVar[tuple[str, ...]] = ("preferences",)
    base_lr: ClassVar[float] = 1e-4

    beta: float = option(0.1, "weight of the odds ratio beside the likelihood (the paper's lambda)", above=0)

    def objective(self, context: StageContext, role: Role) -> Objective:
        """Likelihood and odds ratio of pairs."""
        from align.training.orpo import OddsRatio

        return OddsRatio(role, self.beta)

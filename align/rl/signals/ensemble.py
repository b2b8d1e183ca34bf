"""Signal "ensemble": several reward models on the stage's one base, so that what fools one does not fool all.

"Reward Model Ensembles Help Mitigate Overoptimization", arXiv 2310.02743: `mean_minus_std` is its uncertainty-weighted
objective with the deviation in the place of the variance, `min` its worst case. Here each member's scores are first
brought to its own mean and deviation, as reward models differ in their zero. Members are adapters: the base is in
memory once; each costs its adapter and one forward pass. The critic starts as the first of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from align.rl.signals.base import Said, Scorer, Site, Source, Verdict, kinds
from data_prep.core.errors import UserError
from data_prep.core.options import listing, option

STAGE = "reward_model"
"""The stage that a number is of, where none is named."""
MOST = 20
"""Members that a number may ask for."""


class By(Enum):
    """How the scores of the members become one."""

    mean = "mean"
    min = "min"
    mean_minus_std = "mean_minus_std"


@kinds.register("ensemble")
@dataclass
class Ensemble(Source):
    """Scores replies by what several reward models say together."""

    ensemble: list[str] = listing(
        "reward models on the stage's base [a,b]: stages, RUN/STAGE or paths; or a number: as many of this run"
    )
    stage: str = option(STAGE, "of a number: the stage that is trained so often, each time with another seed")
    by: By = option(By.mean, "mean|min|mean_minus_std: how their normalised scores become one")

    @classmethod
    def of(cls, values: dict[str, Any], where: str) -> Source:
        """There are two different members at least."""
        if is_number(values["ensemble"]):
            if values["ensemble"] > MOST:
                raise UserError(
                    f"out of range (got {values['ensemble']}; expected at most {MOST})",
                    field=f"{where}.ensemble",
                    code="bad_value",
                )
            values = {**values, "ensemble": member_names(values["ensemble"], str(values.get("stage", STAGE)))}
        source = super().of(values, where)
        if len(set(source.models)) < max(2, len(source.models)) or "base" in source.models:
            raise UserError(
                f"an ensemble is two or more different reward models (got {', '.join(source.models) or 'none'})",
                field=f"{where}.ensemble",
                code="bad_value",
                hint="train another one with another seed: align run pipeline=reward_model seed=1",
            )
        return source

    @property
    def models(self) -> list[str]:
        """Its members."""
        return self.ensemble

    def open(self, where: str, site: Site) -> Scorer:
        """What the members say together."""
        import torch

        mean_K = torch.tensor([norm["mean"] for norm in site.norms], dtype=torch.float64)
        deviation_K = torch.tensor([norm["std"] for norm in site.norms], dtype=torch.float64)

        def score(said: Said) -> list[Verdict]:
            assert said.models_BK is not None
            scores_BK = (said.models_BK.double() - mean_K) / deviation_K
            together = {
                By.mean: lambda: scores_BK.mean(1),
                By.min: lambda: scores_BK.amin(1),
                By.mean_minus_std: lambda: scores_BK.mean(1) - scores_BK.std(1, unbiased=False),
            }
            return [{"score": score} for score in together[self.by]().tolist()]

        return score


def is_number(ensemble: Any) -> bool:
    """Whether an ensemble says how many members are to be trained, and not which there are."""
    return isinstance(ensemble, int) and not isinstance(ensemble, bool)


def member_names(count: int, stage: str) -> list[str]:
    """The stages of an ensemble that is to be trained: the one that is named, and it again with other seeds."""
    return [stage, *(f"{stage}_seed{place}" for place in range(1, min(count, MOST)))]

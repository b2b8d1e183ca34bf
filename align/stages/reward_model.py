"""Reward model: learn from preference pairs which reply people prefer.

"Training language models to follow instructions with human feedback", arXiv 2203.02155, eq. 1: a Bradley-Terry loss
on the difference of two scores. The score is a scalar head on the causal model's hidden state at a reply's last
token; the head is saved in a file of its own, where no adapter format can lose it. Differs from common practice in
that a pair's prompt is computed once. Costs one forward and backward over prompt + both replies per pair and epoch.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

from align.config.growth import Link, behind
from align.rl.signals.ensemble import is_number, member_names
from align.stages.base import TrainingStage, stage
from data_prep.core.errors import TrainingStopped, UserError
from data_prep.core.options import option
from data_prep.types import joined

if TYPE_CHECKING:
    from accelerate import Accelerator

    from align.checkpoints.checkpoint import Checkpoint
    from align.config.growth import Chain
    from align.roles import Role
    from align.training.context import StageContext
    from align.training.objectives import Pairwise
    from data_prep.prepare.prepare import Prepared
    from data_prep.types import PairTokens


@stage("reward_model")
@dataclass
class RewardModel(TrainingStage):
    """Learn from preference pairs which reply is better."""

    needs_data: ClassVar[tuple[str, ...]] = ("preferences",)
    makes: ClassVar[str | None] = "reward"
    base_lr: ClassVar[float] = 1e-4
    has_head: ClassVar[bool] = True
    trains_head: ClassVar[bool] = True

    epochs: float = option(1.0, "passes over the preference pairs", above=0)
    centering: float = option(0.01, "weight of the pull of each pair's mean score towards zero")
    reseed: int = option(0, "added to the run's seed where the stage draws weights and the order of its rows")

    @property
    def seed_offset(self) -> int:
        """What it adds to the run's seed."""
        return self.reseed

    @property
    def idle(self) -> set[str]:
        """No other seed is the run's."""
        return super().idle | (set() if self.reseed else {"reseed"})

    def run(self, context: StageContext) -> Checkpoint:
        """Train adapter and head on prepared pairs, measure them on held-out pairs, and save."""
        from align.stages.supervised import supervised_run
        from align.training.batching import in_order
        from align.training.context import write_samples
        from align.training.saving import Result, save_result
        from data_prep.prepare.arrow_rows import lengths_of
        from reward.gate import gate

        prepared = self.pairs(context)
        context.write_card(prepared)
        role = context.fresh_role("reward")
        objective = self.objective(context, role)
        supervised_run(context, objective, role, prepared)
        with context.phase("measure"):
            rows = prepared.eval or prepared.train
            limits = (self.micro_batch_size or (0 if self.micro_tokens else 64), self.micro_tokens)
            measured = measure(context.accelerator, objective, rows, in_order(lengths_of(rows), *limits))
            metrics = measured["metrics"]
            if swaying := metrics["by_token"]:
                swaying["word"] = context.renderer.decode([swaying["token"]]).strip() or "the end"
            metrics["probes"] = probe(context, role, rows, limits[0] or max(1, self.micro_tokens // self.max_length))
        metrics["gate"] = gate(metrics, measured["norm"]["std"])
        say(context, metrics["gate"])
        context.numbers["metrics"] = metrics
        write_samples(context, _samples(context, (prepared.eval or prepared.train)[:8], measured))
        probe_rows = (prepared.eval or prepared.train)[:4]
        context.numbers["metrics"]["probe_scores"] = measured["scores"][: len(probe_rows)]
        result = Result(
            role=role,
            kind="reward",
            parents=self.parents(context),
            probe_ids=[joined(row.prompt, row.chosen) for row in probe_rows],
            metrics=context.numbers["metrics"],
            on_parent=context.parent_mode.mode.name if context.parent_mode.mode else None,
            reward_norm=measured["norm"],
        )
        return save_result(context, result, context.staging)

    def pairs(self, context: StageContext) -> Prepared[PairTokens]:
        """The pairs that it learns from."""
        with context.phase("data"):
            return self.rows(context)

    def parents(self, context: StageContext) -> list[tuple[str, Checkpoint]]:
        """What its checkpoint says that it was made from: (role, checkpoint)."""
        return [("init", context.init)] if context.init is not None else []

    def objective(self, context: StageContext, role: Role) -> Pairwise:
        """Bradley-Terry over pairs, on a fresh head."""
        import torch

        from align.training.objectives import Pairwise
        from reward.head import ScalarHead

        torch.manual_seed(context.seed)
        width = role.tree.get_output_embeddings().weight.shape[1]  # of last hidden states; OPT projects them
        role.head = ScalarHead(width).to(context.accelerator.device)
        return Pairwise(role, self.centering)


def measure(
    process: Accelerator, objective: Pairwise, rows: Sequence[PairTokens], passes: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Held-out quality of a reward model: accuracy with interval, calibration, length correlation, score statistics.

    `passes` are the places of the rows that are computed at a time, in order; the processes divide them.
    """
    import torch

    from align.training.processes import divided
    from reward.quality import quality

    chosen: list[float] = []
    rejected: list[float] = []
    device = objective.role.tree.device
    objective.eval()

    def both(places: Sequence[int]) -> tuple[list[float], list[float]]:
        batch = objective.collate([rows[i] for i in places]).to(device)
        scores = objective.role.scores(batch.packed, torch.cat([batch.chosen_P, batch.rejected_P])).tolist()
        return scores[: len(places)], scores[len(places) :]

    with torch.no_grad():
        for better, worse in divided(process, passes, both):
            chosen += better
            rejected += worse
    if not all(math.isfinite(score) for score in chosen + rejected):
        raise TrainingStopped("the reward model gives scores that are not finite", code="not_finite")
    scores = torch.tensor(chosen + rejected, dtype=torch.float64)
    norm = {"mean": float(scores.mean()), "std": max(float(scores.std()), 1e-6)}
    return {"metrics": quality(rows, chosen, rejected), "norm": norm, "scores": chosen, "rejected": rejected}


def probe(context: StageContext, role: Role, rows: Sequence[PairTokens], chunk: int) -> dict[str, Any]:
    """How often a held-out reply scores above what `reward/probes.py` makes of it, by name of the probe."""
    from align.inference.scoring import score_replies
    from data_prep.records.negatives import KINDS
    from reward.probes import MOST, probes
    from reward.quality import probed

    own = list(islice((row for row in rows if row.task not in KINDS), MOST)) or rows[:MOST]
    margins: dict[str, list[float]] = {}
    for name, made in probes(own, context.renderer.end_token_id, context.renderer.control_ids).items():
        good = score_replies(role, [(prompt, better) for prompt, better, _ in made], chunk)
        bad = score_replies(role, [(prompt, worse) for prompt, _, worse in made], chunk)
        margins[name] = [g - b for g, b in zip(good, bad, strict=True)]
    return probed(margins)


def say(context: StageContext, found: dict[str, Any]) -> None:
    """The gate's verdict in the terminal, a line for every reason."""
    if context.is_main:
        lines = [f"{context.spec.name}: gate {found['verdict']}", *(f"  {reason}" for reason in found["reasons"])]
        print("\n".join(lines), file=sys.stderr)


def _samples(context: StageContext, rows: Sequence[PairTokens], measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Held-out pairs as text, with both scores."""
    from align.training.context import said_features

    decode = context.renderer.decode
    return [
        {
            "id": row.id,
            **said_features(row.prompt),
            "prompt": decode(row.prompt),
            "chosen": {"text": decode(row.chosen), "score": measured["scores"][i]},
            "rejected": {"text": decode(row.rejected), "score": measured["rejected"][i]},
        }
        for i, row in enumerate(rows)
    ]


def members(name: str, chain: Chain) -> Chain:
    """The chain with the reward models that the PPO stage `name` asks for by `{ensemble: NUMBER}`.

    They are the stage that the signal names, once more each with another seed.

    Raises:
        UserError: the run has no such stage.
    """
    reward = chain[name].options.get("reward")
    where = f"stages.{name}.reward"
    for signal in reward if isinstance(reward, list) else [reward]:
        if not isinstance(signal, dict) or not is_number(signal.get("ensemble")):
            continue
        first, *others = member_names(signal["ensemble"], str(signal.get("stage", RewardModel.name)))
        if first not in chain or chain[first].kind.makes != "reward":
            raise UserError(
                f"trains the stage '{first}' with other seeds, and the run has no such reward model",
                field=f"{where}.ensemble",
                code="bad_value",
                hint="list finished ones, [RUN/a,RUN/b], or name the stage: stage=STAGE",
            )
        more = {
            other: Link(chain[first].kind, {**chain[first].options, "reseed": place}, first)
            for place, other in enumerate(others, 1)
        }
        chain = behind(chain, first, more)
    return chain

"""Evaluation: the same held-out prompts answered by every stage of a chain, and judged.

Held-out loss on conversations, reward of greedy replies by the reward model, gold score where the data knows the
truth, and the win rate of the last stage against its parent with a 95 % Wilson interval (ties count half). The judge
of the win rate is the gold score where there is one, else the reward model; the result says which.
Benchmarks of lm-evaluation-harness are asked of every stage where `tasks` names some (`align/evaluation/`).
No paper; costs one rollout and two scoring passes per stage, and what the tasks take.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from align.checkpoints.compatibility import adapter_of
from align.checkpoints.lineage import chain_of
from align.evaluation.judge import judge_refusals, judged
from align.evaluation.options import JudgeOptions, PairsOptions, TaskOptions
from align.evaluation.own_tasks import contents, require_no_code, task_refusals
from align.evaluation.pairs import pairs_contents, pairs_refusals
from align.rl.answers import frozen_policy, in_batches, replies_to
from align.rl.gold import gold_judge, gold_refusals, gold_signal
from align.stages.base import Stage, stage
from data_prep.core.errors import UserError
from data_prep.core.options import option
from data_prep.options import LengthOptions

if TYPE_CHECKING:
    from align.adapters.base import Adapter
    from align.checkpoints.checkpoint import Checkpoint
    from align.checkpoints.compatibility import ParentInfo
    from align.evaluation.tasks import Tasks, TaskScores
    from align.inference.generation import Reply
    from align.rl.gold import Gold
    from align.rl.signals.base import Signal
    from align.roles import Role
    from align.training.context import StageContext
    from align.training.rehearsal import Rehearsal
    from data_prep.options import DataOptions
    from data_prep.prepare.prepare import Prepared
    from data_prep.types import PairTokens, PromptTokens


_NO_LIMIT = 2048
"""Longest row of a task in tokens, for a model that has no limit."""


@dataclass
class Answers:
    """One stage's greedy replies to the evaluation prompts, with what the judges say of them."""

    texts: list[str]
    finished: list[bool]
    scores: list[float] | None
    """Of the reward model, as it gives them."""
    rewards: list[float] | None
    """The same in deviations of its own scores around their mean, as chat and PPO count them."""
    gold: list[dict[str, float]] | None
    loss: float | None


@dataclass
class AnswerOptions:
    """How the prompts are answered."""

    prompts: int = option(500, "most held-out prompts to answer", low=1)
    max_new_tokens: int = option(32, "longest reply in tokens", low=1)
    batch_size: int = option(128, "prompts answered at a time", low=1)
    temperature: float = option(0.0, "sampling temperature (0: greedy)")


@stage("evaluate")
@dataclass
class Evaluate(LengthOptions, PairsOptions, JudgeOptions, TaskOptions, AnswerOptions, Stage):
    """Answer the same held-out prompts with every stage of the chain, and judge the answers."""

    needs_data: ClassVar[tuple[str, ...]] = ("prompts",)
    may_read: ClassVar[tuple[str, ...]] = ("conversations",)
    needs_reward: ClassVar[bool] = True
    revision: ClassVar[int] = 1
    reward_optional: ClassVar[bool] = True

    def refusals(self, where: str, adapter: Adapter, reward: ParentInfo | None) -> Iterator[UserError]:
        """Tasks that cannot be measured, a judge that cannot be asked, pairs that nobody orders."""
        yield from task_refusals(self, where)
        yield from judge_refusals(self, where)
        yield from pairs_refusals(self, where, reward is not None)

    def require_allowed(self, where: str, allow_code: bool) -> None:
        """Task files may name functions."""
        require_no_code(self, allow_code)

    def reads_beside(self) -> list[str]:
        """Task files of one's own with their rows, and pairs."""
        return [*contents(self), *pairs_contents(self)]

    def data_refusals(self, data: DataOptions) -> Iterator[UserError]:
        """A gold judge that cannot judge."""
        yield from gold_refusals(data)

    def check_contents(self, kind: str, rows: Iterable[Any], data: DataOptions) -> None:
        """Rows have what the gold judge needs of them."""
        from reward.rules import require_truth

        if kind == "prompts":
            require_truth([each.source.rule_name for each in self.judged_by(data)], rows)

    def judged_by(self, data: DataOptions) -> list[Signal]:
        """The gold judge."""
        gold = gold_signal(data)
        return [gold] if gold is not None else []

    def run(self, context: StageContext) -> Checkpoint | None:
        """Write result.json and samples.jsonl; there are no weights to save."""
        from data_prep.core.progress import Progress

        with context.phase("data"):
            prepared = context.rows("prompts")
        context.write_card(prepared)
        self._doubt_held_out(context, prepared)
        rows = (prepared.eval or prepared.train)[: self.prompts]
        chain = chain_of(context.init)
        judge = context.bases.realise(context.reward, "reward", _load(context.reward)) if context.reward else None
        gold = gold_judge(context)
        tasks, room = self._open_tasks(context), _room(context, chain)
        pairs = self._read_pairs(context)
        answers: dict[str, Answers] = {}
        measured: dict[str, dict[str, TaskScores]] = {}
        with Progress("evaluate", len(chain), enabled=context.is_main) as progress:
            for name, checkpoint in chain:
                role = frozen_policy(context, checkpoint)
                answers[name] = self._answers(context, role, rows, judge, gold)
                if tasks is not None:
                    measured[name] = self._measure(context, role, room, tasks)
                progress.advance(1)
        result = self._result(context, answers)
        if pairs is not None and judge is not None:
            result["pairs"] = self._ordered(context, judge, pairs)
        if self.judge is not None and context.is_main and len(chain) > 1:
            result["judged"] = self._judged(context, rows, answers)
        if tasks is not None and context.is_main:
            result["tasks"] = self._compared(context, tasks, measured)
        context.numbers["metrics"] = result["stages"][chain[-1][0]]
        if context.is_main:
            (context.staging / "result.json").write_text(
                json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8"
            )
            _write_samples(context, rows, answers)
        return None

    def rehearse(self, context: StageContext) -> Rehearsal:
        """The last policy of the chain beside the reward model, and the batch with the longest prompts."""
        from align.training.rehearsal import Rehearsal

        prepared = context.rows("prompts")
        load = context.parent_mode.load
        roles = [context.bases.realise(one, one.role, load) for one in (context.init, context.reward) if one]
        roles = roles or [context.start_role("policy")]
        longest = sorted((len(row.ids) for row in prepared.eval or prepared.train), reverse=True)
        return Rehearsal(roles, answered=longest[: self.batch_size], new_tokens=self.max_new_tokens)

    def work(self, rows: int, tokens: float) -> float:
        """Tokens of prompts and replies of one policy."""
        return min(rows, self.prompts) * (tokens + self.max_new_tokens)

    def _open_tasks(self, context: StageContext) -> Tasks | None:
        if not self.tasks:
            return None
        if context.init is not None and adapter_of(context.init).against_features(None):
            raise UserError(
                f"tasks have no features, which {context.init.label} reads",
                field=f"stages.{context.spec.name}.tasks",
                code="bad_features",
                hint=f"write what it is for some, align merge {context.init.folder} features=..., and evaluate that",
            )
        from align.evaluation.tasks import Tasks

        with context.phase("data"):
            return Tasks(self, context.config.allow_code)

    def _measure(self, context: StageContext, role: Role, room: int, tasks: Tasks) -> dict[str, TaskScores]:
        """A stage's numbers on the tasks; the processes divide their passes."""
        from align.evaluation.harness_model import RoleModel
        from align.training.processes import divided

        divide = partial(divided, context.accelerator)
        with context.phase("tasks"), context.answering(role):
            return tasks.measure(RoleModel(role, context.renderer, room, self.batch_size, divide))

    def _read_pairs(self, context: StageContext) -> tuple[list[PairTokens], list[str], int] | None:
        """The pairs of the options, which are refused before anything is answered."""
        from align.evaluation.pairs import read_pairs

        if self.pairs is None:
            return None
        with context.phase("data"):
            return read_pairs(self.pairs, context.renderer, context.context)

    def _ordered(
        self, context: StageContext, judge: Role, given: tuple[list[PairTokens], list[str], int]
    ) -> dict[str, Any]:
        """How often the reward model orders pairs rightly."""
        from align.evaluation.pairs import ordered_pairs
        from align.inference.scoring import score_replies

        rows, subsets, long = given

        def score(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
            size = self.batch_size
            return self._each(context, pairs, lambda at: score_replies(judge, pairs[at : at + size], size))

        with context.phase("judge"):
            return {**ordered_pairs(rows, subsets, score), "too_long": long}

    def _judged(
        self, context: StageContext, rows: Sequence[PromptTokens], answers: dict[str, Answers]
    ) -> dict[str, Any]:
        """How often the last policy's replies win over those of its parent, and of each policy before that one."""
        *earlier, parent, last = answers
        asked, own = [row.messages for row in rows], answers[last].texts
        with context.phase("judge"):
            found = {name: judged(self, asked, own, answers[name].texts) for name in (parent, *reversed(earlier))}
        return {**found.pop(parent), "against": parent, **({"earlier": found} if found else {})}

    def _compared(
        self, context: StageContext, tasks: Tasks, measured: dict[str, dict[str, TaskScores]]
    ) -> dict[str, Any]:
        """The numbers of all stages on the tasks, and how many of their documents the data has."""
        from align.evaluation.tasks import compared, contaminated

        result = compared(tasks, measured)
        with context.phase("data"):
            for name, found in contaminated(tasks.documents(), context.spec.data, context.seed).items():
                result[name]["contamination"] = found
        return result

    def _answers(
        self,
        context: StageContext,
        role: Role,
        rows: Sequence[PromptTokens],
        judge: Role | None,
        gold: Gold | None,
    ) -> Answers:
        from align.inference.scoring import normalised, score_replies
        from align.training.processes import from_main

        with context.phase("answer"):
            replies = self._replies(context, role, rows)
        texts = [context.renderer.decode(reply.ids) for reply in replies]
        pairs = [(row.ids, reply.ids) for row, reply in zip(rows, replies, strict=True)]

        def scores(start: int) -> list[float]:
            assert judge is not None
            return score_replies(judge, pairs[start : start + self.batch_size], self.batch_size)

        with context.phase("judge"):
            found = self._each(context, pairs, scores) if judge is not None else None
            return Answers(
                texts,
                [reply.finished for reply in replies],
                found,
                normalised(found, context.reward) if found is not None and context.reward is not None else None,
                from_main(context.accelerator, lambda: gold(rows, texts, replies) if gold is not None else None),
                self._loss(context, role),
            )

    def _each(self, context: StageContext, rows: Sequence[Any], work: Callable[[int], list[Any]]) -> list[Any]:
        """What `work` makes of every batch, by its first row; the processes divide the batches."""
        return in_batches(context, len(rows), self.batch_size, work)

    def _replies(self, context: StageContext, role: Role, rows: Sequence[PromptTokens]) -> list[Reply]:
        from align.inference.generation import Sampling

        sampling = Sampling(self.max_new_tokens, self.temperature or 1.0, greedy=self.temperature == 0)
        return replies_to(context, role, [row.ids for row in rows], sampling, self.batch_size)

    def _doubt_held_out(self, context: StageContext, prepared: Prepared[PromptTokens]) -> None:
        """Say so where conversations that train ask what is held out here: kinds of rows may be split otherwise."""
        import numpy as np

        from data_prep.records.stream import has_source

        if not (prepared.eval and has_source(context.spec.data, "conversations")):
            return
        seen = np.isin(prepared.held[: self.prompts], context.rows("conversations").asked)
        if seen.any():
            first = prepared.eval[int(seen.argmax())].id
            context.warn(
                "held_out_seen",
                f"{int(seen.sum())} of {len(seen)} held-out prompts are also asked in conversations that train "
                f"(first: {first}), so that answers to them may be remembered",
                "hold the same questions out of both: one eval_share and eval_rows, or split=eval in the rows of both",
            )

    def _loss(self, context: StageContext, role: Role) -> float | None:
        """Mean held-out loss per supervised token, where the data has conversations."""
        import torch

        from align.training.objectives import LanguageModeling
        from data_prep.records.stream import has_source

        if not has_source(context.spec.data, "conversations"):
            return None
        prepared = context.rows("conversations")
        rows = (prepared.eval or prepared.train)[: self.prompts]
        objective = LanguageModeling(role).eval()

        def loss(start: int) -> list[tuple[float, float]]:
            batch = objective.collate(rows[start : start + self.batch_size]).to(context.accelerator.device)
            return [(float(objective(batch)[0]), batch.weight)]

        with torch.no_grad():
            found = self._each(context, rows, loss)
        total, weight = (sum(column) for column in zip(*found, strict=True))
        return float(total / weight)

    def _result(self, context: StageContext, answers: dict[str, Answers]) -> dict[str, Any]:
        from reward.metrics import win_rate

        result: dict[str, Any] = {"stages": {name: _summary(found) for name, found in answers.items()}}
        names = list(answers)
        if len(names) > 1:
            last, before = answers[names[-1]], answers[names[-2]]
            judged = [(_verdicts(found)) for found in (last, before)]
            if judged[0] is not None and judged[1] is not None:
                result["win_rate"] = {
                    **win_rate(judged[0], judged[1]),
                    "against": names[-2],
                    "judge": "gold" if last.gold is not None else "reward",
                }
        if context.reward is not None:
            metrics = context.reward.record["metrics"]
            keys = ("accuracy", "low", "high", "ece", "length_corr", "n", "calibration", "by_kind", "probes", "gate")
            result["reward_model"] = {key: metrics[key] for key in keys if key in metrics}
        if len(names) > 1 and answers[names[-1]].gold is not None and len(answers[names[-1]].texts) > 1:
            result["gain"] = _gain(answers[names[-1]], answers[names[-2]])
        return result


def _room(context: StageContext, chain: Sequence[tuple[str, Checkpoint | None]]) -> int:
    """Longest row in tokens that every policy of the chain takes, so that texts are cut alike for all."""
    from align.models.fingerprint import read_model_config
    from align.training.data import context_of

    found = context_of(read_model_config(context.bases.folder), context.spec.adapter, [one for _, one in chain])
    return found or _NO_LIMIT


def _load(checkpoint: Checkpoint) -> Any:
    from align.config.schema import Load

    return Load(checkpoint.load)


def _summary(found: Answers) -> dict[str, Any]:
    count = len(found.texts)
    summary: dict[str, Any] = {
        "n": count,
        "finished": sum(found.finished) / count,
        "loss": found.loss,
        "reward": sum(found.rewards) / count if found.rewards else None,
        "score": sum(found.scores) / count if found.scores else None,
        "gold": None,
    }
    if found.gold:
        means = {key: sum(verdict[key] for verdict in found.gold) / count for key in found.gold[0]}
        se = _standard_error([verdict["score"] for verdict in found.gold])
        summary["gold"] = {**means, "n": count, "se": se}
    return summary


def _standard_error(scores: Sequence[float]) -> float:
    """Of the mean of scores on any scale; of shares of 0 and 1 it is sqrt(p (1 - p) / n)."""
    mean = sum(scores) / len(scores)
    return math.sqrt(sum((score - mean) ** 2 for score in scores)) / len(scores)


def _verdicts(found: Answers) -> list[float] | None:
    if found.gold is not None:
        return [verdict["score"] for verdict in found.gold]
    return found.rewards


def _gain(last: Answers, before: Answers) -> dict[str, float]:
    """Paired change of the gold score from the parent to the last stage."""
    from reward.metrics import paired_difference

    assert last.gold is not None and before.gold is not None
    mean, se = paired_difference([g["score"] for g in last.gold], [g["score"] for g in before.gold])
    return {"gold": mean, "se": se}


def _write_samples(context: StageContext, rows: Sequence[PromptTokens], answers: dict[str, Answers]) -> None:
    from align.training.context import said_features

    with (context.staging / "samples.jsonl").open("w", encoding="utf-8") as stream:
        for i, row in enumerate(rows):
            replies = {
                name: {
                    "text": found.texts[i],
                    "reward": found.rewards[i] if found.rewards else None,
                    "score": found.scores[i] if found.scores else None,
                    "gold": found.gold[i]["score"] if found.gold else None,
                    "finished": found.finished[i],
                }
                for name, found in answers.items()
            }
            sample = {**row.shown(), **said_features(row.ids), "replies": replies}
            stream.write(json.dumps(sample, ensure_ascii=False) + "\n")

"""Refresh: a reward model goes on with what the policy says now and a judge calls worse.

"Training a Helpful and Harmless Assistant with Reinforcement Learning from Human Feedback", arXiv 2204.05862, section
4.5: the reward model is trained on replies of the newest policy, and the policy against it, in turns. A reward model
knows the replies of its pairs alone; PPO leads the policy to others, among them those that it takes for good ones. Here
`init` is the policy that is asked, `reward` the reward model that is trained on, over the new pairs and some of the
data's (`replay`), so that it does not forget those; `align/rl/on_policy.py` says which replies make a pair. Costs the
rollout of `prompts` x `replies`, what the judge takes, and the training of `reward_model` over so many pairs.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from align.config.growth import Link, behind
from align.rl.gold import gold_signal
from align.rl.signals.base import Said, Signal, Site, signal_of
from align.stages.base import StandingT, stage
from align.stages.reward_model import RewardModel
from data_prep.core.errors import TrainingStopped, UserError
from data_prep.core.files import json_lines
from data_prep.core.hashing import sha256_json
from data_prep.core.options import convert, option

if TYPE_CHECKING:
    from align.checkpoints.checkpoint import Checkpoint
    from align.config.growth import Chain
    from align.rl.on_policy import Candidate
    from align.roles import Role
    from align.training.context import StageContext
    from align.training.objectives import Pairwise
    from align.training.rehearsal import Rehearsal
    from data_prep.options import DataOptions
    from data_prep.prepare.prepare import Prepared
    from data_prep.types import PairTokens, PromptTokens

HELD = 4
"""Of so many training prompts that are answered, one held-out prompt is answered too."""
MOST_ROUNDS = 20


@stage("refresh")
@dataclass
class Refresh(RewardModel):
    """Go on with a reward model, on pairs of the policy's own replies too."""

    needs_data: ClassVar[tuple[str, ...]] = ("preferences", "prompts")
    needs_reward: ClassVar[bool] = True

    judge: Any = option(
        None, "what says which replies are bad: a signal as of stages.ppo.reward, {rule: NAME} (default: data.gold)"
    )
    prompts: int = option(512, "training prompts that are answered, and a quarter as many held-out ones", low=1)
    replies: int = option(4, "replies to each (0: none, the pairs of the data alone, such as those of align label)")
    replay: float = option(
        1.0, "share of the data's own training pairs that it goes over again beside these; less costs less", high=1
    )
    max_new_tokens: int = option(32, "longest reply in tokens", low=1)
    temperature: float = option(0.7, "sampling temperature", above=0)

    def __post_init__(self) -> None:
        if self.judge is not None:
            self._signal_of(self.judge)

    def stands_on(self, init: StandingT | None, reward: StandingT | None) -> StandingT | None:
        """The reward model that it goes on with."""
        return reward

    def judged_by(self, data: DataOptions) -> list[Signal]:
        """The judge, else the gold judge of the data."""
        if not self.replies:
            return []
        found = gold_signal(data) if self.judge is None else self._signal_of(self.judge)
        return [found] if found is not None else []

    def data_refusals(self, data: DataOptions) -> Iterator[UserError]:
        """No judge, or one that cannot judge."""
        try:
            judges = self.judged_by(data)
            for each in judges:
                each.source.check(each.where, data)
        except UserError as problem:
            yield problem
            return
        if self.replies and not judges:
            yield UserError(
                "nothing says which replies of the policy are bad: the data has no gold judge, and no other is set",
                field=f"stages.{self.name}.judge",
                code="no_judge",
                hint="set judge={rule: NAME} or {url: ADDRESS} there, data.gold.rule, or replies=0 for labels as data",
            )

    def check_contents(self, kind: str, rows: Iterable[Any], data: DataOptions) -> None:
        """Prompts have what the judge needs of them."""
        from reward.rules import require_truth

        if kind == "prompts":
            require_truth([each.source.rule_name for each in self.judged_by(data)], rows)

    def plan_over(self, rows: int) -> dict[str, float]:
        """The work over so many pairs of the data, where every reply gives another one: at most that."""
        return super().plan_over(self._at_most(rows))

    def work(self, rows: int, tokens: float) -> float:
        """Tokens that are trained on, and those that are sampled."""
        return super().work(self._at_most(rows), tokens) + self.prompts * self.replies * self.max_new_tokens

    def _at_most(self, rows: int) -> int:
        return round(self.replay * rows) + self.prompts * self.replies if self.replies else rows

    def rehearse(self, context: StageContext) -> Rehearsal:
        """The reward model at work, beside the policy and its longest prompts."""
        from align.rl.answers import frozen_policy

        longest = sorted((len(row.ids) for row in context.rows("prompts").train), reverse=True)[: self.batch_size]
        found = super().rehearse(context)
        policy = frozen_policy(context, context.init)
        return replace(found, roles=[*found.roles, policy], answered=longest, new_tokens=self.max_new_tokens)

    def objective(self, context: StageContext, role: Role) -> Pairwise:
        """Bradley-Terry over pairs, on the head that the reward model has."""
        from align.training.objectives import Pairwise

        assert context.reward is not None
        role.head = context.bases.realise(context.reward, "reward", context.parent_mode.load).head
        assert role.head is not None, "a reward model has a head"
        role.head.requires_grad_(True)
        return Pairwise(role, self.centering)

    def parents(self, context: StageContext) -> list[tuple[str, Checkpoint]]:
        """The reward model that it stands on, and the policy that was asked."""
        assert context.reward is not None
        return [("init", context.reward), *([("policy", context.init)] if context.init is not None else [])]

    def pairs(self, context: StageContext) -> Prepared[PairTokens]:
        """Pairs of the data, all or some, and behind them those of the policy's replies."""
        import numpy as np

        from data_prep.prepare.arrow_rows import Joined

        given = super().pairs(context)
        if not self.replies:
            return given
        rows = _kept(context) if context.saver.step else self._sampled(context, given)
        train, held = ([_tokens(row) for row in rows if row["split"] == side] for side in ("train", "eval"))
        if not train:
            context.warn(
                "no_pairs",
                "by the judge, no reply of the policy is worse than another to its prompt: nothing is learned of them",
                "more prompts or replies, a higher temperature, or another judge",
            )
        card = {
            "train": len(train),
            "eval": len(held),
            "chosen_from": dict(Counter(row["chosen_from"] for row in rows)),
            "judge": self.judged_by(context.spec.data)[0].name,
            "policy": context.init.digest if context.init is not None else None,
        }
        drawn = np.random.default_rng(context.seed).permutation(len(given.train))
        again = np.sort(drawn[: round(self.replay * len(drawn))])
        if not (train or len(again)):
            raise TrainingStopped("there is no pair to learn from", code="no_rows", hint="set replay above 0")
        return replace(
            given,
            train=Joined(given.train, again, train),
            eval=Joined(given.eval, np.arange(len(given.eval)), held),
            card={**given.card, "on_policy": card | {"replayed": len(again)}},
        )

    def _sampled(self, context: StageContext, given: Prepared[PairTokens]) -> list[dict[str, Any]]:
        """The pairs of the policy's replies as rows, kept in sampled.jsonl; a held-out prompt gives held-out ones."""
        from align.rl.on_policy import known_replies, pairs_of
        from align.training.resume import SAMPLED

        with context.phase("data"):
            prompts = context.rows("prompts")
            train = self._drawn(context, prompts.train, given.eval)
            held = self._drawn(context, prompts.eval, given.train) if given.eval else []
            held = held[: max(1, len(train) // HELD)]
            known = [*known_replies(given.train, train), *known_replies(given.eval, held)]
        asked, rows = [*train, *held], []
        for place, candidates in enumerate(self._candidates(context, asked, known)):
            side = "train" if place < len(train) else "eval"
            rows += [pair.as_row(split=side) for pair in pairs_of(asked[place], candidates)]
        if context.is_main:
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            (context.staging / SAMPLED).write_text("".join(lines), encoding="utf-8")
        return rows

    def _drawn(
        self, context: StageContext, prompts: Sequence[PromptTokens], other: Sequence[PairTokens]
    ) -> list[PromptTokens]:
        """Some prompts of a side, which no pair of the other side answers; every policy is asked others."""
        import numpy as np

        files = context.init.record["files"] if context.init is not None else {}
        weights = sha256_json([digest for name, digest in files.items() if name.endswith(".safetensors")])
        order = np.random.default_rng([context.seed, int(weights[:8], 16)]).permutation(len(prompts))
        taken = {tuple(pair.prompt) for pair in other}
        found: list[PromptTokens] = []
        for place in order.tolist():
            if len(found) == self.prompts:
                break
            row = prompts[place]
            if tuple(row.ids) not in taken:
                found.append(row)
        return found

    def _candidates(
        self, context: StageContext, prompts: Sequence[PromptTokens], known: Sequence[list[int] | None]
    ) -> list[list[Candidate]]:
        """Of each prompt the policy's replies, and the known one if there is one, with the judge's scores."""
        from align.inference.generation import Reply, Sampling
        from align.rl.answers import frozen_policy, replies_to
        from align.rl.on_policy import Candidate
        from data_prep.core.progress import Progress

        asked = [row.ids for row in prompts for _ in range(self.replies)]
        progress = Progress("replies", len(asked), unit="replies", enabled=context.is_main)
        with context.phase("answer"), context.autocast(), progress:
            policy, sampling = frozen_policy(context, context.init), Sampling(self.max_new_tokens, self.temperature)
            own = replies_to(context, policy, asked, sampling, self.batch_size, progress.advance)
        said = [(place // self.replies, reply, False) for place, reply in enumerate(own)]
        said += [(place, Reply(ids, finished=True), True) for place, ids in enumerate(known) if ids is not None]
        texts = [context.renderer.decode(reply.ids) for _, reply, _ in said]
        scores = self._scores(context, Said([prompts[at] for at, *_ in said], texts, [r.finished for _, r, _ in said]))
        found: list[list[Candidate]] = [[] for _ in prompts]
        for (place, reply, is_known), text, score in zip(said, texts, scores, strict=True):
            found[place].append(Candidate(tuple(reply.ids), text, reply.finished, score, is_known))
        return found

    def _scores(self, context: StageContext, said: Said) -> list[float]:
        """What the judge says of replies; one process asks it for all."""
        from align.training.processes import as_one, from_main

        data = context.spec.data
        (judge,) = self.judged_by(data)
        with context.phase("judge"):
            with as_one(context.accelerator):
                site = Site(data, context.accelerator.device, context.config.allow_code)
                scorer = judge.source.open(judge.where, site)
            verdicts = from_main(context.accelerator, lambda: scorer(said))
        return [verdict["score"] for verdict in verdicts]

    def _signal_of(self, given: Any) -> Signal:
        """The judge as a signal.

        Raises:
            UserError: it cannot be; a reward model of a run cannot teach itself.
        """
        where = f"stages.{self.name}.judge"
        found = signal_of(given, where)
        if found.source.models:
            raise UserError(
                "a reward model of a run is no judge of what reward models are to learn",
                field=where,
                code="bad_value",
                hint="name a rule, a classifier, a function or a server",
            )
        return found


def _tokens(row: dict[str, Any]) -> PairTokens:
    from data_prep.types import PairTokens

    return PairTokens(**row["tokens"])


def _kept(context: StageContext) -> list[dict[str, Any]]:
    """The rows that a run of the stage made before it was stopped."""
    from align.training.resume import SAMPLED

    return json_lines(context.staging / SAMPLED)


def rounds(name: str, chain: Chain) -> Chain:
    """The chain with the rounds that the PPO stage `name` asks for by `refresh`: its reward model, then PPO, anew.

    Each repeats the options of the stage that it goes on with, and takes its result as what it stands on.

    Raises:
        UserError: there is no single reward model to go on with.
    """
    options = chain[name].options
    where = f"stages.{name}.refresh"
    count = min(convert(int, options.get("refresh") or 0, where), MOST_ROUNDS)
    if count < 1:
        return chain
    judge = options.get("reward")
    if judge is None:
        before = list(chain)[: list(chain).index(name)]
        judge = next((each for each in reversed(before) if chain[each].kind.makes == "reward"), None)
    if not isinstance(judge, str):
        raise UserError(
            "rounds go on with one reward model, and the reward of this stage is none",
            field=where,
            code="bad_value",
            hint=f"set stages.{name}.reward=RUN/reward_model, or leave refresh out",
        )
    label, taught = "reward_model", dict[str, Any]()
    if judge in chain:
        label, taught = judge, _without(chain[judge].options, "init", "reward", "on_parent")
    spoken: dict[str, Any] = {key: options[key] for key in ("max_new_tokens", "temperature") if key in options}
    improved = _without(options, "init", "reward", "on_parent", "critic", "refresh")
    policy, more = name, dict[str, Link]()
    for number in range(2, count + 2):
        refreshed, next_policy = f"{label}_{number}", f"{name}_{number}"
        more[refreshed] = Link(Refresh, {**taught, **spoken, "init": policy, "reward": judge}, label)
        more[next_policy] = Link(chain[name].kind, {**improved, "init": policy, "reward": refreshed}, name)
        policy, judge = next_policy, refreshed
    return behind(chain, name, more)


def _without(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in names}

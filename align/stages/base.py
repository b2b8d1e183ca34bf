"""The stage protocol: a stage turns a checkpoint and a data set into a checkpoint.

A stage is a dataclass whose fields are Hydra options (`stages.NAME.FIELD=VALUE`). It lives in one file of this folder
and registers itself with `@stage("name")`. Importing a stage must not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from align.config.registries import stages
from align.config.schema import OnParent
from align.training.options import TrainingOptions
from data_prep.core.errors import UserError
from data_prep.core.options import option
from data_prep.options import LengthOptions

if TYPE_CHECKING:
    from align.adapters.base import Adapter
    from align.checkpoints.checkpoint import Checkpoint
    from align.checkpoints.compatibility import ParentInfo
    from align.config.growth import Chain
    from align.rl.signals.base import Signal
    from align.roles import Role
    from align.training.context import StageContext
    from align.training.objectives import Objective
    from align.training.rehearsal import Rehearsal
    from data_prep.options import DataOptions
    from data_prep.prepare.prepare import Prepared

StageT = TypeVar("StageT", bound="type[Stage]")
StandingT = TypeVar("StandingT")


UNUSUAL = 30.0
"""A learning rate this many times above or below the usual one is warned of."""


def stage(name: str) -> Callable[[StageT], StageT]:
    """Register a stage under `name`, as a Hydra choice of the group `stage` too."""

    def register(cls: StageT) -> StageT:
        from hydra.core.config_store import ConfigStore

        ConfigStore.instance().store(group="stage", name=name, node=cls)
        stages.register(name)(cls)
        return cls

    return register


@dataclass
class Stage:
    """What every stage takes: where it starts from, on which data, with which adapter."""

    name: ClassVar[str]
    needs_data: ClassVar[tuple[str, ...]] = ()
    """Kinds of data it reads: conversations, preferences, prompts, text."""
    may_read: ClassVar[tuple[str, ...]] = ()
    """Kinds of data it also reads where they are given."""
    needs_reward: ClassVar[bool] = False
    """Whether it takes a reward model beside its parent."""
    reward_optional: ClassVar[bool] = False
    """Whether it also works without that reward model."""
    trains: ClassVar[bool] = False
    """Whether it runs the optimisation loop."""
    makes: ClassVar[str | None] = None
    """Role of the checkpoint it makes: policy or reward; None where it makes none."""
    revision: ClassVar[int] = 0
    """Raised when a change makes equal inputs give another result of this stage: it alone is done anew."""
    has_head: ClassVar[bool] = False
    """Whether its checkpoint has a scalar head beside the adapter."""
    lengthening: ClassVar[tuple[str, ...]] = ()
    """Options that may ask for further stages."""

    init: str | None = option(
        None,
        "checkpoint to start from: a stage, RUN/STAGE, a path, or base (default: the run's latest policy)",
    )
    reward: str | None = option(None, "reward model for stages that take one (default: the run's reward_model)")
    on_parent: OnParent = option(OnParent.auto, "how a new adapter stands on the parent: auto|continue|stack|merge")
    data: Any = option(None, "data recipe of this stage alone (default: the run's data)")
    adapter: Any = option(None, "adapter of this stage alone (default: the run's adapter)")

    @classmethod
    def lengthened(cls, name: str, chain: Chain) -> Chain:
        """The stages of a run with those that the options of its stage `name` ask for."""
        return chain

    def stands_on(self, init: StandingT | None, reward: StandingT | None) -> StandingT | None:
        """What its adapter stands on, of its two inputs."""
        return init

    @property
    def reward_model(self) -> str | None:
        """The reward model it asks for: a checkpoint, None for the run's latest, `base` for none."""
        return self.reward if self.needs_reward else "base"

    @property
    def ensemble(self) -> list[str]:
        """Further reward models that it asks for."""
        return []

    @property
    def seed_offset(self) -> int:
        """What is added to the run's seed where the stage draws anything but its rows."""
        return 0

    @property
    def reads(self) -> tuple[str, ...]:
        """Kinds of data that it reads as its options are set: `needs_data`, and what an option asks for."""
        return self.needs_data

    @property
    def idle(self) -> set[str]:
        """Options that decide nothing of the result, as the others are set."""
        return set()

    @property
    def requires_reward_model(self) -> bool:
        """Whether it cannot work without one."""
        return self.needs_reward and not self.reward_optional

    def run(self, context: StageContext) -> Checkpoint | None:
        """Do the stage's work inside `context.staging`; returns the checkpoint written there, if it makes one."""
        raise NotImplementedError

    @property
    def reply_tokens(self) -> int:
        """Tokens that a prompt leaves free for the reply."""
        return int(getattr(self, "max_new_tokens", 0))

    def refusals(self, where: str, adapter: Adapter, reward: ParentInfo | None) -> Iterator[UserError]:
        """Settings that cannot work, known before anything is read; `where` is `stages.NAME`."""
        yield from ()

    @property
    def leaves_critic(self) -> bool:
        """Whether a critic is saved beside the stage's checkpoint."""
        return False

    def parent_refusals(self, where: str, parent: ParentInfo | None) -> Iterator[UserError]:
        """What the stage needs of its parent and that one does not have."""
        yield from ()

    def judged_by(self, data: DataOptions) -> list[Signal]:
        """The signals by which it rewards or measures replies."""
        return []

    def data_refusals(self, data: DataOptions) -> Iterator[UserError]:
        """What is wrong with what the stage reads besides rows."""
        yield from ()

    def require_allowed(self, where: str, allow_code: bool) -> None:
        """Refuse code of the user that the run has not allowed; `where` is `stages.NAME`."""

    def reads_beside(self) -> list[str]:
        """Hashes of files beside its rows that decide its result."""
        return []

    def check_rows(self, where: str, kind: str, count: int) -> None:
        """Raise UserError where so many training rows of a kind are too few."""

    def check_contents(self, kind: str, rows: Iterable[Any], data: DataOptions) -> None:
        """Raise UserError where a row lacks what the stage needs of it.

        Args:
            kind: of the rows, one of `needs_data` and `may_read`.
            rows: all that were read.
        """

    def doubts_of_rows(self, rows: Sequence[Any]) -> Iterator[UserError]:
        """What training rows that can be taken are hardly meant to be: said by `align check` and by the stage."""
        yield from ()

    def doubts(self, where: str, adapter: Adapter, lr_scale: float) -> Iterator[UserError]:
        """Settings that work but are hardly meant: `align check` warns of them, `align run` takes them."""
        yield from ()

    def rehearse(self, context: StageContext) -> Rehearsal:
        """The stage's roles and its largest passes, as `run` would have them: what a plan of its memory is made from.

        Weights lie on the meta device, rows are real.
        """
        raise NotImplementedError

    def work(self, rows: int, tokens: float) -> float:
        """How much there is to do over so many training rows of so many tokens in the mean; twice as much takes twice
        as long. The unit is the stage's own."""
        return rows * (tokens + self.reply_tokens)

    def lighter(self, where: str) -> Iterator[tuple[str, Stage]]:
        """Overrides that make the stage's passes smaller, best first, and the stage with each of them."""
        yield from ()

    def smaller_passes(self, where: str, tokens: int | None) -> str:
        """What to set after a pass, over so many tokens if that is known, did not fit into memory."""
        return f"set a smaller {where}.batch_size, or model.load=bf16"


@dataclass
class TrainingStage(LengthOptions, TrainingOptions, Stage):
    """Options of every stage that runs the optimisation loop of `align/training/loop.py`."""

    trains: ClassVar[bool] = True
    base_lr: ClassVar[float] = 2e-4
    """Peak learning rate of a LoRA adapter on a model of billions of parameters, where the option is not set."""
    trains_head: ClassVar[bool] = False
    """Whether it trains a score head."""

    def peak_lr(self, adapter: Adapter, lr_scale: float) -> float:
        """Peak learning rate with this adapter on a model of this scale: as set, else the stage's default for both."""
        return self.lr if self.lr is not None else self.usual_lr(adapter, lr_scale)

    def usual_lr(self, adapter: Adapter, lr_scale: float) -> float:
        """The learning rate where none is set."""
        return self.base_lr * adapter.lr_factor * lr_scale

    def objective(self, context: StageContext, role: Role) -> Objective:
        """What is minimised over the rows of the stage; gives the role its head where it has one."""
        raise NotImplementedError

    def rows(self, context: StageContext) -> Prepared[Any]:
        """The prepared rows as the objective takes them."""
        return context.rows(self.needs_data[0])

    def rehearse(self, context: StageContext) -> Rehearsal:
        """One role under its objective, and the pass with most tokens."""
        from align.training.batching import largest_pass
        from align.training.optimizer import ready_to_train
        from align.training.rehearsal import Rehearsal
        from data_prep.prepare.arrow_rows import lengths_of

        prepared = self.rows(context)
        rows, lengths = prepared.train, lengths_of(prepared.train)
        role = context.fresh_role("policy")
        objective = self.objective(context, role)
        ready_to_train(role, self)
        places, passes = largest_pass(lengths, self, context.seed)
        again = self.rereads(len(rows))
        return Rehearsal(
            roles=[role],
            objective=objective,
            train=[rows[place] for place in places],
            passes=passes,
            reread=int(lengths.sum() + lengths_of(prepared.eval).sum()) if again else 0,
        )

    def work(self, rows: int, tokens: float) -> float:
        """Tokens that all steps read."""
        return self.steps_over(rows) * min(self.batch_size, rows) * tokens

    def lighter(self, where: str) -> Iterator[tuple[str, Stage]]:
        """Smaller passes, activations computed again, shorter rows."""
        if not self.micro_tokens or self.micro_tokens > self.max_length:
            yield f"{where}.micro_tokens={self.max_length}", replace(self, micro_tokens=self.max_length)
        if not self.gradient_checkpointing:
            yield f"{where}.gradient_checkpointing=true", replace(self, gradient_checkpointing=True)
        half = self.max_length // 2
        if half > self.reply_tokens:
            yield f"{where}.max_length={half}", replace(self, max_length=half)

    def plan_over(self, rows: int) -> dict[str, float]:
        """What `align check` says of the work over so many training rows."""
        return {"steps": self.steps_over(rows), "rows_per_step": min(self.batch_size, rows), "epochs": self.epochs}

    def half_of(self, tokens: int | None) -> int:
        """Half of what a pass held that did not fit; the gradient of a step does not depend on how it is cut."""
        held = min(filter(None, (tokens, self.micro_tokens)), default=2 * self.max_length)
        return max(1, held // 2)

    def smaller_passes(self, where: str, tokens: int | None) -> str:
        """What to set where a pass of so many tokens does not fit."""
        return (
            f"set {where}.micro_tokens={self.half_of(tokens)}; where one row is too long, "
            f"{where}.gradient_checkpointing=true or model.load=bf16. "
            "The same command with it goes on after the last kept state"
        )

    def refusals(self, where: str, adapter: Adapter, reward: ParentInfo | None) -> Iterator[UserError]:
        """Options that the method or the stage has no use for."""
        yield from self.against_method(where, adapter)
        if self.head_decay is not None and not self.trains_head:
            yield UserError("this stage trains no score head", field=f"{where}.head_decay", code="no_effect")
        for name in ("embedding_drift", "embedding_decay"):
            if getattr(self, name) and not adapter.traits.owns_weights:
                yield UserError(
                    f"{getattr(adapter, 'method', type(adapter).__name__)} trains no embeddings",
                    field=f"{where}.{name}",
                    code="no_effect",
                    hint=f"leave it out, or take adapter=full; {where}.hidden_drift works with every method",
                )

    def against_method(self, where: str, adapter: Adapter) -> Iterator[UserError]:
        """Recomputing activations is not possible with every method."""
        if self.gradient_checkpointing and not adapter.traits.gradient_checkpointing:
            name = getattr(adapter, "method", type(adapter).__name__)
            yield UserError(
                f"{name} does not work with gradient checkpointing",
                field=f"{where}.gradient_checkpointing",
                code="illegal_method",
                hint=f"set {where}.gradient_checkpointing=false and a smaller {where}.micro_batch_size",
            )

    def doubts(self, where: str, adapter: Adapter, lr_scale: float) -> Iterator[UserError]:
        """A learning rate far from the usual one."""
        usual = self.usual_lr(adapter, lr_scale)
        if self.lr is not None and not usual / UNUSUAL <= self.lr <= usual * UNUSUAL:
            times = f"{self.lr / usual:.3g} times" if self.lr > usual else f"1/{usual / self.lr:.3g} of"
            yield UserError(
                f"{self.lr:g} is {times} the usual learning rate of this stage and method ({usual:g})",
                field=f"{where}.lr",
                code="unusual_value",
                hint="leave it out to take the usual one",
            )

"""What a stage stands on, decided before any weight loads: which checkpoints, in which mode, at which precision.

Every rule takes a `ParentInfo`: a finished checkpoint, or a stage of the same pipeline that has not run yet. So
`align run` and `align check` obey one set of rules, and a run is planned once, before its first stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from align.adapters.base import Adapter
from align.checkpoints.checkpoint import Checkpoint
from align.checkpoints.peft_adapter import UNKNOWN
from align.checkpoints.resolve import LAST, resolve_checkpoint
from align.config.registries import adapters
from align.config.schema import Load, OnParent, OnPrecisionChange, RunConfig, StageSpec
from data_prep.core.errors import UserError
from data_prep.core.options import build, plain
from data_prep.types import Features

_NOT_STRUCTURAL = {"method", "dropout"}


class ParentInfo(Protocol):
    """What the rules need to know of something that a stage stands on."""

    @property
    def label(self) -> str:
        """Its name in messages."""

    @property
    def role(self) -> str:
        """policy, reward or value."""

    @property
    def method(self) -> str: ...

    @property
    def options(self) -> dict[str, Any]:
        """The adapter's options as plain JSON values."""

    @property
    def load(self) -> str:
        """Precision of its base: fp32, bf16 or nf4."""


ParentT = TypeVar("ParentT", bound=ParentInfo)


@dataclass(frozen=True)
class Planned:
    """The checkpoint that a stage of this pipeline is going to make."""

    label: str
    role: str
    method: str
    options: dict[str, Any]
    load: str
    critic: bool = False
    """Whether a critic is saved beside it."""


Input = Planned | Checkpoint
"""What a stage may name as what it stands on: a stage before it, or a finished checkpoint."""


def options_of(adapter: Adapter) -> dict[str, Any]:
    """An adapter's options as plain JSON values, without empty lists, so that new options change no digest."""
    return {name: value for name, value in plain(adapter).items() if value != []}


def adapter_of(standing: ParentInfo) -> Adapter:
    """The adapter a checkpoint was, or will be, trained with."""
    cls: Any = adapters.get(standing.method)
    try:
        adapter: Adapter = build(cls, standing.options, "options")
    except UserError as error:
        raise UserError(f"options of {standing.label} do not fit this version ({error})") from None
    return adapter


def at_features(checkpoint: Checkpoint, features: Any) -> Checkpoint:
    """The checkpoint with these features for every row; None: as it is.

    Raises:
        UserError: they are not what its adapter reads.
    """
    if features is None:
        return checkpoint
    features = given_features(features)
    require_features([checkpoint], features)
    options = {**checkpoint.options, "fixed": list(features) if isinstance(features, tuple) else features}
    probe = {**checkpoint.record["probe"], "expected": []}  # of rows with features of their own
    return replace(checkpoint, record={**checkpoint.record, "options": options, "probe": probe})


def require_features(checkpoints: Sequence[ParentInfo], features: Features | None) -> None:
    """Refuse features that are not what the adapters of these checkpoints read.

    Raises:
        UserError: none where one reads them, other ones, or some where none reads any.
    """
    readers = [(one, adapter_of(one)) for one in checkpoints]
    readers = [(one, adapter) for one, adapter in readers if adapter.traits.reads_features]
    for one, adapter in readers:
        if problem := adapter.against_features(features):
            raise UserError(f"{one.label}: {problem}", field="features", code="bad_features")
    if features is not None and not readers:
        labels = ", ".join(one.label for one in checkpoints) or "the base"
        raise UserError(
            f"nothing in {labels} reads features", field="features", code="bad_features", hint="leave it out"
        )


def given_features(value: Any) -> Features:
    """Features as someone spells them: a category, a number, or a list of numbers.

    Raises:
        UserError: something else.
    """
    if isinstance(value, str):
        return value
    listed = value if isinstance(value, list | tuple) else [value]
    if not listed or any(isinstance(one, bool) or not isinstance(one, int | float) for one in listed):
        raise UserError(
            f"expected a category or a list of numbers (got {value})", field="features", code="bad_features"
        )
    return tuple(float(one) for one in listed)


def find_input(
    wanted: str | None, role: str, before: Mapping[str, Planned], pipeline: Sequence[str], out: str
) -> Input | None:
    """What a stage names as its `init` or `reward`; with no name, the latest of that role before it in the pipeline.

    Args:
        wanted: a stage, RUN/STAGE, a path, `base`, or None.
        role: policy or reward.
        before: what the stages before this one are going to make, by stage name, in order.
        pipeline: names of all stages.
        out: the folder of runs.

    Raises:
        UserError: no such checkpoint, a stage that comes later, or a checkpoint of another role.
    """
    if wanted == "base":
        return None
    if wanted is None:
        fitting = [standing for standing in before.values() if standing.role == role]
        return fitting[-1] if fitting else None
    if wanted in pipeline and wanted not in before:
        raise UserError(
            f"stage '{wanted}' comes later in this pipeline than the stage that needs it, or leaves no checkpoint",
            code="illegal_chain",
            hint="name a stage before it, or a finished checkpoint as RUN/STAGE",
        )
    if wanted.partition("/")[0] == LAST and LAST not in before:
        raise UserError(
            f"'{wanted}' names another run each day",
            code="unknown_target",
            hint="name it as RUN/STAGE: align ls runs has the newest first",
        )
    found: Input = before[wanted] if wanted in before else resolve_checkpoint(wanted, out, True)
    if found.role != role:
        raise UserError(
            f"'{wanted}' is a {found.role} checkpoint where a {role} is needed",
            code="wrong_role",
            file=str(found.folder) if isinstance(found, Checkpoint) else None,
            hint=f"name a checkpoint whose role is {role}",
        )
    return found


def check_reward(spec: StageSpec, judges: Sequence[ParentInfo], load: Load, on_change: OnPrecisionChange) -> None:
    """A stage that needs reward models has them, made at the precision that the stage loads its base at.

    Raises:
        UserError: it has none, or one that would score differently here.
    """
    if not spec.stage.requires_reward_model:
        return
    if not judges:
        raise UserError(
            f"{spec.name} needs a reward model",
            code="missing_reward",
            hint=f"set stages.{spec.name}.reward=RUN/reward_model, or use pipeline=rlhf",
        )
    other = next((judge.load for judge in judges if judge.load != load.value), None)
    if other is not None and on_change is OnPrecisionChange.refuse:
        raise UserError(
            f"the reward model was trained on a {other} base, {spec.name} would load it as {load.value}, "
            "where it scores differently",
            code="precision_change",
            hint="train both at one precision, or set on_precision_change=recalibrate",
        )


def check_agreement(adapter: Adapter, others: Iterable[ParentInfo | None]) -> None:
    """What adapters on one base must share is the same in all of them.

    Raises:
        UserError: another value, with the one to take.
    """
    own = adapter.agreement()
    for other in (standing for standing in others if standing is not None):
        for name, value in adapter_of(other).agreement().items():
            if own.get(name, value) != value:
                raise UserError(
                    f"adapters on one base share it (got {own[name]}; {other.label} has {value})",
                    field=f"adapter.{name}",
                    code="no_agreement",
                    hint=f"set adapter.{name}={value}",
                )


@dataclass(frozen=True)
class ParentMode:
    """How an adapter stands on what is below it."""

    mode: OnParent | None
    """continue, stack or merge; None for a stage without a parent."""
    load: Load
    forced: tuple[str, ...] = ()
    """Rules that were set aside because the user asked for it."""


@dataclass(frozen=True)
class StagePlan(Generic[ParentT]):
    """What one stage stands on, and everything that is wrong with it."""

    spec: StageSpec
    init: ParentT | None
    reward: ParentT | None
    parent_mode: ParentMode | None
    """None where there is none that is legal."""
    problems: list[UserError] = field(default_factory=list)
    ensemble: Sequence[ParentT] = ()
    """Further reward models, beside `reward`."""

    @property
    def judges(self) -> list[ParentT]:
        """The reward models that there are."""
        return [*([self.reward] if self.reward is not None else []), *self.ensemble]

    @property
    def below(self) -> ParentT | None:
        """What the stage's adapter stands on."""
        found: ParentT | None = self.spec.stage.stands_on(self.init, self.reward)
        return found

    def require(self) -> ParentMode:
        """The mode and precision of a stage that nothing is wrong with.

        Raises:
            UserError: the first problem.
        """
        for problem in self.problems:
            raise problem
        assert self.parent_mode is not None
        return self.parent_mode

    def begin(self, config: RunConfig, made: Mapping[str, Checkpoint], base_folder: Path) -> StagePlan[Checkpoint]:
        """The plan as its stage begins: on finished checkpoints, the files of which are looked at again.

        Args:
            made: the checkpoints that stages before it have made in this run.

        Raises:
            UserError: something in a checkpoint has changed.
        """

        def finished(planned: ParentInfo) -> Checkpoint:
            known = planned if isinstance(planned, Checkpoint) else made[planned.label]
            found = Checkpoint.open(known.folder)
            if found.digest != known.digest:
                raise UserError(
                    f"{known.label} was replaced since this run saw it (got {found.digest[:8]})",
                    code="changed_file",
                    file=str(found.folder),
                    hint="the same command plans with what is there now",
                )
            return found.require(base_folder, config.model_names)

        init = finished(self.init) if self.init is not None else None
        judges = [finished(judge) for judge in self.judges]
        return StagePlan(self.spec, init, next(iter(judges), None), self.parent_mode, ensemble=judges[1:])


def choose_parent_mode(
    parent: ParentInfo | None, adapter: Adapter, mode: OnParent, load: Load | None, on_change: OnPrecisionChange
) -> ParentMode:
    """Decide mode and precision of a stage, or refuse with the reason and what to do instead."""
    wanted = load_of(parent, adapter, load)
    if wanted.four_bit and not adapter.traits.four_bit:
        raise UserError(
            f"{adapter_name(adapter)} cannot stand on a 4-bit base", hint="set model.load=fp32, or use adapter=qlora"
        )
    if not adapter.traits.bf16 and wanted is Load.bf16:
        raise UserError(
            f"{adapter_name(adapter)} trains float32 weights, not {wanted.value}",
            hint="set model.load=fp32 and, for speed, stages.STAGE.autocast=bf16",
        )
    return ParentMode(_mode(parent, adapter, mode, wanted), wanted, _change(parent, wanted, on_change))


def lookout(parent: ParentInfo | None, load: Load | None, on_change: OnPrecisionChange) -> ParentMode:
    """Mode and precision of a stage that trains nothing: it looks at its parent as that was trained."""
    wanted = load or (Load(parent.load) if parent is not None and parent.load != UNKNOWN else Load.fp32)
    return ParentMode(None, wanted, _change(parent, wanted, on_change))


def _change(parent: ParentInfo | None, wanted: Load, on_change: OnPrecisionChange) -> tuple[str, ...]:
    """The change of precision that the user asked for; one that nobody asked for is refused."""
    if parent is None or parent.load in (wanted.value, UNKNOWN):
        return ()
    if on_change is OnPrecisionChange.refuse:
        raise UserError(
            f"precision changes along the chain: {parent.label} was trained on a {parent.load} base, "
            f"this stage would load it as {wanted.value}",
            code="precision_change",
            hint=f"set model.load={parent.load} (and a method that fits), or on_precision_change=recalibrate",
        )
    return (f"precision {parent.load} -> {wanted.value}",)


def adapter_name(adapter: Adapter) -> str:
    """The method's registered name."""
    return str(getattr(adapter, "method", type(adapter).__name__))


def load_of(parent: ParentInfo | None, adapter: Adapter, load: Load | None) -> Load:
    """The precision a stage loads its base at: the method's own, else what is set, else the parent's, else fp32."""
    implied = adapter.quantization()
    if implied is not None:
        return Load(implied)
    if load is not None:
        return load
    return Load(parent.load) if parent is not None and parent.load != UNKNOWN else Load.fp32


def _mode(parent: ParentInfo | None, adapter: Adapter, mode: OnParent, load: Load) -> OnParent | None:
    if parent is None:
        if mode is not OnParent.auto:
            raise UserError(f"on_parent={mode.name} needs a parent checkpoint, and this stage starts from the base")
        return None
    problems = {
        OnParent["continue"]: _against_continue(parent, adapter),
        OnParent.stack: _against_start(adapter) or _against_stack(parent, adapter),
        OnParent.merge: _against_start(adapter) or _against_merge(parent, load),
    }
    if mode is not OnParent.auto:
        if problems[mode]:
            legal = [m.name for m, problem in problems.items() if not problem]
            hint = f"legal here: {', '.join(legal)}" if legal else "no way of standing on it is legal"
            if mode is OnParent["continue"]:
                hint += f"; it is continued with {_words(parent)}"
            raise UserError(f"on_parent={mode.name} cannot be: {problems[mode]}", code="illegal_chain", hint=hint)
        return mode
    for candidate, problem in problems.items():
        if not problem:
            return candidate
    reasons = "; ".join(f"{m.name}: {problem}" for m, problem in problems.items())
    raise UserError(f"{adapter_name(adapter)} cannot stand on {parent.label} ({reasons})", code="illegal_chain")


def _words(standing: ParentInfo) -> str:
    """The overrides that give a stage the method and options of a parent."""
    below = adapter_of(standing)
    usual = options_of(type(below)())
    own = {k: v for k, v in options_of(below).items() if k not in _NOT_STRUCTURAL and v != usual[k]}
    shown = {k: f"[{','.join(v)}]" if isinstance(v, list) else v for k, v in own.items()}
    return " ".join([f"adapter={standing.method}", *(f"adapter.{k}={v}" for k, v in shown.items())])


def _against_continue(parent: ParentInfo, adapter: Adapter) -> str | None:
    if parent.method != adapter_name(adapter):
        return f"the parent's method is {parent.method}, this stage's is {adapter_name(adapter)}"
    own, theirs = options_of(adapter), options_of(adapter_of(parent))
    for key in own.keys() - _NOT_STRUCTURAL:
        if own[key] != theirs.get(key):
            return f"the parent has {key}={theirs.get(key)}, this stage {key}={own[key]}"
    return None


def _against_start(adapter: Adapter) -> str | None:
    if adapter.traits.starts_as_parent:
        return None
    return f"{adapter_name(adapter)} does not start as its parent, which would be lost before training"


def _against_stack(parent: ParentInfo, adapter: Adapter) -> str | None:
    below = adapter_of(parent)
    if below.traits.owns_weights:
        return f"{parent.method} on {parent.method} continues it" if adapter.traits.owns_weights else None
    if not below.traits.low_rank:
        return f"{parent.method} has no exact low-rank form"
    if adapter.traits.reads_weights:
        return f"{adapter_name(adapter)} computes from the weights below it and would miss what is stacked beside them"
    return "full tuning trains the weights themselves" if adapter.traits.owns_weights else None


def _against_merge(parent: ParentInfo, load: Load) -> str | None:
    if not adapter_of(parent).traits.mergeable:
        return f"{parent.method} cannot be merged"
    if load.four_bit:
        return "merging into a 4-bit base would re-quantise it"
    return None

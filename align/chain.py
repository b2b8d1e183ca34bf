"""How a stage stands on its parent, decided before any weight loads: mode, precision, and the reasons for both."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from align.adapters.base import Adapter, adapters
from align.checkpoint import Checkpoint
from align.options import Load, OnPrecisionChange
from align.stages.base import OnParent
from data_prep.errors import UserError

_NOT_STRUCTURAL = {"method", "dropout"}


def options_of(adapter: Adapter) -> dict[str, Any]:
    """An adapter's options as plain JSON values."""
    return {k: v.value if isinstance(v, Enum) else v for k, v in asdict(adapter).items()}


def adapter_of(checkpoint: Checkpoint) -> Adapter:
    """The adapter a checkpoint was trained with."""
    cls: Any = adapters.get(checkpoint.method)
    try:
        adapter: Adapter = cls(**checkpoint.record["options"])
    except TypeError as error:
        raise UserError(f"options of {checkpoint.label} do not fit this version ({error})") from None
    return adapter


@dataclass(frozen=True)
class Footing:
    """How an adapter stands on what is below it."""

    mode: OnParent | None
    """continue, stack or merge; None for a stage without a parent."""
    load: Load
    forced: tuple[str, ...] = ()
    """Rules that were set aside because the user asked for it."""


def footing(
    parent: Checkpoint | None, adapter: Adapter, mode: OnParent, load: Load | None, on_change: OnPrecisionChange
) -> Footing:
    """Decide mode and precision of a stage, or refuse with the reason and what to do instead."""
    wanted = _load(parent, adapter, load)
    if wanted is Load.nf4 and not adapter.traits.four_bit:
        raise UserError(
            f"{adapter_name(adapter)} cannot stand on a 4-bit base", hint="set model.load=fp32, or use adapter=qlora"
        )
    if adapter.traits.owns_weights and wanted is not Load.fp32:
        raise UserError(
            f"{adapter_name(adapter)} trains float32 weights, not {wanted.value}",
            hint="set model.load=fp32 and, for speed, stages.STAGE.autocast=bf16",
        )
    forced: tuple[str, ...] = ()
    if parent is not None and parent.load != wanted.value:
        if on_change is OnPrecisionChange.refuse:
            raise UserError(
                f"precision changes along the chain: {parent.label} was trained on a {parent.load} base, "
                f"this stage would load it as {wanted.value}",
                code="precision_change",
                hint=f"set model.load={parent.load} (and a method that fits), or on_precision_change=recalibrate",
            )
        forced = (f"precision {parent.load} -> {wanted.value}",)
    return Footing(_mode(parent, adapter, mode, wanted), wanted, forced)


def adapter_name(adapter: Adapter) -> str:
    """The method's registered name."""
    return str(getattr(adapter, "method", type(adapter).__name__))


def _load(parent: Checkpoint | None, adapter: Adapter, load: Load | None) -> Load:
    implied = adapter.quantization()
    if implied is not None:
        return Load(implied)
    if load is not None:
        return load
    return Load(parent.load) if parent is not None else Load.fp32


def _mode(parent: Checkpoint | None, adapter: Adapter, mode: OnParent, load: Load) -> OnParent | None:
    if parent is None:
        if mode is not OnParent.auto:
            raise UserError(f"on_parent={mode.name} needs a parent checkpoint, and this stage starts from the base")
        return None
    problems = {
        OnParent["continue"]: _against_continue(parent, adapter),
        OnParent.stack: _against_stack(parent, adapter),
        OnParent.merge: _against_merge(parent, load),
    }
    if mode is not OnParent.auto:
        if problems[mode]:
            legal = [m.name for m, problem in problems.items() if not problem]
            hint = f"legal here: {', '.join(legal)}" if legal else "no way of standing on it is legal"
            raise UserError(f"on_parent={mode.name} cannot be: {problems[mode]}", code="illegal_chain", hint=hint)
        return mode
    for candidate, problem in problems.items():
        if not problem:
            return candidate
    reasons = "; ".join(f"{m.name}: {problem}" for m, problem in problems.items())
    raise UserError(f"{adapter_name(adapter)} cannot stand on {parent.label} ({reasons})", code="illegal_chain")


def _against_continue(parent: Checkpoint, adapter: Adapter) -> str | None:
    if parent.method != adapter_name(adapter):
        return f"the parent's method is {parent.method}, this stage's is {adapter_name(adapter)}"
    own, theirs = options_of(adapter), parent.record["options"]
    for key in own.keys() - _NOT_STRUCTURAL:
        if own[key] != theirs.get(key):
            return f"the parent has {key}={theirs.get(key)}, this stage {key}={own[key]}"
    return None


def _against_stack(parent: Checkpoint, adapter: Adapter) -> str | None:
    below = adapter_of(parent)
    if below.traits.owns_weights:
        return f"{parent.method} on {parent.method} continues it" if adapter.traits.owns_weights else None
    if not below.traits.low_rank:
        return f"{parent.method} has no exact low-rank form"
    return "full tuning trains the weights themselves" if adapter.traits.owns_weights else None


def _against_merge(parent: Checkpoint, load: Load) -> str | None:
    if not adapter_of(parent).traits.mergeable:
        return f"{parent.method} cannot be merged"
    if load is Load.nf4:
        return "merging into a 4-bit base would re-quantise it"
    return None

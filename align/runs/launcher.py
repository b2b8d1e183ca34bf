"""What `accelerate launch` and `accelerate config` ask for, held against the recipe: what contradicts it is refused.

accelerate reads these variables wherever one of its objects is made. What they ask for would be left out in silence,
or done although the recipe, which names everything that decides a result, says otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from align.config.schema import StageSpec
from data_prep.core.errors import UserError

_OTHER_WAYS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config (tensor, context or expert parallel)",
}
_LESS_MEMORY = (
    "set its distributed_type to MULTI_GPU and distributed.shard=base, which cuts the base over the processes; "
    "model.load=nf4, stages.NAME.micro_tokens=N and stages.NAME.gradient_checkpointing=true save memory too"
)


def check_launcher(specs: Sequence[StageSpec], environment: Mapping[str, str] = os.environ) -> None:
    """Refuse settings of accelerate that contradict the recipe, or that nothing here obeys.

    Raises:
        UserError: the first of them, with our option.
    """
    training = [spec for spec in specs if spec.stage.trains]
    for variable, name in _OTHER_WAYS.items():
        if environment.get(variable, "").lower() in ("true", "1", "yes"):
            raise _refused(variable, f"accelerate asks for {name}, which is not used here", _LESS_MEMORY)
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    other = [spec.name for spec in training if spec.stage.autocast.value != precision]
    if precision not in ("no", "") and other:
        words = " ".join(f"stages.{name}.autocast=bf16" for name in other)
        hint = f"set {words}, or its mixed_precision to no" if precision == "bf16" else "set its mixed_precision to no"
        raise _refused("ACCELERATE_MIXED_PRECISION", f"accelerate asks for {precision}, the recipe does not", hint)
    steps = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("1", ""):
        hint = "set stages.NAME.batch_size, the rows of a step, and micro_batch_size, those of a pass"
        variable = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
        raise _refused(variable, f"accelerate asks for {steps} accumulated passes, the recipe decides that", hint)
    compiler = environment.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if compiler.lower() not in ("no", ""):
        hint = "set its dynamo_backend to no: models are not compiled, rows of any length share a pass"
        raise _refused("ACCELERATE_DYNAMO_BACKEND", f"accelerate asks for the compiler {compiler}", hint)


def _refused(variable: str, message: str, hint: str) -> UserError:
    return UserError(message, code="launcher", field=variable, hint=hint)

"""What PPO does about the verdict on its reward model, before it loads any weights."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from align.config.schema import RewardGate
from data_prep.core.errors import UserError
from reward.gate import PASS, REFUSE

if TYPE_CHECKING:
    from align.training.context import StageContext

_HINT = "mend the reward model, or set reward_gate=warn to go on all the same"


def heed(context: StageContext) -> None:
    """Say why the reward model is doubted, or stop where it is refused and the run is strict (`reward_gate`).

    Raises:
        UserError: the run is strict, and the verdict is refuse or was never given.
    """
    wanted, name = context.config.reward_gate, context.spec.name
    if wanted is RewardGate.off or context.reward is None:
        return
    found: dict[str, Any] = context.reward.record["metrics"].get("gate") or {}
    if not found and wanted is RewardGate.strict:
        raise UserError(
            "the reward model was made before there was a gate, so nothing says that it is fit for PPO",
            code="reward_gate",
            file=str(context.reward.folder),
            hint="train it again, or set reward_gate=warn",
        )
    if found.get("verdict") == REFUSE and wanted is RewardGate.strict:
        more = len(found["reasons"]) - 1
        raise UserError(
            f"the reward model is not fit for PPO: {found['reasons'][0]}" + (f" (and {more} more)" if more else ""),
            code="reward_gate",
            file=str(context.reward.folder),
            hint=_HINT,
            details=found["reasons"] if more else (),
        )
    if found and found["verdict"] != PASS and context.is_main:
        said, reasons = f"the gate of its reward model says {found['verdict']}", found["reasons"]
        if context.reward.folder.parent == context.staging.parent:  # its reasons stand a few lines above
            print(f"{name}: {said}", file=sys.stderr)
            return
        first, _, remedy = reasons[0].partition("; ")
        context.warn("reward_gate", f"{said}: {first}", remedy)
        print("".join(f"  {reason}\n" for reason in reasons[1:]), end="", file=sys.stderr)

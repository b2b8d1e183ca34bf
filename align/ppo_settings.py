"""PPO settings that cannot work, and settings that a knowledgeable person would ask about. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from data_prep.errors import UserError

if TYPE_CHECKING:
    from align.stages.ppo import PPO


def refusals(options: PPO, where: str) -> Iterator[UserError]:
    """What cannot work, whatever the data."""
    if options.neftune:
        yield UserError(
            "noise in training forwards would count as a change of the policy since its replies were sampled",
            field=f"{where}.neftune",
            code="bad_value",
            hint="leave it out; it belongs into sft",
        )
    if options.critic_warmup >= options.updates:
        yield UserError(
            f"no update would train the policy: {options.updates} updates, "
            f"{options.critic_warmup} for the critic alone",
            field=f"{where}.critic_warmup",
            code="bad_value",
            hint="raise updates or lower critic_warmup",
        )
    if options.minibatches > options.batch_size:
        yield UserError(
            f"a batch of {options.batch_size} prompts cannot be cut into {options.minibatches} minibatches",
            field=f"{where}.minibatches",
            code="bad_value",
            hint="lower minibatches or raise batch_size",
        )
    if options.kl_target > 0 and options.kl_coef == 0:
        yield UserError(
            "an adaptive coefficient that starts at 0 stays 0",
            field=f"{where}.kl_target",
            code="bad_value",
            hint="set kl_coef above 0, or kl_target=0",
        )


def doubts(options: PPO, where: str) -> Iterator[UserError]:
    """What works but is hardly meant. Ranges are those of the runs in arXiv 2403.17031, with room on both sides."""

    def doubt(name: str, problem: str, hint: str) -> UserError:
        value = getattr(options, name)
        return UserError(f"{value:g} {problem}", field=f"{where}.{name}", code="unusual_value", hint=hint)

    if options.kl_coef > 1:
        yield doubt("kl_coef", "makes the KL penalty outweigh the normalised reward", "usual: 0.01 to 0.2")
    if options.kl_coef == 0:
        yield doubt("kl_coef", "lets the policy leave its parent until kl_limit stops the stage", "usual: 0.01 to 0.2")
    if not 0.02 <= options.clip <= 0.5:
        yield doubt("clip", "is an unusual ratio clip", "usual: 0.1 to 0.3")
    if 0 < options.dual_clip <= 1:
        yield doubt("dual_clip", "bounds the loss below an unchanged ratio of 1", "usual: 3, or 0 for off")
    if options.gamma < 0.9:
        yield doubt("gamma", "hides the reward, given at a reply's end, from its first tokens", "usual: 1")
    if not 0.3 <= options.temperature <= 2:
        yield doubt("temperature", "samples replies far from what the model says", "usual: 0.7 to 1")
    size, rest = divmod(options.batch_size, options.minibatches)
    if rest and options.minibatches <= options.batch_size:
        yield doubt(
            "minibatches",
            f"minibatches of a batch of {options.batch_size} are of unequal size",
            "take a divisor of batch_size",
        )
    elif options.micro_batch_size and size > options.micro_batch_size and size % options.micro_batch_size:
        yield doubt(
            "micro_batch_size",
            f"rows at a time leave a remainder in every minibatch of {size}",
            f"take a divisor of {size}",
        )

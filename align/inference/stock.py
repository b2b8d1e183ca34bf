"""Checkpoints in Python: as models of transformers and peft, and as scores of replies.

`align.load` and `align.score` are these functions. What comes back is stock: nothing of this project is needed to
generate with it, to save it or to train it further.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from align.checkpoints.lineage import judge_of
from align.config.schema import Load
from align.inference.loaded import Opened
from align.inference.scoring import normalised, score_replies
from align.models.own_modules import take_out
from data_prep.core.errors import UserError
from data_prep.types import Message


def load(target: str, out: str = "runs") -> tuple[Any, Any]:
    """The model of a checkpoint and its tokenizer, whose files, parents and base have been checked.

        model, tokenizer = align.load("my-run/ppo")
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)

    Args:
        target: a path, RUN or RUN/STAGE below `out`; a run stands for its last policy.
        out: folder of runs.

    Returns:
        A `PeftModel` where stock peft has the method and the adapter stands on the base itself; else, where the
        change is one of weights, a plain model with it folded in, in float32; both in eval mode. And the tokenizer,
        with the chat template that was trained with.

    Raises:
        UserError: there is none such, something does not fit its record, or no stock model computes the same.
    """
    opened = Opened.target(target, out)
    checkpoint, traits = opened.checkpoint, opened.adapter.traits
    opened.require_language_model("loading as a stock model")
    alone = not checkpoint.record.get("derived_base") and not opened.bases.terms_under(checkpoint, opened.load)
    if traits.owns_weights or (traits.mergeable and not (alone and traits.portable)):
        model = opened.bases.folded(checkpoint, opened.load)
        take_out(model)
    elif alone and traits.portable:
        model = opened.on_base(checkpoint.folder)
        take_out(model)
    else:
        raise UserError(
            f"no stock model computes what {checkpoint.label} ({checkpoint.method}) does",
            code="not_portable",
            hint=f"talk to it with align chat {checkpoint.folder}",
        )
    return model.eval(), opened.tokenizer


def score(target: str, prompts: Sequence[str], replies: Sequence[str], out: str = "runs") -> list[float]:
    """Rewards of replies to prompts, as chat and PPO count them.

        better, worse = align.score("my-run", ["say owl", "say owl"], ["The owl says hoot.", "No."])

    Args:
        target: a reward model, or a policy or run whose chain has one: a path, RUN or RUN/STAGE below `out`.
        prompts: user messages, one for each reply.
        replies: replies that the assistant ended.
        out: folder of runs.

    Returns:
        One number a reply, in standard deviations of the reward model's own scores around their mean.

    Raises:
        UserError: no reward model there, unequal counts, or an empty reply.
    """
    import torch

    if len(prompts) != len(replies):
        raise UserError(f"{len(prompts)} prompts for {len(replies)} replies", code="bad_value")
    opened = Opened.target(target, out)
    judge = opened.checkpoint if opened.checkpoint.record["role"] == "reward" else judge_of(opened.checkpoint)
    if judge is None:
        raise UserError(f"the chain of {opened.checkpoint.label} has no reward model", code="no_reward_model")
    judge.require(opened.base_folder)
    role = opened.bases.realise(judge, "reward", Load(judge.load))
    renderer = opened.renderer
    pairs = [
        (renderer.prompt([Message("user", prompt)]), renderer.reply(reply))
        for prompt, reply in zip(prompts, replies, strict=True)
    ]
    score_B = torch.tensor(score_replies(role, pairs, 64))
    return normalised(score_B, torch.ones(len(pairs), dtype=torch.bool), judge)

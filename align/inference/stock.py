"""Checkpoints in Python: as models of transformers and peft, and as scores of replies.

`align.load` and `align.score` are these functions. What comes back is stock: nothing of this project is needed to
generate with it, to save it or to train it further.
"""

from __future__ import annotations

from collections.abc import Sequence
from shlex import quote
from typing import Any

from align.checkpoints.compatibility import given_features, require_features
from align.checkpoints.lineage import judge_of
from align.config.schema import Load
from align.inference.forms import Form, against
from align.inference.loaded import Opened
from align.inference.scoring import normalised, score_replies
from align.models.own_modules import take_out
from data_prep.core.errors import UserError
from data_prep.types import Message, with_features


def load(target: str, out: str = "runs", base: str | None = None, features: Any = None) -> tuple[Any, Any]:
    """The model of a checkpoint and its tokenizer, whose files, parents and base have been checked.

        model, tokenizer = align.load("my-run/ppo")
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)

    Args:
        target: a path, RUN or RUN/STAGE below `out`; a run stands for its last policy.
        out: folder of runs.
        base: folder of the base where it lies now, if it has moved.
        features: those of every row, for a method that reads them: a category, or numbers.

    Returns:
        A `PeftModel` where stock peft has the method and the adapter stands on the base itself; else, where the
        change is one of weights, a plain model with it folded in, in float32; both in eval mode. And the tokenizer,
        with the chat template that was trained with.

    Raises:
        UserError: there is none such, something does not fit its record, or no stock model computes the same.
    """
    opened = Opened.target(target, out, base, features)
    checkpoint, problems = opened.checkpoint, against(opened)
    opened.require_language_model("loading as a stock model")
    if problems[Form.peft] is None:
        model = opened.on_base(checkpoint.folder)
    elif problems[Form.merged] is None or opened.adapter.traits.owns_weights:
        model = opened.bases.folded(checkpoint, opened.load)
    else:
        raise UserError(
            f"no stock model computes what {checkpoint.label} ({checkpoint.method}) does",
            code="not_portable",
            hint="give features, which every row then has"
            if opened.adapter.traits.reads_features
            else f"talk to it with align chat {quote(str(checkpoint.folder))}",
        )
    take_out(model)
    return model.eval(), opened.tokenizer


def score(
    target: str,
    prompts: Sequence[str],
    replies: Sequence[str],
    out: str = "runs",
    base: str | None = None,
    features: Sequence[Any] | None = None,
) -> list[float]:
    """Rewards of replies to prompts, as chat and PPO count them.

        better, worse = align.score("my-run", ["say owl", "say owl"], ["The owl says hoot.", "No."])

    Args:
        target: a reward model, or a policy or run whose chain has one: a path, RUN or RUN/STAGE below `out`.
        prompts: user messages, one for each reply.
        replies: replies that the assistant ended.
        out: folder of runs.
        base: folder of the base where it lies now, if it has moved.
        features: those of each prompt, for a reward model whose method reads them.

    Returns:
        One number a reply, in standard deviations of the reward model's own scores around their mean.

    Raises:
        UserError: no reward model there, unequal counts, or an empty reply.
    """
    if len(prompts) != len(replies):
        raise UserError(f"{len(prompts)} prompts for {len(replies)} replies", code="bad_value")
    opened = Opened.target(target, out, base)
    judge = opened.checkpoint if opened.checkpoint.record["role"] == "reward" else judge_of(opened.checkpoint)
    if judge is None:
        raise UserError(f"the chain of {opened.checkpoint.label} has no reward model", code="no_reward_model")
    judge.require(opened.base_folder)
    role = opened.bases.realise(judge, "reward", Load(judge.load))
    renderer = opened.renderer
    given = [None] * len(prompts) if features is None else [given_features(one) for one in features]
    if len(given) != len(prompts):
        raise UserError(f"{len(prompts)} prompts for {len(given)} features", code="bad_value")
    for one in set(given):
        require_features([judge], one)
    pairs = [
        (with_features(renderer.prompt([Message("user", prompt)]), own), renderer.reply(reply))
        for prompt, reply, own in zip(prompts, replies, given, strict=True)
    ]
    return normalised(score_replies(role, pairs, 64), judge)

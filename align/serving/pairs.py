"""Pairs of replies for people to judge: prompts of a run answered by policies of its chain, the telling pairs first.

A label says most about a pair where the reward model is wrong or unsure. It is likely wrong where another measure
disagrees with it: how likely the reply is under the first of the compared policies. A reward that rises as that falls
is what over-optimised replies look like (Gao et al. 2023, arXiv 2210.10760).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch

from align.inference.generation import Sampling
from align.inference.scoring import mean_logprobs
from align.serving.conversation import Panel
from align.serving.labels import Answer, Pair, pair_key
from align.serving.options import LabelOptions, Split
from align.training.batching import seed_at
from data_prep.core.errors import UserError, unknown
from data_prep.core.progress import Progress
from data_prep.formats.message_lists import message_entry, spoken
from data_prep.options import DataOptions, LengthOptions
from data_prep.prepare.prepare import prepare
from data_prep.records.mixing import sources_for
from data_prep.records.stream import open_stream
from data_prep.types import PROMPT, Message, PromptTokens

_BATCH = 32
"""Prompts that are answered, and replies that are read, at a time."""


@dataclass
class Choice:
    """The pairs to judge, and what was left out on the way."""

    pairs: list[Pair]
    answered: int = 0
    unsayable: int = 0
    """Prompts with tools, or cut to fit: what the policies saw could not be shown or read again."""
    blank: int = 0
    same: int = 0
    candidates: int = 0

    @property
    def notice(self) -> str:
        """What to tell the labeller who waits."""
        left = {"the same twice": self.same, "a blank reply": self.blank, "prompts with tools or cut": self.unsayable}
        said = "".join(f", {count} {what}" for what, count in left.items() if count)
        return f"{self.answered} prompts answered: {self.candidates} pairs{said}; {len(self.pairs)} to judge"


def compared(panel: Panel, options: LabelOptions) -> list[str]:
    """The policies to compare: as asked, else the last two of the chain, or the only one twice.

    Raises:
        UserError: a name that the chain does not have, or a single one.
    """
    names = options.stages or (panel.names[-2:] if len(panel.names) > 1 else panel.names * 2)
    for name in names:
        if name not in panel.names:
            raise unknown("policy", name, panel.names)
    if len(names) < 2:
        hint = f"stages=[{names[0]},{names[0]}] compares two draws of it"
        raise UserError("two replies need two stages", field="stages", hint=hint, code="bad_value")
    return names


def choose_pairs(panel: Panel, data: DataOptions, run_seed: int, options: LabelOptions) -> Choice:
    """Answer prompts of the run, and choose the pairs to judge.

    Args:
        data: as the run recorded it.
        run_seed: of the run, which decided what its rows are.

    Raises:
        UserError: no such stages, no prompts on that side, or no two replies that differ.
    """
    names = compared(panel, options)
    panel.load(names)
    longest = min(options.max_new_tokens, *(panel.context(name) // 2 for name in names))
    asked, unsayable = _prompts(panel, data, run_seed, min(map(panel.context, names)) - longest, options)
    sampling = Sampling(longest, options.temperature or 1.0, greedy=options.temperature == 0)
    with Progress("answering", len(names) * len(asked), unit="replies") as progress:
        said = [
            list(_answers(panel, names, place, asked, sampling, options.seed, progress)) for place in range(len(names))
        ]
    choice = Choice([], len(asked), unsayable)
    found: dict[str, Pair] = {}
    for number, (prompt, _) in enumerate(asked):
        for left, right in combinations([one[number] for one in said], 2):
            if not (left.text.strip() and right.text.strip()):
                choice.blank += 1
            elif left.text.strip() == right.text.strip():
                choice.same += 1
            else:
                key = pair_key(prompt, left.text, right.text)
                found.setdefault(key, Pair(key, prompt, (left, right)))
    choice.candidates = len(found)
    choice.pairs = sorted(found.values(), key=lambda pair: pair.order)[: options.pairs]
    if not choice.pairs:
        hint = "raise temperature or prompts, or compare other stages"
        raise UserError(f"no two replies differ ({choice.notice})", field="stages", hint=hint, code="no_pairs")
    return choice


def _prompts(
    panel: Panel, data: DataOptions, run_seed: int, room: int, options: LabelOptions
) -> tuple[list[tuple[Any, list[int]]], int]:
    """Some prompts of the run, drawn by the seed, each as a label names it and as ids; and how many were unsayable.

    Raises:
        UserError: the run's data cannot be read, or has no prompts on that side.
    """
    prepared = prepare(PROMPT, data, panel.renderer, LengthOptions(max_length=max(2, room), max_lost=1.0), run_seed)
    rows: Sequence[PromptTokens] = prepared.eval if options.split is Split.eval else prepared.train
    if not len(rows):
        raise UserError("the run has no prompts on that side", field="split", code="no_prompts", hint="split=train")
    drawn = random.Random(options.seed).sample(range(len(rows)), min(options.prompts, len(rows)))
    chosen = {row.id: row.ids for row in (rows[place] for place in drawn)}
    asked: dict[str, tuple[Any, list[int]]] = {}
    for source in sources_for(data, PROMPT):
        for record in open_stream(source.given, PROMPT, run_seed):
            if record.id in chosen and not record.tools:
                messages = _with_system(record.messages, data.system)
                if panel.renderer.prompt(messages) == chosen[record.id]:
                    asked[record.id] = (as_column(messages), chosen[record.id])
    return [asked[name] for name in chosen if name in asked], len(chosen) - len(asked)


def _with_system(messages: tuple[Message, ...], system: str | None) -> tuple[Message, ...]:
    return (Message("system", system), *messages) if system and messages[0].role != "system" else messages


def as_column(messages: tuple[Message, ...]) -> Any:
    """A prompt as a label names it: the words of one question, or a list of messages."""
    question = spoken(messages, "user")
    return question[0] if question else [message_entry(message) for message in messages]


def _answers(
    panel: Panel,
    names: Sequence[str],
    place: int,
    asked: Sequence[tuple[Any, list[int]]],
    sampling: Sampling,
    seed: int,
    progress: Progress,
) -> Iterator[Answer]:
    """What the policy at a place of `names` says to every prompt, read by the reward model and the first policy."""
    name, reader = names[place], panel.engine(names[0]).role
    engine = panel.engine(name)
    generator = torch.Generator(device=engine.role.tree.device)
    for start in range(0, len(asked), _BATCH):
        generator.manual_seed(seed_at(seed, start, place))
        prompts = [ids for _, ids in asked[start : start + _BATCH]]
        ids = [reply.ids for reply in engine.generate(prompts, sampling, generator)]
        both = list(zip(prompts, ids, strict=True))
        rewards: Sequence[float | None] = panel.rewards(both) or [None] * len(both)
        for reply, reward, likelihood in zip(ids, rewards, mean_logprobs(reader, both, _BATCH), strict=True):
            yield Answer(panel.renderer.decode(reply), name, panel.digest(name), reward, likelihood)
        progress.advance(len(both))

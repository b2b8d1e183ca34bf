"""A conversation with the policies of a chain: what they see, what they say, and what the reward model thinks of it.

No input or output here: `terminal.py` and `web.py` show what `Panel.answer` yields. Every policy is a tree
on one base in memory; a policy sees its own earlier replies. Text becomes ids only through the renderer, as in
training, so that nothing typed or said can become a control token.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from align.checkpoints.checkpoint import Checkpoint
from align.checkpoints.compatibility import given_features, require_features
from align.checkpoints.lineage import chain_of, judge_of
from align.config.schema import Load
from align.inference.generation import Reply, RolloutEngine, Sampling
from align.inference.scoring import normalised, score_replies
from align.models.fingerprint import base_fingerprint, read_model_config
from align.models.location import model_folder
from align.models.quantised import own_load
from align.models.shared_base import BaseIdentity
from align.models.tokenizer import open_tokenizer
from align.models.virtual_tokens import lead_of
from align.roles import Bases, Role
from align.serving.options import ChatOptions, label_of
from data_prep.core.errors import UserError
from data_prep.rendering.renderer import Renderer
from data_prep.types import Features, Message, with_features


@dataclass(frozen=True)
class Said:
    """One model's reply. `reward` is in standard deviations of the reward model's own scores, None without one."""

    text: str
    finished: bool
    """Whether the model ended it itself, not the length limit or the reader."""
    tokens: int
    reward: float | None


@dataclass(frozen=True)
class Turn:
    """A message and what each model that was asked replied."""

    message: str
    replies: dict[str, Said]


@dataclass
class Conversation:
    """What has been said so far."""

    system: str | None = None
    turns: list[Turn] = field(default_factory=list)

    def messages(self, model: str, main: str, skipped: int = 0) -> list[Message]:
        """The conversation as `model` sees it, the oldest turns skipped.

        Its replies are its own; where it was not asked they are `main`'s, and else anyone's.
        """
        seen = [Message("system", self.system)] if self.system else []
        for turn in self.turns[skipped:]:
            said = turn.replies.get(model) or turn.replies.get(main) or next(iter(turn.replies.values()))
            seen += [Message("user", turn.message), Message("assistant", said.text)]
        return seen


@dataclass(frozen=True)
class Heard:
    """One more piece of a model's reply; the pieces joined are its text."""

    model: str
    text: str


@dataclass(frozen=True)
class Ended:
    """A model's whole reply."""

    model: str
    said: Said


@dataclass(frozen=True)
class Forgot:
    """So many of the oldest turns no longer fit the context, and were not shown to the model."""

    turns: int

    @property
    def notice(self) -> str:
        """What to tell the reader."""
        count = "the oldest turn is" if self.turns == 1 else f"the oldest {self.turns} turns are"
        return f"({count} left out: the conversation is longer than the context)"


Event = Heard | Ended | Forgot
_NO_LIMIT = 1 << 30
_CHUNK = 32
"""Replies that the reward model reads at a time."""


def context_of(tree: Any) -> int:
    """Most tokens that prompt and reply may have together on a tree; virtual tokens take their part of it."""
    limit = getattr(tree.config.get_text_config(), "max_position_embeddings", None) or _NO_LIMIT
    lead = lead_of(tree)
    return int(limit) - (lead.tokens if lead else 0)


class Speller(Protocol):
    """What makes text of a reply's ids."""

    @property
    def reply_edges(self) -> tuple[str, str]:
        """What stands before and after the text, and is no part of it."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text."""


class Growing:
    """The text of a reply whose tokens arrive one by one: pieces that never break a character or take a word back."""

    def __init__(self, renderer: Speller) -> None:
        self._renderer = renderer
        self.shown = ""

    def more(self, ids: Sequence[int], complete: bool = False) -> str:
        """What can be shown now and was not before. `complete` says that no more tokens will come."""
        text = self._renderer.decode(ids)
        stable = text if complete else self._stable(text)
        if not stable.startswith(self.shown):
            return ""  # a byte-wise decoder is in the middle of a character
        new = stable[len(self.shown) :]
        self.shown = stable
        return new

    def _stable(self, text: str) -> str:
        """The text without an end that more tokens may change: half a character or half of the template's words."""
        before, after = self._renderer.reply_edges
        text = text.rstrip("\ufffd")
        if before.startswith(text):
            return ""
        for size in range(min(len(after), len(text)), 0, -1):
            if after.startswith(text[-size:]):
                return text[:-size]
        return text


class Panel:
    """The policies of a checkpoint's lineage, base first, and the reward model of the chain.

    Args:
        checkpoint: the policy to talk to, or the folder of a plain model, which is a lineage of its own.
        options: only `reward` and `base` are read; how replies are drawn is said for each.

    Raises:
        UserError: files, parents, base, tokenizer or template do not fit.
    """

    def __init__(self, checkpoint: Checkpoint | Path, options: ChatOptions) -> None:
        from accelerate import Accelerator

        self.label = label_of(checkpoint)
        policy = checkpoint if isinstance(checkpoint, Checkpoint) else None
        folder = policy.base_folder(options.base) if policy else model_folder(self.label)
        judge = judge_of(policy) if policy and options.reward else None
        if policy is not None:
            policy = policy.require(folder, [str(policy.record["root"])])
        if judge is not None:
            judge.require(folder)
        self.judge = label_of(judge) if judge else None
        """RUN/STAGE of the reward model, if there is one."""
        self.renderer = Renderer(open_tokenizer(folder))
        identity = BaseIdentity(str(folder), None, base_fingerprint(folder))
        self.bases = Bases(folder, identity, Accelerator().device)
        self.chain = chain_of(policy)
        """The base and every policy of the lineage, by stage name."""
        self._own_load = own_load(read_model_config(folder))
        self._engines: dict[str, RolloutEngine] = {}
        self.judge_checkpoint = judge
        """The reward model itself."""
        self._judging: Role | None = None

    @property
    def names(self) -> list[str]:
        """Every policy of the lineage by stage name, base first."""
        return [name for name, _ in self.chain]

    @property
    def main(self) -> str:
        """The policy that TARGET names."""
        return self.names[-1]

    def context(self, name: str) -> int:
        """Most tokens that prompt and reply of a policy may have together; virtual tokens take their part of it."""
        return context_of(self.engine(name).role.tree)

    def engine(self, name: str) -> RolloutEngine:
        """The sampler of one policy, made when it is first asked."""
        if name not in self._engines:
            checkpoint = dict(self.chain)[name]
            if checkpoint is not None:
                role = self.bases.realise(checkpoint, name, self.load_of(checkpoint))
            else:
                role = Role(name, self.bases.root(self.load_of(None)).tree(), None).freeze()
            self._engines[name] = RolloutEngine(role, self.renderer.end_token_id)
        return self._engines[name]

    def load_of(self, checkpoint: Checkpoint | None) -> Load:
        """The precision that a policy of the lineage is opened at: its own, or the lowest recorded one's."""
        if checkpoint is not None and not checkpoint.foreign:
            return Load(checkpoint.load)
        recorded = [Load(one.load) for _, one in self.chain if one is not None and not one.foreign]
        return recorded[0] if recorded else self._own_load

    def load(self, names: Sequence[str]) -> None:
        """Bring policies and the reward model into memory, so that the first reply does not wait for them."""
        for name in names:
            self.engine(name)
        if self.judge_checkpoint is not None and self._judging is None:
            self._judging = self.bases.realise(self.judge_checkpoint, "reward", Load(self.judge_checkpoint.load))

    def digest(self, name: str) -> str:
        """What identifies a policy's weights: its checkpoint's digest, or the fingerprint of the base."""
        checkpoint = dict(self.chain)[name]
        return checkpoint.digest if checkpoint is not None else self.bases.identity.fingerprint

    def rewards(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float] | None:
        """Rewards of (prompt, reply) pairs by the chain's reward model, if it is loaded. Replies are never empty."""
        if self._judging is None or self.judge_checkpoint is None:
            return None
        return normalised(score_replies(self._judging, pairs, _CHUNK), self.judge_checkpoint)

    def check_system(self, text: str | None) -> None:
        """Refuse a system prompt that the chat template or the context cannot take."""
        self._prompt(Conversation(text), "", self.main, 1)

    def answer(
        self,
        talk: Conversation,
        message: str,
        names: Sequence[str],
        options: ChatOptions,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Generator[Event, None, None]:
        """Let the named policies reply to a message, one token each in turn; the turn is added when all have ended.

        `stopped` is asked after every token; what has been said until then is kept. If nothing has been said, or the
        iterator is closed early, nothing is added.

        Raises:
            UserError: the message is longer than the context, or the template refuses it; nothing is added.
        """
        prompts = {name: self._prompt(talk, message, name, options.max_new_tokens) for name in names}
        features = self._features(names, options)
        prompts = {name: (with_features(ids, features), skipped) for name, (ids, skipped) in prompts.items()}
        if forgotten := max(skipped for _, skipped in prompts.values()):
            yield Forgot(forgotten)
        self.load(names)
        seed = random.randrange(2**31) if options.seed is None else options.seed + len(talk.turns)
        said: dict[str, Said] = {}
        with ExitStack() as stack:
            live = {}
            for name in names:
                stream = self._stream(name, prompts[name][0], options, seed)
                live[name] = stack.enter_context(closing(_Voice(stream, self.renderer)))
            while live:
                for name, voice in list(live.items()):
                    piece = voice.next(stopped())
                    if piece:
                        yield Heard(name, piece)
                    if voice.over:
                        del live[name]
                        said[name] = self._judged(prompts[name][0], voice)
                        yield Ended(name, said[name])
        if any(reply.tokens for reply in said.values()):
            talk.turns.append(Turn(message, {name: said[name] for name in names}))

    def _features(self, names: Sequence[str], options: ChatOptions) -> Features | None:
        """The features that were asked for, where they are what the named policies and the reward model read."""
        features = None if options.features is None else given_features(options.features)
        asked = [one for one in (*(dict(self.chain)[name] for name in names), self.judge_checkpoint) if one is not None]
        require_features(asked, features)
        return features

    def _stream(self, name: str, prompt: list[int], options: ChatOptions, seed: int) -> Iterator[list[Reply]]:
        engine = self.engine(name)
        generator = torch.Generator(device=engine.role.tree.device).manual_seed(seed)
        longest = min(options.max_new_tokens, self.context(name) - len(prompt))
        sampling = Sampling(longest, options.temperature or 1.0, greedy=options.temperature == 0)
        return engine.stream([prompt], sampling, generator)

    def _prompt(self, talk: Conversation, message: str, model: str, reply_tokens: int) -> tuple[list[int], int]:
        """Ids of the conversation with a new message, and how many of the oldest turns had to be left out.

        Room for the reply is kept free: what was asked for, and at most half of the context.
        """
        if any(broken(one.content) for one in talk.messages(model, self.main)) or broken(message):
            raise UserError("the message holds half of a character", code="bad_text", hint="type it again")
        context = self.context(model)
        kept = min(reply_tokens, context // 2)
        for skipped in range(len(talk.turns) + 1):
            messages = [*talk.messages(model, self.main, skipped), Message("user", message)]
            ids = self.renderer.prompt(messages)
            if len(ids) + kept <= context:
                return ids, skipped
        system = " with the system prompt" if talk.system else ""
        raise UserError(
            f"message too long (got {len(ids)} tokens{system}; expected at most {context - kept}: "
            f"{kept} of the context of {context} are kept for the reply)",
            code="too_long",
            hint="it was not added; shorten it",
        )

    def _judged(self, prompt: list[int], voice: _Voice) -> Said:
        """A reply that has ended, with its reward."""
        reply = voice.reply
        rewards = self.rewards([(prompt, reply.ids)]) if reply.ids else None
        return Said(self.renderer.decode(reply.ids), reply.finished, len(reply.ids), rewards[0] if rewards else None)


def broken(text: str) -> bool:
    """Whether a text holds surrogates, which are no characters and which no tokenizer takes."""
    return any("\ud800" <= char <= "\udfff" for char in text)


class _Voice:
    """One policy's reply while it is being said."""

    def __init__(self, stream: Iterator[list[Reply]], renderer: Renderer) -> None:
        self.reply = Reply()
        self.over = False
        self._stream: Any = stream
        self._growing = Growing(renderer)

    def next(self, stop: bool) -> str:
        """Sample one more token, or end; returns what can be shown now."""
        grown = None if stop else next(self._stream, None)
        if grown is None:
            self.over = True
        else:
            self.reply = grown[0]
        return self._growing.more(self.reply.ids, complete=self.over)

    def close(self) -> None:
        """Sample no more."""
        self._stream.close()

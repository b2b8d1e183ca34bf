"""Replies in OpenAI's form: the text of growing rows, whole answers and the events of a stream."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from align.inference.open_batch import Row
from align.serving.conversation import Growing, Speller
from align.serving.openai_request import Asked, ChatRequest
from align.serving.served import Served


@dataclass(frozen=True)
class Plain:
    """Text of ids as it is, without a template."""

    tokenizer: Any
    ends: frozenset[int] = frozenset()
    """Ids that are no text at the end."""
    reply_edges: tuple[str, str] = ("", "")

    def decode(self, ids: Sequence[int]) -> str:
        """The text, special tokens included."""
        told = ids[:-1] if self.ends & set(ids[-1:]) else ids
        return str(self.tokenizer.decode(told, skip_special_tokens=False, clean_up_tokenization_spaces=False))


class Spoken:
    """What one row has said so far, cut where the first stop text begins."""

    def __init__(self, row: Row, speller: Speller, stops: tuple[str, ...], piecewise: bool) -> None:
        self.row = row
        self.text = ""
        self.tokens = 0
        """How many of the row's tokens were needed for the text."""
        self.reason: str | None = None
        """Why it is over: stop or length."""
        self.cut = False
        """Whether a stop text ended it."""
        self.told = 0
        """How many tokens the events of a stream have told of."""
        self._growing = Growing(speller)
        self._stops = stops
        self._piecewise = piecewise or bool(stops)

    @property
    def ids(self) -> list[int]:
        """The tokens of the text, without the one that ended the row."""
        ids = self.row.reply.ids[: self.tokens]
        return ids[:-1] if ids and ids[-1] in self.row.sampling.ends else ids

    def more(self) -> str:
        """What can be told now and was not before."""
        if self.reason is not None or not (self._piecewise or self.row.over):
            return ""
        over = self.row.over  # read before the ids: what it says is true of them
        known, told = len(self.row.reply.ids), len(self.text)
        while self.reason is None and (self.tokens < known or over):
            self.tokens = min(self.tokens + 1, known) if self._stops else known
            self._grow(self.tokens == known and over)
        return self.text[told:]

    def _grow(self, complete: bool) -> None:
        """Take the next tokens into the text."""
        self._growing.more(self.row.reply.ids[: self.tokens], complete)
        seen = self._growing.shown
        ends = [place for stop in self._stops if (place := seen.find(stop)) >= 0]
        if ends:
            self.text, self.reason = seen[: min(ends)], "stop"
            self.cut = self.row.left = True
        else:
            self.text = seen if complete else seen[: len(seen) - self._open_stop(seen)]
            if complete:
                self.reason = "stop" if self.row.reply.finished else "length"

    def _open_stop(self, seen: str) -> int:
        """How many of the last characters may be the beginning of a stop text."""
        sizes = (size for stop in self._stops for size in range(1, len(stop)) if seen.endswith(stop[:size]))
        return max(sizes, default=0)


@dataclass
class Wording:
    """The JSON of one request's answer."""

    asked: Asked
    served: Served
    id: str
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def chat(self) -> bool:
        """Whether the answer is a chat's, or a plain text's."""
        return isinstance(self.asked.request, ChatRequest)

    def spoken(self) -> list[Spoken]:
        """A reader of every row."""
        renderer = self.served.renderer
        stops, stream = self.asked.stops, self.asked.request.stream
        plain = [Plain(renderer.tokenizer, row.sampling.ends) for row in self.asked.rows]
        spellers: Sequence[Speller] = [renderer] * len(plain) if self.chat else plain
        return [Spoken(row, each, stops, stream) for row, each in zip(self.asked.rows, spellers, strict=True)]

    def whole(self, chosen: Sequence[Spoken], drawn: Sequence[Spoken], rewards: Sequence[float]) -> dict[str, Any]:
        """The whole answer: the chosen replies of all that were drawn, and their rewards if these were asked for."""
        choices = []
        for number, one in enumerate(chosen):
            said = {"message": {"role": "assistant", "content": one.text}} if self.chat else {"text": one.text}
            choices.append({"index": number, **said, "logprobs": self._logprobs(one), "finish_reason": one.reason})
        return {
            **self._head("chat.completion" if self.chat else "text_completion"),
            "choices": [choice | self._rewarded(rewards[i : i + 1]) for i, choice in enumerate(choices)],
            "usage": self.usage(drawn),
            **self._rewarded(rewards),
        }

    def opening(self, number: int) -> dict[str, Any]:
        """The first event of a chat's reply."""
        return self._event({"index": number, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})

    def event(self, number: int, one: Spoken, piece: str, rewards: Sequence[float]) -> dict[str, Any]:
        """One event of a stream: a piece of a reply, or its end."""
        said = {"delta": {"content": piece} if piece else {}} if self.chat else {"text": piece}
        choice = {"index": number, **said, "logprobs": self._logprobs(one, one.told), "finish_reason": one.reason}
        one.told = len(one.ids)
        return self._event(choice | self._rewarded(rewards))

    def usage_event(self, drawn: Sequence[Spoken]) -> dict[str, Any]:
        """The last event of a stream that was asked for its usage."""
        return {**self._event(), "usage": self.usage(drawn)}

    def _event(self, *choices: dict[str, Any]) -> dict[str, Any]:
        return {**self._head("chat.completion.chunk" if self.chat else "text_completion"), "choices": list(choices)}

    def scored(self, one: Spoken) -> list[int]:
        """A reply as its reward model reads it: as it was drawn, or what a stop text has left of it."""
        return self.served.renderer.reply(one.text) if one.cut and self.chat else one.row.reply.ids[: one.tokens]

    def usage(self, drawn: Sequence[Spoken]) -> dict[str, int]:
        """Tokens read, each prompt once, and drawn."""
        prompt = sum(len(one.row.prompt) for one in drawn[:: self.asked.each])
        completion = sum(one.tokens for one in drawn)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def _head(self, kind: str) -> dict[str, Any]:
        name = "chatcmpl" if self.chat else "cmpl"
        return {"id": f"{name}-{self.id}", "object": kind, "created": self.created, "model": self.asked.request.model}

    def _rewarded(self, rewards: Sequence[float]) -> dict[str, Any]:
        """The first of some rewards, where there are any."""
        return {"align": {"reward": rewards[0]}} if rewards else {}

    # ------------------------------------------------------------------------------------------------ log-probabilities
    def _logprobs(self, one: Spoken, start: int = 0) -> dict[str, Any] | None:
        """Of the tokens from `start` on, where they are wanted."""
        if one.row.sampling.logprobs is None:
            return None
        ids = one.ids
        own = list(zip(ids, one.row.reply.logprobs, strict=False))[start:]
        top = one.row.likeliest[start : len(ids)]
        if self.chat:
            told = [
                {**self._token(*pair), "top_logprobs": [self._token(*each) for each in likeliest]}
                for pair, likeliest in zip(own, top, strict=True)
            ]
            return {"content": told}
        words = [self._word(token) for token in ids]
        return {
            "tokens": words[start:],
            "token_logprobs": [logprob for _, logprob in own],
            "top_logprobs": [{self._word(token): logprob for token, logprob in each} for each in top],
            "text_offset": [sum(map(len, words[:place])) for place in range(start, len(words))],
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        word = self._word(token)
        return {"token": word, "logprob": logprob, "bytes": list(word.encode())}

    def _word(self, token: int) -> str:
        return Plain(self.served.renderer.tokenizer).decode([token])

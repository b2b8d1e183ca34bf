"""Requests in OpenAI's form: read, checked, and turned into rows for the engine; the rest is refused by name."""

# No `from __future__ import annotations`: `data_prep/core/options.py` reads these annotations as types, as elsewhere.
import json
import random
from dataclasses import dataclass
from typing import Any, Optional, TypeVar

import torch

from align.checkpoints.compatibility import given_features, require_features
from align.inference.generation import streams_of
from align.inference.open_batch import Row, RowSampling
from align.serving.options import ServeOptions
from align.serving.served import Model, Served
from data_prep.core.errors import UserError
from data_prep.core.options import build, convert, listing, option
from data_prep.formats.message_lists import OPENAI_ROLES, parse_messages, parse_tools
from data_prep.sources.rows import Row as DataRow
from data_prep.types import with_features

COLDEST = 1e-4
"""Lower temperatures are 0: logits over them would overflow."""
MOST_STOPS = 16
MOST_LIKELIEST = 20
_SAYS_NOTHING = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
"""Fields that have nothing to do with the reply."""
_AS_IT_IS: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "suffix": ("",),
    "echo": (False,),
    "tool_choice": ("auto", "none"),
    "parallel_tool_calls": (True, False),
}
"""Fields that are taken where they ask for nothing, and refused by name elsewhere."""


@dataclass(frozen=True)
class StreamOptions:
    """How a stream is told."""

    include_usage: bool = option(False, "a last event with the number of tokens")


@dataclass(frozen=True)
class Extras:
    """What only this server does."""

    reward: bool = option(False, "add the reward of every reply")


@dataclass
class Request:
    """What both kinds of requests have in common."""

    model: str = option("", "whose replies")
    max_tokens: Optional[int] = option(None, "longest reply in tokens", low=1)
    temperature: Optional[float] = option(None, "0: always the likeliest token", high=100)
    top_p: float = option(1.0, "share of the probability to draw from", above=0, high=1)
    n: int = option(1, "replies to give", low=1)
    best_of: Optional[int] = option(None, "replies to draw, of which the reward model takes the best n", low=1)
    seed: Optional[int] = option(None, "repeats replies", low=-(2**63), high=2**63 - 1)
    stop: Any = option(None, "texts that end a reply and are no part of it")
    stream: bool = option(False, "send the reply as it grows")
    stream_options: StreamOptions = option(StreamOptions(), "how a stream is told")
    features: Any = option(None, "features of the prompts, for a method that reads them: a category, or numbers")
    align: Extras = option(Extras(), "what only this server does")

    def likeliest(self) -> int | None:
        """Of how many of the likeliest tokens log-probabilities are wanted; None: of none, and not the token's own."""
        raise NotImplementedError

    def prompts(self, served: Served) -> list[list[int]]:
        """Ids of what to go on from."""
        raise NotImplementedError

    def ends(self, served: Served) -> frozenset[int]:
        """Ids that end a reply."""
        raise NotImplementedError


@dataclass
class ChatRequest(Request):
    """A body of /v1/chat/completions."""

    messages: list[dict[str, Any]] = listing("the conversation")
    max_completion_tokens: Optional[int] = option(None, "another name of max_tokens", low=1)
    logprobs: bool = option(False, "log-probabilities of the tokens")
    top_logprobs: Optional[int] = option(None, "and of so many of the likeliest ones", high=MOST_LIKELIEST)
    tools: list[dict[str, Any]] = listing("tools, for templates that print them")

    def __post_init__(self) -> None:
        self.max_tokens = self.max_completion_tokens or self.max_tokens

    def likeliest(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise UserError("top_logprobs needs logprobs: true", field="top_logprobs", code="bad_value")
        return (self.top_logprobs or 0) if self.logprobs else None

    def prompts(self, served: Served) -> list[list[int]]:
        row = DataRow("", 0, {"tools": self.tools})
        try:
            messages = parse_messages(row, "messages", self.messages, OPENAI_ROLES)
            return [served.renderer.prompt(messages, parse_tools(row, "tools"))]
        except UserError as problem:
            raise UserError(problem.message, field=problem.field or "messages", code=problem.code) from None

    def ends(self, served: Served) -> frozenset[int]:
        return frozenset({served.renderer.end_token_id})


@dataclass
class CompletionRequest(Request):
    """A body of /v1/completions: plain text to go on from, without a template."""

    prompt: Any = option("", "a text, its ids, or a list of either")
    logprobs: Optional[int] = option(None, "log-probabilities of so many of the likeliest tokens", high=5)

    def likeliest(self) -> int | None:
        return self.logprobs

    def prompts(self, served: Served) -> list[list[int]]:
        given = self.prompt
        many = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
        size = served.vocabulary
        found = []
        for number, one in enumerate(many):
            where = f"prompt[{number}]" if many is given else "prompt"
            if isinstance(one, str):
                found += served.renderer.beginnings([one])
            else:
                ids = convert(list[int], one, where)
                if any(not 0 <= token < size for token in ids):
                    raise UserError(f"ids are 0 to {size - 1}", field=where, code="bad_value")
                found.append(ids)
            if not found[-1]:
                raise UserError("empty: there is nothing to go on from", field=where, code="bad_value")
        return found

    def ends(self, served: Served) -> frozenset[int]:
        eos = served.renderer.tokenizer.eos_token_id
        return frozenset({served.renderer.end_token_id} | ({int(eos)} if eos is not None else set()))


R = TypeVar("R", bound=Request)


def read_request(kind: type[R], body: bytes) -> R:
    """A request's body, its types and sizes checked.

    Raises:
        UserError: not JSON, an unknown field, a wrong type or a number out of range.
    """
    try:
        content = json.loads(body)
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError("the body holds half of a character", code="bad_text") from None
    except (ValueError, RecursionError):
        raise UserError("the body is not JSON", code="bad_json") from None
    if not isinstance(content, dict):
        raise UserError("the body is no JSON object", code="bad_json")
    given = {}
    for name, value in content.items():
        if value is None or name in _SAYS_NOTHING:
            continue
        if name in _AS_IT_IS:
            if value not in _AS_IT_IS[name]:
                raise UserError("cannot be asked for here", field=name, code="unsupported", hint="leave it out")
            continue
        given[name] = value
    return build(kind, given, "")


@dataclass(frozen=True)
class Asked:
    """A request that can be answered."""

    request: Request
    model: Model
    rows: list[Row]
    """best_of rows for each prompt, one prompt after the other."""
    each: int
    """Rows of a prompt."""
    stops: tuple[str, ...]


def asked(request: Request, served: Served, options: ServeOptions) -> Asked:
    """The rows that answer a request.

    Raises:
        UserError: an unknown model, too many rows, a prompt that does not fit, or what the chain cannot do.
    """
    if not request.model:
        raise UserError("names no model", field="model", code="bad_value", hint=f"choose from: {_listed(served)}")
    model = served.find(request.model)
    each = request.best_of or request.n
    if each < request.n:
        raise UserError(f"less than n (got {each}; n is {request.n})", field="best_of", code="bad_value")
    if request.best_of and request.stream:
        raise UserError("the best is known at the end: it cannot be streamed", field="stream", code="unsupported")
    if (request.best_of or request.align.reward) and model.judge is None:
        field = "best_of" if request.best_of else "align.reward"
        raise UserError(f"{model.name} has no reward model here", field=field, code="no_reward_model")
    features = None if request.features is None else given_features(request.features)
    judged = bool(request.best_of or request.align.reward or features is not None)
    require_features([one for one in model.roles if judged or one.role == "policy"], features)
    prompts = [with_features(ids, features) for ids in request.prompts(served)]
    if len(prompts) * each > options.max_rows:
        raise UserError(
            f"asks for {len(prompts) * each} replies, at most {options.max_rows} may be asked for at once",
            field="best_of" if request.best_of else "n",
            code="too_many",
        )
    stops = _stops(request.stop)
    rows = [row for number, ids in enumerate(prompts) for row in _rows(request, served, model, options, ids, each)]
    return Asked(request, model, rows, each, stops)


def _rows(
    request: Request, served: Served, model: Model, options: ServeOptions, prompt: list[int], each: int
) -> list[Row]:
    """The rows that go on from one prompt."""
    room = model.context - len(prompt)
    longest = request.max_tokens or min(options.max_new_tokens, max(room, 1))
    if longest > room:
        raise UserError(
            f"the prompt has {len(prompt)} tokens and the reply may have {longest}: "
            f"together more than the context of {model.context}",
            field="max_tokens" if room > 0 else "messages",
            code="context_length_exceeded",
            hint="shorten one of them",
        )
    temperature = options.temperature if request.temperature is None else request.temperature
    sampling = RowSampling(
        longest,
        request.ends(served),
        temperature if temperature >= COLDEST else 0.0,
        request.top_p,
        request.likeliest(),
    )
    seed = random.randrange(2**31) if request.seed is None else request.seed
    generator = torch.Generator(device=served.bases.device).manual_seed(seed)
    return [Row(prompt, sampling, stream, model.adapter) for stream in streams_of(each, generator)]


def _stops(value: Any) -> tuple[str, ...]:
    given = [value] if isinstance(value, str) else value
    texts = convert(list[str], [] if given is None else given, "stop")
    if len(texts) > MOST_STOPS or not all(texts):
        raise UserError(f"expected at most {MOST_STOPS} texts, none empty", field="stop", code="bad_value")
    return tuple(texts)


def _listed(served: Served) -> str:
    return ", ".join(served.models)

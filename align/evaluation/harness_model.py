"""A role as lm-evaluation-harness asks models: log-likelihoods of texts, and greedy replies up to stop words.

The tokens that are read, and what is cut where a text is too long, are those of the library's own `HFLM`, so that a
number here is one of its numbers. What differs is how they are computed: on the role itself, whatever its method, with
no export; rows are packed without padding, a context that several continuations share is read once, and a reply that
has met its stop word leaves the batch. Replies also end with the chat template's end token.

Shape suffixes: M tokens whose probabilities are asked for, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from align.inference.open_batch import OpenBatch, Row, RowSampling
from align.models.packing import pack_branches
from align.roles import CHUNK_ELEMENTS, Role
from data_prep.core.errors import UserError
from data_prep.rendering.renderer import Renderer

Family = tuple[tuple[int, ...], list[int]]
"""A context, and the places of the requests that continue it."""
Divide = Callable[[Sequence[Any], Callable[[Any], Any]], list[Any]]
"""What is made of every part, in order; the processes of a run divide the parts."""
REPLY_TOKENS = 256
"""Longest reply where a task names no length."""


class RoleModel(TemplateLM):  # type: ignore[misc]
    """A role under the interface of the library.

    Args:
        role: a frozen policy.
        room: longest row in tokens beside the role's virtual ones.
        batch_size: most requests of a pass.
        divide: gives parts to the processes of the run.
    """

    def __init__(self, role: Role, renderer: Renderer, room: int, batch_size: int, divide: Divide) -> None:
        super().__init__()
        self.tokenizer = renderer.tokenizer
        self._role, self._room, self._batch_size, self._divide = role, room, batch_size, divide
        self._ends = frozenset({renderer.end_token_id, self.eot_token_id} - {None})

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self.tokenizer.eos_token_id  # type: ignore[no-any-return]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        """What the library keys its cache of requests by, which is not used here."""
        return str(self.tokenizer.name_or_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text; special tokens are added as the tokenizer does, and never a second time."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Turns as one text; without a generation prompt the last turn is left open."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether greedy decoding gives it) of every (context, continuation)."""
        return super().loglikelihood(requests, disable_tqdm=True)  # type: ignore[no-any-return]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Log-probability of whole texts, each token behind as much of what precedes it as the model takes."""
        owners: list[int] = []
        windows: list[tuple[None, list[int], list[int]]] = []
        for number, request in enumerate(requests):
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._room,
                context_len=1,
            ):
                owners.append(number)
                windows.append((None, *make_disjoint_window(window)))
        totals = [0.0] * len(requests)
        for number, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += value
        return totals

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        pairs = [self._cut(context, continuation) for _, context, continuation in requests]
        batches = list(_batches(pairs, self._batch_size))

        def read(batch: list[Family]) -> list[tuple[float, bool]]:
            return _read(self._role, [(context, [pairs[at][1] for at in places]) for context, places in batch])

        found: dict[int, tuple[float, bool]] = {}
        for batch, values in zip(batches, self._divide(batches, read), strict=True):
            found.update(zip((at for _, places in batch for at in places), values, strict=True))
        return [found[at] for at in range(len(pairs))]

    def _cut(self, context: list[int], continuation: list[int]) -> tuple[tuple[int, ...], list[int]]:
        """The end of a row that the model takes: its last token is only predicted.

        Raises:
            UserError: the continuation alone is too long.
        """
        if len(continuation) > self._room:
            raise UserError(
                f"a task has a continuation of {len(continuation)} tokens, and the model takes {self._room}",
                code="too_long",
            )
        kept = self._room + 1 - len(continuation)
        return tuple(context[-kept:]), continuation

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Greedy replies, each without its stop word and what follows it.

        Raises:
            UserError: a task asks for samples, or for longer replies than the model has room for.
        """
        end = self.tokenizer.decode(self.eot_token_id)
        asked = [(at, *request.args) for at, request in enumerate(requests)]
        rows = sorted(((at, self._row_of(context, settings, end)) for at, context, settings in asked), key=_longest)
        size = self._batch_size
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        found: dict[int, str] = {}
        for batch, texts in zip(batches, self._divide(batches, self._replies), strict=True):
            found.update(zip((at for at, _ in batch), texts, strict=True))
        return [found[at] for at in range(len(requests))]

    def _row_of(self, context: str, settings: dict[str, Any], end: str) -> tuple[list[int], int, list[str]]:
        """(prompt, most new tokens, stop words) of a request."""
        wanted = normalize_gen_kwargs(settings, REPLY_TOKENS)
        if wanted["do_sample"]:
            raise UserError(
                "a task asks for samples, and replies to tasks are greedy here",
                code="task_samples",
                hint="leave the task out, or copy it with do_sample: false",
            )
        longest = int(wanted["max_gen_toks"])
        if longest >= self._room:
            raise UserError(
                f"a task asks for replies of {longest} tokens, and the model has room for {self._room} with the prompt",
                code="too_long",
                hint="leave the task out, or copy it with a smaller max_gen_toks",
            )
        stops = handle_stop_sequences(wanted["until"], eos=end)
        return self.tok_encode(context)[-(self._room - longest) :], longest, stops

    def _replies(self, batch: list[tuple[int, tuple[list[int], int, list[str]]]]) -> list[str]:
        """The texts of replies that grow together."""
        growing: list[tuple[Row, list[str]]] = []
        for _, (prompt, longest, stops) in batch:
            row = Row(prompt, RowSampling(longest, self._ends, temperature=0.0), np.random.default_rng(0))
            row.grew = _watch(row, stops, self._text)
            growing.append((row, stops))
        work = OpenBatch(self._role)
        work.admit([row for row, _ in growing])
        while work.rows:
            work.step()
        for row, _ in growing:
            if row.problem is not None:
                raise row.problem
        return [postprocess_generated_text(self._text(row.reply.ids), stops, None) for row, stops in growing]

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def _longest(row: tuple[int, tuple[list[int], int, list[str]]]) -> tuple[int, int]:
    return -len(row[1][0]), row[0]


def _watch(row: Row, stops: Sequence[str], text: Callable[[Sequence[int]], str]) -> Callable[[], None]:
    """Ends a row once a stop word stands in its text; a token is a byte or more of it, or one that is not shown."""
    tail = 8 + 2 * max((len(stop.encode()) for stop in stops), default=0)

    def grew() -> None:
        said = text(row.reply.ids[-tail:])
        row.left = any(stop in said for stop in stops if stop)

    return grew


def _batches(pairs: Sequence[tuple[tuple[int, ...], list[int]]], size: int) -> Iterator[list[Family]]:
    """Requests of one context together, the longest first, so many requests at a time."""
    families: dict[tuple[int, ...], list[int]] = {}
    for at, (context, _) in enumerate(pairs):
        families.setdefault(context, []).append(at)
    longest = {context: max(len(pairs[at][1]) for at in places) for context, places in families.items()}
    batch: list[Family] = []
    room = size
    for context in sorted(families, key=lambda one: -len(one) - longest[one]):
        places = families[context]
        while places:
            batch.append((context, places[:room]))
            room, places = room - len(places[:room]), places[room:]
            if room == 0:
                yield batch
                batch, room = [], size
    if batch:
        yield batch


@torch.no_grad()
def _read(role: Role, families: Sequence[tuple[tuple[int, ...], list[list[int]]]]) -> list[tuple[float, bool]]:
    """(log-probability, greedy) of every continuation behind its context; a context is read once."""
    branches = [[one[:-1] for one in ours if len(one) > 1] or [[]] for _, ours in families]
    packed = pack_branches([context for context, _ in families], branches).to(role.tree.device)
    sources: list[int] = []
    targets: list[int] = []
    at = 0
    for context, continuations in families:
        last = at + len(context) - 1
        at += len(context)
        for continuation in continuations:
            sources += [last, *range(at, at + len(continuation) - 1)][: len(continuation)]
            targets += continuation
            at += max(0, len(continuation) - 1)
    hidden_MD = role.hidden(packed)[torch.tensor(sources, dtype=torch.long, device=role.tree.device)]
    logprobs, greedy = _judged(role, hidden_MD, torch.tensor(targets, dtype=torch.long, device=role.tree.device))
    found, start = [], 0
    for continuation in [one for _, ours in families for one in ours]:
        end = start + len(continuation)
        found.append((float(logprobs[start:end].sum()), bool(greedy[start:end].all())))
        start = end
    return found


def _judged(role: Role, hidden_MD: Tensor, target_M: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [M] of the targets in float32, and whether each is the likeliest token [M]."""
    rows = max(1, CHUNK_ELEMENTS // role.tree.config.get_text_config().vocab_size)
    logprobs, greedy = [hidden_MD.new_zeros(0, dtype=torch.float32)], [target_M.new_zeros(0, dtype=torch.bool)]
    for start in range(0, len(target_M), rows):
        part_M = target_M[start : start + rows]
        logprob_MV = role.logits(hidden_MD[start : start + rows]).float().log_softmax(-1)
        logprobs.append(logprob_MV.gather(1, part_M[:, None])[:, 0])
        greedy.append(logprob_MV.argmax(-1) == part_M)
    return torch.cat(logprobs), torch.cat(greedy)

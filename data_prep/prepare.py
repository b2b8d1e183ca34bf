"""From data options to token ids: sources -> formats -> filtering -> splitting -> rendering, with a data card.

Every row that goes in comes out kept or dropped for a named reason; the sum is asserted. Rendering is Renderer's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from data_prep.card import histogram, samples
from data_prep.digests import sha256_json, template_digest, tokenizer_digest
from data_prep.errors import UserError, at_row
from data_prep.filtering import SHOWN, Tally, check_long
from data_prep.formats.base import CONVERSATION, DOCUMENT, PREFERENCE, PROMPT, UNPAIRED
from data_prep.options import DataOptions, LengthOptions, TrainOn
from data_prep.quality.overlap import check_overlap
from data_prep.quality.pairs import pair_numbers
from data_prep.reading import VERSION, Given, data_digest, read_records, source_for, source_rows
from data_prep.rendering import Renderer
from data_prep.shortening import Shortener, TooLong, length_of, messages_of
from data_prep.splitting import Candidate, choose_sides, in_order, prompt_key
from data_prep.types import (
    Conversation,
    Document,
    Labelled,
    LabelledTokens,
    Message,
    PairTokens,
    Preference,
    Prompt,
    PromptTokens,
    Tokens,
)

__all__ = [
    "Prepared",
    "Renderer",
    "data_digest",
    "prepare_conversations",
    "prepare_preferences",
    "prepare_prompts",
    "prepare_text",
    "prepare_unpaired",
    "source_rows",
    "template_digest",
    "tokenizer_digest",
]
T = TypeVar("T", Tokens, PairTokens, LabelledTokens, PromptTokens)
R = TypeVar("R", Conversation, Preference, Labelled, Prompt)


@dataclass
class Prepared(Generic[T]):
    """Rendered rows, the data card, and the digest of everything that decides them (texts, tokenizer, template).

    Training rows stand in the order of their source; evaluation rows in the order of a hash of their question, so
    that the first n of them are a fair sample of all.
    """

    train: list[T]
    eval: list[T]
    card: dict[str, Any]
    digest: str


@dataclass
class _Rendered(Generic[T]):
    """Rows of one kind on their way: (row, side), and what was lost."""

    tally: Tally
    rule: str = ""
    kept: list[tuple[T, str]] = field(default_factory=list)
    long: list[TooLong] = field(default_factory=list)
    cut: dict[str, None] = field(default_factory=dict)
    overlap: dict[str, Any] = field(default_factory=dict)


def prepare_conversations(data: DataOptions, renderer: Renderer, length: LengthOptions, seed: int) -> Prepared[Tokens]:
    """Conversations as ids with a mask of the assistant's words.

    Raises:
        UserError: bad rows, too many over-long rows, or nothing left.
    """
    given = source_for(data, CONVERSATION)
    records, tally, about = read_records(given, CONVERSATION, seed)
    rows: list[Conversation] = [_with_system(row, data.system) for row in records]
    if data.train_on is TrainOn.last:
        rows = [_last_turn_alone(row) for row in rows]
    result = _render(given, rows, tally, Shortener(renderer, length), renderer.conversations)
    for tokens, _ in result.kept:
        if not any(tokens.mask[1:]):
            nothing = UserError("nothing to train on (no supervised token)", code="no_reply")
            result.tally.bad(at_row(tokens.id, nothing))
    result.kept = [(tokens, side) for tokens, side in result.kept if any(tokens.mask[1:])]
    return _finish(given, result, renderer, length, about)


def prepare_preferences(
    data: DataOptions, renderer: Renderer, length: LengthOptions, seed: int
) -> Prepared[PairTokens]:
    """Preferences as prompt ids and two replies; the longer of both sides counts for `max_length`.

    Raises:
        UserError: bad rows (identical sides too), too many over-long rows, or nothing left.
    """
    given = source_for(data, PREFERENCE)
    records, tally, about = read_records(given, PREFERENCE, seed)
    rows: list[Preference] = [_with_system(row, data.system) for row in records]
    about["pairs"] = pair_numbers(rows)
    noisy = {row.id for row in rows if row.meta.get("flip")}
    result = _render(given, rows, tally, Shortener(renderer, length), renderer.pairs)
    kept, flipped = [], 0
    for pair, side in result.kept:
        if pair.chosen == pair.rejected:
            how = "truncation" if pair.id in result.cut else "rendering"
            same = UserError(f"chosen and rejected are the same after {how}", code="identical_pair")
            result.tally.bad(at_row(pair.id, same))
            continue
        if side == "train" and pair.id in noisy:
            flipped += 1
            margin = None if pair.margin is None else -pair.margin
            pair = replace(pair, chosen=pair.rejected, rejected=pair.chosen, margin=margin)
        kept.append((pair, side))
    result.kept = kept
    if noisy:
        about["notes"]["training labels flipped on purpose (noise)"] = flipped
    return _finish(given, result, renderer, length, about)


def prepare_unpaired(
    data: DataOptions, renderer: Renderer, length: LengthOptions, seed: int
) -> Prepared[LabelledTokens]:
    """Labelled replies (of `data.preferences`) as prompt ids and reply ids.

    Raises:
        UserError: bad rows, too many over-long rows, or nothing left.
    """
    given = source_for(data, UNPAIRED)
    records, tally, about = read_records(given, UNPAIRED, seed)
    rows: list[Labelled] = [_with_system(row, data.system) for row in records]
    result = _render(given, rows, tally, Shortener(renderer, length), renderer.labelled)
    return _finish(given, result, renderer, length, about)


def prepare_prompts(data: DataOptions, renderer: Renderer, length: LengthOptions, seed: int) -> Prepared[PromptTokens]:
    """Prompts with the generation prompt; repeated ones are dropped and counted.

    Falls back on the prompts of the conversations, then of the preferences, when no prompts are given.

    Raises:
        UserError: bad rows, too many over-long rows, or nothing left.
    """
    given = source_for(data, PROMPT)
    records, tally, about = read_records(given, PROMPT, seed)
    rows: list[Prompt] = []
    seen: set[str] = set()
    for record in records:
        row = _with_system(record, data.system)
        key = repr([row.messages, row.tools, row.meta.get("split")])
        if key in seen:
            tally.dropped["duplicate_prompt"] += 1
            continue
        seen.add(key)
        rows.append(row)
    result = _render(given, rows, tally, Shortener(renderer, length), renderer.prompts)
    return _finish(given, result, renderer, length, about)


def prepare_text(data: DataOptions, renderer: Renderer, length: LengthOptions, seed: int) -> Prepared[Tokens]:
    """Documents as ids, every token supervised; documents longer than `max_length` are cut into pieces, counted.

    Raises:
        UserError: bad rows or nothing left.
    """
    given = source_for(data, DOCUMENT)
    records, tally, about = read_records(given, DOCUMENT, seed)
    documents: list[Document] = list(records)
    encoded = renderer.documents([row.text for row in documents])
    weights = [-(-len(ids) // length.max_length) for ids in encoded]
    wishes = [
        Candidate(row.text.strip(), row.meta.get("split"), weight)
        for row, weight in zip(documents, weights, strict=True)
    ]
    result: _Rendered[Tokens] = _Rendered(tally)
    sides = _sides(given, documents, wishes, result)
    cut = 0
    for place in in_order(wishes, sides):
        row, side, ids = documents[place], sides[place], encoded[place]
        if side not in ("train", "eval"):
            continue
        starts = range(0, len(ids), length.max_length)
        cut += len(starts) > 1
        for start in starts:
            part = ids[start : start + length.max_length]
            identity = row.id if len(starts) == 1 else f"{row.id}#{start}"
            if len(part) > 1:
                result.kept.append((Tokens(part, [True] * len(part), identity), side))
            else:
                tally.dropped["one_token_piece"] += 1
            tally.seen += 1
        tally.seen -= 1
    about["notes"]["documents cut into pieces"] = cut
    return _finish(given, result, renderer, length, about)


# --------------------------------------------------------------------------------------------------------- insides
def _with_system(row: Any, system: str | None) -> Any:
    """The row with a system message in front, if one is asked for and the row has none."""
    name = "prompt" if isinstance(row, Preference | Labelled) else "messages"
    messages: tuple[Message, ...] = getattr(row, name)
    if not system or any(message.role == "system" for message in messages):
        return row
    return type(row)(**{**row.__dict__, name: (Message("system", system), *messages)})


def _last_turn_alone(row: Conversation) -> Conversation:
    """The dialogue with the loss on its last reply alone."""
    last = max(place for place, message in enumerate(row.messages) if message.role == "assistant")
    quiet = [m if place >= last else replace(m, train=False) for place, m in enumerate(row.messages)]
    return replace(row, messages=tuple(quiet))


def _render(
    given: Given,
    rows: Sequence[R],
    tally: Tally,
    shortener: Shortener,
    render: Callable[[Sequence[R]], list[T | UserError]],
) -> _Rendered[T]:
    """Choose sides, render, and shorten what is too long; rows that the template refuses are bad rows."""
    candidates = [Candidate(prompt_key(messages_of(row)), row.meta.get("split")) for row in rows]
    result: _Rendered[T] = _Rendered(tally)
    sides = _sides(given, rows, candidates, result)
    staying = [(rows[p], sides[p]) for p in in_order(candidates, sides) if sides[p] in ("train", "eval")]
    for (row, side), tokens in zip(staying, render([row for row, _ in staying]), strict=True):
        if isinstance(tokens, UserError):
            tally.bad(tokens)
            continue
        if length_of(tokens) > shortener.max_length:
            shorter = shortener.shorten(row, tokens)
            if isinstance(shorter, TooLong):
                tally.dropped["too_long"] += 1
                result.long.append(shorter)
                continue
            tokens = shorter
            result.cut[row.id] = None
        result.kept.append((tokens, side))
    return result


def _sides(given: Given, rows: Sequence[Any], candidates: Sequence[Candidate], result: _Rendered[Any]) -> list[str]:
    """The side of every row; training rows that repeat an evaluation row or its question are on neither, counted."""
    sides, result.rule = choose_sides(candidates, given.source)
    result.overlap, sides = check_overlap(rows, sides, given.source.on_leak)
    result.tally.dropped["question_in_eval"] += sides.count("overlap")
    result.tally.dropped["leak"] += sides.count("leak")
    return sides


def _finish(
    given: Given,
    result: _Rendered[T],
    renderer: Renderer,
    length: LengthOptions,
    about: dict[str, Any],
) -> Prepared[T]:
    """Check what is lost and what is left, write the card."""
    tally, kept = result.tally, result.kept
    tally.check_bad_rows(given.source.on_bad_row)
    check_long(result.long, len(kept) + len(result.long), length)
    train: list[T] = [row for row, side in kept if side == "train"]
    held: list[T] = [row for row, side in kept if side == "eval"]
    dropped = {reason: count for reason, count in sorted(tally.dropped.items()) if count}
    if not train:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or f"all {len(held)} evaluate"
        raise UserError(f"no training row is left of {tally.seen} ({reasons})", code="no_rows", file=given.label)
    assert tally.seen == len(kept) + sum(dropped.values()), (tally.seen, len(kept), dropped)
    rows = {
        "in": tally.seen,
        "kept": len(kept),
        "dropped": dropped,
        "truncated": sum(row.id in result.cut for row, _ in kept),
    }
    card = {
        "source": given.label,
        "license": given.data.license,
        **about,
        "rows": rows,
        "splits": {"train": len(train), "eval": len(held), "rule": result.rule},
        **_token_numbers(train + held),
        "overlap": result.overlap,
        "choices": dict(renderer.choices),
        "template_digest": renderer.template_digest,
        "tokenizer_digest": renderer.tokenizer_digest,
        "max_length": length.max_length,
        **_lost_rows(result),
        "samples": samples(train, renderer),
    }
    digest = sha256_json([VERSION, renderer.template_digest, renderer.tokenizer_digest, *map(_content, (train, held))])
    return Prepared(train, held, {**card, "digest": digest}, digest)


def _content(rows: Sequence[Any]) -> list[Any]:
    """What a rendered row says, without the id (paths differ between machines)."""
    return [[value for name, value in row.__dict__.items() if name not in ("id", "meta", "task")] for row in rows]


def _lost_rows(result: _Rendered[Any]) -> dict[str, Any]:
    """The first rows that are bad, too long or cut, by name; the counts of all stand in `rows`."""
    long = [f"{row.id}: {row.tokens} tokens{' (the answer)' if row.answer else ''}" for row in result.long[:SHOWN]]
    named = {
        "bad_rows": [str(problem) for problem in result.tally.first_problems()],
        "long_rows": long,
        "truncated_rows": list(result.cut)[:SHOWN],
    }
    answers = sum(row.answer for row in result.long)
    more = {"long_for_their_answer": answers} if answers else {}
    return {**{name: rows for name, rows in named.items() if rows}, **more}


def _token_numbers(rows: Sequence[Any]) -> dict[str, Any]:
    """`tokens` and `supervised_share` of the card; a pair's supervised tokens are those of both replies."""
    counts = [length_of(row) for row in rows]
    total = supervised = 0
    for row in rows:
        if isinstance(row, Tokens):
            total, supervised = total + len(row.ids), supervised + sum(row.mask)
        elif isinstance(row, PairTokens):
            replies = len(row.chosen) + len(row.rejected)
            total, supervised = total + len(row.prompt) + replies, supervised + replies
        elif isinstance(row, LabelledTokens):
            total, supervised = total + len(row.prompt) + len(row.reply), supervised + len(row.reply)
        else:
            total += len(row.ids)
    numbers = {
        "total": total,
        "supervised": supervised,
        "mean": round(sum(counts) / len(counts), 2),
        "longest": max(counts),
        "histogram": histogram(counts),
    }
    return {"tokens": numbers, "supervised_share": round(supervised / total, 4)}

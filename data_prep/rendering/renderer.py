"""The only tokenising code: messages to token ids and a loss mask.

Rules, each held by a test:
- Contents never become control ids, whatever they spell (see templates.py).
- Text is tokenised in maximal plain sections between control tokens, so that merges over the edge of a content give
  the ids that the base was trained on; the one forced edge is where the generation prompt ends and the reply begins,
  as it is there at generation time too.
- ids of a conversation == prompt(messages before the last) + reply(last text) + an unsupervised tail.
- The mask covers what an assistant turn says and its end token, and nothing else.
- No bos is added beyond the template's own; a doubled one at the front is folded into one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from data_prep.core.errors import UserError, at_row, unknown
from data_prep.rendering.chat_template import ChatTemplate, Layout, Tools
from data_prep.rendering.digests import digest_of_template, digest_of_tokenizer, template_digest, tokenizer_digest
from data_prep.rendering.encoder import CONTROL, JOIN, START, PlainEncoder, Section
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
    RowKind,
    Tokens,
)

__all__ = ["Renderer", "template_digest", "tokenizer_digest"]
R = TypeVar("R")
S = TypeVar("S")
_ANYONE = Message("user", "x")


class Piece(NamedTuple):
    """A control token (`control` is its text) or a plain section.

    `turn` is the assistant turn that says it, `weight` multiplies its loss.
    """

    section: Section
    control: str | None
    turn: int | None
    weight: float = 1.0


@dataclass(frozen=True)
class Encoded:
    """Ids of pieces, whether each is supervised, and the weights of their losses where any is not 1."""

    ids: list[int]
    mask: list[bool]
    weights: list[float] | None = None


class Renderer:
    """Renders rows with one tokenizer and its chat template.

    Args:
        tokenizer: a transformers `PreTrainedTokenizerBase` with a chat template.

    Attributes:
        end_token_id: the id that ends an assistant turn.
        reply_edges: what the template writes before and after a reply's text; `decode` leaves both out.
        pad_token_id: the tokenizer's pad id; without one, its eos id (masks come from lengths, so this is harmless).
        choices: decisions taken for the user, name -> sentence; copied into data cards.

    Raises:
        UserError: no chat template, or one that cannot be trained with (the message says why).
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.choices: dict[str, str] = {}
        self._template = ChatTemplate(tokenizer)
        self._encoder = PlainEncoder(tokenizer, self._template.controls)
        if self._template.prints_date:
            self.choices["date"] = "the chat template prints today's date, so token ids change from day to day"
        if self._template.switches:
            self.choices["thinking"] = (
                "the chat template opens replies with a thought: enable_thinking=false takes it out"
            )
        self.end_token_id = self._template.controls[self._template.end]
        self.reply_edges = (self._template.reply_prefix, self._template.reply_suffix)
        self.pad_token_id = self._choose_pad()
        self.bos_token_id: int | None = tokenizer.bos_token_id
        self._say_choices()
        self.template_digest = digest_of_template(self._template.source)
        self._inside: re.Pattern[str] | None = None
        """Control tokens that contents may hold, as escaped text spells them."""
        self._tokenizer_digest: str | None = None

    @property
    def tokenizer_digest(self) -> str:
        """Hex sha256 of the tokenizer; equals `tokenizer_digest(folder)` of the folder it came from."""
        if self._tokenizer_digest is None:
            self._tokenizer_digest = digest_of_tokenizer(self.tokenizer)
        return self._tokenizer_digest

    @property
    def control_ids(self) -> frozenset[int]:
        """Ids of the tokens that are no plain text: the template's and the tokenizer's own."""
        return frozenset(self._template.controls.values())

    def reading(self, tokens: Sequence[str]) -> Renderer:
        """A renderer that reads these special tokens as what they are where contents spell them, not as words.

        Raises:
            UserError: one is no special token of this tokenizer, or ends a turn.
        """
        for token in tokens:
            if token not in self._template.controls:
                raise _of_special_tokens(unknown("special token", token, self._template.controls))
            if token == self._template.end:
                raise _of_special_tokens(UserError(f"{token} ends a turn: no content may hold it", code="end_inside"))
        other = copy(self)
        other.choices = {**self.choices, "special_tokens": f"contents may hold {', '.join(tokens)}, read as such"}
        other._inside = self._template.escapes.marks_of(tokens)
        return other

    def spelled_controls(self, texts: Iterable[str]) -> set[str]:
        """The special tokens that texts spell and that are read as plain text all the same."""
        found = {token for text in texts for token in self._template.escapes.spelled(text)}
        inside = self._inside
        return {token for token in found if not (inside and inside.fullmatch(self._template.escapes.escape(token)))}

    def _say_choices(self) -> None:
        """Name what was decided about bos and the mask."""
        bos = self.tokenizer.bos_token
        if bos and self._adds_bos() and self._template.layout([_ANYONE], True).text.startswith(bos):
            self.choices["bos"] = "template and tokenizer both put a bos in front: it is written once"
        if not self._template.trusts_marks:
            what = (
                "marks not all of what an assistant says" if self._template.has_markers else "has no generation marks"
            )
            self.choices["mask"] = f"the chat template {what}: the mask follows from its generation prompts"

    def _choose_pad(self) -> int:
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        if pad is None:
            self.choices["pad_token"] = "the tokenizer has no pad token: its end token pads; masks come from lengths"
            return int(eos) if eos is not None else self.end_token_id
        if pad == eos:
            self.choices["pad_token"] = "pad and eos are the same token: masks come from lengths, so eos is learnt"
        return int(pad)

    # ------------------------------------------------------------- single rows
    def conversation(self, row: Conversation) -> Tokens:
        """Ids and mask of a whole conversation.

        Raises:
            UserError: the template refuses the row.
        """
        return _value(self.conversations([row])[0])

    def prompt(self, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
        """Ids of messages and the generation prompt."""
        return self._encode_all([self._pieces(self._template.layout(messages, True, tools))])[0].ids

    def reply(self, text: str) -> list[int]:
        """Ids of an assistant's reply, end token included, to stand right behind `prompt(...)`."""
        return self._encode_all([self._reply_pieces(text)])[0].ids

    def pair(self, row: Preference) -> PairTokens:
        """Ids of a preference: the prompt once, and both replies."""
        return _value(self.pairs([row])[0])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a reply: what `reply` was given, cut at the first end token, padding left out."""
        ids = [int(token) for token in ids]
        finished = self.end_token_id in ids
        if finished:
            ids = ids[: ids.index(self.end_token_id)]
        while ids and ids[-1] == self.pad_token_id:
            ids.pop()
        text = str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        text = text.removeprefix(self._template.reply_prefix)
        return text.removesuffix(self._template.reply_suffix) if finished else text

    # ------------------------------------------------------------------ batches
    def render(self, kind: RowKind, rows: Sequence[Any]) -> list[Any]:
        """Many records of one kind at once; a row that cannot be rendered gives its error instead."""
        render: dict[RowKind, Callable[[Any], list[Any]]] = {
            RowKind.conversations: self.conversations,
            RowKind.preferences: self.pairs,
            RowKind.unpaired: self.labelled,
            RowKind.prompts: self.prompts,
            RowKind.text: self._whole,
        }
        return render[kind](rows)

    def _whole(self, rows: Sequence[Document]) -> list[Tokens]:
        encoded = self.documents([row.text for row in rows])
        return [
            Tokens(ids, [True] * len(ids), row.id, features=row.meta.get("features"))
            for ids, row in zip(encoded, rows, strict=True)
        ]

    def conversations(self, rows: Sequence[Conversation]) -> list[Tokens | UserError]:
        """Many conversations at once; a row that cannot be rendered gives its error instead."""

        def pieces(row: Conversation) -> list[list[Piece]]:
            said = [message for message in row.messages if message.role == "assistant"]
            layout = self._template.layout(row.messages, False, row.tools)
            for span, message in zip(layout.spans, said, strict=True):
                if message.trained and isinstance(span, UserError):
                    raise span
            found = self._pieces(layout)
            if all(message.trained and message.weight is None for message in said):
                return [found]
            return [[p if p.turn is None else _as_asked(p, said[p.turn]) for p in found]]

        def tokens(row: Conversation, parts: list[Encoded]) -> Tokens:
            return Tokens(
                ids=parts[0].ids,
                mask=parts[0].mask,
                id=row.id,
                weights=parts[0].weights,
                task=row.meta.get("task"),
                features=row.meta.get("features"),
            )

        return self._many(rows, pieces, tokens)

    def pairs(self, rows: Sequence[Preference]) -> list[PairTokens | UserError]:
        """Many preferences at once; a row that cannot be rendered gives its error instead."""

        known: dict[str, list[Piece]] = {}  # one reply often stands in many pairs

        def reply(text: str) -> list[Piece]:
            if text not in known:
                known[text] = self._reply_pieces(text)
            return known[text]

        def pieces(row: Preference) -> list[list[Piece]]:
            prompt = self._pieces(self._template.layout(row.prompt, True, row.tools))
            return [prompt, reply(row.chosen), reply(row.rejected)]

        def tokens(row: Preference, parts: list[Encoded]) -> PairTokens:
            prompt, chosen, rejected = (part.ids for part in parts)
            said = row.meta
            return PairTokens(
                prompt, chosen, rejected, row.id, row.margin, said.get("task"), features=said.get("features")
            )

        return self._many(rows, pieces, tokens)

    def labelled(self, rows: Sequence[Labelled]) -> list[LabelledTokens | UserError]:
        """Many labelled replies at once; a row that cannot be rendered gives its error instead."""

        def pieces(row: Labelled) -> list[list[Piece]]:
            prompt = self._pieces(self._template.layout(row.prompt, True, row.tools))
            return [prompt, self._reply_pieces(row.reply)]

        def tokens(row: Labelled, parts: list[Encoded]) -> LabelledTokens:
            prompt, reply = (part.ids for part in parts)
            return LabelledTokens(prompt, reply, good=row.good, id=row.id, features=row.meta.get("features"))

        return self._many(rows, pieces, tokens)

    def prompts(self, rows: Sequence[Prompt]) -> list[PromptTokens | UserError]:
        """Many prompts at once; a row that cannot be rendered gives its error instead."""

        def pieces(row: Prompt) -> list[list[Piece]]:
            return [self._pieces(self._template.layout(row.messages, True, row.tools))]

        def tokens(row: Prompt, parts: list[Encoded]) -> PromptTokens:
            asked = next((m for m in reversed(row.messages) if m.role == "user"), row.messages[-1])
            messages = [message.as_dict() for message in row.messages]
            features = row.meta.get("features")
            return PromptTokens(parts[0].ids, asked.content, row.id, dict(row.meta), messages, features=features)

        return self._many(rows, pieces, tokens)

    def documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of plain documents: a bos when the tokenizer adds one itself, the text, the eos token if there is one."""
        eos = self.tokenizer.eos_token_id
        back = [int(eos)] if eos is not None else []
        return [[*ids, *back] for ids in self.beginnings(texts)]

    def beginnings(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of documents that go on: as `documents`, without the end."""
        escape = self._template.escapes.escape
        encoded = self._encode_all([self._said(escape(text), START) for text in texts])
        bos = self.bos_token_id
        front = [bos] if bos is not None and self._adds_bos() else []
        return [[*front, *one.ids] for one in encoded]

    # ------------------------------------------------------------------ insides
    def _adds_bos(self) -> bool:
        ids = self.tokenizer("x", verbose=False)["input_ids"]
        return bool(ids) and ids[0] == self.bos_token_id

    def _reply_pieces(self, text: str) -> list[Piece]:
        layout = self._template.layout([_ANYONE, Message("assistant", text)])
        if isinstance(layout.spans[0], UserError):
            raise layout.spans[0]
        pieces = self._pieces(layout)
        return [piece for piece in pieces if piece.turn is not None]

    def _pieces(self, layout: Layout) -> list[Piece]:
        """Cut a rendered text into control tokens and plain sections; edges of assistant turns are cuts too."""
        template = self._template
        edges: list[tuple[int, int, int | None]] = []
        place = 0
        for number, span in enumerate(layout.spans):
            if isinstance(span, tuple):
                edges += [(place, span[0], None), (*span, number)]
                place = span[1]
        edges.append((place, len(layout.text), None))
        pieces: list[Piece] = []
        before, strip_left = START, False
        for first, end, turn in edges:
            start = first
            for found in (*template.pattern.finditer(layout.text, start, end), None):
                text = layout.text[start : found.start() if found else end]
                text = text.lstrip() if strip_left else text
                if found and found[0] in template.swallow_left:
                    text = text.rstrip()
                if text:
                    pieces += self._said(text, before, turn)
                    before, strip_left = CONTROL if pieces[-1].control else JOIN, False
                if found:
                    pieces.append(Piece((CONTROL, ""), found[0], turn))
                    before, start, strip_left = CONTROL, found.end(), found[0] in template.swallow_right
        bos = self.tokenizer.bos_token
        while bos and len(pieces) > 1 and pieces[0].control == bos == pieces[1].control:
            self.choices["bos"] = "the template writes bos twice at the front: folded into one"
            pieces.pop(0)
        return pieces

    def _said(self, text: str, before: str, turn: int | None = None) -> list[Piece]:
        """Escaped text between control tokens of the template: one section, or several around tokens that it holds."""
        unescape = self._template.escapes.unescape
        if self._inside is None:
            return [Piece((before, unescape(text)), None, turn)]
        pieces: list[Piece] = []
        for place, part in enumerate(self._inside.split(text)):
            if place % 2:
                pieces.append(Piece((CONTROL, ""), self._template.escapes.string(int(part)), turn))
                before = CONTROL
            elif part:
                pieces.append(Piece((before, unescape(part)), None, turn))
                before = JOIN
        return pieces

    def _encode_all(self, rows: Sequence[list[Piece]]) -> list[Encoded]:
        """Ids and masks of rows of pieces; every distinct section is encoded once, in one batch."""
        encoded = self._encoder.encode([p.section for row in rows for p in row if p.control is None])
        result = []
        for row in rows:
            ids: list[int] = []
            mask: list[bool] = []
            lengths: list[int] = []
            for piece in row:
                control = piece.control
                new = encoded[piece.section] if control is None else [self._template.controls[control]]
                ids += new
                mask += [piece.turn is not None] * len(new)
                lengths.append(len(new))
            weights = None
            if any(piece.weight != 1.0 for piece in row):
                weights = [p.weight for p, length in zip(row, lengths, strict=True) for _ in range(length)]
            result.append(Encoded(ids, mask, weights))
        return result

    def _many(
        self,
        rows: Sequence[S],
        pieces: Callable[[S], list[list[Piece]]],
        tokens: Callable[[S, list[Encoded]], R],
    ) -> list[R | UserError]:
        """Lay out every row, encode all of them in one batch, and put the parts together again."""
        laid: list[list[list[Piece]] | UserError] = []
        for row in rows:
            try:
                laid.append(pieces(row))
            except UserError as problem:
                laid.append(at_row(str(getattr(row, "id", "")), problem))
        flat = [part for parts in laid if not isinstance(parts, UserError) for part in parts]
        encoded = iter(self._encode_all(flat))
        result: list[R | UserError] = []
        for row, parts in zip(rows, laid, strict=True):
            if isinstance(parts, UserError):
                result.append(parts)
            else:
                result.append(tokens(row, [next(encoded) for _ in parts]))
        return result


def _of_special_tokens(problem: UserError) -> UserError:
    problem.field = "data.special_tokens"
    return problem


def _as_asked(piece: Piece, said: Message) -> Piece:
    """A piece of an assistant turn, out of the loss if the turn is, and with the turn's weight."""
    if not said.trained:
        return piece._replace(turn=None)
    return piece if said.weight is None else piece._replace(weight=said.weight)


def _value(result: R | UserError) -> R:
    if isinstance(result, UserError):
        raise result
    return result

"""One kind of rows on its way from options to prepared rows; what `data_prep/prepare/prepare.py` calls."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from data_prep.core.hashing import sha256_json
from data_prep.core.options import plain
from data_prep.core.progress import Progress
from data_prep.options import DataOptions, LengthOptions
from data_prep.prepare.assemble import Reading, load, save, settled
from data_prep.prepare.collect import CollectedRows, writing
from data_prep.prepare.content_digest import content_digest, data_digest
from data_prep.prepare.render_chunk import Chunks
from data_prep.prepare.row_cache import Kept, code_digest, stamps
from data_prep.prepare.workers import chunked, rendered
from data_prep.quality.pair_bias import PairNumbers
from data_prep.quality.template_marks import spelled_texts
from data_prep.quality.text_keys import digest as digest_of
from data_prep.records.mixing import sources_for
from data_prep.records.stream import Stream, open_stream, source_rows
from data_prep.rendering.digests import template_digest, tokenizer_digest
from data_prep.rendering.renderer import Renderer
from data_prep.types import Prepared, RowKind

LEAST_BYTES = 1 << 20
"""Smaller data is not worth a look into the cache."""
LARGE = 1 << 25
"""Data of so many bytes mostly has rows enough for worker processes."""


class Preparation:
    """One kind of rows on its way from options to `Prepared`."""

    def __init__(self, data: DataOptions, kind: RowKind, renderer: Renderer, length: LengthOptions, seed: int) -> None:
        self.data, self.kind, self.length, self.seed = data, kind, length, seed
        self.renderer = renderer.reading(data.special_tokens) if data.special_tokens else renderer
        self.sources = sources_for(data, kind)
        self.pairs = PairNumbers()
        self.seen: set[bytes] = set()
        self.streams: list[Stream] = []
        self.ends: list[int] = []
        """How many records stand before the end of each source."""

    def run(self, on_disk: bool) -> Prepared[Any]:
        """Rows from the cache, or made and, where they are many, kept in it; `on_disk`: few lie in a file, too."""
        before = stamps(self._files())
        size = sum(status[1] for status in before)
        kept = Kept(self._key(size))
        if (found := kept.found(load)) is not None:
            return found
        gathered = CollectedRows(kept.folder)
        try:
            self._gather(gathered, kept, size)
            gathered.close(on_disk)
            reading = Reading(self.kind, self.data, self.sources, self.streams, self.ends)
            prepared = settled(reading, gathered, self.renderer, self.length, self.seed, self._numbers())
            if gathered.folder is not None:
                if before != stamps(self._files()):
                    kept.forget()
                with writing(lambda: gathered.folder):
                    save(gathered.folder, prepared)
                return load(kept.publish())
            return prepared
        except BaseException:
            gathered.abandon()
            kept.drop()
            raise

    def _files(self) -> list[str]:
        return [file for source in self.sources for file in source.given.files()]

    def _key(self, size: int) -> str | None:
        """Hash of what decides the rows; None where it is not known beforehand, or the data is too small to matter."""
        if size < LEAST_BYTES or "date" in self.renderer.choices or any(one.given.remote for one in self.sources):
            return None
        return sha256_json(
            [
                code_digest(),
                self.kind,
                content_digest(self.data, self.kind),
                [[one.given.label, one.given.source.on_leak.value, *one.given.files()] for one in self.sources],
                [self.renderer.template_digest, self.renderer.tokenizer_digest, self.renderer.choices],
                plain(self.length),
                [self.data.name, self.data.license, self.seed],
            ]
        )

    # ---------------------------------------------------------------- reading
    def _gather(self, gathered: CollectedRows, kept: Kept, size: int) -> None:
        """Read, render and collect all sources."""
        render = Chunks(self.kind, self.renderer, self.length, self.data.system, self.data.train_on)
        is_first = os.environ.get("RANK", "0") == "0"
        with Progress(f"data {self.data.name}", None, unit="rows", enabled=is_first) as progress:
            for part in rendered(render, chunked(self._records(kept)), self.data.workers, likely_many=size >= LARGE):
                gathered.add(part)
                progress.advance(gathered.records - progress.done)
        self.renderer.choices.update(gathered.choices)

    def _records(self, kept: Kept) -> Iterator[Any]:
        """The records of all sources, one after another."""
        count = 0
        for source in self.sources:
            stream = open_stream(source.given, self.kind, self.seed)
            if stream.foreign():
                kept.forget()  # code from elsewhere is no part of the key
            self.streams.append(stream)
            stream.check_left_out()
            for record in stream:
                if self.kind == RowKind.prompts and self._repeated(record):
                    stream.tally.dropped["duplicate_prompt"] += 1
                    continue
                if self.kind == RowKind.preferences:
                    self.pairs.add(record)
                if source.name is not None:
                    record.meta.setdefault("task", source.name)
                for token in self.renderer.spelled_controls(spelled_texts(record)):
                    stream.form.notes[f"rows whose text spells '{token}', a special token, read as plain text"] += 1
                count += 1
                yield record
            stream.tally.check_whole()
            stream.check_left_out()
            self.ends.append(count)

    def _numbers(self) -> dict[str, Any]:
        """What the card says of preference pairs beside their sides."""
        return {"pairs": self.pairs.card()} if self.kind == RowKind.preferences else {}

    def _repeated(self, record: Any) -> bool:
        key = digest_of(
            repr([record.messages, record.tools, *(record.meta.get(name) for name in ("split", "features"))])
        )
        if key in self.seen:
            return True
        self.seen.add(key)
        return False


__all__ = [
    "Prepared",
    "Renderer",
    "data_digest",
    "prepare",
    "source_rows",
    "template_digest",
    "tokenizer_digest",
]


def prepare(
    kind: RowKind, data: DataOptions, renderer: Renderer, length: LengthOptions, seed: int, on_disk: bool = False
) -> Prepared[Any]:
    """The rows of one kind as token ids, with a card that counts what became of all.

    Conversations get a mask of the assistant's words. Preferences and labelled replies (`unpaired`, of
    `data.preferences`) are prompt ids and reply ids; the longer of two replies counts for `max_length`. Prompts end
    with the generation prompt; they fall back on those of conversations, then of preferences, and repeated ones are
    dropped and counted. Of documents every token is supervised; longer ones are cut into pieces, counted.

    Args:
        on_disk: few rows lie in a file as well, as many do, and `Rows.path` says where: other processes `load` them.

    Raises:
        UserError: bad rows, too many over-long rows, or nothing left.
    """
    return Preparation(data, kind, renderer, length, seed).run(on_disk)

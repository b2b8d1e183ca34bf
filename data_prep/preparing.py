"""One kind of rows on its way from options to prepared rows; what `data_prep/prepare.py` calls."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from data_prep.chunks import Chunks
from data_prep.contents import content_digest
from data_prep.digests import sha256_json
from data_prep.formats.base import PREFERENCE, PROMPT
from data_prep.gathering import Gathered, writing
from data_prep.kept import Kept, code_digest, stamps
from data_prep.mixtures import sources_for
from data_prep.options import DataOptions, LengthOptions
from data_prep.pace import Pace
from data_prep.prepared import Prepared
from data_prep.quality.pairs import PairNumbers
from data_prep.quality.texts import digest as digest_of
from data_prep.reading import Stream, open_stream
from data_prep.rendering import Renderer
from data_prep.settling import Reading, load, save, settled
from data_prep.typed import plain
from data_prep.workers import chunked, rendered

LEAST_BYTES = 1 << 20
"""Smaller data is not worth a look into the cache."""
LARGE = 1 << 25
"""Data of so many bytes mostly has rows enough for worker processes."""


class Preparation:
    """One kind of rows on its way from options to `Prepared`."""

    def __init__(self, data: DataOptions, kind: str, renderer: Renderer, length: LengthOptions, seed: int) -> None:
        self.data, self.kind, self.renderer, self.length, self.seed = data, kind, renderer, length, seed
        self.sources = sources_for(data, kind)
        self.pairs = PairNumbers()
        self.seen: set[bytes] = set()
        self.streams: list[Stream] = []
        self.ends: list[int] = []
        """How many records stand before the end of each source."""

    def run(self) -> Prepared[Any]:
        """Rows from the cache, or made and, where they are many, kept in it."""
        before = stamps(self._files())
        size = sum(status[1] for status in before)
        kept = Kept(self._key(size))
        if (found := kept.found(load)) is not None:
            return found
        gathered = Gathered(kept.folder)
        try:
            self._gather(gathered, kept, size)
            gathered.close()
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
    def _gather(self, gathered: Gathered, kept: Kept, size: int) -> None:
        """Read, render and collect all sources."""
        render = Chunks(self.kind, self.renderer, self.length, self.data.system, self.data.train_on)
        with Pace(self.data.name) as pace:
            for part in rendered(render, chunked(self._records(kept)), self.data.workers, likely_many=size >= LARGE):
                gathered.add(part)
                pace.at(gathered.records)
        self.renderer.choices.update(gathered.choices)

    def _records(self, kept: Kept) -> Iterator[Any]:
        """The records of all sources, one after another."""
        count = 0
        for source in self.sources:
            stream = open_stream(source.given, self.kind, self.seed)
            if stream.foreign():
                kept.forget()  # code from elsewhere is no part of the key
            self.streams.append(stream)
            for record in stream:
                if self.kind == PROMPT and self._repeated(record):
                    stream.tally.dropped["duplicate_prompt"] += 1
                    continue
                if self.kind == PREFERENCE:
                    self.pairs.add(record)
                if source.name is not None:
                    record.meta.setdefault("task", source.name)
                count += 1
                yield record
            stream.tally.check_whole()
            self.ends.append(count)

    def _numbers(self) -> dict[str, Any]:
        """What the card says of preference pairs beside their sides."""
        return {"pairs": self.pairs.card()} if self.kind == PREFERENCE else {}

    def _repeated(self, record: Any) -> bool:
        key = digest_of(repr([record.messages, record.tools, record.meta.get("split")]))
        if key in self.seen:
            return True
        self.seen.add(key)
        return False

"""Content hashes of what a kind of rows is made of, without rendering anything."""

from __future__ import annotations

from typing import Any

from data_prep.core.hashing import sha256_json
from data_prep.core.options import plain
from data_prep.options import DataOptions
from data_prep.records.filter import make_filters, options_of
from data_prep.records.mixing import sources_for
from data_prep.records.stream import VERSION, Given
from data_prep.sources.files import digest_path
from data_prep.sources.generated import find_generator
from data_prep.types import UNPAIRED, RowKind


def data_digest(data: DataOptions, kind: str) -> str:
    """Hex hash of what a kind of row is made of: bytes of the files (or the generator's version) and the options.

    Args:
        data: the data options.
        kind: a name of `RowKind`: "conversations", "preferences", "unpaired", "prompts" or "text".

    Raises:
        UserError: an unknown kind, nothing given, or a missing file.
    """
    if kind not in RowKind.__members__:
        raise ValueError(f"unknown kind of data {kind!r} (expected {', '.join(RowKind.__members__)})")
    return content_digest(data, RowKind[kind])


def content_digest(data: DataOptions, kind: RowKind) -> str:
    """The same for a kind of record ("conversation", ...); of a mixture it covers every source and how they are drawn.

    Raises:
        UserError: nothing given, or a missing file.
    """
    filtered = None if kind == UNPAIRED else kind  # which may be read as pairs: filters of both count
    filters = [[one.name, options_of(one), one.content(data.root)] for one in make_filters(data.filters, filtered)]
    sources = sources_for(data, kind)
    mixed = [[one.name, one.weight, one.epochs, source_digest(one.given, kind)] for one in sources if one.name]
    return sha256_json(
        {
            "kind": kind,
            "system": data.system,
            "train_on": data.train_on.value,
            "source": [data.temperature, mixed] if mixed else source_digest(sources[0].given, kind),
            **({"filters": filters} if filters else {}),
            **({"unused": data.unused} if data.unused else {}),
            **({"keep": data.keep} if data.keep else {}),
            **({"special_tokens": data.special_tokens} if data.special_tokens else {}),
        }
    )


def source_digest(given: Given, kind: RowKind | None) -> str:
    """Hex hash of one source: bytes of the files it reads (or its generator's version) and its options.

    Raises:
        UserError: a missing file.
    """
    data, source = given.data, given.source
    options = plain(source)
    for name in ("path", "eval_path", "on_leak"):  # contents count, not names; leaks never train, refused or dropped
        options.pop(name)
    for name in ("negatives", "split"):
        if not options[name]:
            options.pop(name)
    content: dict[str, Any] = {"version": VERSION, "options": options}
    if source.generator:
        generator = find_generator(source.generator)
        content["generator"] = [source.generator, str(generator.version)]
    elif source.path:
        content["files"] = digest_path(source.path, data.root, given.wish(kind))
    if source.eval_path:
        content["eval_files"] = digest_path(source.eval_path, data.root, given.wish(kind, source.eval_path))
    return sha256_json(content)

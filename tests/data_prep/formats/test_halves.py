"""Preference pairs read as labelled replies: a good one and a bad one each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_prep.core.errors import UserError
from data_prep.formats.base import FORMATS
from data_prep.options import DataOptions, LengthOptions, OnBadRow, SourceOptions
from data_prep.prepare.prepare import data_digest, prepare
from data_prep.rendering.renderer import Renderer
from data_prep.types import PREFERENCE, UNPAIRED, LabelledTokens
from tests.tiny import tiny_tokenizer, write_jsonl

TABLE = {"styles": {"calm": 0.5, "loud": 0.5}, "preferred": "calm", "other": ["loud"], "topic": "topic"}


def pairs(count: int = 12) -> list[dict[str, Any]]:
    return [{"prompt": f"ask {i}", "chosen": f"yes {i}", "rejected": f"no {i}", "margin": 2.0} for i in range(count)]


def data(path: Path, rows: list[dict[str, Any]], share: float = 0.25, **options: Any) -> DataOptions:
    write_jsonl(path, rows)
    return DataOptions(preferences=SourceOptions(path=str(path), eval_share=share, **options))


def replies(rows: list[LabelledTokens]) -> set[tuple[tuple[int, ...], tuple[int, ...], bool]]:
    return {(tuple(row.prompt), tuple(row.reply), row.good) for row in rows}


def test_every_pair_gives_both_replies_as_it_renders_them(tmp_path: Path) -> None:
    found, renderer = data(tmp_path / "a.jsonl", pairs()), Renderer(tiny_tokenizer())
    whole = prepare(PREFERENCE, found, renderer, LengthOptions(512), 0)
    apart = prepare(UNPAIRED, found, renderer, LengthOptions(512), 0)
    for pair_rows, labelled in ((whole.train, apart.train), (whole.eval, apart.eval)):
        assert len(labelled) == 2 * len(pair_rows) > 0
        wanted = {(tuple(r.prompt), tuple(r.chosen), True) for r in pair_rows}
        wanted |= {(tuple(r.prompt), tuple(r.rejected), False) for r in pair_rows}
        assert replies(list(labelled)) == wanted
    ids = [row.id for row in (*apart.train, *apart.eval)]
    assert len(set(ids)) == 24 and all(name.endswith(("#chosen", "#rejected")) for name in ids)
    assert apart.card["rows"]["in"] == apart.card["rows"]["kept"] == 24 and apart.ended == 1.0
    assert data_digest(found, "unpaired") != data_digest(found, "preferences")


def test_bad_pairs_and_filters_of_pairs_are_those_of_pairs(tmp_path: Path) -> None:
    rows = [*pairs(10), {"prompt": "ask 3", "chosen": "no 3", "rejected": "yes 3"}, {"prompt": "x", "chosen": "y"}]
    found = data(tmp_path / "a.jsonl", rows, on_bad_row=OnBadRow.drop)
    found.filters = {"contradictory": {}}
    plain = data_digest(data(tmp_path / "a.jsonl", rows, on_bad_row=OnBadRow.drop), "unpaired")
    assert data_digest(found, "unpaired") != plain, "such a filter has a say in labelled replies as well"
    card = prepare(UNPAIRED, found, Renderer(tiny_tokenizer()), LengthOptions(512), 0).card["rows"]
    assert card["in"] == card["kept"] + sum(card["dropped"].values())
    assert card["dropped"]["contradictory"] == 2 and card["kept"] == 18


LABELS = (
    ("yes", "no"),
    ("GOOD", "bad"),
    ("up", "down"),
    ("desirable", "undesirable"),
    (1, -1),
    ("1.0", "0.0"),
    (True, False),
)


@pytest.mark.parametrize(("good", "bad"), LABELS)
def test_labels_are_read_as_people_write_them(good: Any, bad: Any, tmp_path: Path) -> None:
    rows = [{"prompt": f"ask {i}", "completion": f"say {i}", "label": (good, bad)[i % 2]} for i in range(8)]
    read = prepare(UNPAIRED, data(tmp_path / "a.jsonl", rows), Renderer(tiny_tokenizer()), LengthOptions(512), 0)
    found = {int(row.id.rpartition(":")[2]): row.good for row in (*read.train, *read.eval)}
    assert found == {i + 1: i % 2 == 0 for i in range(8)}


@pytest.mark.parametrize("rating", [5, 2.5, "4"])
def test_a_rating_is_no_label_and_none_of_its_rows_can_be_dropped(rating: Any, tmp_path: Path) -> None:
    """Of ratings from 1 to 5 the worst, 1, would be read as good and the best be dropped."""
    rows = [{"prompt": f"ask {i}", "completion": f"say {i}", "label": (rating, 1)[i % 2]} for i in range(8)]
    for on_bad_row in OnBadRow:
        found = data(tmp_path / "a.jsonl", rows, on_bad_row=on_bad_row)
        with pytest.raises(UserError, match="a rating is no label") as caught:
            prepare(UNPAIRED, found, Renderer(tiny_tokenizer()), LengthOptions(512), 0)
        assert caught.value.row == 1 and "drop" not in caught.value.hint


def test_negatives_of_pairs_are_halved_too(tmp_path: Path) -> None:
    found = data(tmp_path / "a.jsonl", pairs(), negatives=["repeated"])
    prepared = prepare(UNPAIRED, found, Renderer(tiny_tokenizer()), LengthOptions(512), 0)
    rows = [*prepared.train, *prepared.eval]
    assert len(rows) == 48 and sum(row.good for row in rows) == 24
    assert prepared.card["rows"]["in"] == 48 and len({row.id for row in rows}) == 48
    labelled = [{"prompt": f"ask {i}", "completion": f"yes {i}", "label": i % 2 == 0} for i in range(6)]
    with pytest.raises(UserError, match="negatives are made of pairs"):
        found = data(tmp_path / "b.jsonl", labelled, negatives=["repeated"])
        prepare(UNPAIRED, found, Renderer(tiny_tokenizer()), LengthOptions(512), 0)


@pytest.mark.parametrize("name", FORMATS.names())
def test_every_format_of_pairs_gives_labelled_replies(name: str) -> None:
    kinds = FORMATS.get(name).kinds
    assert FORMATS.get(name).yields(UNPAIRED) == (PREFERENCE in kinds or UNPAIRED in kinds)


def test_labels_flipped_on_purpose_are_flipped_for_training_alone(tmp_path: Path) -> None:
    rows = [{"prompt": f"ask {i}", "topic": "t", "calm": f"calm {i}", "loud": f"loud {i}"} for i in range(40)]
    renderer = Renderer(tiny_tokenizer())
    good = []
    for noise in (0.0, 0.4):
        found = data(tmp_path / f"{noise}.jsonl", rows, format="answer_table", options={**TABLE, "noise": noise})
        prepared = prepare(UNPAIRED, found, renderer, LengthOptions(512), 0)
        good.append([{row.id.partition(":")[2]: row.good for row in side} for side in (prepared.train, prepared.eval)])
    (train, held), (noisy, held_too) = good
    changed = {name for name in train if train[name] != noisy[name]}
    assert held == held_too and 0 < len(changed) < len(train)
    stems = {name.removesuffix("#chosen").removesuffix("#rejected") for name in changed}
    assert changed == {stem + side for stem in stems for side in ("#chosen", "#rejected")}, "both halves of a pair"


def test_dialogues_alone_are_refused(tmp_path: Path) -> None:
    talk = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": f"yes {i}"}]} for i in (1, 2)
    ]
    with pytest.raises(UserError, match="expected unpaired rows"):
        prepare(UNPAIRED, data(tmp_path / "a.jsonl", talk), Renderer(tiny_tokenizer()), LengthOptions(512), 0)

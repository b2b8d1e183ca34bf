"""The persona recipe's preferences are the published pairs (on the real data, where it is present)."""

import gzip
import json
import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("ALIGN_SHARED") or Path(__file__).resolve().parents[4] / "shared") / "data"
pytestmark = pytest.mark.skipif(not (SHARED / "chitchat").is_dir(), reason="the development data is not here")


def rows(name):
    with gzip.open(SHARED / "chitchat" / name, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def test_recipe_prefers_what_the_published_pairs_prefer():
    from align.config.compose import compose
    from data_prep.records.stream import source_for
    from data_prep.types import PREFERENCE
    from tests.records import read_records

    words = ["experiment=persona_rlhf", "model.path=BASE", f"data.root={SHARED}"]
    words += ["data.preferences.options.noise=0.0", "data.preferences.options.other=professional"]
    words += ["data.preferences.negatives=[]"]
    data = compose(words).stages[1].data
    records, _, _ = read_records(source_for(data, PREFERENCE), PREFERENCE, 0)
    ours = {(r.prompt[0].content.strip(), r.chosen.strip(), r.rejected.strip()) for r in records}
    keys = ("prompt", "chosen", "rejected")
    published = {tuple(row[key].strip() for key in keys) for row in rows("persona_preference.jsonl.gz")}
    assert published <= ours
    assert all(chosen.strip("!. ").lower() == rejected.strip("!. ").lower() for _, chosen, rejected in ours - published)

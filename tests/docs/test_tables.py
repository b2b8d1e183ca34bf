"""Generated parts of the documents equal what the code says today, and every option is in one of them."""

from __future__ import annotations

import pytest

from align.config.registries import adapters, stages
from tests.docs.pages import pages
from tests.docs.tables import generated, kinds_on

PAGES = pytest.mark.parametrize("page", pages(), ids=lambda page: page.shown)


@PAGES
def test_generated_parts_are_up_to_date(page):
    assert page.text == generated(page), "run: python -m tests.docs.tables"


def test_every_option_of_the_registries_is_in_a_table():
    shown = {kind.replace("only ", "adapter ") for page in pages() for kind in kinds_on(page)}
    wanted = {f"stage {name}" for name in stages.names()} | {f"adapter {name}" for name in adapters.names()}
    wanted |= {"run", "model", "data", "source", "gold", "every_stage", "training", "formats", "on_parent", "verbs"}
    assert not wanted - shown

"""The list of `make test-mutations` fits the code: it cannot rot between its runs."""

from __future__ import annotations

import ast

import pytest

from tests.rl_details import MUTATIONS
from tests.rl_mutations import ROOT, places


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda each: f"{each.detail}: {each.what}")
def test_what_is_replaced_stands_there_once_and_leaves_python(mutation):
    assert places(mutation) == 1 and mutation.right != mutation.wrong
    source = (ROOT / mutation.file).read_text(encoding="utf-8")
    ast.parse(source.replace(mutation.right, mutation.wrong))
    for guard in mutation.guards:
        file, _, name = guard.partition("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / file).read_text(encoding="utf-8"), guard


def test_every_detail_is_turned_wrong():
    assert {each.detail for each in MUTATIONS} == set(range(1, 33))

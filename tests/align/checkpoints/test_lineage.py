"""A chain is opened once for all that looks at it; `verify` and the next operation open it anew."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from align.checkpoints.checkpoint import RECORD, Checkpoint
from align.checkpoints.lineage import chain_of, judge_of
from data_prep.core.errors import UserError
from tests.tiny_chain import base, copied, finished


@pytest.fixture
def opened(monkeypatch):
    """How often each folder was opened."""
    finished()  # made before the counting
    count, whole = Counter(), Checkpoint.open.__func__

    def counted(cls, folder):
        count[folder.name] += 1
        return whole(cls, folder)

    monkeypatch.setattr(Checkpoint, "open", classmethod(counted))
    return count


def test_a_chain_is_opened_once(opened):
    top = Checkpoint.open(finished() / "ppo")
    assert [one.stage for one in top.ancestors()] == ["sft", "reward_model"]
    top.require(base())
    top.base_folder()
    assert [name for name, _ in chain_of(top)] == ["base", "sft", "ppo"]
    assert judge_of(top).parent().parent() is None
    assert opened == {"ppo": 1, "sft": 1, "reward_model": 1}


def test_all_that_stand_on_a_checkpoint_find_the_same(opened):
    top = Checkpoint.open(finished() / "ppo")
    assert top.parent("init") is top.parent("reward").parent("init")


def test_verify_and_another_operation_look_again(tmp_path):
    run = copied(finished(), tmp_path)
    top = Checkpoint.open(run / "ppo")
    top.require(base())
    record = json.loads((run / "sft" / RECORD).read_text("utf-8"))
    (run / "sft" / RECORD).write_text(json.dumps(record), "utf-8")  # the same content in other bytes
    assert top.parent().stage == "sft", "this operation goes on with what it has seen"
    assert not top.verify()[0]["ok"]
    with pytest.raises(UserError, match="another checkpoint than it was trained from"):
        Checkpoint.open(run / "ppo").parent()

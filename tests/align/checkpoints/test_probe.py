"""A checkpoint's probe is compared where it is opened, once for each machine: a chain on another base is seen."""

from __future__ import annotations

from unittest import mock

import pytest

from align import roles
from align.config.schema import Load
from data_prep.core.errors import UserError
from tests.tiny_chain import base, bases, checkpoint, finished


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    finished()  # which compares and remembers its own
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("stage", ["sft", "reward_model", "ppo", "ppo/value"])
def test_every_role_is_compared_once_and_refused_on_another_base(stage):
    saved = checkpoint(finished(), stage)
    with mock.patch.object(roles, "outputs", wraps=roles.outputs) as compared:
        for _ in range(2):
            bases().realise(saved, saved.role, Load.fp32)
    assert sum(call.args[1] == saved.record["probe"]["input_ids"] for call in compared.call_args_list) == 1
    with pytest.raises(UserError, match=r"does not compute here what it computed .*versions in run.json") as caught:
        bases(base(1)).realise(saved, saved.role, Load.fp32)
    assert caught.value.code == "wrong_probe"


def test_weights_that_were_changed_with_their_record_are_seen(tmp_path):
    saved = checkpoint(finished(), "sft")
    probe, rows = saved.record["probe"], saved.record["probe"]["expected"]
    near = {**probe, "expected": [[value + 1e-4 for value in row] for row in rows]}
    changed = {**probe, "expected": [[rows[0][0] + 0.1, *rows[0][1:]], *rows[1:]]}
    object.__setattr__(saved, "record", {**saved.record, "probe": near})
    bases().realise(saved, "policy", Load.fp32)  # as another machine rounds
    object.__setattr__(saved, "record", {**saved.record, "probe": changed})
    object.__setattr__(saved, "digest", "another")
    with pytest.raises(UserError, match="does not compute here"):
        bases().realise(saved, "policy", Load.fp32)


def test_another_precision_that_was_asked_for_is_not_compared():
    saved = checkpoint(finished(), "sft")
    bases(base(1)).realise(saved, "policy", Load.bf16)


def test_a_stage_that_goes_on_with_an_adapter_compares_it_first():
    saved = checkpoint(finished(), "sft")
    going_on = roles.ParentMode(roles.OnParent["continue"], Load.fp32)
    seen = mock.patch.object(roles, "require_probe", side_effect=UserError("seen"))
    with seen, pytest.raises(UserError, match="seen"):
        bases().fresh(saved, roles.adapter_of(saved), going_on, "policy")

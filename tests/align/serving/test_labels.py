"""The file of labels: what it holds after every step, who may write it, and what its rows say together."""

from __future__ import annotations

import json

import pytest

from align.serving.labels import Answer, Label, Pair, open_labels, read_labels, summary, told
from data_prep.core.errors import UserError

ROW = {
    "prompt": "Hi",
    "a": "one",
    "b": "two",
    "choice": "a",
    "labeller": "ann",
    "seconds": 1.5,
    "stages": {"a": "sft", "b": "ppo"},
    "digests": {"a": "1f", "b": "2e"},
    "time": "2026-01-01T00:00:00+00:00",
}
KEYS = {"prompt", "a", "b", "choice", "labeller", "seconds", "stages", "digests", "time"}


def made(**changes):
    return Label(**{**ROW, **changes})


def test_the_file_holds_what_stands_after_every_step(tmp_path):
    path = tmp_path / "labels.jsonl"
    first, second, other = made(), made(prompt="And?", comment="\u00fc \u2028 x"), made(labeller="ben")
    with open_labels(str(path)) as file:
        for label in (first, second, other):
            file.add(label)
            assert read_labels(path) == file.labels and file.labels[-1] == label
        assert file.take_back("ann", {first.pair, second.pair}) == second
        assert file.take_back("ann", {second.pair}) is None and file.take_back("cem", {first.pair}) is None
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["labeller"] for row in rows] == ["ann", "ben"] and all(row.keys() == KEYS for row in rows)
    with open_labels(str(path)) as file:
        assert file.labels == [first, other]


def test_one_process_at_a_time_and_nothing_else_in_between(tmp_path):
    path = tmp_path / "labels.jsonl"
    with open_labels(str(path)) as file:
        with pytest.raises(UserError, match="another align label has this file"), open_labels(str(path)):
            pass
        file.add(made())
        path.write_text(path.read_text() * 2)
        with pytest.raises(UserError, match="something else has changed the file"):
            file.add(made(prompt="And?"))
    with open_labels(str(path)) as file:
        assert len(file.labels) == 2


def test_a_link_stays_a_link(tmp_path):
    real = tmp_path / "real.jsonl"
    (tmp_path / "link.jsonl").symlink_to(real)
    with open_labels(str(tmp_path / "link.jsonl")) as file:
        file.add(made())
    assert (tmp_path / "link.jsonl").is_symlink() and len(read_labels(real)) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"choice": "c"}, "choice is none of a, b, tie, bad"),
        ({"stages": {"a": "sft"}}, "stages needs a and b"),
        ({"rewards": {"a": "much", "b": 1}}, "expected a number"),
        ({"labeler": "ann"}, "did you mean 'labeller'"),
        ({"time": None}, "needs a value"),
        ({"seconds": "long"}, "expected a number"),
    ],
    ids=str,
)
def test_a_row_that_is_no_label_is_named(tmp_path, change, said):
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (ROW, {**ROW, **change})))
    with pytest.raises(UserError) as refused, open_labels(str(path)):
        pass
    assert said in str(refused.value) and f"{path}:2" in str(refused.value) and "\n" not in str(refused.value)


def test_what_cannot_be_a_file_of_labels_is_refused(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "Hi", "chosen": "x", "rejected": "y"}\n')
    (tmp_path / "torn.jsonl").write_text(json.dumps(ROW) + '\n{"prompt": "Hi", "a')
    for name, said in (
        ("pairs.jsonl", "is no label: it lacks a, b"),
        ("torn.jsonl", "torn.jsonl:2"),
        ("labels.csv", "out=labels.jsonl"),
        ("missing/labels.jsonl", "cannot be written"),
    ):
        with pytest.raises(UserError) as refused, open_labels(str(tmp_path / name)):
            pass
        assert said in str(refused.value)


def test_agreement_by_hand():
    """Four common pairs, three verdicts the same. Chance: ann says x 3 times of 4 and ben 2, tie 1 and 2: 8/16."""
    ann = [made(prompt=str(n), choice=choice) for n, choice in enumerate(("a", "a", "a", "tie"))]
    swapped = {"a": "two", "b": "one", "stages": {"a": "ppo", "b": "sft"}, "labeller": "ben"}
    ben = [made(prompt=str(n), choice=choice, **swapped) for n, choice in enumerate(("b", "b", "tie", "tie", "bad"))]
    found = summary([*ann, *ben])
    (both,) = found["between"]
    assert both == {"labellers": ["ann", "ben"], "n": 4, "same": 0.75, "kappa": 0.5}
    assert found["labels"] == 9 and found["pairs"] == 5 and found["reward_model"] is None
    (contest,) = found["stages"]
    assert contest["stages"] == ["sft", "ppo"] and contest["wins"] == {"sft": 5, "ppo": 0}
    assert (contest["tie"], contest["bad"], contest["n"], contest["share"]) == (3, 1, 8, 6.5 / 8)
    assert "ann and ben agree on 75% of 4 pairs, kappa 0.50" in told(found)


def test_the_reward_model_agrees_where_the_chosen_reply_has_more():
    rewards = {"a": 1.0, "b": -1.0}
    rows = [made(rewards=rewards), made(rewards=rewards, choice="b"), made(rewards={"a": 1.0, "b": 1.0})]
    found = summary([*rows, made(rewards=rewards, choice="tie"), made()])["reward_model"]
    assert (found["accuracy"], found["n"]) == (0.5, 3) and found["low"] < 0.5 < found["high"]


def test_people_whom_chance_explains_have_no_kappa():
    rows = [made(labeller=name, prompt=str(n)) for name in ("ann", "ben") for n in range(3)]
    assert summary(rows)["between"][0]["kappa"] is None
    assert told(summary([])) == ["0 labels on 0 pairs"]


def test_two_draws_of_one_stage_are_no_contest():
    assert summary([made(stages={"a": "ppo", "b": "ppo"})])["stages"] == []


def test_pairs_that_a_label_says_most_about_come_first():
    """Reward margin, negative where the likelihood disagrees: surely wrong, unsure, surely right."""

    def pair(rewards, likelihoods):
        answers = [Answer("x", "s", "d", *numbers) for numbers in zip(rewards, likelihoods, strict=True)]
        return Pair("k", "Hi", (answers[0], answers[1]))

    wrong, unsure, right = pair((2, 0), (-3, -1)), pair((0.1, 0), (-1, -2)), pair((0, 2), (-2, -1))
    assert sorted((right, wrong, unsure), key=lambda one: one.order) == [wrong, unsure, right]
    assert [one.order for one in (wrong, unsure, right)] == [-2, 0.1, 2]
    assert pair((None, None), (-1, -2)).order == 0

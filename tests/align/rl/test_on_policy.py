"""Which replies of a policy make a pair, by hand."""

from __future__ import annotations

from align.rl.on_policy import KIND, Candidate, known_replies, pairs_of
from data_prep.types import PairTokens, PromptTokens

ROW = PromptTokens([1, 2], "hello", "file:1", messages=[{"role": "user", "content": "hello"}])


def reply(text: str, score: float, known: bool = False, finished: bool = True) -> Candidate:
    return Candidate(tuple(text.encode()), text, finished, score, known)


def found(*candidates: Candidate) -> list[tuple[str, str]]:
    return [(pair.chosen.text, pair.rejected.text) for pair in pairs_of(ROW, candidates)]


def test_the_known_reply_is_chosen_over_each_worse_reply_once() -> None:
    said = [reply("bad", 0.0), reply("good", 1.0), reply("bad", 0.0), reply("poor", 0.2), reply("known", 1.0, True)]
    assert found(*said) == [("known", "bad"), ("known", "poor")]


def test_a_better_reply_of_the_policy_is_chosen_over_a_known_one_that_the_judge_finds_bad() -> None:
    said = [reply("good", 1.0), reply("bad", 0.0), reply("known", 0.5, True)]
    assert found(*said) == [("good", "bad")], "and the known one is no reply of the policy: never rejected"


def test_without_a_known_reply_the_best_of_the_policys_own_is_chosen() -> None:
    assert found(reply("a", 0.1), reply("b", 0.7), reply("c", 0.3)) == [("b", "a"), ("b", "c")]


def test_replies_that_are_all_alike_to_the_judge_teach_nothing() -> None:
    assert found(reply("a", 0.0), reply("b", 0.0)) == []
    assert found() == []


def test_a_reply_that_did_not_end_is_rejected_at_most() -> None:
    open_ended = reply("and and", 0.9, finished=False)
    assert found(open_ended, reply("bad", 0.1)) == [], "nothing whole is better than it"
    assert found(open_ended, reply("known", 1.0, True)) == [("known", "and and")]
    assert found(open_ended) == []


def test_known_replies_are_those_of_the_very_prompt_and_of_pairs_that_were_given() -> None:
    pairs = [
        PairTokens([1, 2], [7], [8], "a:1", task="off_topic"),
        PairTokens([1, 2], [5], [6], "a:1"),
        PairTokens([1, 2], [9], [6], "a:1"),
        PairTokens([1, 3], [4], [6], "a:2"),
    ]
    assert known_replies(pairs, [ROW, PromptTokens([1, 4], "other", "file:2")]) == [[5], None]


def test_a_pair_as_it_is_trained_on_and_as_a_row() -> None:
    (pair,) = pairs_of(ROW, [reply("ab", 0.0), reply("c", 1.0, True)])
    assert pair.tokens() == PairTokens([1, 2], [99], [97, 98], "file:1", task=KIND)
    row = pair.as_row(split="eval")
    assert (row["prompt"], row["chosen"], row["rejected"]) == (ROW.messages, "c", "ab")
    assert (row["chosen_from"], row["split"], row["scores"]) == ("data", "eval", {"chosen": 1.0, "rejected": 0.0})
    assert PairTokens(**row["tokens"]) == pair.tokens()

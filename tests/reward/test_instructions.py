"""The rule instructions: every check by hand-made replies that follow it and that do not; unknown ids by name."""

from __future__ import annotations

from typing import Any

import pytest

from data_prep.core.errors import UserError
from data_prep.formats.prompts import Prompts
from data_prep.sources.rows import Row
from data_prep.types import PROMPT, PromptTokens
from reward.rules import build_rule, require_truth, verdict
from reward.rules.instructions import CHECKS

AT_LEAST, LESS = "at least", "less than"
CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("keywords:existence", {"keywords": ["owl", "C++"]}, "An OWL writes c++.", "An owl writes C."),
    ("keywords:frequency", {"keyword": "owl", "frequency": 2, "relation": AT_LEAST}, "owl Owl", "owl"),
    ("keywords:frequency", {"keyword": "owl", "frequency": 2, "relation": LESS}, "owl", "owl, owl"),
    ("keywords:forbidden_words", {"forbidden_words": ["owl"]}, "Bowls and howls.", "An Owl."),
    ("keywords:letter_frequency", {"letter": "A", "let_frequency": 3, "let_relation": AT_LEAST}, "banana", "band"),
    ("length_constraints:number_words", {"num_words": 3, "relation": AT_LEAST}, "one, two three", "one two"),
    ("length_constraints:number_words", {"num_words": 3.0, "relation": LESS}, "one two", "one two three"),
    ("length_constraints:number_sentences", {"num_sentences": 3, "relation": LESS}, "Yes. It is 3.5!", "A. B? C."),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": AT_LEAST}, '"So." He left.', "So it is"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "one\n***\ntwo", "one\n\ntwo"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "***\none\n***\ntwo", "one *** *** two"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "weekend"},
        "a\n\nWeekend, at last",
        "weekend\n\nat last",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] of [town]", "[name] of town"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\nP. S. Call me", "Bye. PS"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "p.p.s more", "p.s. more"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n - b", "* a\n** b\nc"),
    ("detectable_format:constrained_response", {}, "My answer is no. Sorry.", "No."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and *b*", "*a* and * *"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Part", "num_sections": 2},
        "Part 1 a Part 2 b",
        "Part 1",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": [1, null]}\n```', "{'a': 1}"),
    ("detectable_format:title", {}, "<<On owls>>\nThey fly.", "<< >>\nOwls"),
    ("combination:two_responses", {}, "yes\n******\nno", "yes ****** yes"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Write a poem."}, "write a POEM. Roses", "Roses. Write a poem."),
    ("startend:end_checker", {"end_phrase": "Any questions?"}, 'So it is. "any questions?"', "Any questions? No."),
    ("startend:start_checker", {"start_phrase": "Well,"}, "  well, no", "No, well"),
    ("startend:quotation", {}, ' "so" ', '"so'),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": LESS},
        "NASA is big",
        "NASA IS big",
    ),
    ("change_case:english_capital", {}, "ALL OF IT, 3 TIMES!", "ALL OF it"),
    ("change_case:english_lowercase", {}, "all of it", "All of it"),
    ("punctuation:no_comma", {}, "no; never", "no, never"),
]


def row(*instructions: dict[str, Any]) -> PromptTokens:
    return PromptTokens([1], "?", "f:1", {"instructions": list(instructions)})


def judged(reply: str, *instructions: dict[str, Any], **options: Any) -> dict[str, float]:
    return verdict("instructions", build_rule("instructions", options, list), row(*instructions), reply, True)


@pytest.mark.parametrize(("name", "kwargs", "good", "bad"), CASES)
def test_checks_by_hand(name: str, kwargs: dict[str, Any], good: str, bad: str) -> None:
    instruction = {"id": name, "kwargs": {**kwargs, "other_field_of_the_table": None}}
    assert judged(good, instruction)["strict"] == 1.0
    assert judged(bad, instruction)["strict"] == 0.0
    assert judged("  \n", instruction)["strict"] == 0.0  # nothing follows nothing


def test_every_check_has_a_case() -> None:
    assert {name for name, *_ in CASES} == set(CHECKS)


def test_strict_and_loose_for_prompts_and_instructions() -> None:
    no_comma, title = {"id": "punctuation:no_comma"}, {"id": "detectable_format:title", "kwargs": {}}
    quoted = {"id": "startend:quotation", "kwargs": None}
    found = judged('Sure, here it is:\n"no comma"', no_comma, quoted)
    assert found == {"score": 0.0, "strict": 0.0, "loose": 1.0, "strict_share": 0.0, "loose_share": 1.0}
    assert judged('Sure:\n"so"\nAnything else?', quoted)["loose"] == 1.0  # without its first line and its last
    assert judged("plain", no_comma, title, share=True)["score"] == 0.5
    assert judged("Sure, this:\nplain", no_comma, loose=True)["score"] == 1.0


@pytest.mark.parametrize(
    ("instruction", "said"),
    [
        ({"id": "punctuation:no_coma"}, "did you mean 'punctuation:no_comma'"),
        ({"id": "language:response_language", "kwargs": {"language": "de"}}, "language:response_language"),
        ({"id": "startend:quotation", "kwargs": {"mark": "'"}}, "unknown field of the instruction startend:quotation"),
        ({"id": "startend:end_checker", "kwargs": {}}, "startend:end_checker lacks end_phrase"),
        (
            {"id": "length_constraints:number_words", "kwargs": {"num_words": 3, "relation": "at most"}},
            "unknown relation 'at most'",
        ),
        ({"id": "keywords:existence", "kwargs": {"keywords": "owl"}}, "expected a list"),
    ],
)
def test_what_cannot_be_verified_is_refused_by_name_and_row(instruction: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match="f:1") as refused:
        require_truth(["instructions"], [row(instruction)])
    assert said in str(refused.value)
    with pytest.raises(UserError, match="f:1"):
        judged("x", instruction)


def test_a_row_without_instructions_is_named() -> None:
    with pytest.raises(UserError, match="f:2:instructions: the rule instructions needs"):
        require_truth([None, "instructions"], [row({"id": "punctuation:no_comma"}), PromptTokens([1], "?", "f:2")])


def test_rows_of_ifeval_are_read_as_they_are() -> None:
    data = {
        "key": 1000,
        "prompt": "Write a poem without commas.",
        "instruction_id_list": ["punctuation:no_comma", "startend:quotation"],
        "kwargs": [{}, {}],
    }
    (record,) = Prompts({}, 0).records(PROMPT, iter([Row("f", 1, data)]))
    names = [each["id"] for each in record.meta["instructions"]]
    assert names == data["instruction_id_list"]
    (problem,) = Prompts({}, 0).records(PROMPT, iter([Row("f", 1, {**data, "kwargs": [{}]})]))
    assert isinstance(problem, UserError) and "as many kwargs" in str(problem)
    (other,) = Prompts({}, 0).records(PROMPT, iter([Row("f", 1, {"prompt": "a", "instructions": "be kind"})]))
    assert "instructions" not in other.meta

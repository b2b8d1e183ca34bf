"""Rule "instructions": the reply does what the row's instructions ask of its form, each verified by a program.

As in "Instruction-Following Evaluation for Large Language Models", arXiv 2311.07911, with its ids and fields, so that
its rows are read as they are; a reply counts as strict as it stands, and as loose without its first line, its last
line, or asterisks (section 2.2). No model and no network. What differs: sentences are counted by their signs, words in
capitals by letters, where the paper's code asks a trained tokenizer; `language:response_language` is not there, since
no rule tells it. Cost: a few searches of the reply for each instruction.
"""

from __future__ import annotations

import inspect
import json
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from data_prep.core.errors import UserError, unknown
from data_prep.core.options import convert
from reward.rules import rules

CHECKS: dict[str, Callable[..., bool]] = {}
"""Id of an instruction -> whether a reply follows it; the function's keywords are the instruction's fields."""
_FIELD = "instructions"


@rules.register("instructions")
class Instructions:
    """Verifies the row's `instructions`.

    Args:
        loose: the score is the loose verdict, not the strict one.
        share: the score is the share of the instructions that are followed, not whether all are.
    """

    reads_instructions: ClassVar[bool] = True

    def __init__(self, loose: bool = False, share: bool = False) -> None:
        self._key = ("loose" if loose else "strict") + ("_share" if share else "")

    @staticmethod
    def require(instructions: Sequence[Mapping[str, Any]]) -> None:
        """Refuse instructions that cannot be verified.

        Raises:
            UserError: an id that is not known, or fields that it does not have or lacks; says which.
        """
        for each in instructions:
            _check_of(each)

    def score(
        self,
        prompt_text: str,
        topic: str,
        reply_text: str,
        finished: bool,
        instructions: Sequence[Mapping[str, Any]],
    ) -> dict[str, float]:
        """strict, loose: all instructions are followed; strict_share, loose_share: the part of them that is.

        score is one of the four, as the options say. Whether the reply ended does not count.
        """
        checks = [_check_of(each) for each in instructions]
        loosened = _loosened(reply_text)
        strict = [bool(reply_text.strip()) and check(reply_text) for check in checks]
        loose = [any(text.strip() and check(text) for text in loosened) for check in checks]
        found = {
            "strict": float(all(strict)),
            "loose": float(all(loose)),
            "strict_share": sum(strict) / len(strict),
            "loose_share": sum(loose) / len(loose),
        }
        return {"score": found[self._key], **found}


def _check_of(instruction: Mapping[str, Any]) -> Callable[[str], bool]:
    """One instruction as a check of replies; fields that are null are not given."""
    name = str(instruction["id"])
    if name not in CHECKS:
        problem = unknown("instruction", name, CHECKS)
        raise UserError(problem.message, field=_FIELD, code=problem.code)
    follows = CHECKS[name]
    takes = dict(list(inspect.signature(follows).parameters.items())[1:])
    kinds = typing.get_type_hints(follows)
    given = {key: value for key, value in (instruction.get("kwargs") or {}).items() if value is not None}
    for key in given:
        if key not in takes:
            problem = unknown(f"field of the instruction {name}", key, takes)
            raise UserError(problem.message, field=_FIELD, code="bad_value")
    for key, each in takes.items():
        if key not in given and each.default is each.empty:
            raise UserError(f"the instruction {name} lacks {key}", field=_FIELD, code="bad_value")
    fields = {key: convert(kinds[key], value, f"{_FIELD}.{key}") for key, value in given.items()}
    for key, value in fields.items():
        if key.endswith("relation") and value not in _RELATIONS:
            problem = unknown("relation", value, _RELATIONS)
            raise UserError(problem.message, field=f"{_FIELD}.{key}", code="bad_value")
    return lambda reply: follows(reply, **fields)


def _loosened(reply: str) -> list[str]:
    """The reply as it is, and without its first line, its last line, both; each without asterisks too."""
    lines = reply.split("\n")
    cut = [reply, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*cut, *(text.replace("*", "") for text in cut)]


_RELATIONS: dict[str, Callable[[int, int], bool]] = {
    "less than": lambda count, wanted: count < wanted,
    "at least": lambda count, wanted: count >= wanted,
}


def _compare(count: int, relation: str, wanted: int) -> bool:
    return _RELATIONS[relation](count, wanted)


def _check(name: str) -> Callable[[Callable[..., bool]], Callable[..., bool]]:
    def register(follows: Callable[..., bool]) -> Callable[..., bool]:
        CHECKS[name] = follows
        return follows

    return register


def _count(text: str, word: str) -> int:
    return len(re.findall(re.escape(word.strip()), text, re.IGNORECASE))


@_check("keywords:existence")
def _existence(reply: str, keywords: list[str]) -> bool:
    return all(_count(reply, word) for word in keywords)


@_check("keywords:frequency")
def _frequency(reply: str, keyword: str, frequency: int, relation: str) -> bool:
    return _compare(_count(reply, keyword), relation, frequency)


@_check("keywords:forbidden_words")
def _forbidden_words(reply: str, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", reply, re.IGNORECASE) for word in forbidden_words)


@_check("keywords:letter_frequency")
def _letter_frequency(reply: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compare(reply.lower().count(letter.lower()), let_relation, let_frequency)


@_check("length_constraints:number_words")
def _number_words(reply: str, num_words: int, relation: str) -> bool:
    return _compare(len(re.findall(r"\w+", reply)), relation, num_words)


@_check("length_constraints:number_sentences")
def _number_sentences(reply: str, num_sentences: int, relation: str) -> bool:
    parts = re.split(r"(?<=[.!?\u3002\uff01\uff1f])[\"')\]]*\s+", reply.strip())
    return _compare(sum(1 for part in parts if re.search(r"\w", part)), relation, num_sentences)


@_check("length_constraints:number_paragraphs")
def _number_paragraphs(reply: str, num_paragraphs: int) -> bool:
    first, *middle = re.split(r"\s?\*\*\*\s?", reply)
    parts = [first, *middle]
    if not all(part.strip() for part in parts[1:-1]):
        return False
    return sum(1 for part in parts if part.strip()) == num_paragraphs


@_check("length_constraints:nth_paragraph_first_word")
def _nth_paragraph_first_word(reply: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts = re.split(r"\n\n", reply)
    if sum(1 for part in parts if part.strip()) != num_paragraphs or not 1 <= nth_paragraph <= len(parts):
        return False
    words = parts[nth_paragraph - 1].split()
    return bool(words) and words[0].lstrip("'\"").lower().rstrip(".,?!'\"") == first_word.lower()


@_check("detectable_content:number_placeholders")
def _number_placeholders(reply: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", reply)) >= num_placeholders


@_check("detectable_content:postscript")
def _postscript(reply: str, postscript_marker: str) -> bool:
    known = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return bool(
        re.search(known.get(postscript_marker.strip(), re.escape(postscript_marker.strip().lower())), reply.lower())
    )


@_check("detectable_format:number_bullet_lists")
def _number_bullets(reply: str, num_bullets: int) -> bool:
    return len(re.findall(r"^\s*(?:\*[^*].*|-.*)$", reply, re.MULTILINE)) == num_bullets


@_check("detectable_format:constrained_response")
def _constrained(reply: str) -> bool:
    return any(answer in reply for answer in ("My answer is yes.", "My answer is no.", "My answer is maybe."))


@_check("detectable_format:number_highlighted_sections")
def _highlights(reply: str, num_highlights: int) -> bool:
    found = [*re.findall(r"\*[^\n*]*\*", reply), *re.findall(r"\*\*[^\n*]*\*\*", reply)]
    return sum(1 for part in found if part.strip("*").strip()) >= num_highlights


@_check("detectable_format:multiple_sections")
def _sections(reply: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"\s?{re.escape(section_spliter.strip())}\s?\d+\s?", reply)) >= num_sections


@_check("detectable_format:json_format")
def _json(reply: str) -> bool:
    text = re.sub(r"^```(?:json|Json|JSON)?|```$", "", reply.strip()).strip()
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


@_check("detectable_format:title")
def _title(reply: str) -> bool:
    return any(title.strip() for title in re.findall(r"<<([^\n]+)>>", reply))


@_check("combination:two_responses")
def _two_responses(reply: str) -> bool:
    parts = reply.split("******")
    said = [part.strip() for part in parts if part.strip()]
    return all(part.strip() for part in parts[1:-1]) and len(said) == 2 and said[0] != said[1]


@_check("combination:repeat_prompt")
def _repeat_prompt(reply: str, prompt_to_repeat: str) -> bool:
    return reply.strip().lower().startswith(prompt_to_repeat.strip().lower())


@_check("startend:end_checker")
def _ends(reply: str, end_phrase: str) -> bool:
    return reply.strip().strip('"').lower().endswith(end_phrase.strip().lower())


@_check("startend:start_checker")
def _starts(reply: str, start_phrase: str) -> bool:
    return reply.strip().strip('"').lower().startswith(start_phrase.strip().lower())


@_check("startend:quotation")
def _quotation(reply: str) -> bool:
    text = reply.strip()
    return len(text) > 1 and text.startswith('"') and text.endswith('"')


@_check("change_case:capital_word_frequency")
def _capital_words(reply: str, capital_frequency: int, capital_relation: str) -> bool:
    found = sum(1 for word in re.findall(r"[\w'-]+", reply) if word.isupper())
    return _compare(found, capital_relation, capital_frequency)


@_check("change_case:english_capital")
def _upper(reply: str) -> bool:
    return reply.isupper()


@_check("change_case:english_lowercase")
def _lower(reply: str) -> bool:
    return reply.islower()


@_check("punctuation:no_comma")
def _no_comma(reply: str) -> bool:
    return "," not in reply

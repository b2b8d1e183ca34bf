"""What a column's name says of it: part of the question, an answer, a grade of the row, or none of these.

Names are compared by their words: `chatHistory`, `chat_history` and `Chat history` are one. Names that say where a row
comes from or how long it is (`source`, `context_id`, `article_url`, `num_tokens`), or that hold another's answer
(`gpt4_response`), have no role, whatever they are about: leaving them out changes no answer. A name that says nothing
is of the role `OTHER`: what stands under it decides.
"""

from __future__ import annotations

import re
from functools import lru_cache

QUESTION, CONTEXT, LONG_CONTEXT, ANSWER = "question", "context", "long context", "answer"
BETTER, WORSE, GRADE, THOUGHT, OTHER = "better", "worse", "grade", "thought", "other"


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^\W\d_]+")
_ABOUT = _names("""
    id ids uid uuid idx index url urls uri link len length lengths count counts num number n hash md5 sha lang language
    type types kind source sources name names author model date time timestamp version split format size chars words
    title titles category domain license dataset offset position start end fingerprint
""")
"""Words that make a name one about the thing, not the thing itself: `context_id`, `num_passages`."""
_WHOLE_NAMES = {
    QUESTION: _names("""
        question query prompt instruction problem user human request inquiry message conversation dialog dialogue ask
        inputs_pretokenized user_input user_prompt user_message user_query
    """),
    ANSWER: _names("""
        completion response output answer reply target solution assistant gpt bot targets_pretokenized label_text
        correct_answer best_answer gold_answer final_answer long_answer short_answer model_answer expected_output
        model_output assistant_response ideal_answer reference_answer
    """),
    BETTER: _names("better best preferred chosen"),
    WORSE: _names("worse worst dispreferred rejected"),
    LONG_CONTEXT: _names("""
        story description content sentence code note scenario scene setting theory case report review email transcript
        lyrics tweet post news law clause contract plot claim starter_code environment paper letter poem patient
    """),
    THOUGHT: _names("rationale explanation reasoning reasoning_content thinking thought think cot chain_of_thought"),
    GRADE: _names("label kto_tag good bad accepted"),
}
"""Role -> names that have it as they stand, in the singular."""
_CONTEXT = _names("""
    context ctx passage article paragraph document doc excerpt background evidence fact knowledge premise hypothesis
    abstract transcript history definition guideline rule constraint example demonstration demo fewshot shot option
    choice distractor ending candidate image img picture photo audio video speech attachment table schema persona
    personality profile hint tool function api memory retrieved retrieval search previous preceding scratchpad ocr
    screenshot support system prefix preamble input body text observation situation
""")
"""Words, in the singular, that make a name part of what is asked, wherever they stand in it."""
_NEARLY_ALONE = _names("input text prefix system hint option function rule api tool previous")
"""Words of `_CONTEXT` that do so only alone, or beside words of `_BESIDE`."""
_BESIDE = _names("""
    system message prompt instruction text data list available used user task extra additional input chat conversation
    dialog dialogue raw full retrieved path image definition turn the few shot description a b c d e
""")
_BY_THE_WAY = _names("""
    answer response completion generation output solution reply chosen rejected original orig meta metadata info extra
    config setting param header tag flag file folder embedding vector moderation test style task template log error
    annotator worker generator labelling mask
""")
"""Words, in the singular, that make a name one of another's answer, or of notes on how the row came about."""
_PICTURES = _names("image img picture photo audio video")
_GRADES = _names("""
    score rating grade reward correct incorrect correctness quality safe unsafe safety toxicity toxic harmful harmless
    harmlessness helpfulness honesty truthfulness accuracy accepted approved passed pass verified valid invalid vote
    upvote downvote star like thumb flagged acceptable hallucination hallucinated coherence verdict judgement judgment
    rank confidence good wrong right
""")
"""Words, in the singular, that make a name a grade of the row."""
_NO_PLURAL = _names("""
    hypothesis class address previous corpus process focus status analysis basis bias plus pass correctness helpfulness
    harmless harmlessness truthfulness is has
""")


@lru_cache(maxsize=4096)
def role_of(name: str) -> str | None:
    """The role of a column of this name; None for what changes no answer, `OTHER` where the name does not say."""
    words = [_singular(word.lower()) for word in _WORDS.findall(name)]
    words = words[1:] if words[:1] == ["source"] and len(words) > 1 else words  # source_text is the text
    whole = "_".join(words)
    for role, names in _WHOLE_NAMES.items():
        if whole in names:
            return role
    if re.fullmatch(r"[A-Ea-e]|op[a-e]", name.strip()):
        return CONTEXT  # the options of a question
    if not words or (not _ABOUT.isdisjoint(words) and _PICTURES.isdisjoint(words)):
        return None
    if any(_is_context(word, words) for word in words):
        return CONTEXT
    if not _GRADES.isdisjoint(words):
        return GRADE
    return OTHER if _BY_THE_WAY.isdisjoint(words) else None


def _is_context(word: str, words: list[str]) -> bool:
    alone = all(other == word or other in _BESIDE for other in words)
    return word in _CONTEXT and (alone or word not in _NEARLY_ALONE)


def _singular(word: str) -> str:
    if word in _NO_PLURAL or len(word) < 4 or not word.endswith("s"):
        return word
    if word.endswith(("ches", "shes", "xes")):
        return word[:-2]
    return f"{word[:-3]}y" if word.endswith("ies") else word[:-1]

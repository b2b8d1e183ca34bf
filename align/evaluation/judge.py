"""A judge over an OpenAI-compatible endpoint: which of two replies is better, asked in both orders.

"Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena", arXiv 2306.05685: pairwise comparison (section 3.1, figure 5),
and both orders against position bias (section 3.4): a reply wins where it wins in both, everything else is a tie. The
prompt is shorter than the paper's. Costs two requests a prompt; nothing is sent where no judge is named. No torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from align.evaluation.options import JudgeOptions
from data_prep.core.errors import TrainingStopped, UserError
from data_prep.core.http import NoAnswerError, ask_json, is_server, patiently
from reward.metrics import accuracy_interval

KEY = "ALIGN_JUDGE_KEY"
"""Environment variable with the key that requests carry. No other is read, so that no key goes where it should not."""
_FORM = "openai:"
_VERDICT = re.compile(r"\[\[(A|B|C)\]\]")
_ASKED = (
    "You compare two assistants' replies to the same conversation. Judge how helpful, relevant, accurate and clear "
    "each is. Neither their order nor their length shall count. Explain yourself briefly, then end with your verdict: "
    "[[A]] if reply A is better, [[B]] if reply B is better, [[C]] for a tie."
)


def judge_refusals(options: JudgeOptions, where: str) -> Iterator[UserError]:
    """Why a judge cannot be asked, known without asking it; `where` is `stages.NAME`."""
    if options.judge is None:
        return
    if not options.judge.startswith(_FORM) or not is_server(options.judge.removeprefix(_FORM)):
        yield UserError(
            f"not a judge (got {options.judge})",
            field=f"{where}.judge",
            code="bad_value",
            hint="as openai:http://HOST:PORT/v1, to which /chat/completions is added",
        )
    if not options.judge_model:
        yield UserError(
            "the judge has no model",
            field=f"{where}.judge_model",
            code="missing_option",
            hint="set judge.model=NAME, as the endpoint calls it",
        )


def judged(
    options: JudgeOptions, asked: Sequence[Sequence[Mapping[str, Any]]], own: Sequence[str], before: Sequence[str]
) -> dict[str, Any]:
    """How often replies win over those before them, ties counted half, with a 95 % Wilson interval.

    Args:
        asked: the messages that each pair of replies answers.

    Returns:
        value, low, high, n; of the n pairs `ties` (called so), `disagree` (orders that do not agree, ties as well); and
        `unread`, pairs without a verdict that can be read, which do not count.

    Raises:
        TrainingStopped: the endpoint gives no answer, or no verdict at all.
    """
    with ThreadPoolExecutor(options.judge_parallel) as pool:
        forward = pool.map(lambda row: _verdict(options, *row), zip(asked, own, before, strict=True))
        backward = pool.map(lambda row: _verdict(options, *row), zip(asked, before, own, strict=True))
        try:
            both = list(zip(forward, backward, strict=True))
        except NoAnswerError as problem:
            pool.shutdown(wait=False, cancel_futures=True)
            raise _stopped(options, str(problem)) from problem
    read = [pair for pair in both if None not in pair]
    if not read:
        raise _stopped(options, f"gave none of {len(both)} pairs a verdict that can be read ([[A]], [[B]] or [[C]])")
    wins = sum(pair == ("A", "B") for pair in read)
    losses = sum(pair == ("B", "A") for pair in read)
    ties = sum(pair == ("C", "C") for pair in read)
    value, low, high = accuracy_interval(wins + (len(read) - wins - losses) / 2, len(read))
    return {
        "value": value,
        "low": low,
        "high": high,
        "n": len(read),
        "ties": ties,
        "disagree": len(read) - wins - losses - ties,
        "unread": len(both) - len(read),
        "judge": options.judge_model,
        "endpoint": str(options.judge).removeprefix(_FORM),
    }


def _stopped(options: JudgeOptions, said: str) -> TrainingStopped:
    hint = f"the same command goes on; a key, where it wants one, stands in {KEY}"
    return TrainingStopped(f"the judge {str(options.judge).removeprefix(_FORM)} {said}", code="judge_failed", hint=hint)


def _verdict(options: JudgeOptions, asked: Sequence[Mapping[str, Any]], a: str, b: str) -> str | None:
    """A, B or C for a tie; None where the answer has no verdict."""
    talk = "\n\n".join(f"[{turn['role']}]\n{turn['content']}" for turn in asked)
    said = f"{talk}\n\n[reply A]\n{a}\n[end of reply A]\n\n[reply B]\n{b}\n[end of reply B]"
    body = {
        "model": options.judge_model,
        "messages": [{"role": "system", "content": _ASKED}, {"role": "user", "content": said}],
        "temperature": 0,
        "max_tokens": options.judge_tokens,
    }
    url = f"{str(options.judge).removeprefix(_FORM).rstrip('/')}/chat/completions"
    key = os.environ.get(KEY)
    headers = {"Authorization": f"Bearer {key}"} if key else None
    answer = patiently(
        lambda: ask_json(url, body, options.judge_timeout, headers), options.judge_retries, options.judge_wait
    )
    try:
        text = str(answer["choices"][0]["message"]["content"])
    except (KeyError, IndexError, TypeError) as problem:
        raise NoAnswerError('answered no {"choices": [{"message": ...}]}') from problem
    found = _VERDICT.findall(text)
    return found[-1] if found else None

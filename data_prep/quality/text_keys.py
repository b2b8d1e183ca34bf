"""What a record says: its whole text, its question, the replies that it teaches, and when two say the same."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

from data_prep.splitting import prompt_key
from data_prep.types import Conversation, Document, Labelled, Message, Preference, Prompt

_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+|[^\w\s]|_")


def question_messages(record: Any) -> tuple[Message, ...]:
    """What is asked: the prompt, or all that stands before a dialogue's last reply; nothing for a document."""
    if isinstance(record, Document):
        return ()
    if isinstance(record, Preference | Labelled):
        return record.prompt
    messages: tuple[Message, ...] = record.messages
    if isinstance(record, Conversation):
        last = max((place for place, m in enumerate(messages) if m.role == "assistant"), default=len(messages))
        return messages[:last]
    return messages


def question_key(record: Any) -> str:
    """What makes two records the same question for the split: the first user turn, or a document's whole text."""
    if isinstance(record, Document):
        return record.text.strip()
    return prompt_key(record.prompt if isinstance(record, Preference | Labelled) else record.messages)


def question_text(record: Any) -> str:
    """The question's words, without system messages; a document's whole text."""
    if isinstance(record, Document):
        return record.text
    return "\n".join(m.content for m in question_messages(record) if m.role != "system")


def replies(record: Any) -> list[str]:
    """What a record teaches: trained turns, the chosen or the labelled reply, a document; nothing of a prompt."""
    if isinstance(record, Document):
        return [record.text]
    if isinstance(record, Preference):
        return [record.chosen]
    if isinstance(record, Labelled):
        return [record.reply]
    if isinstance(record, Prompt):
        return []
    return [m.content for m in record.messages if m.role == "assistant" and m.trained and m.content]


def whole_text(record: Any) -> str:
    """Everything that a record says, system messages left out (they repeat by design)."""
    if isinstance(record, Document):
        return record.text
    parts = [question_text(record)]
    if isinstance(record, Preference):
        parts += [record.chosen, record.rejected]
    elif isinstance(record, Labelled):
        parts.append(record.reply)
    elif isinstance(record, Conversation):
        parts = [m.content for m in record.messages if m.role != "system"]
    return "\n".join(parts)


def texts_apart(record: Any) -> tuple[list[str], list[str]]:
    """What is asked, and what follows it, without system messages; the words of both are those of the whole text."""
    if isinstance(record, Document):
        return [record.text], []
    asked = question_messages(record)
    rest: Sequence[str] = ()
    if isinstance(record, Preference):
        rest = (record.chosen, record.rejected)
    elif isinstance(record, Labelled):
        rest = (record.reply,)
    elif isinstance(record, Conversation):
        rest = [m.content for m in record.messages[len(asked) :] if m.role != "system"]
    return [m.content for m in asked if m.role != "system"], list(rest)


def folded(text: str) -> str:
    """The text with case and runs of white space folded: what makes two texts the same."""
    return " ".join(text.casefold().split())


def digest(*parts: str) -> bytes:
    """16 bytes that stand for texts in sets and tables."""
    encoded = [part.encode("utf-8", "surrogatepass") for part in parts]
    whole = b"".join([len(one).to_bytes(8, "little") + one for one in encoded])
    return hashlib.blake2b(whole, digest_size=16).digest()


def turns_text(messages: tuple[Message, ...]) -> str:
    """One text that is the same for the same turns: roles, folded contents and tool calls."""
    parts = [part for m in messages for part in (m.role, folded(m.content), repr(m.calls) if m.calls else "")]
    return "\x1f".join(parts)  # white space, so no part has it


def row_digest(record: Any) -> bytes:
    """16 bytes that are the same for two records that say the same, case and white space aside."""
    if isinstance(record, Document):
        return digest(folded(record.text))
    tools = repr(record.tools) if record.tools else ""
    if isinstance(record, Preference):
        return digest(turns_text(record.prompt), folded(record.chosen), folded(record.rejected), tools)
    if isinstance(record, Labelled):
        return digest(turns_text(record.prompt), folded(record.reply), str(record.good), tools)
    return digest(turns_text(record.messages), tools)


def words(text: str) -> list[str]:
    """Words and signs in lower case; scripts written without spaces give one character each.

    None holds white space: the words of a text are those of its parts between spaces.
    """
    return _WORD.findall(text.casefold())

"""Small talk: the data set that comes with the package, computed and not stored.

Licence: Apache-2.0. Every sentence was written for this project; no third party's text is in it.

What: 76 topics of small talk, 80 user phrasings each (6,080 in all), and three personas (plain, cheerful,
pirate) with one fixed answer per topic, 228 answers that are all different. `rows` gives the answer table;
`text` gives the pretraining corpus of the embedded model nano: 14,000 documents, about 1.65 million
characters, 1,200 different words. Wrong-topic and damaged answers for preferences are made from the rows by
the format `answer_table`.

How: a topic has 5 to 9 core phrasings with slots. Their expansions, called wordings, are dressed with an
opener ("hey, ") or a closer (", please") or both. All choices are made by hashes of the text itself, so
they do not depend on the platform, the process or any seed.

Hold-out: in each topic 6 wordings (456 in all) are held out, chosen by hash. A held-out wording appears in
no train prompt and in no document, neither alone nor as a part, whatever its opener or closer. It is a new
sentence made of familiar parts: every word of it occurs in other wordings of its topic, and at least two
thirds of the expansions of its core phrasing stay in training. So the split measures how well paraphrases
are recognised, not unseen vocabulary.

In the corpus about one answer in three is another topic's, so that pretraining shows what goes together
without being the finished chatbot.
"""

from __future__ import annotations

import functools
import hashlib
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count, product
from typing import Any, NamedTuple

from data_prep.core.errors import UserError, unknown
from data_prep.generators.smalltalk_texts import Topic, frames, topics
from data_prep.sources.generated import GENERATORS

version = "1"
PERSONAS = ("plain", "cheerful", "pirate")
PHRASINGS_PER_TOPIC = 80
HELD_OUT_PER_TOPIC = 6
DOCUMENTS = 14_000
MIN_WORDS, MAX_WORDS = 3, 14
_MOST_BARE = 56
_SLOT = re.compile(r"\{([^{}]*)\}")


class Wording(NamedTuple):
    """One expansion of a core phrasing, without opener, closer and final mark."""

    core: int
    text: str
    mark: str
    kind: str


class Phrasing(NamedTuple):
    """One user prompt as it stands in the table."""

    topic: str
    prompt: str
    wording: Wording
    held_out: bool


def normalised(text: str) -> str:
    """Lower-case words with single spaces, no punctuation: the form in which phrasings are compared."""
    return " ".join(re.findall(r"[a-z0-9']+", text.lower()))


def rows(options: Mapping[str, Any] | None = None) -> list[dict[str, str]]:
    """The answer table, one row per phrasing: topic, prompt, plain, cheerful, pirate, split.

    Args:
        options: none are known yet; must be empty.

    Raises:
        UserError: an unknown option.
    """
    _checked(options, ())
    return [
        {
            "topic": phrasing.topic,
            "prompt": phrasing.prompt,
            **{persona: getattr(topic, persona) for persona in PERSONAS},
            "split": "eval" if phrasing.held_out else "train",
        }
        for topic in topics()
        for phrasing in _phrasings()[topic.name]
    ]


def text(options: Mapping[str, Any] | None = None) -> list[str]:
    """The pretraining documents: plain text, train phrasings only, no control tokens.

    Document i depends on i alone, so a smaller corpus is the beginning of a larger one.

    Args:
        options: documents (int >= 1, default 14000).

    Raises:
        UserError: an unknown option or a count that is not a positive whole number.
    """
    wanted = _checked(options, ("documents",)).get("documents", DOCUMENTS)
    if not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1:
        raise UserError(f"option 'documents' must be a whole number >= 1, not {wanted!r}", field="documents")
    return [_document(index) for index in range(wanted)]


@GENERATORS.register("smalltalk")
class SmallTalk:
    """The registry's entry for this module: the same version, rows and text."""

    version = version
    rows = staticmethod(rows)
    text = staticmethod(text)


def _checked(options: Mapping[str, Any] | None, known: Sequence[str]) -> Mapping[str, Any]:
    """The options, or an error that names the first unknown one."""
    for key in options or {}:
        if key not in known:
            raise unknown("option of the generator smalltalk", str(key), known)
    return options or {}


# --- phrasings ---


def _rank(*parts: object) -> bytes:
    """A sort key that looks random and is the same on every platform."""
    return hashlib.sha256("|".join(map(str, parts)).encode()).digest()


def _wordings(topic: Topic) -> list[Wording]:
    """All expansions of a topic's core phrasings, in order and without repeats."""
    found: dict[str, Wording] = {}
    for core, pattern in enumerate(topic.ask):
        request, body, mark = pattern.startswith("*"), pattern.lstrip("*")[:-1], pattern[-1]
        kind = "request" if request else "question" if mark == "?" else "statement"
        kind = "social" if topic.social else kind
        pieces = [piece.split("|") if odd % 2 else [piece] for odd, piece in enumerate(_SLOT.split(body))]
        for choice in product(*pieces):
            wording = " ".join("".join(choice).split())
            found.setdefault(normalised(wording), Wording(core, wording, mark, kind))
    return list(found.values())


def _held_out(topic: str, wordings: list[Wording], everything: str) -> set[str]:
    """Choose the wordings to hold out: by hash, at most a third of each core, no word that train lacks."""
    chosen: set[str] = set()
    sizes = Counter(wording.core for wording in wordings)
    taken: Counter[int] = Counter()
    plain = {wording.text: normalised(wording.text) for wording in wordings}
    left = Counter(word for line in plain.values() for word in set(line.split()))
    for wording in sorted(wordings, key=lambda wording: _rank("held out", topic, plain[wording.text])):
        words = set(plain[wording.text].split())
        if (
            3 * (taken[wording.core] + 1) > sizes[wording.core]
            or not MIN_WORDS <= len(plain[wording.text].split()) <= MAX_WORDS - 4
            or everything.count(f" {plain[wording.text]} ") > 1  # it is a part of another wording
            or any(left[word] < 2 for word in words)  # training would never see the word in this topic
        ):
            continue
        left.subtract(words)
        chosen.add(wording.text)
        taken[wording.core] += 1
        if len(chosen) == HELD_OUT_PER_TOPIC:
            break
    return chosen


def _forms(wording: Wording) -> tuple[list[str], list[str], list[str]]:
    """The wording alone (or nothing, if too short), with an opener or a closer, and with both."""
    words = wording.text.lower().split()
    openers = [opener for opener in frames().openers[wording.kind] if opener.strip(" ,") not in words]
    closers = [closer for closer in frames().closers[wording.kind] if "friend" not in wording.text]
    one = [opener + wording.text for opener in openers] + [wording.text + closer for closer in closers]
    both = [
        opener + wording.text + closer
        for opener in openers
        for closer in closers
        if opener.strip(" ,") != closer.strip(" ,")
    ]
    alone, one, both = (
        [form + wording.mark for form in forms if MIN_WORDS <= len(form.split()) <= MAX_WORDS]
        for forms in ([wording.text], one, both)
    )
    return alone, one, both


def _styled(form: str) -> str:
    """Three of four forms as a sentence; the others in casual lower case, half of those without the mark."""
    style = _rank("style", form)[0] % 8
    if style > 1:
        return form[0].upper() + form[1:]
    return form.lower() if style == 1 else form.lower().rstrip("?.!")


@functools.lru_cache(maxsize=1)
def _phrasings() -> dict[str, tuple[Phrasing, ...]]:
    """The phrasings of every topic: first those for training, then the held-out ones."""
    wordings = {topic.name: _wordings(topic) for topic in topics()}
    everything = "  ".join(normalised(wording.text) for group in wordings.values() for wording in group)
    everything = f" {everything} ".replace("  ", " | ")
    table: dict[str, tuple[Phrasing, ...]] = {}
    for name, group in wordings.items():
        held = _held_out(name, group, everything)
        kept: list[Phrasing] = []
        bare: list[tuple[str, Wording]] = []
        dressed: list[tuple[str, Wording]] = []
        for wording in group:
            draw = _Draw(f"{name}|{wording.text}")
            alone, one, both = _forms(wording)
            if wording.text in held:
                form = draw.pick(draw.pick((alone, alone, one)))
                kept.append(Phrasing(name, _styled(form), wording, True))
                continue
            bare += [(form, wording) for form in alone]
            dressed += [(form, wording) for form in draw.some(one, 4) + draw.some(both, 1)]
        bare.sort(key=lambda pair: _rank("bare", pair[0]))
        dressed.sort(key=lambda pair: _rank("dressed", pair[0]))
        train = (bare[:_MOST_BARE] + dressed)[: PHRASINGS_PER_TOPIC - len(kept)]
        table[name] = (*(Phrasing(name, _styled(form), wording, False) for form, wording in train), *kept)
    return table


# --- pretraining text ---


class _Draw:
    """A stream of choices made from a hash of its name: the same everywhere, no global state."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._numbers = self._stream()

    def _stream(self) -> Iterator[int]:
        block = 0
        while True:
            yield from struct.unpack("<16I", hashlib.blake2b(f"{self._name}|{block}".encode()).digest())
            block += 1

    def below(self, limit: int) -> int:
        """A whole number from 0 to limit - 1."""
        return next(self._numbers) % limit

    def pick(self, choices: Sequence[Any]) -> Any:
        """One of the choices."""
        return choices[self.below(len(choices))]

    def some(self, choices: Sequence[Any], count: int) -> list[Any]:
        """Several different choices, in random order."""
        left = list(choices)
        return [left.pop(self.below(len(left))) for _ in range(min(count, len(left)))]


@functools.lru_cache(maxsize=1)
def _train_lines() -> dict[str, tuple[str, ...]]:
    """Per topic the train prompts, each closed by its mark so that prose can go on after it."""
    return {
        name: tuple(
            line.prompt if line.prompt[-1] in "?.!" else line.prompt + line.wording.mark
            for line in group
            if not line.held_out
        )
        for name, group in _phrasings().items()
    }


def _fields(draw: _Draw, topic: Topic) -> dict[str, Any]:
    """Values for the fields that all frames share."""
    persona = draw.pick(PERSONAS)
    a, b = draw.some(frames().names, 2)
    f, g = draw.some(topic.facts, 2)
    other, third = draw.some([other for other in topics() if other.name != topic.name], 2)
    words = draw.some(topic.words, 4)
    return {
        "a": a,
        "b": b,
        "about": topic.about,
        "other": other.about,
        "third": third.about,
        "f": f,
        "g": g,
        "h": draw.pick(other.facts),
        "place": draw.pick(frames().places),
        "role": draw.pick(frames().roles[persona]),
        "r": getattr(topic, persona),
        "persona": persona,
        "w": ", ".join(words),
        "one": words[0],
        "n": draw.pick(frames().numbers),
    }


def _transcript(draw: _Draw, topic: Topic) -> str:
    """One to three questions with answers; about one answer in three belongs to another topic."""
    fields = _fields(draw, topic)
    frame = draw.pick(frames().scripts if draw.below(2) else frames().prose)
    lines = []
    for turn in range(1 if frame in frames().prose else draw.pick((1, 1, 2, 3))):
        subject = topic if turn == 0 else draw.pick(topics())
        source = draw.pick(topics()) if draw.below(3) == 0 else subject
        question = draw.pick(_train_lines()[subject.name])
        lines.append(frame.format(**{**fields, "q": question, "r": getattr(source, fields["persona"])}))
    return "\n".join(lines)


def _note(draw: _Draw, topic: Topic) -> str:
    """Paraphrases of one topic side by side, or the topic and an answer."""
    fields = _fields(draw, topic)
    if draw.below(4) == 0:
        return str(draw.pick(frames().replies).format(**fields))
    return str(draw.pick(frames().notes).format(*draw.some(_train_lines()[topic.name], 4), **fields))


def _story(draw: _Draw, topic: Topic) -> str:
    """Two to four sentences around the topic."""
    return str(draw.pick(frames().stories).format(**_fields(draw, topic)))


def _list(draw: _Draw, topic: Topic) -> str:
    """A list of words, topics or facts."""
    return str(draw.pick(frames().lists).format(**_fields(draw, topic)))


_Kind = Callable[[_Draw, Topic], str]
_KINDS: tuple[_Kind, ...] = (_transcript,) * 5 + (_note,) * 2 + (_story,) * 2 + (_list,)


@functools.lru_cache(maxsize=1)
def _held_out_words() -> dict[tuple[str, ...], list[list[str]]]:
    """The held-out wordings as lists of words, by their first three words."""
    table: dict[tuple[str, ...], list[list[str]]] = {}
    for group in _phrasings().values():
        for words in (normalised(line.wording.text).split() for line in group if line.held_out):
            table.setdefault(tuple(words[:MIN_WORDS]), []).append(words)
    return table


def _leaks(document: str) -> bool:
    """Whether a held-out wording stands in the document, even across the end of a sentence."""
    words, table = normalised(document).split(), _held_out_words()
    return any(
        words[start : start + len(held)] == held
        for start, key in enumerate(zip(words, words[1:], words[2:], strict=False))
        for held in table.get(key, ())
    )


def _document(index: int) -> str:
    """Document number `index`: its kind and topic drawn by hash, its first letter in upper case.

    Two neighbouring sentences may form a held-out wording by chance; then the document is drawn anew.
    """
    for attempt in count():
        draw = _Draw(f"smalltalk {version} document {index} {attempt}")
        kind: _Kind = draw.pick(_KINDS)
        document = kind(draw, draw.pick(topics()))
        if not _leaks(document):
            return document[0].upper() + document[1:]
    raise AssertionError("unreachable")

"""Sentence frames, names and places for the small-talk pretraining text (own text, Apache-2.0).

Fields of the frames: ``a`` and ``b`` are two people, ``role`` is somebody who speaks like the persona,
``q`` and ``r`` are a prompt and an answer, ``0`` to ``3`` prompts of one topic, ``about`` is the topic in
words, ``other`` and ``third`` are other topics, ``f`` and ``g`` facts about the topic, ``h`` a fact about
the other one, ``w`` a list of key words, ``one`` a key word, ``place`` a place, ``n`` a number in words.
"""

from __future__ import annotations

OPENERS: dict[str, tuple[str, ...]] = {
    "question": ("hey, ", "so, ", "say, ", "by the way, ", "okay, ", "well, ", "now, ", "hmm, "),
    "request": ("please ", "hey, ", "okay, ", "now ", "come on, ", "well, ", "so, "),
    "statement": ("hey, ", "well, ", "oh, ", "you know, ", "listen, ", "look, ", "hmm, "),
    "social": ("oh, ", "well, ", "ah, ", "okay, ", "so, "),
}
CLOSERS: dict[str, tuple[str, ...]] = {
    "question": (", friend", ", my friend", ", buddy"),
    "request": (", please", ", friend", ", my friend", ", buddy"),
    "statement": (", friend", ", my friend", ", buddy", ", you know"),
    "social": (", friend", ", my friend", ", buddy", ", my dear"),
}

NAMES: tuple[str, ...] = ("Sam", "Kim", "Ann", "Ben", "Lea", "Tom", "Mia", "Max", "Eva", "Leo", "Ida", "Joe")
PLACES: tuple[str, ...] = (
    "in the park",
    "at the market",
    "in the kitchen",
    "on the bus",
    "at the harbour",
    "in the library",
    "under a tree",
    "in front of the house",
    "on the beach",
    "at the station",
)
ROLES: dict[str, tuple[str, ...]] = {
    "plain": ("The clerk", "The quiet neighbour", "The teacher", "The doctor"),
    "cheerful": ("The cheerful host", "The merry baker", "The happy neighbour", "The friendly guest"),
    "pirate": ("The sailor", "The captain", "The old pirate", "The man with the hook"),
}

SCRIPTS: tuple[str, ...] = (
    "{a}: {q}\n{b}: {r}",
    "- {q}\n- {r}",
    "Q: {q}\nA: {r}",
)
PROSE: tuple[str, ...] = (
    "Someone said: {q} {role} answered: {r}",
    '{a} looked at {b}. "{q}" The answer was: "{r}"',
    '"{q}" said {a}. "{r}" said {b}.',
    "A guest began: {q} {role} replied: {r}",
    "{a} and {b} met {place}. {a} said: {q} {b} answered: {r}",
    "They talked about {about}. First came the words: {q} Then came the answer: {r}",
    "In a play a child says: {q} {role} then says: {r}",
)
NOTES: tuple[str, ...] = (
    "You can say it like this: {0} Or like this: {1}",
    "{0}\nThe same in other words: {1}",
    "These lines mean the same:\n- {0}\n- {1}\n- {2}",
    "When people talk about {about}, they say: {0} They also say: {1}",
    "{a} says: {0} {b} would say: {1} Both talk about {about}.",
    "Many ways to talk about {about}: {0} {1} {2} {3}",
)
REPLIES: tuple[str, ...] = (
    "About {about} one can say: {r}",
    "{role} likes to talk about {about} and says: {r}",
    '{role} said "{r}" and everybody knew that it was about {about}.',
    "A line about {about}: {r}",
)
STORIES: tuple[str, ...] = (
    "{a} and {b} met {place}. They talked about {about}. {f}",
    "{a} sat {place} and thought about {about}. {f} {g}",
    "{f} {g} That is what {a} wrote about {about}.",
    "{a} knows a lot about {about}. {b} wanted to know more. So they met {place}. {f}",
    "It was a quiet afternoon {place}. {f} {a} told {b} about {about}, and they stayed until the evening.",
    "{a} asked {n} people about {about}. Most of them said the same. {f}",
    "{b} came late. {a} was waiting {place} and reading about {about}. {g}",
    '{a} said: "{f}" {b} answered: "{g}" They both liked to talk about {about}.',
    "First they talked about {about}. Then they talked about {other}. {f}",
    "{role} came by and said: {r} {a} smiled. {f}",
)
LISTS: tuple[str, ...] = (
    "Words about {about}: {w}.",
    "Things that people talk about: {about}, {other} and {third}.",
    "A list for today:\n1. {about}\n2. {other}\n3. {third}",
    "{a} likes to talk about {about}. {b} likes to talk about {other}.",
    "The word {one} belongs to {about}, not to {other}.",
    "Chapter {n}: {about}. Here are the words: {w}.",
    "Short notes:\n- {f}\n- {h}",
)
NUMBERS: tuple[str, ...] = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "twelve")

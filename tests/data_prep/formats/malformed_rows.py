"""Rows that cannot mean what their format says, each with the place and the words of its complaint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from data_prep.types import CONVERSATION, PREFERENCE, UNPAIRED

NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Bad:
    """A bad row between good ones: `field` and `words` of the complaint; `flat` rows fit a table of texts."""

    name: str
    kind: str
    good: dict[str, Any]
    changed: dict[str, Any]
    field: str
    words: str
    only: str = ""
    """Containers that can hold it, where not all can (one letter each: l jsonl, j json, c csv, p parquet)."""

    @property
    def row(self) -> dict[str, Any]:
        """The good row with the change; a value of DROP takes a column out."""
        return {key: value for key, value in {**self.good, **self.changed}.items() if value != DROP}


DROP = "<no such column>"
TALK = {"prompt": "question", "completion": "answer"}
PAIR = {"prompt": "question", "chosen": "yes", "rejected": "no", "margin": 1.0}
HUMAN = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
HH = {"chosen": HUMAN + " y", "rejected": HUMAN + " n"}
USER, SAID = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CHAT = {"messages": [USER, SAID]}
GPT = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
KTO = {"prompt": "q", "completion": "a", "label": True}
KTO_CHAT = {"messages": [USER, SAID], "label": True}
GRADED = {"instruction": "q", "output_1": "x", "output_2": "y", "preference": 1.25}
RANKED = {"prompt": "q", "responses": ["x", "y"], "ranks": [1, 2]}
SEED = {"instruction": "q", "instances": [{"input": "", "output": "a"}]}
ALPACA = {"instruction": "q", "input": "", "output": "a"}
RANKING = {"conversations": [{"from": "human", "value": "a"}], "chosen": {"from": "gpt", "value": "y"}}
RANKING |= {"rejected": {"from": "gpt", "value": "n"}}


def chat(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


def call(arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


C, P, K = CONVERSATION, PREFERENCE, UNPAIRED
BAD = [
    Bad("empty question", C, TALK, {"prompt": ""}, "prompt", "empty"),
    Bad("blank question", C, TALK, {"prompt": " \n\t "}, "prompt", "empty"),
    Bad("invisible question", C, TALK, {"prompt": "\u200b\ufeff"}, "prompt", "empty"),
    Bad("wide blank question", C, TALK, {"prompt": "\u3000\xa0"}, "prompt", "empty"),
    Bad("empty answer", C, TALK, {"completion": ""}, "completion", "empty"),
    Bad("blank answer", C, TALK, {"completion": "   "}, "completion", "empty"),
    Bad("an end mark alone", C, TALK, {"completion": "<|endoftext|>"}, "completion", "empty"),
    Bad("null question", C, TALK, {"prompt": None}, "prompt", "got null", "ljp"),
    Bad("number for a question", C, TALK, {"prompt": 3}, "prompt", "got a number 3", "lj"),
    Bad("truth for a question", C, TALK, {"prompt": True}, "prompt", "got true or false", "lj"),
    Bad("object for text", C, TALK, {"prompt": {"a": 1}}, "prompt", "got an object", "lj"),
    Bad("list of numbers", C, TALK, {"completion": [1, 2]}, "completion[0]", "got a number", "lj"),
    Bad("lone surrogate", C, TALK, {"completion": "a\ud800"}, "completion", "lone surrogate", "lj"),
    Bad("lacking answer", C, TALK, {"completion": DROP}, "completion", "is missing", "lj"),
    Bad("misspelt column", C, TALK, {"completion": DROP, "complétion": "a"}, "completion", "did you mean", "lj"),
    Bad("unknown split", C, {**TALK, "split": "train"}, {"split": "trian"}, "split", "unknown split"),
    Bad("empty instruction", C, ALPACA, {"instruction": ""}, "instruction", "empty"),
    Bad("empty output", C, ALPACA, {"output": "\n"}, "output", "empty"),
    Bad("number as input", C, ALPACA, {"input": 5}, "input", "wrong type", "lj"),
    Bad("history of one", C, {**ALPACA, "history": [["a", "b"]]}, {"history": [["a"]]}, "history[0]", "[question"),
    Bad("blank history", C, {**ALPACA, "history": [["a", "b"]]}, {"history": [["a", ""]]}, "history[0][1]", "empty"),
    Bad("equal sides", P, PAIR, {"rejected": "yes"}, "rejected", "the same as chosen"),
    Bad("sides equal but for blanks", P, PAIR, {"rejected": " yes\n"}, "rejected", "the same as chosen"),
    Bad("empty chosen", P, PAIR, {"chosen": ""}, "chosen", "empty"),
    Bad("blank rejected", P, PAIR, {"rejected": "\t"}, "rejected", "empty"),
    Bad("no rejected", P, PAIR, {"rejected": None}, "rejected", "got null", "ljp"),
    Bad("empty prompt of a pair", P, PAIR, {"prompt": ""}, "prompt", "empty"),
    Bad("margin in words", P, {**PAIR, "margin": "1"}, {"margin": "much"}, "margin", "expected a number"),
    Bad("margin NaN", P, PAIR, {"margin": NAN}, "margin", "expected a number", "cp"),
    Bad("margin infinite", P, PAIR, {"margin": INF}, "margin", "expected a number", "cp"),
    Bad("no dialogue", P, HH, {"chosen": "hello"}, "chosen", "is not a dialogue"),
    Bad("other prompts", P, HH, {"rejected": HUMAN.replace("c", "x") + " n"}, "rejected", "differs from chosen"),
    Bad("ends with the human", P, HH, {"chosen": HUMAN + " y\n\nHuman: more"}, "chosen", "ends in a user turn"),
    Bad("silent assistant", P, HH, {"chosen": HUMAN}, "chosen", "turn 4 (assistant) is empty"),
    Bad(
        "no prompt at all",
        P,
        HH,
        {"chosen": "\n\nAssistant: y", "rejected": "\n\nAssistant: n"},
        "chosen",
        "has no prompt",
    ),
    Bad("equal dialogues", P, HH, {"rejected": HH["chosen"]}, "rejected", "the same as chosen"),
    Bad("unknown role", C, CHAT, chat({"role": "robot", "content": "a"}, SAID), "messages[0].role", "unknown role"),
    Bad(
        "misspelt role", C, CHAT, chat({"role": "usr", "content": "a"}, SAID), "messages[0].role", "did you mean 'user'"
    ),
    Bad("no role", C, CHAT, chat({"content": "a"}, SAID), "messages[0].role", "unknown role (got None"),
    Bad(
        "role is a number", C, CHAT, chat({"role": 1, "content": "a"}, SAID), "messages[0].role", "unknown role", "ljc"
    ),
    Bad("no assistant", C, CHAT, chat(USER), "messages", "no assistant turn"),
    Bad("no messages", C, CHAT, chat(), "messages", "empty"),
    Bad("no content", C, CHAT, chat({"role": "user"}, SAID), "messages[0].content", "got null"),
    Bad("blank content", C, CHAT, chat(USER, {**SAID, "content": " "}), "messages[1].content", "empty"),
    Bad(
        "content is a number", C, CHAT, chat({**USER, "content": 7}, SAID), "messages[0].content", "got a number", "ljc"
    ),
    Bad(
        "an image",
        C,
        CHAT,
        chat({**USER, "content": [{"type": "image_url"}]}, SAID),
        "messages[0].content[0]",
        "expected a text part",
        "ljc",
    ),
    Bad("messages in words", C, CHAT, {"messages": "hello"}, "messages", "expected a list of messages", "ljc"),
    Bad("messages of words", C, CHAT, chat("hello"), "messages[0]", "expected an object", "ljc"),
    Bad("train in words", C, CHAT, chat(USER, {**SAID, "train": "no"}), "messages[1].train", "expected true or false"),
    Bad("nothing trains", C, CHAT, chat(USER, {**SAID, "train": False}), "messages", "without train: false"),
    Bad("weight below 0", C, CHAT, chat(USER, {**SAID, "weight": -1}), "messages[1].weight", "at least 0"),
    Bad("weight in words", C, CHAT, chat(USER, {**SAID, "weight": "x"}), "messages[1].weight", "expected a number"),
    Bad(
        "broken call",
        C,
        CHAT,
        chat(USER, call("{x"), SAID),
        "messages[1].tool_calls[0].arguments",
        "invalid JSON",
        "ljc",
    ),
    Bad(
        "call of a list",
        C,
        CHAT,
        chat(USER, call([1]), SAID),
        "messages[1].tool_calls[0].arguments",
        "expected an object",
        "ljc",
    ),
    Bad(
        "tool without a name",
        C,
        {**CHAT, "tools": [{"name": "f"}]},
        {"tools": [{"name": None}]},
        "tools[0].name",
        "null",
    ),
    Bad(
        "unknown speaker",
        C,
        GPT,
        {"conversations": [{"from": "humn", "value": "a"}, GPT["conversations"][1]]},
        "conversations[0].from",
        "did you mean 'human'",
    ),
    Bad("nobody answers", C, GPT, {"conversations": GPT["conversations"][:1]}, "conversations", "no assistant turn"),
    Bad(
        "call in words",
        C,
        GPT,
        {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "f()"}]},
        "conversations[1].value",
        "invalid JSON",
    ),
    Bad("no label", K, KTO, {"label": None}, "label", "expected true or false", "ljp"),
    Bad("label in words", K, {**KTO, "label": "true"}, {"label": "maybe"}, "label", "expected true or false"),
    Bad("label NaN", K, {**KTO, "label": "1"}, {"label": "nan"}, "label", "expected true or false"),
    Bad("nothing judged", K, KTO_CHAT, chat(USER), "messages", "ends in a user turn"),
    Bad("grade out of range", P, GRADED, {"preference": 3.5}, "preference", "out of range"),
    Bad("grade NaN", P, GRADED, {"preference": NAN}, "preference", "expected a number", "cp"),
    Bad("blank output", P, GRADED, {"output_2": ""}, "output_2", "empty"),
    Bad("equal outputs", P, GRADED, {"output_2": "x"}, "rejected", "the same"),
    Bad("too few ranks", P, RANKED, {"ranks": [1]}, "ranks", "got 1 values; expected a list of 2"),
    Bad("one reply", P, RANKED, {"responses": ["x"], "ranks": [1]}, "responses", "has one reply"),
    Bad("blank reply", P, RANKED, {"responses": ["x", " "]}, "responses[1]", "empty"),
    Bad("no instance", C, SEED, {"instances": []}, "instances", "empty"),
    Bad("instance without output", C, SEED, {"instances": [{"input": "x", "output": ""}]}, "output", "empty"),
    Bad("answer as a question", P, RANKING, GPT, "conversations", "nothing to reply to"),
    Bad("chosen by a human", P, RANKING, {"chosen": {"from": "human", "value": "y"}}, "chosen", "ends in a user turn"),
    Bad("equal ways on", P, RANKING, {"rejected": RANKING["chosen"]}, "rejected", "the same as chosen"),
]

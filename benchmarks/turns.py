"""Whether a model of the quickstart keeps to the topic when a chat goes on: greedy replies to three held-out questions.

python benchmarks/turns.py TARGET [--out runs] [--chats 20]

Every question of a chat is of a topic of its own, drawn by a seed; a reply counts when it is a known reply on the topic
of the last question (`reward/rules/known_reply.py`).
"""

from __future__ import annotations

import argparse
import random

from align.serving.conversation import Conversation, Panel
from align.serving.options import ChatOptions, find_policy
from data_prep.generators.smalltalk import PERSONAS, rows
from reward.rules.known_reply import KnownReply

TURNS = 3


def main() -> None:
    """Print the share of replies on their topic, turn by turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--out", default="runs")
    parser.add_argument("--chats", type=int, default=20)
    given = parser.parse_args()
    table = rows()
    rule = KnownReply(table, "topic", list(PERSONAS), "cheerful")
    asked, draw = [row for row in table if row["split"] == "eval"], random.Random(0)
    options = ChatOptions(temperature=0.0, max_new_tokens=64, reward=False, seed=0)
    panel = Panel(find_policy(given.target, given.out)[0], options)
    kept = [0.0] * TURNS
    for _ in range(given.chats):
        talk = Conversation(None)
        for turn in range(TURNS):
            row = draw.choice(asked)
            for _event in panel.answer(talk, row["prompt"], [panel.main], options):
                pass
            reply = talk.turns[-1].replies[panel.main]
            kept[turn] += rule.score(row["prompt"], row["topic"], reply.text, reply.finished)["topic"]
    shares = ", ".join(f"{count / given.chats:.0%}" for count in kept)
    print(f"{given.target}: {shares} of {given.chats} replies on their topic, by turn")


if __name__ == "__main__":
    main()

"""From people's judgements to a better reward model, with a program in the place of people: `make loop`.

    python benchmarks/loop.py [init=RUN/sft] [OVERRIDES of every run]

The quickstart is run; `align label` serves pairs of its SFT's and its PPO's replies; a judge who knows the generator's
answers chooses between them through the page's own requests; the reward model is trained again on the same pairs with
the labels among them, and PPO goes on against it from the policy that was labelled. Gold scores of both policies are
compared on the held-out prompts, none of which is labelled. With `init` the first run begins with a reward model on
that checkpoint.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from align.checkpoints.lineage import lineage
from align.cli.dispatch import main as align
from data_prep.core.files import json_lines
from data_prep.core.hashing import file_sha256
from reward.metrics import paired_difference

PAIRS = 60
Judge = Callable[[list[dict[str, str]], str, str], str]
"""(prompt, reply a, reply b) -> a, b, tie or bad."""


def gold_parts(words: Sequence[str] = ()) -> Callable[[str, str, bool], dict[str, float]]:
    """The parts of the gold score of (question, reply, whether it ended) by the known answers.

    Args:
        words: choose the data; by default the quickstart's.
    """
    from align.config.compose import compose
    from data_prep.records.stream import source_rows
    from reward.rules import build_rule

    data = compose(["pipeline=evaluate", *words]).stages[0].data
    rows = source_rows(data, data.gold.source)
    rule: Any = build_rule(str(data.gold.rule), data.gold.options, lambda: rows)
    topics = {row["prompt"]: str(row[data.gold.options["topic"]]) for row in rows}
    return lambda asked, reply, ended: rule.score(asked, topics[asked], reply, ended)


def gold_judge() -> Judge:
    """Prefers the reply with the higher gold score; of two alike, the one with more parts of it right."""
    parts_of = gold_parts()

    def points(asked: str, reply: str) -> float:
        parts = parts_of(asked, reply, True)
        return 10 * parts["score"] + sum(parts.values())

    def judge(prompt: list[dict[str, str]], a: str, b: str) -> str:
        left, right = (points(prompt[-1]["content"], reply) for reply in (a, b))
        return ("tie" if left else "bad") if left == right else "a" if left > right else "b"

    return judge


def vote(address: str, **content: Any) -> dict[str, Any]:
    """What the page of `align label` would show next, asked for as the page asks."""
    url, _, token = address.partition("?token=")
    headers = {"Content-Type": "application/json", "X-Align-Token": token}
    body = json.dumps({"labeller": "judge", **content}).encode()
    with urllib.request.urlopen(urllib.request.Request(f"{url}vote", body, headers), timeout=60) as answer:
        found: dict[str, Any] = json.loads(answer.read())
    return found


def labelled(run: Path, out: Path, judge: Judge, *options: str) -> None:
    """Let a judge choose between all pairs of the page that `align label` serves."""
    command = [sys.executable, "-m", "align.cli", "label", str(run), "--port", "0", f"out={out}", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        line = server.stdout.readline()  # its address, once the replies are there
        try:
            if not line:
                raise SystemExit("align label ended before it had an address")
            address = line.split()[-1]
            state = vote(address)
            while (pair := state["pair"]) is not None:
                choice = judge(pair["prompt"], pair["a"], pair["b"])
                state = vote(address, pair=pair["key"], choice=choice, seconds=1)
        finally:
            server.send_signal(signal.SIGINT)


def on(sft: Path, policy: Path) -> list[str]:
    """Overrides of a run of the whole chain whose reward model stands on an SFT, and whose PPO on a policy."""
    return ["~stages.sft", f"stages.reward_model.init={sft}", f"stages.ppo.init={policy}"]


def again(run: Path, name: str, sft: Path, labels: Path, words: Sequence[str]) -> Path:
    """A reward model with labels among its pairs, PPO that goes on from the run's, and an evaluation of both.

    Checks that the lineage says so.

    Args:
        words: overrides that put the labels among the pairs, and whatever else the run is to be.
    """
    if code := align(["run", f"name={name}", f"out={run.parent}", *on(sft, run / "ppo"), *words]):
        raise SystemExit(code)
    found = [node.get("labels", {}) for node in lineage(run.parent / name / "ppo")["nodes"]]
    if {str(labels): file_sha256(labels)} not in found:
        raise SystemExit(f"no checkpoint of {name} names {labels} in its lineage")
    return run.parent / name


def golds(run: Path) -> list[list[float]]:
    """Gold scores of the replies of a run's last two policies, prompt by prompt."""
    replies = [list(row["replies"].values())[-2:] for row in json_lines(run / "evaluate" / "samples.jsonl")]
    return [[own[place]["gold"] for own in replies] for place in (0, 1)]


def main(words: Sequence[str]) -> int:
    """Run the loop; returns 1 where gold is lower after it than chance explains."""
    out = Path(next((word[4:] for word in words if word.startswith("out=")), "runs")).resolve()
    given = next((Path(word[5:]).resolve() for word in words if word.startswith("init=")), None)
    words = [word for word in words if not word.startswith(("out=", "init="))]
    before, labels = out / "loop-0", out / "loop-labels.jsonl"
    sft = given or before / "sft"
    if code := align(["run", "name=loop-0", f"out={out}", *(on(given, given) if given else []), *words]):
        return code
    labelled(before, labels, gold_judge(), f"pairs={PAIRS}")
    mixed = ["data=smalltalk_labelled", f"data.preferences.mix.labels.path={labels}"]
    after = again(before, "loop-1", sft, labels, [*mixed, *words])
    first, second = golds(after)
    change, error = paired_difference(second, first)
    means = [sum(own) / len(own) for own in (first, second)]
    print(f"gold {means[0]:.3f} before, {means[1]:.3f} after: changed by {change:+.3f} (standard error {error:.3f})")
    return int(change < -1.96 * error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

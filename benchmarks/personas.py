"""One adapter that answers in each persona on demand, beside one adapter per persona: styles as features of rows.

python -m benchmarks.personas [--out runs] [--steps 450] [--questions 456] [--write]

On the embedded base: `lora_features` on dialogues of all personas alike, each with its persona as its features, and a
`lora` for each persona on its dialogues alone, each with a third of the steps, so that both ways cost the same. Then
every held-out question is asked of each persona, greedily. A reply is in the asked style, or on the topic, when it is
a known reply of that style, or to that topic (`reward/rules/known_reply.py`). Runs that are there are not run again;
`--write` puts the table into docs/adapters.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import align
from align.inference.generation import RolloutEngine, Sampling
from align.inference.loaded import Opened
from align.report.formatting import percent, size
from benchmarks.pages import write_measured
from data_prep.generators.smalltalk import PERSONAS, rows
from data_prep.types import Message, with_features
from reward.rules.known_reply import KnownReply

PAGE = Path(__file__).resolve().parent.parent / "docs" / "adapters.md"
BATCH = 64


def main() -> None:
    """Train what is not there yet, ask, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs")
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--questions", type=int, default=456)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    one = trained(
        given.out,
        "one-for-all",
        given.steps,
        PERSONAS,
        "adapter=lora_features",
        f"adapter.categories=[{','.join(PERSONAS)}]",
        "data.conversations.options.features=style",
    )
    each = {
        persona: trained(given.out, f"only-{persona}", given.steps // len(PERSONAS), [persona], "adapter=lora")
        for persona in PERSONAS
    }
    lines = ["| adapter | asked for | in its style | on the topic |", "| --- | --- | --- | --- |"]
    for name, targets in (("one `lora_features`", dict.fromkeys(PERSONAS, one)), ("a `lora` each", each)):
        found = [answered(given.out, target, persona, given.questions) for persona, target in targets.items()]
        total = size(sum(weights(given.out, target) for target in set(targets.values())))
        for persona, (style, topic) in zip(PERSONAS, found, strict=True):
            lines.append(f"| {name} | {persona} | {percent(style)} | {percent(topic)} |")
        means = [sum(column) / len(column) for column in zip(*found, strict=True)]
        lines.append(f"| {name}, {total} in all | mean | {percent(means[0])} | {percent(means[1])} |")
    print("\n".join(lines))
    if given.write:
        command = f"`python -m benchmarks.personas --steps {given.steps} --questions {given.questions}`"
        write_measured(PAGE, "personas", "\n".join([*lines, "", command, ""]))


def trained(out: str, name: str, steps: int, personas: Sequence[str], *words: str) -> str:
    """RUN/sft of a run on dialogues of these personas."""
    styles = ",".join(f"{persona}: {float(persona in personas)}" for persona in PERSONAS)
    config = align.compose(
        [
            *("pipeline=sft", "data=smalltalk", f"out={out}", f"name={name}-{steps}", *words),
            f"data.conversations.options.styles={{{styles}}}",
            *(f"stages.sft.max_steps={steps}", f"stages.sft.eval_every={steps}", "stages.sft.batch_size=32"),
        ]
    )
    align.run(config)
    return f"{config.name}/sft"


def answered(out: str, target: str, persona: str, questions: int) -> tuple[float, float]:
    """Shares of the replies to held-out questions that are in a persona's style, and on the topic."""
    table = rows()
    held = [row for row in table if row["split"] == "eval"]
    asked = held[:: max(1, len(held) // questions)][:questions]
    rule = KnownReply(table, "topic", list(PERSONAS), persona)
    opened = Opened.target(target, out)
    renderer = opened.renderer
    engine = RolloutEngine(opened.role, renderer.end_token_id)
    prompts = [with_features(renderer.prompt([Message("user", row["prompt"])]), persona) for row in asked]
    replies = []
    for start in range(0, len(prompts), BATCH):
        replies += engine.generate(prompts[start : start + BATCH], Sampling(64, greedy=True))
    said = zip(asked, replies, strict=True)
    found = [rule.score(row["prompt"], row["topic"], renderer.decode(one.ids), one.finished) for row, one in said]
    style, topic = (sum(verdict[part] for verdict in found) / len(found) for part in ("persona", "topic"))
    return style, topic


def weights(out: str, target: str) -> int:
    """Bytes of an adapter's weights."""
    return (Path(out) / target / "adapter_model.safetensors").stat().st_size


if __name__ == "__main__":
    main()

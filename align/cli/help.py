"""`align VERB --help`: flags, override forms, and every option of the registered stages and adapters."""

from __future__ import annotations

import re
import textwrap
from typing import TYPE_CHECKING

from align.cli.option_rows import described, options_of, places, summary
from align.cli.verb import named
from align.stages.base import Stage, TrainingStage

if TYPE_CHECKING:
    from align.cli.verb import Verb

FLAGS = {
    "--json": "print one JSON object on standard output, everything else on standard error",
    "--config-dir DIR": "a folder of your own recipes (data/mine.yaml, experiment/mine.yaml, ...)",
    "-m, --multirun": "run every combination of the values given with commas: adapter=lora,vera",
    "--strict": "exit with code 2 where there is any warning, at the end; what was made stays",
    "--compare": "every policy of the chain answers, base first, each with its reward",
    "--web": "a page on 127.0.0.1 instead of the terminal (needs the extra: chat)",
    "--summary": "say what the file of labels holds, and serve no page",
    "--port PORT": "where the page is served [8417]",
    "--as NAME": "the copy's name, where it is to have another than the recipe's",
    "--force": "go on past a refusal that only warns of loss; the result records it",
}
COMMON = ("--json", "--config-dir DIR")
"""Flags of every verb."""
FORMS = """\
adapter=vera                        adapter of every stage
adapter.rank=64                     an option of it, for every stage that has no adapter of its own
stages.reward_model.adapter=lora    that stage only
stages.reward_model.adapter.rank=8  that stage only
stages.ppo.lr=1e-5                  an option of a stage
stages.ppo.init=RUN/sft             start from a checkpoint
data=files data.path=my.jsonl       your own data
model=hf model.path=FOLDER          your own base; model.load=fp32|bf16|nf4
pipeline=sft  experiment=NAME  seed=0  out=runs  name=NAME"""


def help_of(verb: Verb) -> str:
    """The text of `align VERB --help`."""
    own = {flag.partition("=")[0] for flag in verb.flags} | ({"-m"} if verb.multirun else set())
    flags = {flag: text for flag, text in FLAGS.items() if flag in COMMON or re.split("[, =]", flag)[0] in own}
    parts = [f"align {verb.name} {verb.usage}\n  {verb.summary}", _table("Flags", flags)]
    if "OVERRIDES" in verb.usage:
        parts += ["Overrides\n" + textwrap.indent(FORMS, "  "), *_options()]
    if verb.actions:
        parts.append(_table("Actions", {f"{one.name} {one.usage}": one.summary for one in verb.actions}))
    if verb.options:
        parts.append(_table("Options KEY=VALUE", described(named(verb.options))))
    return "\n\n".join(parts)


def _options() -> list[str]:
    """Option tables of the model, the data, the stages and the adapters."""
    common = {row["name"]: row["default"] for row in options_of(TrainingStage)}
    parts = []
    for place in places():
        same: set[str] = set()
        if place.kind is TrainingStage:
            same = set(described(Stage))
        elif place.of == "stage":
            same = {row["name"] for row in options_of(place.kind) if common.get(row["name"], "") == row["default"]}
        title = place.title or f"{place.prefix}  ({summary(place.kind)})"
        parts.append(_table(title, described(place.kind, same | {"method"})))
    return parts


def _table(title: str, rows: dict[str, str]) -> str:
    """A title and two aligned columns."""
    width = max((len(key) for key in rows), default=0)
    lines = []
    for key, text in rows.items():
        folded = textwrap.wrap(text, 100 - width, break_on_hyphens=False) or [""]
        lines.append(f"  {key:<{width}}  {folded[0]}")
        lines += [f"  {'':<{width}}  {more}" for more in folded[1:]]
    return "\n".join([title, *lines])

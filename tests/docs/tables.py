"""The generated parts of the documents, made from the registries and dataclasses.

A part stands between `<!-- table: KIND ARGUMENTS -->` and `<!-- end -->`. From the root of the repository
`python -m tests.docs.tables` writes all of them anew; tests/docs/test_tables.py checks that nothing has drifted.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from align.adapters.shapes import _key, _meta_model, linear_layers
from align.adapters.targets import short_names
from align.checkpoints.checkpoint import Checkpoint
from align.checkpoints.compatibility import choose_parent_mode, options_of
from align.cli.option_rows import options_of as option_rows
from align.cli.option_rows import summary
from align.cli.verbs import VERBS
from align.config.compose import compose
from align.config.hydra_loader import group_choices, recipe_comment, recipes
from align.config.registries import adapters, stages
from align.config.schema import (
    DistributedOptions,
    ModelOptions,
    OnParent,
    OnPrecisionChange,
    RunOptions,
    TrackingOptions,
)
from align.evaluation.options import JudgeOptions, PairsOptions, TaskOptions
from align.rl.signals.base import SignalOptions
from align.serving.options import ServeOptions
from align.stages.base import Stage, TrainingStage
from align.weights.options import ShipOptions
from data_prep.core.errors import UserError
from data_prep.formats.base import FORMATS
from data_prep.options import DataOptions, GoldOptions, SourceOptions
from data_prep.records.filter import FILTERS
from data_prep.tools.convert import writable
from tests.architectures import ARCHITECTURES, PRESETS, config_of
from tests.docs.pages import Page, pages

_PART = re.compile(r"(<!-- table: ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_STAGES = ("pretrain", "sft", "reward_model", "dpo", "kto", "orpo", "ppo")
_USES = {
    "conversation": "`sft`",
    "preference": "`reward_model`, `dpo`, `kto`, `orpo`",
    "unpaired": "`kto`",
    "prompt": "`ppo`, `evaluate`",
    "document": "`pretrain`",
}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def text(value: str) -> str:
    """Text as a table cell may hold it."""
    return value.replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;")


def code(value: object) -> str:
    """A value as a code span; nothing for an empty one."""
    if value is None or value == "" or value == {} or value == []:
        return ""
    shown = str(value).lower() if isinstance(value, bool) else str(value)
    return "`" + shown.replace("|", "\\|") + "`"


def options(cls: Any, without: Iterable[str] = ()) -> str:
    """Option, default and help of a dataclass."""
    rows = option_rows(cls, {*without, "method"})
    if not rows:
        return "No options."
    return table(
        ("option", "default", "what it does"),
        [(code(row["name"]), code(row["default"]), text(row["help"])) for row in rows],
    )


def _names(cls: Any) -> set[str]:
    return {row["name"] for row in option_rows(cls)}


def stage_options(name: str) -> str:
    """The options that a stage has of its own, or with another default than every training stage."""
    cls = stages.get(name)
    common = {row["name"]: row["default"] for row in option_rows(TrainingStage)}
    same = {row["name"] for row in option_rows(cls) if common.get(row["name"], "") == row["default"]}
    return options(cls, same | _names(Stage))


def methods() -> str:
    """Methods by stages; every method can be used in every training stage."""
    rows = []
    for name, cls in adapters.items():
        said = text(summary(cls))
        said = said if said.split()[0][1:] != said.split()[0][1:].lower() else said[0].lower() + said[1:]
        rows.append((f"`{name}`: {said}", *["yes"] * len(_STAGES)))
    return table(("", *(f"`{name}`" for name in _STAGES)), rows)


def traits() -> str:
    """What each method can do."""
    rows: list[tuple[str, ...]] = []
    for name, cls in adapters.items():
        made: Any = cls()  # type: ignore[operator]
        held = made.traits
        bases = ["fp32", *(["bf16"] if held.bf16 else []), *(["4 bits"] if held.four_bit else [])]
        rows.append(
            (
                code(name),
                code(made.quantization()) or ", ".join(bases),
                _yes(held.starts_as_parent),
                _yes(held.low_rank),
                _yes(held.mergeable),
                _yes(held.portable),
                _yes(held.gradient_checkpointing),
                _yes(held.soft_prompt),
                held.latency,
                code(f"{made.lr_factor:g}"),
            )
        )
    head = ("method", "base", "starts as its parent", "can be stacked on", "can be merged", "loads in stock peft")
    more = ("gradient checkpointing", "takes places of the context", "cost at inference", "factor on the learning rate")
    return table((*head, *more), rows)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def rates() -> str:
    """Peak learning rates where `lr` is not set."""
    names = [name for name, _ in adapters.items()]
    rows = []
    for name in _STAGES:
        base: float = stages.get(name).base_lr  # type: ignore[attr-defined]
        rows.append((code(name), *(code(f"{base * adapters.get(method).lr_factor:g}") for method in names)))
    return table(("stage", *(code(name) for name in names)), rows)


def on_parent() -> str:
    """The legal ways of standing on a parent: `auto` takes the first of a cell."""
    children = [name for name, _ in adapters.items()]
    below = [(m, "fp32") for m in children if adapters.get(m).traits.four_bit is False]
    for name in children:
        made: Any = adapters.get(name)()  # type: ignore[operator]
        if made.traits.four_bit:
            below += [(name, load) for load in ("fp32", "nf4") if made.quantization() in (None, load)]
    rows = []
    for method, load in sorted(below, key=lambda pair: (pair[1], pair[0])):
        made = adapters.get(method)()  # type: ignore[operator]
        record = {"stage": "sft", "method": method, "options": options_of(made), "load": load}
        parent = Checkpoint(Path(), record, "0" * 64)
        rows.append((f"`{method}`, {load}", *(_legal(parent, child) for child in children)))
    return table(("parent", *(f"`{name}` on it" for name in children)), rows)


def _legal(parent: Checkpoint, child: str) -> str:
    adapter: Any = adapters.get(child)()  # type: ignore[operator]
    legal, changed = [], False
    for mode in OnParent:
        try:
            choose_parent_mode(parent, adapter, mode, None, OnPrecisionChange.refuse)
        except UserError as problem:
            changed = changed or problem.code == "precision_change"
        else:
            legal += [mode.name] if mode is not OnParent.auto else []
    return ", ".join(legal) or ("precision" if changed else "refused")


def formats() -> str:
    """Every data format: its name, the kinds of row it yields, and the first sentence of its file."""
    rows = []
    for name, form in FORMATS.items():
        module = inspect.getmodule(form)
        first = inspect.cleandoc(module.__doc__ or "").split("\n\n")[0].replace("\n", " ").removeprefix(f"{name}: ")
        kinds = ", ".join(dict.fromkeys(_USES[kind] for kind in form.kinds if kind in _USES))
        rows.append((code(name), kinds, text(first)))
    return table(("format", "serves", "rows"), rows)


def format_options(name: str) -> str:
    """The options of one data format."""
    return table(("option", "what it does"), [(code(k), text(v)) for k, v in FORMATS.get(name).option_help.items()])


def formats_options() -> str:
    """The options of all formats but those with a table of their own; equal ones share a row."""
    rows: dict[tuple[str, str], list[str]] = {}
    for name, form in FORMATS.items():
        for option, said in form.option_help.items() if name != "answer_table" else ():
            rows.setdefault((option, said), []).append(code(name))
    head = ("option", "formats", "what it does")
    return table(head, [(code(option), ", ".join(names), text(said)) for (option, said), names in rows.items()])


def filters() -> str:
    """Every filter of rows, what it does, and its options with their defaults."""
    rows = []
    for name, cls in FILTERS.items():
        taken = [
            f"{code(row['name'])}: {text(row['help'])}" + (f" [{text(str(row['default']))}]" if row["default"] else "")
            for row in option_rows(cls)
        ]
        rows.append((code(name), text(summary(cls)), "; ".join(taken) or "none"))
    return table(("filter", "what it does", "options"), rows)


def choices(group: str) -> str:
    """The recipes of a group with their first comment."""
    with recipes(None):
        return table(
            ("recipe", "what it is"),
            [(code(f"{group}={name}"), text(recipe_comment(group, name))) for name in group_choices(group)],
        )


def presets() -> str:
    """The model presets, from the recipes."""
    rows = []
    for name, architecture in PRESETS.items():
        model = compose([f"model={name}", "data=smalltalk"]).model
        load = model.load.value if model.load else "fp32"
        cells = (f"model={name}", model.path, architecture, load, model.template, f"{model.lr_scale:g}")
        rows.append(tuple(code(cell) for cell in cells))
    return table(("recipe", "hub id", "architecture", "precision", "chat template", "factor on the rate"), rows)


def architectures() -> str:
    """What works on each architecture of the tests' list, and what LoRA adapts on it."""
    rows = []
    for name, entry in ARCHITECTURES.items():
        if entry.refused is None:
            model = _meta_model(_key(config_of(name)))
            layers = ", ".join(code(leaf) for leaf in short_names(linear_layers(model)))
            experts = short_names(path for path, p in model.named_parameters() if p.ndim == 3)
            layers += f" (not the experts' {', '.join(map(code, experts))})" if experts else ""
            tried = "whole chain" if entry.chain else "forward, rollouts, counts"
            rows.append((code(name), entry.people, tried, layers, entry.features))
    return table(("architecture", "models", "tried", "`all-linear` adapts", "features tried"), rows)


def refused_architectures() -> str:
    """Architectures that are refused, and why."""
    rows = [(code(name), entry.people, entry.features) for name, entry in ARCHITECTURES.items() if entry.refused]
    return table(("architecture", "models", "why"), rows)


def verbs() -> str:
    """The verbs of the command line."""
    return table(
        ("command", "what it does"), [(code(f"align {verb.name} {verb.usage}"), text(verb.summary)) for verb in VERBS]
    )


def actions() -> str:
    """The options of the actions of verbs, each with the actions that take it."""
    takers: dict[tuple[str, str, str], list[str]] = {}
    for action in (action for verb in VERBS for action in verb.actions):
        module, _, kind = action.options.partition(":")
        for row in option_rows(getattr(importlib.import_module(module), kind)):
            takers.setdefault((row["name"], code(row["default"]), text(row["help"])), []).append(code(action.name))
    every = [code(action.name) for verb in VERBS for action in verb.actions]
    head = ("option", "default", "actions", "what it does")
    return table(
        head, [(code(n), d, "all" if names == every else ", ".join(names), h) for (n, d, h), names in takers.items()]
    )


PARTS: dict[str, Callable[..., str]] = {
    "methods": methods,
    "traits": traits,
    "rates": rates,
    "on_parent": on_parent,
    "formats": formats,
    "format": format_options,
    "formats_options": formats_options,
    "filters": filters,
    "verbs": verbs,
    "actions": actions,
    "writable": lambda: table(
        ("form", "holds"), [(code(name), f"{kind} rows") for name, kind in sorted(writable().items())]
    ),
    "choices": choices,
    "presets": presets,
    "architectures": architectures,
    "refused_architectures": refused_architectures,
    "run": lambda: options(RunOptions),
    "model": lambda: options(ModelOptions),
    "tracking": lambda: options(TrackingOptions),
    "distributed": lambda: options(DistributedOptions),
    "data": lambda: options(DataOptions),
    "source": lambda: options(SourceOptions),
    "gold": lambda: options(GoldOptions),
    "signal": lambda: options(SignalOptions),
    "serving": lambda: options(ServeOptions),
    "judge": lambda: options(JudgeOptions),
    "pairs": lambda: options(PairsOptions),
    "tasks": lambda: options(TaskOptions),
    "shipping": lambda: options(ShipOptions),
    "every_stage": lambda: options(Stage),
    "training": lambda: options(TrainingStage, _names(Stage)),
    "stage": stage_options,
    "adapter": lambda name: options(adapters.get(name)),
    "only": lambda name: options(adapters.get(name), _names(adapters.get("lora"))),
}


def generated(page: Page) -> str:
    """The page's text with every generated part made anew."""

    def part(found: re.Match[str]) -> str:
        kind, *arguments = found[2].split()
        return f"{found[1]}{PARTS[kind](*arguments)}\n{found[3]}"

    return _PART.sub(part, page.text)


def kinds_on(page: Page) -> list[str]:
    """What the page's generated parts hold: `stage ppo`, `adapter lora`, ..."""
    return [found[2] for found in _PART.finditer(page.text)]


def main() -> None:
    """Write every generated part anew and name the pages that changed."""
    for page in pages():
        after = generated(page)
        if after != page.text:
            page.path.write_text(after, encoding="utf-8")
            print(page.shown, file=sys.stderr)


if __name__ == "__main__":
    main()

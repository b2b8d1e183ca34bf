"""The findings of `align check` on a terminal: wrapped to its width, in colour where there is colour."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.text import Text

from align.planning.findings import WORDS, Findings

LABEL = 11
LONGEST = 400
"""Tokens of a row that are printed; the middle of longer rows is left out."""
_STYLES = {"error": "bold red", "warning": "yellow"}


def print_findings(found: Findings, console: Console) -> None:
    """Everything that was found, problems last."""
    for title, facts in _sections(found):
        print_facts(console, title, facts)
    if found.preview:
        print_rows(found.preview, console)
    _problems(found, console)


def _problems(found: Findings, console: Console) -> None:
    """One line for each problem, whatever the width, and one line of verdict."""
    for problem in found.problems:
        head = Text(f"{WORDS[problem.severity]}  ", style=_STYLES[problem.severity])
        console.print(head.append(_safe(visible(str(problem)), console), style="not bold default"), soft_wrap=True)
    console.print(Text(found.verdict(), style="bold green" if found.ok else "bold red"), soft_wrap=True)


def _sections(found: Findings) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """(title, (label, value) of its facts)."""
    model = found.model
    if model:
        context = f", context of {model['context']:,} tokens" if model["context"] else ""
        facts = [("base", f"{model['path'] or 'fresh weights'} ({model['type']}{context})")]
        yield f"model {model['name']}", [*facts, *(("note", note) for note in model["notes"].values())]
    for stage in found.stages:
        yield f"stage {stage['name']}", list(_stage_facts(stage))
    for name, entry in found.data.items():
        yield f"data {name}", list(_data_facts(entry))


def _stage_facts(stage: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The facts of one stage."""
    mode = f" ({stage['on_parent']})" if stage["on_parent"] else ""
    yield "stands on", f"{stage['init']}{mode}, " + (f"loaded as {stage['load']}" if stage["load"] else "refused below")
    yield from (("forced", rule) for rule in stage["forced"])
    if stage["reward"]:
        yield "reward", stage["reward"]
    if "adapter" in stage:
        share = ""
        if "share" in stage:
            share = f": {stage['trainable']:,} of {stage['total']:,} parameters ({100 * stage['share']:.3g}%)"
        yield "trains", stage["adapter"] + share
        yield "lr", f"{stage['lr']:.3g}"
    if "memory" in stage:
        yield "memory", stage["memory"]
    if "updates" in stage:
        each = f"{stage['rows_per_update']:,} prompts"
        yield "updates", f"{stage['updates']:,}, each of {each} ({stage['rows']:,} there are)"
    if "steps" in stage:
        times = "once" if stage.get("epochs") == 1 else f"{stage.get('epochs', 0):g} times over"
        over = f" ({stage['rows']:,} rows, {times})" if "epochs" in stage else ""
        yield "steps", f"{stage['steps']:,} of {stage['rows_per_step']:,} rows{over}"


def _data_facts(entry: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The facts of one kind of data."""
    rows, tokens, splits = entry["rows"], entry["tokens"], entry["splits"]
    yield "for", ", ".join(entry["stages"])
    yield from _sources(entry)
    dropped = [f"{count:,} {reason}" for reason, count in rows["dropped"].items()]
    yield "rows", f"{rows['in']:,} in, {rows['kept']:,} kept, {rows['truncated']:,} truncated"
    yield "dropped", ", ".join(dropped) or "none"
    if entry.get("truncated_rows"):
        yield "cut short", ", ".join(entry["truncated_rows"])
    yield "splits", f"{splits['train']:,} train, {splits['eval']:,} eval ({splits['rule']})"
    yield "tokens", f"{tokens['mean']:g} a row, longest {tokens['longest']:,} (limit {entry['max_length']:,})"
    ends = entry["end_supervised_share"]
    end = f", end of turn in {100 * ends:.4g}% of the rows" if ends is not None else ""
    if tokens["supervised"]:
        yield "in the loss", f"{100 * entry['supervised_share']:.3g}% of the tokens{end}"
    yield from (("note", f"{note}: {count:,}") for note, count in entry["notes"].items() if count)


def _sources(entry: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The source, or those of a mixture with what one pass draws of each."""
    if "mixture" not in entry:
        yield "source", f"{entry['source']} ({entry['format']}: {entry['evidence']})"
        return
    for name, drawn in entry["mixture"]["sources"].items():
        own = entry["sources"][name] if "sources" in entry else entry
        share = f"{drawn['drawn']:,} rows drawn, {100 * drawn['share']:.3g}%, {drawn['epochs']:.3g} epochs"
        yield "source", f"{name}: {drawn['source']} ({own['format']}: {own['evidence']}); {share}"
        if own is not entry:
            yield from (("note", f"{name}: {note}: {count:,}") for note, count in own["notes"].items() if count)


def print_facts(console: Console, title: str, facts: Iterable[tuple[str, str]]) -> None:
    """A title, and below it labels with their values."""
    console.print(Text(_safe(visible(title), console), style="bold"), soft_wrap=True)
    for label, value in facts:
        _fact(console, label, value)


def _fact(console: Console, label: str, value: str) -> None:
    """A label and its value, wrapped beside the label."""
    label = _safe(visible(label), console)
    width = max(console.width - LABEL - 3, 16)
    lines = textwrap.wrap(_safe(visible(value), console), width) or [""]
    for number, line in enumerate(lines):
        head = label if number == 0 else ""
        console.print(Text(f"  {head:<{LABEL}} ", style="dim").append(line, style="not dim"), soft_wrap=True)


def print_rows(
    rows: Iterable[dict[str, Any]], console: Console, title: str = "first rows, as the model sees them"
) -> None:
    """Rows token by token, as `align/planning/rows.py:preview` gives them."""
    plain = console.color_system is None or console.no_color
    legend = "[ ]: in the loss" if plain else "green: in the loss"
    console.print(Text(f"{title} ({legend})", style="bold"))
    for row in rows:
        count = len(row["ids"])
        name = row["kind"] if row["part"] == "whole" else f"{row['kind']}, {row['part']}"
        head = f"  {name}, {row['id']}: {count:,} tokens, {sum(row['mask']):,} in the loss"
        for line in textwrap.wrap(_safe(visible(head), console), max(console.width - 1, 20), subsequent_indent="    "):
            console.print(Text(line, style="dim"), soft_wrap=True)
        for text in _wrapped(_tokens(row, console, plain), max(console.width - 3, 20)):
            console.print(Text("  ").append_text(text), soft_wrap=True)


def _tokens(row: dict[str, Any], console: Console, plain: bool) -> Iterator[Text]:
    """A row's tokens: those in the loss in green, or where there is no colour every run of them in one bracket."""
    kept = [bool(value) for value in row["mask"]]
    left_out = range(LONGEST // 2, len(kept) - (LONGEST - LONGEST // 2)) or range(len(kept), len(kept))
    bar = _safe("│", console)
    for place, token in enumerate(row["tokens"]):
        if place in left_out:
            if place == left_out.start:
                yield Text(f" ... {len(left_out):,} more tokens ... ", style="dim")
            continue
        shown = _safe(visible(token), console)
        if not plain:
            yield Text(shown, style="bold green" if kept[place] else "").append(bar, style="dim not bold")
        elif not kept[place]:
            yield Text(shown + bar)
        else:
            begins = place in (0, left_out.stop) or not kept[place - 1]
            ends = place + 1 in (len(kept), left_out.start) or not kept[place + 1]
            yield Text(("[" if begins else "") + shown + ("]" if ends else bar))


def _wrapped(parts: Iterable[Text], width: int) -> Iterator[Text]:
    """Parts joined to lines of at most `width` cells; a line ends between parts, and inside one that is longer."""
    line = Text()
    for part in parts:
        if line and line.cell_len + part.cell_len > width:
            yield line
            line = Text()
        line.append_text(part)
        while line.cell_len > width:
            head, line = line.divide([width])
            yield head
    if line:
        yield line


def visible(text: str) -> str:
    """Text with control, format and unassigned characters written as escapes; nothing in it moves the cursor."""
    return "".join(
        char.encode("unicode_escape").decode("ascii") if unicodedata.category(char)[0] == "C" else char for char in text
    )


def _safe(text: str, console: Console) -> str:
    """Text that the terminal's encoding can hold."""
    text = text if console.encoding.lower().startswith("utf") else text.replace("│", "|")
    return text.encode(console.encoding, "backslashreplace").decode(console.encoding)

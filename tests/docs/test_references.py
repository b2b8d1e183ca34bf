"""What the documents name exists: files, links, functions, options and their defaults, metric names, JSON keys."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from enum import Enum
from functools import cache

import pytest
import yaml

from align.cli.option_rows import options_of
from align.config.registries import adapters, stages
from align.config.schema import ModelOptions, RunOptions
from data_prep.options import DataOptions
from tests.docs.pages import ROOT, Page, anchors, blocks, links, pages, prose, spans

PAGES = pytest.mark.parametrize("page", pages(), ids=lambda page: page.shown)
_FILE = re.compile(
    r"((?:align|reward|data_prep|recipes|tests|docs|\.ci)/[\w./*-]*|[\w-]+\.(?:md|toml|txt)|Makefile)(?::(.+))?"
)
_OPTION = re.compile(r"((?:stages|adapter|model|data)\.[\w.]+)(?:=.*)?")
_SETTING = re.compile(r"([a-z_0-9]+)=(\S+)")
_METRIC = re.compile(r"(?:objective|policy|value|response|rollout)/[a-z_0-9]+")


@PAGES
def test_links_lead_somewhere(page):
    broken = []
    for target in links(page):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.path.parent / name).resolve() if name else page.path
        if not path.exists() or (anchor and anchor not in anchors(Page(path))):
            broken.append(target)
    assert not broken


@PAGES
def test_files_and_names_exist(page):
    """`path` must exist (NAME in it is a placeholder); `path.py:name` must define that name."""
    missing = []
    for span in spans(page):
        found = _FILE.fullmatch(span)
        if not found or "NAME" in span:
            continue
        path = ROOT / found[1]
        if "*" in found[1]:
            good = any(ROOT.glob(found[1]))
        elif found[1].endswith((".md", ".toml", ".txt")) and "/" not in found[1]:
            good = path.exists() or found[1] == "README.md"
        else:
            good = path.exists()
        if not good or (found[2] and found[2] not in defined(found[1])):
            missing.append(span)
    assert not missing


@cache
def defined(shown: str) -> frozenset[str]:
    """Functions, classes, methods and fields of a source file, as `name` and `Class.name`."""
    names = set()
    for node in ast.parse((ROOT / shown).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.ClassDef):
            for item in node.body:
                if isinstance(item, ast.FunctionDef):
                    names.add(f"{node.name}.{item.name}")
                elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    names.add(f"{node.name}.{item.target.id}")
    return frozenset(names)


def known(path: list[str]) -> bool:
    """Whether a dotted option exists; NAME stands for any stage, OPTION for any option."""
    first, *rest = path[:-1] if path[-1] == "OPTION" else path
    if first == "stages":
        kinds = [cls for name, cls in stages.items() if not rest or rest[0] in (name, "NAME")]
        return bool(kinds) and (len(rest) < 2 or any(_in(cls, rest[1:]) for cls in kinds))
    if first == "adapter":
        return not rest or any(_in(cls, rest) for _, cls in adapters.items())
    return _in({"model": ModelOptions, "data": DataOptions}[first], rest)


def _in(cls, rest: list[str]) -> bool:
    if not rest:
        return True
    fields = {item.name: item for item in dataclasses.fields(cls)}
    if rest[0] not in fields:
        return False
    if rest[0] in ("adapter", "data") and len(rest) > 1:
        return known(rest)
    default = fields[rest[0]].default_factory
    nested = default if dataclasses.is_dataclass(default) else None
    return len(rest) == 1 or nested is None or _in(nested, rest[1:])


@PAGES
def test_options_exist(page):
    wrong = []
    for span in spans(page):
        for word in span.split():
            found = _OPTION.fullmatch(word)
            if found and not word.endswith(".safetensors") and not known(found[1].rstrip(".").split(".")):
                wrong.append(word)
    assert not wrong


def test_top_level_options_exist():
    named = {
        "seed",
        "deterministic",
        "out",
        "name",
        "on_precision_change",
        "reward_gate",
        "allow_code",
        "distributed",
        "model",
        "adapter",
        "data",
        "stages",
        "tracking",
    }
    assert named == {item.name for item in dataclasses.fields(RunOptions)}


def test_ppo_page_has_32_details_with_our_defaults():
    page = next(page for page in pages() if page.shown == "docs/ppo.md")
    rows = [line.split(" | ") for line in page.text.splitlines() if re.match(r"\| \d+ \| ", line)]
    assert [int(row[0].strip("| ")) for row in rows] == list(range(1, 33))
    own = {row["name"]: row["default"] for row in options_of(stages.get("ppo"))}
    wrong = []
    for row in rows:
        for name, value in _SETTING.findall(" ".join(re.findall(r"`([^`]+)`", row[2]))):
            if name not in own or not _equal(own[name], value):
                wrong.append(f"{name}={value}")
    assert not wrong


def _equal(default, value: str) -> bool:
    shown = default.name if isinstance(default, Enum) else default
    read = yaml.safe_load(value)
    return shown == (float(read) if isinstance(shown, float) else read)


@PAGES
def test_metrics_are_logged_under_these_names(page):
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "align").rglob("*.py"))
    named = {span for span in spans(page) if _METRIC.fullmatch(span)}
    assert not [name for name in named if f'"{name}"' not in source]


def test_every_key_of_a_checkpoint_record_is_explained():
    page = next(page for page in pages() if page.shown == "docs/checkpoints.md")
    record = json.loads((ROOT / "align" / "models" / "nano" / "checkpoint.json").read_text(encoding="utf-8"))
    part = page.text.partition("## checkpoint.json")[2].partition("\n## ")[0]
    named = {
        key for cell in re.findall(r"^\| (`[^|]*`) \|", part, re.MULTILINE) for key in re.findall(r"`(\w+)`", cell)
    }
    assert named == set(record)


@PAGES
def test_json_blocks_are_json(page):
    for language, text in blocks(page):
        if language == "json":
            json.loads(text)


@PAGES
def test_figures_to_come_are_in_the_results_alone_and_each_once(page):
    marks = re.findall(r"TBD[\w.-]*", page.text)
    assert len(marks) == len(set(marks))
    assert not marks or page.shown == "docs/results.md"


@PAGES
def test_no_path_of_one_machine_is_written_down(page):
    assert not re.search(r"(?<![\w.$}])/(home|root|tmp|Users|work|mnt)/\w", page.text)


def test_the_readme_is_short():
    page = next(page for page in pages() if page.shown == "README.md")
    assert len(page.text.splitlines()) < 180
    assert prose(page)


def test_what_is_to_be_installed_is_there():
    """Nothing is fetched by the project's own name, which no index has; extras are those of pyproject.toml."""
    extras = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE))
    told = [page.text for page in pages()]
    told += [
        path.read_text("utf-8") for part in ("align", "data_prep", "reward") for path in (ROOT / part).rglob("*.py")
    ]
    named = [words for text in told for words in re.findall(r"pip install ([^`\n)]+)", text)]
    assert len(named) > 5 and not [words for words in named if "align" in words]
    for words in named:
        for group in re.findall(r"\.\[([\w,]+)\]", words):
            assert set(group.split(",")) <= extras, words

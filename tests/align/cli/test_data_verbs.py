"""`align data`: what is planted in a file is found and named, and every action answers on one line or in one object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.cli.dispatch import main
from tests.tiny import write_jsonl

WORDS = "the quick brown fox jumps over the lazy dog while seven small birds watch from a tree"


@pytest.fixture
def command(capfd):
    """`align data ...`: (exit code, standard output, standard error)."""

    def run(*words: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main(["data", *map(str, words)])
        out, err = capfd.readouterr()
        return code, out, err

    return run


def talks(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"What is number {n} of the {n * n} things?", "completion": f"Thing {n}."} for n in range(count)]


def planted(folder: Path) -> tuple[Path, Path]:
    """A file with one fault of each sort at a known row, and a file kept for testing."""
    rows = talks(30)
    rows[4] = {"prompt": "A story?", "completion": WORDS}
    rows[9] = {"prompt": "a  Story?", "completion": WORDS.upper()}
    rows[14] = {"prompt": "A story?", "completion": WORDS.replace("lazy", "sleepy")}
    rows[19] = {"prompt": "How?", "completion": "I'm sorry, but I can't help with that."}
    rows[24] = {"prompt": "Go on.", "completion": "I go on and on and I " * 9}
    rows[27]["completion"] = "The cafÃ© is open."
    rows[28]["extra"] = None
    tested = [
        rows[2],
        {"prompt": rows[6]["prompt"], "completion": "other"},
        {"prompt": "A story?!", "completion": "x " + WORDS},
    ]
    return write_jsonl(folder / "a.jsonl", rows), write_jsonl(folder / "test.jsonl", tested)


def test_every_planted_fault_is_found(command, tmp_path):
    source, tested = planted(tmp_path)
    code, out, _ = command("stats", source, f"against={tested}", "--json")
    card = json.loads(out)
    assert code == 0 and card["rows"] == {"in": 30, "kept": 30, "dropped": {}}
    assert (card["format"], card["kind"]) == ("prompt_completion", "conversation") and card["tokens"] == {}
    assert card["fields"]["prompt"] == {"types": {"text": 30}, "missing": 0}
    assert card["fields"]["extra"] == {"types": {}, "missing": 30}
    assert card["duplicates"]["exact"] == {"count": 1, "first": [f"{source}:10 repeats {source}:5"]}
    assert card["duplicates"]["near"] == {"count": 1, "first": [f"{source}:15 repeats {source}:5"]}
    assert card["leakage"]["exact"] == {"count": 1, "first": [f"{source}:3 is in {tested}:1"]}
    assert card["leakage"]["question"]["first"][0] == f"{source}:5 is in {tested}:3"
    assert f"{source}:7 is in {tested}:2" in card["leakage"]["question"]["first"]
    assert card["refusals"] == {"count": 1, "first": [f"{source}:20"]}
    assert card["repetitive"] == {"count": 1, "first": [f"{source}:25"]}
    if isinstance(card["repairs"], dict):
        assert card["repairs"] == {"count": 1, "first": [f"{source}:28"]}
    assert sum(card["characters"]["histogram"]["counts"]) == 30
    assert {"row": f"{source}:25", "why": "long: 196 characters"} in card["worst"]


def test_clean_rows_raise_no_alarm(command, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", talks(60))
    other = write_jsonl(tmp_path / "b.jsonl", talks(90)[60:])
    card = json.loads(command("stats", source, f"against={other}", "--json")[1])
    counts = [*card["duplicates"].values(), *card["leakage"].values(), card["refusals"], card["repetitive"]]
    assert not any(found["count"] for found in counts if isinstance(found, dict))
    assert card["pairs"] == {} and card["errors"] == []


def test_pairs_are_looked_at_as_pairs(command, tmp_path):
    rows = [{"prompt": f"q {n}", "chosen": "long answer", "rejected": "no"} for n in range(6)]
    rows[5] = {"prompt": "q 1", "chosen": "no", "rejected": "long answer"}
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    card = json.loads(command("stats", source, "--json")[1])
    assert card["kind"] == "preference"
    assert (card["pairs"]["contradictory"], card["pairs"]["chosen_longer"]) == (2, round(5 / 6, 4))
    code, out, _ = command("stats", source)
    assert code == 0 and "2 contradictory, 0 tied" in out and "longer in 83.3% of the pairs" in out


def test_bad_rows_are_listed_beside_the_numbers(command, tmp_path):
    rows = [*talks(3), {"prompt": "", "completion": "a"}, {"prompt": "a", "completion": {"x": 7}}]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    code, out, err = command("stats", source, "--json")
    card = json.loads(out)
    assert code == 2 and card["rows"] == {"in": 5, "kept": 3, "dropped": {"bad_row": 1, "empty": 1}}
    assert [(bad["row"], bad["field"]) for bad in card["errors"]] == [(4, "prompt"), (5, "completion")]
    assert card["error"]["row"] == 4 and card["bad_rows"] == 2
    assert err.splitlines()[-1].startswith(f"align: {source}:4:prompt: empty")
    code, out, _ = command("stats", source, "on_bad_row=drop", "--json")
    assert code == 0 and json.loads(out)["bad_rows"] == 2


def test_tokens_are_counted_with_a_model(command, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", talks(20))
    tokens = json.loads(command("stats", source, "model=nano", "--json")[1])["tokens"]
    assert tokens["total"] == round(20 * tokens["mean"]) > 200 and sum(tokens["histogram"]["counts"]) == 20


def test_languages_of_long_files_are_sampled(command, tmp_path, monkeypatch):
    pytest.importorskip("py3langid")
    monkeypatch.setattr("data_prep.tools.statistics.LANGUAGE_ROWS", 20)
    source = write_jsonl(tmp_path / "a.jsonl", talks(60))
    languages = json.loads(command("stats", source, "--json")[1])["languages"]
    assert sum(languages.values()) == 22 and languages["en"] > 10


def test_show_prints_rows_as_the_model_sees_them(command, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", talks(5))
    code, out, _ = command("show", source, "rows=2-3", "--json")
    shown = json.loads(out)["rows"]
    assert code == 0 and [row["id"] for row in shown] == [f"{source}:2", f"{source}:3"]
    said = "".join(token for token, kept in zip(shown[0]["tokens"], shown[0]["mask"], strict=True) if kept)
    assert said == "Thing 1.<|end|>"
    code, out, _ = command("show", source, "rows=5")
    assert code == 0 and "conversation" in out and "[Th" in out
    for words, message in (
        (("rows=6",), "has no row 6"),
        (("rows=6-99999999999999999999",), "has no row 6"),
        (("rows=0",), "expected N or N-M"),
        (("rows=3-2",), "expected N"),
    ):
        code, _, err = command("show", source, *words)
        assert code == 2 and message in err and err.count("\n") == 1


def test_show_says_what_it_leaves_out(command, tmp_path):
    marked = {"prompt": "q", "completion": "[INST] a"}
    source = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "", "completion": "a"}, marked])
    code, out, err = command("show", source)
    assert code == 0 and out.count("conversation, ") == 1
    assert f"warning  {source}:1:prompt: empty" in err and "note     rows whose text spells '[INST]'" in err


def test_labelled_rows_and_documents_are_shown(command, tmp_path):
    labelled = write_jsonl(tmp_path / "k.jsonl", [{"prompt": "a", "completion": "b", "label": False}])
    texts = write_jsonl(tmp_path / "t.jsonl", [{"text": "Once upon a time."}])
    assert json.loads(command("show", labelled, "--json")[1])["rows"][0]["part"] == "bad reply"
    assert json.loads(command("show", texts, "--json")[1])["kind"] == "document"
    for source in (labelled, texts):
        assert command("stats", source, "model=nano")[0] == 0


def test_files_are_made(command, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [*talks(20), talks(1)[0]])
    code, out, _ = command("dedup", source, f"to={tmp_path / 'b.jsonl'}")
    assert (
        code == 0 and f"{source}:21 repeats {source}:1" in out and "21 rows in, 20 written, dropped: 1 duplicate" in out
    )
    code, out, err = command("dedup", source, "to=-")
    assert code == 0 and len(out.splitlines()) == 20 and json.loads(out.splitlines()[0]) == talks(1)[0]
    assert "1 duplicate" in err
    code, out, _ = command("convert", source, "form=sharegpt", f"to={tmp_path / 's.jsonl'}", "--json")
    assert code == 0 and json.loads(out)["rows"]["kept"] == 21
    names = [f"train={tmp_path / 't.jsonl'}", f"eval={tmp_path / 'e.jsonl'}"]
    code, out, _ = command("split", source, "share=0.3", *names, "--json")
    assert code == 0 and sum(json.loads(out)["sides"].values()) == 21
    code, _, err = command("split", source, *names)
    assert code == 2 and "exists already" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stat", "a.jsonl"], "unknown action of align data 'stat' (did you mean 'stats'?"),
        ([], "what? (expected stats, show, dedup, split, convert)"),
        (["stats"], "which file? (expected FILE); align data stats FILE"),
        (["stats", "none.jsonl"], "none.jsonl: no such file or folder"),
        (["stats", "-"], "-: standard input is not read; "),
        (["stats", "[a.jsonl,b.jsonl]"], "no data file matches this pattern; several files are a folder"),
        (["stats", "a.jsonl", "agianst=b"], "did you mean 'against'?"),
        (["stats", "a.jsonl", "near=2"], "near: out of range"),
        (["stats", "a.jsonl", "kind=pairs"], "unknown choice 'pairs'"),
        (["dedup", "a.jsonl"], "to: which file is to be written?; add to=FILE.jsonl"),
        (["dedup", "a.jsonl", "to=-", "--json"], "standard output holds the JSON answer"),
        (["split", "a.jsonl", "train=x.jsonl"], "eval: which file is to be written?"),
        (["split", "a.jsonl", "train=x.jsonl", "eval=x.jsonl"], "expected two names"),
        (["show", "a.jsonl", "model=nanno"], "nanno"),
    ],
)
def test_a_mistake_is_one_line(command, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", talks(3))
    code, _, err = command(*words)
    assert code == 2 and message in err and err.count("\n") == 1 and err.startswith("align: ")


@pytest.mark.parametrize(
    ("row", "words", "form"),
    [
        ({"q": "a", "m": {"a": ["b"]}}, ["columns={prompt: 'Q: {q}', completion: m.a.0}"], "prompt_completion"),
        ({"q": "a", "a": "b"}, ["columns.prompt=q", "columns.completion=a"], "prompt_completion"),
        ({"q": "a", "m": {"a": "b"}}, ["columns={prompt:q,completion:m.a}"], "prompt_completion"),
        (
            {"conversation": [{"from": "Q", "value": "a"}, {"from": "bot", "value": "b"}]},
            ["options={roles: {Q: user, bot: assistant}}"],
            "sharegpt",
        ),
        (
            {"conversation": [{"from": "human", "value": "a"}, {"from": "bot", "value": "b"}]},
            ["options.roles={bot: assistant}"],
            "sharegpt",
        ),
        (
            {"conversation": [{"from": "Q", "value": "a"}, {"from": "gpt", "value": "b"}]},
            ["options.roles.Q=user"],
            "sharegpt",
        ),
        (
            {"text": "q: a A: b"},
            ["parse.text='q: {prompt} A: {completion}'", "format=prompt_completion"],
            "prompt_completion",
        ),
        (
            {"prompt": "a", "completion": "I'm sorry, but I can't help."},
            ["filters={dedup: {near: 0.8}, refusal: {}}"],
            "prompt_completion",
        ),
        (
            {"prompt": "a", "completion": "I'm sorry, but I can't help."},
            ["filters.refusal={}", "filters.dedup.near=0.8"],
            "prompt_completion",
        ),
    ],
)
def test_mappings_are_written_whole_or_entry_by_entry(command, tmp_path, row, words, form):
    source = write_jsonl(tmp_path / "a.jsonl", [row, row])
    code, out, err = command("stats", source, *words, "--json")
    card = json.loads(out)
    assert code == 0 and card["format"] == form, err
    assert card["rows"]["kept"] == (0 if "filters" in words[0] else 2)


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("kind.x=1", "align: kind.x: unknown option"),
        ("option.roles=1", "align: option.roles: unknown option"),
        ("filters.refusl={}", "align: data.filters.refusl: unknown filter 'refusl' (did you mean 'refusal'?"),
        ("columns=3", "align: columns: expected a mapping"),
        ("columns=3 columns.a=b", "align: columns: expected a mapping"),
    ],
)
def test_wrong_options_are_one_line(command, tmp_path, word, line):
    code, _, err = command("stats", write_jsonl(tmp_path / "a.jsonl", talks(2)), *word.split())
    assert code == 2 and err.startswith(line) and err.count("\n") == 1, err


def test_help_names_actions_and_options(command):
    assert "split FILE" in command("--help")[1]
    out = command("dedup", "--help")[1]
    assert "near" in out and "align data dedup FILE [OPTIONS]" in out

"""`align label` on a tiny chain: which pairs it shows, what it refuses, and the way from labels to the next PPO."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from align.cli.dispatch import main
from align.cli.label import _recorded_prompts
from align.inference.scoring import mean_logprobs
from align.roles import outputs
from align.serving.conversation import Panel
from align.serving.labels import read_labels
from align.serving.options import ChatOptions, LabelOptions, Split
from align.serving.pairs import choose_pairs
from benchmarks.loop import again, labelled
from data_prep.core.errors import UserError
from data_prep.core.hashing import file_sha256
from data_prep.splitting import prompt_key, rank
from data_prep.types import Message
from tests.tiny import write_jsonl
from tests.tiny_chain import checkpoint, finished, made, pipeline_words, read, refused, rows_folder

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

OPTIONS = LabelOptions(pairs=8, prompts=12, max_new_tokens=6, temperature=5.0)


@pytest.fixture(scope="module")
def panel():
    return Panel(checkpoint(finished(), "ppo"), ChatOptions())


def chosen(panel, **changes):
    data, seed = _recorded_prompts(checkpoint(finished(), "ppo"))
    return choose_pairs(panel, data, seed, replace(OPTIONS, **changes))


def said(prompt):
    """The messages of a label's prompt."""
    if isinstance(prompt, str):
        return (Message("user", prompt),)
    return tuple(Message(one["role"], one["content"]) for one in prompt)


def test_the_same_seed_shows_the_same_pairs_the_telling_ones_first(panel):
    found = chosen(panel)
    assert found.pairs == chosen(panel).pairs and len(found.pairs) == 8 and found.answered == 12
    assert [pair.order for pair in found.pairs] == sorted(pair.order for pair in found.pairs)
    assert chosen(panel, seed=1).pairs != found.pairs
    for pair in found.pairs:
        assert [answer.stage for answer in pair.answers] == ["sft", "ppo"]
        assert [answer.digest for answer in pair.answers] == [panel.digest("sft"), panel.digest("ppo")]
        assert rank(prompt_key(said(pair.prompt))) >= 0.2, "a training prompt: else its label could only evaluate"


def test_likelihoods_are_those_of_rows_read_alone(panel):
    role = panel.engine("ppo").role
    rows = [([5, 9, 11], [7, 8]), ([6], [12, 30, 31, 40]), ([8, 8, 8, 8], [9])]
    for (prompt, reply), mean in zip(rows, mean_logprobs(role, rows, 2), strict=True):
        (logprobs,) = outputs(role, [[*prompt, *reply]])
        assert mean == pytest.approx(math.fsum(logprobs[-len(reply) :]) / len(reply), abs=1e-5)


def test_other_stages_and_sides(panel):
    held = chosen(panel, split=Split.eval, prompts=100).pairs
    assert held and all(rank(prompt_key(said(pair.prompt))) < 0.2 for pair in held)
    assert {answer.stage for pair in chosen(panel, stages=["ppo", "ppo"]).pairs for answer in pair.answers} == {"ppo"}
    three = chosen(panel, stages=["base", "sft", "ppo"], pairs=100).pairs
    assert len({tuple(answer.stage for answer in pair.answers) for pair in three}) == 3
    with pytest.raises(UserError, match="did you mean 'sft'"):
        chosen(panel, stages=["sftt", "ppo"])
    with pytest.raises(UserError, match=r"stages=\[ppo,ppo\] compares two draws"):
        chosen(panel, stages=["ppo"])
    with pytest.raises(UserError, match=r"no two replies differ .* the same twice"):
        chosen(panel, stages=["ppo", "ppo"], temperature=0.0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "needs a TARGET"),
        (["{run}/reward_model"], "does not speak"),
        (["{run}", "stage=[sft,ppo]"], "did you mean 'stages'"),
        (["{run}", "pairs=0"], "at least 1"),
        (["{run}", "out=labels.csv"], "out=labels.jsonl"),
        (["{run}", "--json"], "add --summary"),
        (["{run}", "--summary", "out=none.jsonl"], "no such file"),
        (["{run}", "--summary", "--port", "1"], "leave out --summary"),
        (["{base}"], "a plain model has no run"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_in_one_line(words, said, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = finished()
    base = read(run / "sft" / "checkpoint.json")["root"]
    code = main(["label", *(word.format(run=run, base=base) for word in words)])
    assert said in refused(code, capfd.readouterr().err) and not list(tmp_path.glob("*.jsonl"))


def test_who_answers_how_much_is_said_before_the_page_is_there(capfd, tmp_path, monkeypatch):
    monkeypatch.setattr("align.serving.local_page.serve", lambda page, found: 0)
    words = ["prompts=4", "max_new_tokens=6", "temperature=5", f"out={tmp_path / 'labels.jsonl'}"]
    run = finished()
    capfd.readouterr()
    assert main(["label", str(run), *words]) == 0
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "align: sft and ppo answer up to 4 prompts; the page comes behind that"
    assert lines[1].startswith("answering 8/8") and "4 prompts answered" in lines[2]


def mixed_words(path):
    """Overrides that put labels among the pairs."""
    pairs = rows_folder() / "preferences.jsonl"
    mix = f"{{given: {{path: {pairs}, eval_share: 0.2}}, labels: {{path: {path}}}}}"
    return [f"data.preferences.mix={mix}", "data.preferences.path=null"]


def named(stage, path):
    """A reward model names the labels it has read, by digest, in card and checkpoint."""
    digest = file_sha256(path)
    card = read(stage / "data_card.json")
    assert card["sources"]["labels"]["labels"] == {str(path): digest} and card["mixture"]["sources"]["labels"]["drawn"]
    assert read(stage / "checkpoint.json")["labels"] == {str(path): digest}


def test_a_reward_model_names_the_labels_it_has_read(panel, tmp_path, capfd):
    whose = {"stages": {"a": "sft", "b": "ppo"}, "digests": {"a": panel.digest("sft"), "b": panel.digest("ppo")}}
    judged = {"prompt": "say bell", "a": "bell", "b": "no owl", "choice": "a", "labeller": "ann", "seconds": 1.5}
    judged |= {"rewards": {"a": 1.0, "b": 0.5}, "time": "2026-11-29T10:00:00+00:00"}
    path = write_jsonl(tmp_path / "labels.jsonl", [{**judged, **whose}])
    assert main(["label", str(finished()), "--summary", f"out={path}", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["labels"] == found["reward_model"]["n"] == found["stages"][0]["n"] == 1
    run = made("reward_model", *mixed_words(path), "stages.reward_model.max_steps=1", "name=n", out=tmp_path)
    named(run / "reward_model", path)
    capfd.readouterr()
    assert main(["lineage", str(run / "reward_model")]) == 0
    assert f"  labels: {path} {file_sha256(path)[:8]}" in capfd.readouterr().out


@pytest.mark.grid
def test_from_labels_to_the_next_reward_model_and_ppo(tmp_path, capfd):
    """The loop in small: the page is voted on as a browser does, and the next chain names the labels it read."""
    path = tmp_path / "labels.jsonl"
    run = finished()
    options = ["pairs=8", "prompts=12", "max_new_tokens=6", "temperature=5"]
    labelled(run, path, lambda prompt, a, b: "a" if len(a) >= len(b) else "b", *options)
    labels = read_labels(path)
    assert len(labels) == 8 and all((len(one.a) >= len(one.b)) == (one.choice == "a") for one in labels)

    (tmp_path / "runs").mkdir()
    first = tmp_path / "runs" / "first"
    first.symlink_to(run)
    shared = [word for word in pipeline_words("rlhf") if not word.startswith("stages.sft.")]
    after = again(first, "second", run / "sft", path, [*shared, *mixed_words(path)])
    named(after / "reward_model", path)
    assert "labels" not in read(after / "ppo" / "checkpoint.json")
    capfd.readouterr()
    assert main(["lineage", str(after / "ppo")]) == 0
    assert f"  labels: {path} {file_sha256(path)[:8]}" in capfd.readouterr().out
    assert main(["label", str(after), "--summary", f"out={path}", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["labels"] == 8 and found["reward_model"]["n"] == 8 and found["stages"][0]["n"] == 8


def test_the_file_is_data_at_once(tmp_path, capfd):
    rows = [{"prompt": f"say {n}", "a": "x", "b": "y", "choice": "ab"[n % 2], "labeller": "ann"} for n in range(30)]
    path = write_jsonl(tmp_path / "labels.jsonl", [*rows, {**rows[0], "prompt": "more", "choice": "bad"}])
    for pipeline in ("reward_model", "kto"):
        shared = [word for word in pipeline_words(pipeline) if not word.startswith("data.preferences")]
        code = main(["check", *shared, f"data.preferences.path={path}", f"out={tmp_path}"])
        out = capfd.readouterr()
        assert code == 0 and "labels" in out.out, out

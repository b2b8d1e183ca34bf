"""Folders that are there are never told as missing: moved bases, models, adapters and classifiers, by every verb."""

from __future__ import annotations

import io
import json
import shutil
import sys
from functools import cache
from pathlib import Path

import pytest

import align
from align.cli.dispatch import main
from data_prep.core.errors import UserError
from tests.tiny_chain import HOME, base, compose, copied, data_words, execute, finished, made, read, refused


@cache
def moved() -> tuple[Path, Path]:
    """A short SFT run whose base lies elsewhere now: the run, and where the base is."""
    before = Path(shutil.copytree(base(), HOME / "before"))
    run = made("sft", "name=moved", "adapter.rank=4", model=before)
    return run, before.rename(HOME / "now")


def answers(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a command whose standard input has one message."""
    capfd.readouterr()
    keyboard, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(b"say owl\n"))
    try:
        code = main(list(words))
    finally:
        sys.stdin = keyboard
    out, err = capfd.readouterr()
    return code, out, err


VERBS = {
    "chat": ("max_new_tokens=4",),
    "eval": ("stages.evaluate.prompts=2", "stages.evaluate.max_new_tokens=4", "out={tmp}"),
    "verify": (),
    "merge": ("to={tmp}/merged",),
    "export": ("to={tmp}/exported",),
    "compress": ("rank=4", "to={tmp}/compressed"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_base_that_has_moved_is_named_and_checked_by_every_verb(tmp_path, capfd, verb):
    run, now = moved()
    words = [verb, str(run / "sft"), *(word.format(tmp=tmp_path) for word in VERBS[verb])]
    code, out, err = answers(capfd, *words)
    assert code == 2 and "base=FOLDER" in out + err and "Traceback" not in err, err
    code, out, err = answers(capfd, *words, f"base={base(1)}")
    assert code == 2 and "trained on another base" in out + err, err
    code, out, err = answers(capfd, *words, f"base={now}")
    assert code == 0, err


@pytest.mark.parametrize("verb", ["merge", "export", "extract", "compress", "combine", "eval"])
def test_a_stage_without_weights_is_refused_with_the_stages_that_have_some(tmp_path, capfd, verb):
    run = tmp_path / "n"
    for stage, file in (("sft", "checkpoint.json"), ("evaluate", "result.json"), (".staging-ppo", "metrics.jsonl")):
        (run / stage).mkdir(parents=True)
        (run / stage / file).write_text("{}")
    done = [{"name": "sft", "digest": "0"}, {"name": "evaluate", "digest": "1"}]
    (run / "run.json").write_text(json.dumps({"stages": [*done, {"name": "ppo", "dir": ".staging-ppo"}]}))
    more = {"combine": [str(run / "evaluate"), f"to={tmp_path / 'to'}"], "extract": ["rank=4"], "compress": ["rank=4"]}
    for stage in ("evaluate", "ppo"):
        line = refused(*answers(capfd, verb, str(run / stage), *more.get(verb, []), f"out={tmp_path}")[::2])
        assert "no checkpoint in it" in line and f"; take {run / 'sft'}" in line and "Errno" not in line


def test_a_moved_base_in_python():
    run, now = moved()
    with pytest.raises(UserError, match="base=FOLDER"):
        align.load(str(run / "sft"))
    model, tokenizer = align.load(str(run / "sft"), base=str(now))
    assert model(**tokenizer("owl", return_tensors="pt")).logits.isfinite().all()


def test_combine_takes_the_base_of_all_its_targets(tmp_path, capfd):
    run, now = moved()
    words = ["combine", str(run / "sft"), str(run / "sft"), f"to={tmp_path / 'both'}", "rows=2"]
    assert "base=FOLDER" in refused(*answers(capfd, *words)[::2])
    assert answers(capfd, *words, f"base={now}")[0] == 0


def test_a_base_that_was_made_in_the_run_is_found_there_by_every_verb(tmp_path, capfd):
    config = compose(
        [
            *("pipeline=pretrain", "model=nano_blank", "adapter=full", *data_words(), f"out={tmp_path}", "name=fresh"),
            *("model.config.hidden_size=32", "model.config.intermediate_size=64", "model.config.num_hidden_layers=1"),
            *("model.config.num_attention_heads=2", "model.config.num_key_value_heads=2"),
            *("model.tokenizer.vocab_size=300", "stages.pretrain.max_steps=1", "stages.pretrain.batch_size=8"),
        ]
    )
    assert execute(config)["status"] == "done"
    stage = str(tmp_path / "fresh" / "pretrain")
    code, out, err = answers(capfd, "verify", stage)
    assert code == 0 and "all checks passed" in out, out + err
    assert answers(capfd, "chat", stage, "max_new_tokens=4")[0] == 0
    away = Path(shutil.copytree(stage, tmp_path / "away" / "pretrain"))
    assert "made from nothing in the run" in answers(capfd, "verify", str(away))[1]
    assert answers(capfd, "verify", str(away), f"base={tmp_path / 'fresh' / 'blank'}")[0] == 0


@cache
def adapter() -> Path:
    """An adapter as stock peft writes it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base())
    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(
        HOME / "plain-adapter"
    )
    return HOME / "plain-adapter"


@cache
def classifier() -> Path:
    """A reward model as stock transformers writes it."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(base(), num_labels=1)
    model.save_pretrained(HOME / "classifier")
    return HOME / "classifier"


@cache
def empty() -> Path:
    """A folder of somebody's notes."""
    folder = HOME / "notes"
    folder.mkdir()
    (folder / "todo.txt").write_text("", "utf-8")
    return folder


KINDS = {
    "model": (base, "a plain model folder, and no run or checkpoint"),
    "adapter": (adapter, "a plain peft adapter, without a record"),
    "classifier": (classifier, "a stock reward model or classifier"),
    "other": (empty, "holds no run, checkpoint, model or adapter (it has: todo.txt)"),
}
USED = {("chat", "model"), ("chat", "adapter"), ("eval", "model"), ("eval", "adapter"), ("lineage", "adapter")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("verb", ["chat", "eval", "verify", "merge", "lineage", "export"])
def test_a_folder_of_another_kind_is_used_or_told_as_what_it_is(tmp_path, capfd, verb, kind):
    make, said = KINDS[kind]
    evaluation = (*data_words(), "stages.evaluate.prompts=2", "stages.evaluate.max_new_tokens=4", f"out={tmp_path}")
    more = {"chat": ("max_new_tokens=4",), "eval": evaluation}.get(verb, ())
    code, _, err = answers(capfd, verb, str(make()), *more)
    if (verb, kind) in USED:
        assert code == 0, err
    else:
        assert said in refused(code, err)


def test_replies_of_a_plain_model_are_those_of_stock_transformers(capfd):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    code, out, _ = answers(capfd, "chat", str(base()), "temperature=0", "max_new_tokens=6")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base()), AutoTokenizer.from_pretrained(base())
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "say owl"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**asked, max_new_tokens=6, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert code == 0 and tokenizer.decode(ids, skip_special_tokens=True).strip() in out


def test_a_model_named_as_a_parent_is_answered_with_what_to_set(capfd, tmp_path):
    words = ["pipeline=ppo", "model=hf", f"model.path={base()}", *data_words(), f"out={tmp_path}"]
    line = refused(*answers(capfd, "run", *words, f"stages.ppo.init={base()}", "stages.ppo.reward=x")[::2])
    assert "a plain model folder" in line and "stages.STAGE.init=base" in line


def test_a_run_that_lost_files_says_how_they_come_back(capfd, tmp_path):
    run, out = copied(finished(), tmp_path), f"out={tmp_path}"
    (run / "sft" / "adapter_model.safetensors").unlink()
    line = refused(*answers(capfd, "chat", f"{run.name}/sft", out)[::2])
    assert "adapter_model.safetensors: file of sft" in line and "the same command trains it again" in line
    (run / "run.json").write_text("", encoding="utf-8")
    line = refused(*answers(capfd, "verify", run.name, out)[::2])
    assert "run.json cannot be read" in line and "move it away: the command that made the run takes" in line
    assert f"align verify {run.name} says why" in answers(capfd, "ls", "runs", out)[1]
    (run / "run.json").unlink()
    line = refused(*answers(capfd, "verify", run.name, out)[::2])
    assert "run.json is missing: the command that made the run" in line and str(run / "ppo") in line


def test_a_folder_of_states_is_answered_with_the_newest(capfd, tmp_path):
    for step in (5, 10):
        (tmp_path / "out" / f"checkpoint-{step:02}").mkdir(parents=True)
    assert "checkpoint-10?" in refused(*answers(capfd, "chat", str(tmp_path / "out"))[::2])


def test_a_run_that_was_copied_without_its_base_is_checked_on_the_base_of_today(tmp_path, capfd):
    run, now = moved()
    there = copied(run, tmp_path)
    code, out, _ = answers(capfd, "verify", str(there), f"base={now}", "--json")
    assert code == 0 and json.loads(out)["ok"] and read(there / "run.json")["status"] == "done"

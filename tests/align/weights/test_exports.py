"""Every export is right in padded batches, names no path of this machine, is readable, and its README loads it."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import align
from align.checkpoints.card import base_name
from align.inference.loaded import Opened
from align.weights import output
from align.weights.export import export
from align.weights.extract import compress
from align.weights.options import CompressOptions, ExportOptions, Form
from align.weights.padding import ending_at, outputs_of_batch, padded_tokenizer
from data_prep.core.errors import UserError
from data_prep.types import Message
from tests.tiny import tiny_tokenizer
from tests.tiny_chain import HOME, base, finished, made

FORMS = {"peft": "sft", "lora": "ppo", "merged": "ppo", "sequence_classification": "reward_model"}


@cache
def exported(form: str) -> Path:
    """A checkpoint of the shared chain in a form, written under an ordinary umask."""
    before = os.umask(0o022)
    try:
        export(str(finished() / FORMS[form]), ExportOptions(to=str(HOME / f"as-{form}"), form=Form(form)))
    finally:
        os.umask(before)
    return HOME / f"as-{form}"


@pytest.mark.parametrize("form", FORMS)
def test_no_path_of_this_machine_is_in_it_and_everyone_may_read_it(form):
    folder = exported(form)
    for path in folder.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o644, path
        text = path.read_bytes()
        assert str(HOME).encode() not in text and str(Path.home()).encode() not in text, path
    record = json.loads((folder / "align_export.json").read_text("utf-8"))
    assert record["base"] == base().name and max(part["kl"] for part in record["padded"].values()) < 1e-5
    assert set(record["padded"]) == {"right", "left"}


@pytest.mark.parametrize("form", FORMS)
def test_the_code_of_its_readme_runs(form, capsys, monkeypatch):
    folder = exported(form)
    readme = (folder / "README.md").read_text("utf-8")
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    code = re.sub(r'^base = ".*$', f"base = {str(base())!r}", code, flags=re.MULTILINE)
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out.strip()
    if form == "sequence_classification":
        told = align.score(str(finished() / "reward_model"), ["Hello!", "Hello!"], ["Hello! How are you?", "No."])
        assert json.loads(printed) == pytest.approx(told, abs=1e-4), "one reply has one reward"
    assert printed.startswith("[") and len(json.loads(printed) if form.startswith("seq") else eval(printed)) == 2
    for part in (
        "base_model: " + base().name,
        "## Lineage",
        "## Data",
        "conversations.jsonl",
        "## Measured",
        "Licence",
    ):
        assert part in readme, part


def test_scores_of_padded_batches_are_those_of_rows_alone():
    folder = exported("sequence_classification")
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    talks = [
        [{"role": "user", "content": "say owl"}, {"role": "assistant", "content": said}]
        for said in ("owl", "the owl and the lion sand yell", "no")
    ]
    opened = Opened.target(str(finished() / "reward_model"), "runs")
    asked = opened.renderer.prompt([Message("user", "say owl")])
    expected = [asked + opened.renderer.reply(talk[1]["content"]) for talk in talks]
    assert tokenizer.apply_chat_template(talks)["input_ids"] == expected, "as it was trained, to the end of the reply"
    for side in ("right", "left"):
        batch = tokenizer.apply_chat_template(
            talks, padding=True, padding_side=side, return_tensors="pt", return_dict=True
        )
        alone = [model(torch.tensor([ids])).logits[0, 0] for ids in expected]
        torch.testing.assert_close(model(**batch).logits[:, 0], torch.stack(alone), rtol=0, atol=1e-5)


def test_a_classifier_that_pads_differently_in_config_and_tokenizer_is_not_written(tmp_path, monkeypatch):
    def apart(model: Any, tokenizer: Any) -> None:
        model.config.pad_token_id = 77

    monkeypatch.setattr(output, "agree", apart)
    options = ExportOptions(to=str(tmp_path / "rm"), form=Form.sequence_classification)
    with pytest.raises(UserError, match="sequence_classification in a batch padded on the right differs too much"):
        export(str(finished() / "reward_model"), options)
    assert not list(tmp_path.iterdir())


def test_virtual_tokens_are_exported_and_the_readme_asks_one_prompt_at_a_time(tmp_path):
    run = made("sft", "adapter=prompt", "name=virtual")
    written = export(str(run / "sft"), ExportOptions(to=str(tmp_path / "x")))
    assert written["form"] == "peft" and set(written["padded"]) == {"right"} and written["drift"]["kl"] < 1e-5
    assert (tmp_path / "x" / "README.md").read_text("utf-8").count('"role": "user"') == 1


@pytest.mark.parametrize("pad", ["<|pad|>", "<|end|>", None])
def test_padding_is_a_token_that_ends_no_reply(pad):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = pad
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    reads, writes = padded_tokenizer(tokenizer, "right", never=end), padded_tokenizer(tokenizer, "left")
    assert reads.pad_token_id not in (None, end) and writes.pad_token_id is not None
    assert (reads.padding_side, writes.padding_side, tokenizer.pad_token) == ("right", "left", pad)
    assert reads("the owl") == tokenizer("the owl"), "words are cut as before"


def test_a_tokenizer_without_a_spare_token_gets_one_and_the_model_a_row_for_it(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

    from align.weights.padding import agree

    backend = Tokenizer(models.BPE(vocab={"<|end|>": 0, "a": 1}, merges=[]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    found = padded_tokenizer(tokenizer, "right", never=0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=2, num_labels=1, **sizes))
    agree(model, found)
    assert found.pad_token_id == 2 == model.config.pad_token_id and model.get_input_embeddings().weight.shape[0] == 3
    scores, mask = outputs_of_batch(model, found, [[1, 0], [1, 1, 1, 0]], "right")
    assert scores.isfinite().all() and mask.sum(1).tolist() == [2, 4]


def test_a_template_is_cut_only_behind_the_end_of_a_reply():
    tokenizer = tiny_tokenizer()
    before = tokenizer.chat_template
    talk = [{"role": "user", "content": " a \n"}, {"role": "assistant", "content": "\n b"}]
    whole = tokenizer.apply_chat_template(talk, tokenize=False)
    ending_at(tokenizer, "<|end|>")
    assert tokenizer.apply_chat_template(talk, tokenize=False) == whole.rstrip() != whole
    tokenizer.chat_template, again = before.replace("{{ '\\n' }}", ""), before.replace("{{ '\\n' }}", "")
    ending_at(tokenizer, "<|end|>")
    assert tokenizer.chat_template == again


def test_compress_refuses_what_says_something_else(tmp_path):
    run = made("sft", "adapter=lora", "adapter.rank=8", "stages.sft.lr=3e-2", "name=bound")
    target, to = str(run / "sft"), str(tmp_path / "small")
    with pytest.raises(UserError, match=r"compressed differs too much .*keep a higher rank"):
        compress(target, CompressOptions(to=to, rank=1, max_kl=1e-9))
    assert not list(tmp_path.iterdir())
    forced = compress(target, CompressOptions(to=to, rank=1, max_kl=1e-9), force=True)
    assert forced["forced"] and (tmp_path / "small" / "README.md").is_file()
    assert not compress(target, CompressOptions(to=f"{to}-8", rank=8))["forced"]


@pytest.mark.parametrize(
    ("root", "name"),
    [
        ("package:nano", "nano"),
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("/somewhere/models/qwen", "qwen"),
        ("./models/qwen", "qwen"),
        ("~/qwen", "qwen"),
        ("a/b/c", "c"),
    ],
)
def test_a_base_is_named_without_its_path(root, name):
    assert base_name(root) == name


def test_the_licence_of_a_base_is_named(tmp_path):
    from align.weights.card import plain_card

    folder = Path(shutil.copytree(base(), tmp_path / "b"))
    record = {"form": "lora", "of": "x", "base": "b"}
    assert "not stated in its folder" in plain_card(folder, record)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# b\n", "utf-8")
    assert "license: apache-2.0" in plain_card(folder, record)

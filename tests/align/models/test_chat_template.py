"""`model.template`: a chat template for a base that has none."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from align.checkpoints.checkpoint import Checkpoint
from align.models.chat_template import asked_template, bare, dressed
from align.models.fingerprint import base_fingerprint
from align.models.resolve import open_renderer
from data_prep.core.errors import UserError
from data_prep.rendering.digests import digest_of_template, template_digest
from data_prep.types import Conversation, Message
from tests.tiny import TEMPLATE, save_tiny_llama, tiny_tokenizer
from tests.tiny_chain import HOME, made, read, refused, run, sft

TALK = (Message("system", "be kind"), Message("user", "hi <|end|>"), Message("assistant", "ho"), Message("user", "x"))


@cache
def silent() -> Path:
    """A base whose tokenizer has no chat template; never to be changed in place."""
    return save_tiny_llama(HOME / "silent", template=None)


@cache
def plain_run() -> Path:
    """A chain on it, with the plain template."""
    return made("rlhf", "model.template=plain", model=silent(), without="evaluate")


def test_a_base_without_a_template_is_refused_and_the_line_names_the_option(tmp_path, capfd):
    said = refused(*run(capfd, *sft(tmp_path, model=silent())))
    assert "no chat template" in said and "model.template=plain" in said


def test_the_template_is_in_every_checkpoint_and_its_digest(tmp_path):
    text = asked_template("plain", silent())
    for stage in ("sft", "reward_model", "ppo", "ppo/value"):
        saved = Checkpoint.open(plain_run() / stage)
        assert saved.record["template_digest"] == digest_of_template(text)
        assert (saved.folder / "chat_template.jinja").read_text() == text
        assert "chat_template.jinja" in saved.record["files"]
    assert all(check["ok"] for check in Checkpoint.open(plain_run() / "ppo").verify())
    assert Checkpoint.open(plain_run() / "sft").record["root"] == str(silent())
    assert read(plain_run() / "sft" / "adapter_config.json")["base_model_name_or_path"] == str(silent())


def test_later_stages_need_the_same_template(tmp_path, capfd):
    start = f"stages.sft.init={plain_run() / 'sft'}"
    assert "model.template=plain" in refused(*run(capfd, *sft(tmp_path, start, model=silent())))
    other = tmp_path / "other.jinja"
    other.write_text(TEMPLATE)
    said = refused(*run(capfd, *sft(tmp_path, start, f"model.template={other}", model=silent())))
    assert "another chat template" in said
    code, err = run(capfd, *sft(tmp_path, start, "model.template=plain", model=silent()))
    assert code == 0, err


def test_a_fully_tuned_model_takes_the_template_along(tmp_path):
    folder = made("sft", "model.template=plain", "adapter=full", model=silent(), out=tmp_path) / "sft"
    assert AutoTokenizer.from_pretrained(folder).chat_template == asked_template("plain", silent())
    assert template_digest(folder) == Checkpoint.open(folder).record["template_digest"]


def test_a_turn_ends_with_eos_and_contents_stay_contents():
    renderer = open_renderer(dressed(silent(), asked_template("plain", silent())))
    assert renderer.end_token_id == tiny_tokenizer().eos_token_id
    row = renderer.conversation(Conversation(TALK, "row:0"))
    ends = [place for place, token in enumerate(row.ids) if token == renderer.end_token_id]
    assert len(ends) == 1 and row.mask[ends[0]]
    said = [token for token, wanted in zip(row.ids, row.mask, strict=True) if wanted]
    assert renderer.tokenizer.decode(said) == " ho<|end|>"
    assert renderer.prompt(TALK[:2]) == row.ids[: row.mask.index(True)]
    assert renderer.decode(said) == "ho"


def test_bos_is_written_where_the_tokenizer_writes_it(tmp_path):
    from tokenizers.processors import TemplateProcessing

    folder = Path(shutil.copytree(silent(), tmp_path / "base"))
    tokenizer = tiny_tokenizer(None)
    tokenizer.add_special_tokens({"bos_token": "<|system|>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A", special_tokens=[("<|system|>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    renderer = open_renderer(dressed(folder, asked_template("plain", folder)))
    ids = renderer.prompt(TALK[1:2])
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1


def test_chatml_needs_its_tokens(tmp_path):
    with pytest.raises(UserError, match=r"<\|im_start\|> and <\|im_end\|>.*plain"):
        asked_template("chatml", silent())
    folder = Path(shutil.copytree(silent(), tmp_path / "base"))
    tokenizer = tiny_tokenizer(None)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(folder)
    renderer = open_renderer(dressed(folder, asked_template("chatml", folder)))
    row = renderer.conversation(Conversation(TALK, "row:0"))
    said = [token for token, wanted in zip(row.ids, row.mask, strict=True) if wanted]
    assert tokenizer.decode(said) == "ho<|im_end|>"


def test_a_file_is_taken_as_it_is_and_a_missing_one_refused(tmp_path):
    own = tmp_path / "own.jinja"
    own.write_text(TEMPLATE)
    assert asked_template(str(own), silent()) == TEMPLATE
    with pytest.raises(UserError, match=r"no such template: planar.*did you mean plain"):
        asked_template("planar", silent())


def test_a_dressed_base_is_the_same_base(tmp_path):
    folder = dressed(silent(), TEMPLATE)
    assert folder != silent() and dressed(silent(), TEMPLATE) == folder and bare(folder) == silent()
    assert base_fingerprint(folder) == base_fingerprint(silent())
    assert dressed(folder, TEMPLATE) == folder
    assert json.loads((folder / "config.json").read_text()) == read(silent() / "config.json")

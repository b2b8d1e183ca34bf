"""Stock classifiers as rewards and as gold: their own forward's numbers, what is refused, and a run that names them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from align.checkpoints.checkpoint import Checkpoint
from align.checkpoints.lineage import lineage
from align.inference.generation import Reply
from align.rl.signals.base import Said, Site, signal_of, signals_of
from align.rl.signals.weighed import Signals
from data_prep.core.errors import TrainingStopped, UserError
from data_prep.options import DataOptions
from data_prep.types import PromptTokens
from tests.tiny import tiny_tokenizer
from tests.tiny_chain import HOME, base, copied, finished, made, pipeline_words, read, refused, run

WHERE = "stages.ppo.reward"
TEMPLATE = (
    "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
"""No token and no sign of it is the policy's."""


@cache
def classifier(labels: int = 1, pad: bool = True, template: str | None = TEMPLATE, seed: int = 0) -> Path:
    """A random stock classifier with a tokenizer of its own; never to be changed in place."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = tiny_tokenizer(template, merges=[("s", "a"), ("sa", "y")])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=96,
        num_labels=labels,
        pad_token_id=tokenizer.pad_token_id if pad else None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForSequenceClassification(config)
    folder = HOME / f"classifier-{labels}-{pad}-{template is None}-{seed}"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def said(*texts: str) -> Said:
    """Replies to prompts of growing length."""
    asked = [[{"role": "user", "content": "say owl " * (i + 1)}] for i in range(len(texts))]
    prompts = [PromptTokens([1], "?", f"f.jsonl:{i}", {}, messages) for i, messages in enumerate(asked, 1)]
    return Said(prompts, texts, [True] * len(texts))


@pytest.mark.parametrize(("labels", "pad", "more"), [(1, True, {}), (1, False, {}), (3, True, {"label": "LABEL_1"})])
def test_scores_are_those_of_its_own_forward_on_each_conversation_alone(labels, pad, more):
    """Batches are of replies of unequal length, padded whether or not the classifier has a token for it."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = classifier(labels, pad)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    replies = said("owl", "the owl says hoot to the lion", "", "say say", "no")
    signal = signal_of({"classifier": str(folder), "batch_size": 2, **more}, WHERE)
    found = signal.source.open(WHERE, Site(DataOptions()))(replies)
    for one, row, text in zip(found, replies.prompts, replies.texts, strict=True):
        whole = [*row.messages, {"role": "assistant", "content": text}]
        ids = tokenizer.apply_chat_template(whole, return_tensors="pt", return_dict=True)["input_ids"]
        with torch.no_grad():
            expected = model(ids).logits[0, 1 if labels == 3 else 0]
        assert one["score"] == pytest.approx(float(expected), abs=1e-5)
    assert len({round(one["score"], 6) for one in found}) == len(found)


def test_a_folder_that_holds_a_classifier_is_one_and_is_measured_first():
    (signal,) = signals_of(str(classifier()), WHERE)
    assert signal.name == "classifier" and signal.measured and not signal.source.models
    replies = said("a", "b c", "d e f")
    signals = Signals([signal], Site(DataOptions()), lambda ids: replies.texts[ids[0]])
    scores = signals.scores(replies.prompts, [Reply([i], [0.0], True) for i in range(3)], torch.zeros(3, 0))
    signals.begin(scores)
    total = signals.total(scores)
    assert float(total.mean()) == pytest.approx(0, abs=1e-5)
    assert float(total.std(unbiased=False)) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda: {"classifier": str(classifier(template=None))}, "no chat template, so conversations cannot be"),
        (lambda: {"classifier": str(classifier(3))}, "has 3 labels, and one number a reply is needed"),
        (lambda: {"classifier": str(classifier(3)), "label": "LABEL_7"}, "unknown label 'LABEL_7'"),
        (lambda: {"classifier": str(base())}, "no sequence-classification model"),
        (lambda: {"classifier": str(HOME / "nothing")}, "model folder does not exist"),
        (lambda: {"classifier": "nobody/nothing"}, "the hub cannot be reached or has no such model"),
        (lambda: {"classifier": str(classifier()), "wieght": 2}, "did you mean 'stages.ppo.reward.weight'?"),
        (lambda: {"classifier": str(classifier()), "template": "no.jinja"}, "no such file: no.jinja"),
    ],
)
def test_what_cannot_score_is_refused_before_a_weight_is_read(value, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        signal_of(value(), WHERE).source.check(WHERE, DataOptions())


def test_a_template_of_its_own_may_be_named(tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text(TEMPLATE)
    replies, data = said("owl"), DataOptions()
    bare, whole = (
        signal_of({"classifier": str(classifier(template=template)), **more}, WHERE).source
        for template, more in ((None, {"template": str(file)}), (TEMPLATE, {}))
    )
    assert bare.open(WHERE, Site(data))(replies) == whole.open(WHERE, Site(data))(replies)
    assert bare.contents(data)[2] == whole.contents(data)[2]


@pytest.mark.parametrize("text", ["{% for m in messages %}", "{{ raise_exception('no system role') }}", "{{ 1 + '' }}"])
def test_a_template_that_cannot_be_written_out_is_refused(tmp_path, text):
    file = tmp_path / "chat.jinja"
    file.write_text(text)
    source = signal_of({"classifier": str(classifier()), "template": str(file)}, WHERE).source
    with pytest.raises(UserError, match="chat template of the classifier cannot write out"):
        source.check(WHERE, DataOptions())


def test_a_conversation_that_the_template_refuses_stops_with_its_row(tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text("{% if 'owl' in messages[0].content %}{{ raise_exception('no owls') }}{% endif %}" + TEMPLATE)
    source = signal_of({"classifier": str(classifier()), "template": str(file)}, WHERE).source
    source.check(WHERE, DataOptions())
    with pytest.raises(TrainingStopped, match=r"cannot write out the reply to f.jsonl:1 \(no owls\)"):
        source.open(WHERE, Site(DataOptions()))(said("hoot"))


def test_a_conversation_longer_than_it_reads_stops_with_its_row():
    scorer = signal_of(str(classifier()), WHERE).source.open(WHERE, Site(DataOptions()))
    with pytest.raises(TrainingStopped, match=r"reads at most 96 tokens, prompt and reply of f.jsonl:1 are \d+"):
        scorer(said("hoot " * 40))


def test_without_a_template_a_run_ends_in_one_line(tmp_path, capfd):
    words = pipeline_words("ppo", f"stages.ppo.init={finished() / 'sft'}", f"out={tmp_path}", "name=n")
    line = refused(*run(capfd, *words, f"stages.ppo.reward={classifier(template=None)}"))
    assert "stages.ppo.reward.template=FILE" in line and not (tmp_path / "n").exists()


def of_classifier(out: Path, folder: Path, *more: str) -> dict[str, Any]:
    words = ["advantage=reinforce_pp", "updates=1", "max_approx_kl=9", f"reward={folder}"]
    own = [f"stages.ppo.{word}" for word in [f"init={finished() / 'sft'}", *words]]
    return read(made("ppo", *own, "name=c", *more, out=out) / "run.json")["stages"][0]


def test_a_run_names_it_by_fingerprint_and_another_one_is_another_result(tmp_path):
    gold = f"data.gold.signal={{classifier: {classifier(seed=1)}}}"
    first = of_classifier(tmp_path, classifier(), gold)
    saved = Checkpoint.open(tmp_path / "c" / "ppo")
    (judge,) = saved.judges
    assert judge["path"] == str(classifier()) and saved.parent("reward") is None
    graph = lineage(saved.folder)
    assert {"from": saved.digest[:16], "to": judge["fingerprint"][:16], "role": "reward"} in graph["edges"]
    assert "gold/score" in (tmp_path / "c" / "ppo" / "metrics.jsonl").read_text()
    moved = copied(classifier(), tmp_path)
    assert of_classifier(tmp_path, moved, gold)["skipped"]
    again = of_classifier(tmp_path, classifier(seed=1), gold)
    assert not again["skipped"] and again["digest"] != first["digest"]

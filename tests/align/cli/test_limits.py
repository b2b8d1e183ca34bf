"""Numbers out of range, rows over the context, tokenizers that lack something: refused, or a choice that is counted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from align.cli.dispatch import main
from align.config.schema import Load
from tests.tiny import save_tiny_llama, tiny_tokenizer
from tests.tiny_chain import CPU, base, finished, own_data, pipeline_words, read, refused, run, sft, talk


@pytest.mark.parametrize(
    "word",
    [
        "stages.sft.lr=fast",
        "stages.sft.batch_size=0",
        "stages.sft.batch_size=-4",
        "stages.sft.lr=-1e-3",
        "stages.sft.epochs=0",
        "stages.sft.max_length=0",
        "stages.sft.max_steps=-1",
        "stages.sft.warmup=2",
        "stages.sft.micro_batch_size=-1",
        "adapter.rank=0",
        "adapter.rank=-1",
        "adapter.dropout=1.5",
        "adapter.target_modules=[]",
        "adapter.target_modules=[nothing_here]",
        "data.conversations.eval_share=1.5",
        "data.conversations.limit=0",
        "seed=-1",
        "seed=abc",
        "name=a/b",
        "stages.sft.max_grad_norm=-1",
        "stages.sft.beta2=1.5",
    ],
)
def test_impossible_values_are_refused_before_training(word, tmp_path, capfd):
    refused(*run(capfd, *sft(tmp_path), word))
    assert not (tmp_path / "n" / "sft").exists()


@pytest.mark.parametrize(
    "word",
    [
        "stages.ppo.updates=0",
        "stages.ppo.ppo_epochs=0",
        "stages.ppo.minibatches=0",
        "stages.ppo.max_new_tokens=0",
        "stages.ppo.temperature=0",
        "stages.ppo.temperature=-1",
        "stages.ppo.max_new_tokens=500",
        "stages.ppo.reward_clip=-1",
        "stages.ppo.critic_warmup=2",
    ],
)
def test_impossible_values_of_ppo(word, tmp_path, capfd):
    chain = finished()
    inputs = [f"stages.ppo.init={chain / 'sft'}", f"stages.ppo.reward={chain / 'reward_model'}", "name=n"]
    refused(*run(capfd, *pipeline_words("ppo", *inputs), f"out={tmp_path}", word))
    assert not (tmp_path / "n" / "ppo").exists()


@pytest.mark.parametrize("stage", ["sft", "ppo", "evaluate"])
def test_rows_longer_than_the_context_are_refused_or_counted(stage, tmp_path, capfd):
    """The model has 256 positions; `max_length` alone would let longer rows through."""
    chain = finished()
    inputs = {
        "sft": [],
        "ppo": [f"stages.ppo.init={chain / 'sft'}", f"stages.ppo.reward={chain / 'reward_model'}"],
        "evaluate": [f"stages.evaluate.init={chain / 'sft'}"],
    }[stage]
    limit = f"stages.{stage}.max_length=4096"
    long = talk(question="say {i} " + "x" * 300)
    words = pipeline_words(stage, *inputs, "name=n", *own_data(tmp_path / "l.jsonl", long), f"out={tmp_path}", limit)
    line = refused(*run(capfd, *words))
    assert "256" in line or "250" in line, "the context, less what a reply may take"
    mixed = [*talk(90), *talk(3, question="say {i} again " + "x" * 300)]
    words = pipeline_words(stage, *inputs, "name=n", *own_data(tmp_path / "m.jsonl", mixed), f"out={tmp_path}", limit)
    assert run(capfd, *words)[0] == 0
    card = read(tmp_path / "n" / stage / "data_card.json")["rows"]
    assert card["dropped"] == {"too_long": 3} and card["in"] == card["kept"] + 3


def test_a_prompt_that_leaves_no_room_for_a_reply(tmp_path, capfd):
    """245 of 256 positions are the prompt; six new tokens fit, thirty do not."""
    chain = finished()
    inputs = [f"stages.ppo.init={chain / 'sft'}", f"stages.ppo.reward={chain / 'reward_model'}", "name=n"]
    rows = own_data(tmp_path / "l.jsonl", talk(question="{i:02d} " + "x" * 240))
    words = pipeline_words("ppo", *inputs, *rows, f"out={tmp_path}", "stages.ppo.max_length=4096")
    assert run(capfd, *words)[0] == 0
    refused(*run(capfd, *words, "stages.ppo.max_new_tokens=30"))


def retokenised(folder: Path, **changes) -> Path:
    """The tiny model with another tokenizer configuration; None removes a key."""
    model = Path(shutil.copytree(base(), folder))
    config = read(model / "tokenizer_config.json")
    for key, value in changes.items():
        config.pop(key, None)
        if value is not None:
            config[key] = value
    (model / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return model


def test_no_chat_template(tmp_path, capfd):
    model = save_tiny_llama(tmp_path / "bare", template=None)
    line = refused(*run(capfd, *sft(tmp_path, model=model)))
    assert "chat template" in line and "model.template" in line


@pytest.mark.parametrize("pad", [None, "<|end|>"], ids=["no_pad", "pad_is_eos"])
def test_pad_tokens_are_a_documented_choice(pad, tmp_path, capfd):
    """Training works (the whole chain where pad is eos), every data card says so, and every row learns to end."""
    model = retokenised(tmp_path / "model", pad_token=pad)
    pipeline, stages = ("rlhf", ("sft", "reward_model", "ppo", "evaluate")) if pad else ("sft", ("sft",))
    code, err = run(capfd, *pipeline_words(pipeline, "name=n", model=model), f"out={tmp_path}")
    assert code == 0, err
    for stage in stages:
        assert "pad_token" in read(tmp_path / "n" / stage / "data_card.json")["choices"]
    clean = read(finished() / "sft" / "data_card.json")
    assert read(tmp_path / "n" / "sft" / "data_card.json")["tokens"] == clean["tokens"], "the end token is supervised"


def test_an_end_token_inside_a_prompt_ends_no_reply():
    """A reply is the same alone and beside rows of other lengths."""
    import torch

    from align.inference.generation import RolloutEngine, Sampling
    from tests.tiny_chain import fresh, sentences

    role = fresh("lora", Load.fp32)
    prompts = [[*ids[:3], 1, *ids[3:]] for ids in sentences(5)]
    engine = RolloutEngine(role, end_id=1)
    together = engine.generate(prompts, Sampling(6, greedy=True))
    for prompt, reply in zip(prompts, together, strict=True):
        alone = engine.generate([prompt], Sampling(6, greedy=True))[0]
        assert alone.ids == reply.ids
        torch.testing.assert_close(torch.tensor(alone.logprobs), torch.tensor(reply.logprobs), rtol=0, atol=1e-5)
    assert role.tree.device == CPU


def test_a_template_that_refuses_a_system_message_is_no_silent_loss(tmp_path, capfd):
    from tests.tiny import TEMPLATE

    start, end = TEMPLATE.index("{% elif m['role'] == 'system'"), TEMPLATE.index("{% else %}")
    model = Path(shutil.copytree(base(), tmp_path / "model"))
    tiny_tokenizer(TEMPLATE[:start] + TEMPLATE[end:]).save_pretrained(model)
    code, err = run(capfd, *sft(tmp_path, "data.system=be brief", model=model))
    assert "system" in refused(code, err)


def test_json_errors_have_the_contracts_keys(tmp_path, capfd):
    capfd.readouterr()
    code = main(["run", *sft(tmp_path, "adapter=lorra"), "--json"])
    out, err = capfd.readouterr()
    assert code == 2 and "Traceback" not in err
    error = json.loads(out)["error"]
    assert error.keys() == {"code", "message", "hint", "file", "row", "field"} and "lora" in error["message"]
    rows = talk()
    rows[2]["messages"][0]["role"] = "usr"
    code = main(["run", *sft(tmp_path, *own_data(tmp_path / "t.jsonl", rows)), "--json"])
    error = json.loads(capfd.readouterr().out)["error"]
    assert code == 2 and error["row"] == 3 and error["file"].endswith("t.jsonl") and error["field"]

"""What users get wrong: one line and exit code 2, or a documented choice that is counted. Nothing saved is lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from align.cli import main
from tests.tiny import save_tiny_llama, tiny_tokenizer, write_jsonl
from tests.tiny_chain import (
    CPU,
    base,
    checkpoint,
    copied,
    data_words,
    finished,
    made,
    pipeline_words,
    read,
    refused,
    rows_folder,
)


def run(capfd, *words: str) -> tuple[int, str]:
    """(exit code, standard error) of `align run`."""
    capfd.readouterr()
    code = main(["run", *words])
    return code, capfd.readouterr().err


def sft(tmp_path: Path, *more: str, model: Path | None = None) -> list[str]:
    return [*pipeline_words("sft", "name=n", *more, model=model), f"out={tmp_path}"]


def talk(count: int = 24, question: str = "say {i}", answer: str = "the {i}") -> list[dict]:
    return [
        {
            "messages": [
                {"role": "user", "content": question.format(i=i)},
                {"role": "assistant", "content": answer.format(i=i)},
            ]
        }
        for i in range(count)
    ]


def own_data(path: Path, rows: list[dict]) -> list[str]:
    """Overrides that make a run read these rows alone."""
    return [f"data.conversations.path={write_jsonl(path, rows)}"]


# ------------------------------------------------------------------------------------------------------------- models
@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("{tmp}/nothere", "does not exist"),
        ("./nothere", "does not exist"),
        ("package:nono", "no embedded model"),
        ("org/nothere", "hub"),
        ("'org/na me'", ""),
        ("org/nothere/deeper", "does not exist"),
        ("{tmp}/file.txt", ""),
    ],
)
def test_a_model_that_is_not_there(path, said, tmp_path, capfd):
    (tmp_path / "file.txt").write_text("x")
    code, err = run(capfd, *sft(tmp_path), f"model.path={path.format(tmp=tmp_path)}")
    assert said in refused(code, err)


def test_a_misspelt_folder_is_guessed(tmp_path, capfd):
    model = save_tiny_llama(tmp_path / "my-model")
    code, err = run(capfd, *sft(tmp_path, model=tmp_path / "my-modle"))
    assert str(model) in refused(code, err)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_model_folder_with_a_hole(missing, tmp_path, capfd):
    model = Path(shutil.copytree(base(), tmp_path / "base"))
    (model / missing).unlink()
    code, err = run(capfd, *sft(tmp_path, model=model))
    assert missing.partition(".")[0].split(".")[0] in refused(code, err) or "safetensors" in err


def test_damaged_and_pickled_weights(tmp_path, capfd):
    model = Path(shutil.copytree(base(), tmp_path / "base"))
    weights = (model / "model.safetensors").read_bytes()
    for content in (b"", b"\xff" * 40, weights[:200], weights[:-1000]):
        (model / "model.safetensors").write_bytes(content)
        assert "safetensors" in refused(*run(capfd, *sft(tmp_path, model=model)))
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert "pickled" in refused(*run(capfd, *sft(tmp_path, model=model)))
    (model / "config.json").write_text("{", encoding="utf-8")
    assert "JSON" in refused(*run(capfd, *sft(tmp_path, model=model)))


def test_an_architecture_nobody_knows(tmp_path, capfd):
    model = Path(shutil.copytree(base(), tmp_path / "base"))
    config = read(model / "config.json")
    (model / "config.json").write_text(json.dumps({**config, "model_type": "nosuch"}), encoding="utf-8")
    refused(*run(capfd, *sft(tmp_path, model=model)))


def test_code_in_a_model_folder_never_runs(tmp_path, capfd):
    model = Path(shutil.copytree(base(), tmp_path / "base"))
    config = read(model / "config.json")
    auto = {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Config"}
    (model / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": auto}), "utf-8")
    (model / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n", encoding="utf-8")
    refused(*run(capfd, *sft(tmp_path, model=model)))
    assert not (tmp_path / "ran").exists()


def test_a_hub_id_without_a_network_is_one_line(tmp_path):
    """In a process of its own, with a home of its own: nothing is cached and the variable is read at import."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    words = ["run", "pipeline=sft", "model=hf", "model.path=org/some-model", *data_words(), f"out={tmp_path}"]
    program = [sys.executable, "-c", "import sys; from align.cli import main; sys.exit(main(sys.argv[1:]))"]
    done = subprocess.run(
        [*program, *words], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=100
    )
    line = refused(done.returncode, done.stderr)
    assert "org/some-model" in line and "model.path" in line and done.stdout == ""


# --------------------------------------------------------------------------------------------------------------- data
def test_missing_and_empty_data(tmp_path, capfd):
    assert "nothere.jsonl" in refused(*run(capfd, *sft(tmp_path, "data.conversations.path=/nothere.jsonl")))
    (tmp_path / "empty.jsonl").write_text("")
    refused(*run(capfd, *sft(tmp_path, f"data.conversations.path={tmp_path / 'empty.jsonl'}")))
    (tmp_path / "blank.jsonl").write_text("\n\n  \n")
    refused(*run(capfd, *sft(tmp_path, f"data.conversations.path={tmp_path / 'blank.jsonl'}")))
    assert not (tmp_path / "n" / "sft").exists()


def test_a_missing_file_of_a_later_stage_is_found_before_the_first(tmp_path, capfd):
    words = [*pipeline_words("rlhf", "name=n", "data.preferences.path=/nothere.jsonl"), f"out={tmp_path}"]
    assert "/nothere.jsonl" in refused(*run(capfd, *words))
    assert not (tmp_path / "n" / "sft").exists()


def test_an_unknown_role_names_file_row_and_the_nearest(tmp_path, capfd):
    rows = talk()
    rows[4]["messages"][1]["role"] = "asistant"
    line = refused(*run(capfd, *sft(tmp_path, *own_data(tmp_path / "t.jsonl", rows))))
    assert "t.jsonl:5" in line and "asistant" in line and "assistant" in line.replace("asistant", "")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": []},
        {"messages": [{"role": "user", "content": "alone"}]},
        {"messages": [{"role": "user"}, {"role": "assistant", "content": "x"}]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None}]},
        {"messages": "text"},
        {"other": 1},
    ],
)
def test_bad_rows_are_refused_or_counted(row, tmp_path, capfd):
    rows = talk()
    rows.insert(6, row)
    line = refused(*run(capfd, *sft(tmp_path, *own_data(tmp_path / "t.jsonl", rows))))
    assert "t.jsonl:7" in line
    words = sft(tmp_path, *own_data(tmp_path / "t.jsonl", rows), "data.conversations.on_bad_row=drop")
    assert run(capfd, *words)[0] == 0
    card = read(tmp_path / "n" / "sft" / "data_card.json")["rows"]
    assert (
        card["in"] == 25 and card["kept"] + sum(card["dropped"].values()) == 25 and sum(card["dropped"].values()) == 1
    )


def test_broken_json_names_the_line(tmp_path, capfd):
    path = write_jsonl(tmp_path / "t.jsonl", talk())
    path.write_text(path.read_text("utf-8") + '{"messages": [\n', encoding="utf-8")
    assert "t.jsonl:25" in refused(*run(capfd, *sft(tmp_path, f"data.conversations.path={path}")))


def test_identical_sides_are_refused(tmp_path, capfd):
    rows = [{"prompt": f"p {i}", "chosen": "same", "rejected": "same" if i == 3 else "other"} for i in range(20)]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    words = [*pipeline_words("reward_model", "name=n", f"data.preferences.path={path}"), f"out={tmp_path}"]
    assert "p.jsonl:4" in refused(*run(capfd, *words))


# ------------------------------------------------------------------------------------------------ names and values
@pytest.mark.parametrize(
    ("word", "nearest"),
    [
        ("adapter=lorra", "lora"),
        ("stages.sft.adapter=verra", "vera"),
        ("pipeline=stf", "sft"),
        ("stages.stf.lr=1", "sft"),
        ("stages.sft.lrr=1e-4", "stages.sft.lr"),
        ("adapter.rnak=8", "adapter.rank"),
        ("stages.sft.on_parent=stck", "stack"),
        ("stages.sft.schedule=cosin", "cosine"),
        ("data=smaltalk", "smalltalk"),
        ("model=nan", "nano"),
        ("data.conversations.pth=x", "path"),
        ("model.load=nf44", "nf4"),
        ("sed=1", "seed"),
        ("data.conversations.format=alpacca", "alpaca"),
        ("data.conversations.on_bad_row=dropp", "drop"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(word, nearest, tmp_path, capfd):
    assert nearest in refused(*run(capfd, *sft(tmp_path), word))
    assert not (tmp_path / "n" / "sft").exists()


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


def test_ppo_without_a_reward_model_and_with_too_few_prompts(tmp_path, capfd):
    chain = finished()
    words = pipeline_words("ppo", "name=n", f"stages.ppo.init={chain / 'sft'}", f"out={tmp_path}")
    assert "stages.ppo.reward" in refused(*run(capfd, *words))
    words += [f"stages.ppo.reward={chain / 'reward_model'}", "stages.ppo.batch_size=500"]
    assert "500" in refused(*run(capfd, *words))


@pytest.mark.parametrize("target", ["chian/sft", "nothere/sft", "{chain}/sfft", "{chain}"])
def test_a_parent_that_is_not_there(target, tmp_path, capfd):
    chain = finished()
    words = [f"stages.ppo.reward={chain / 'reward_model'}", "name=n", f"out={tmp_path}"]
    code, err = run(capfd, *pipeline_words("ppo", f"stages.ppo.init={target.format(chain=chain)}", *words))
    if target == "{chain}":  # a run stands for its last policy
        assert code == 0
        return
    line = refused(code, err)
    assert target.split("/")[-1] in line
    if "sfft" in target:
        assert "did you mean" in line


@pytest.mark.parametrize("verb", ["verify", "lineage", "eval"])
def test_targets_that_are_not_there(verb, tmp_path, capfd):
    run_folder = copied(finished(), tmp_path)
    capfd.readouterr()
    for target in ("nothere", run_folder.name[:-1] + "x", f"{run_folder.name}/evaluat", ""):
        code = main([verb, target, f"out={tmp_path}"])
        refused(code, capfd.readouterr().err)


# ------------------------------------------------------------------------------------------------------- the folder
def test_a_file_in_place_of_the_output_folder(tmp_path, capfd):
    (tmp_path / "file").write_text("mine")
    assert "file" in refused(*run(capfd, *sft(tmp_path / "file")))
    (tmp_path / "n").write_text("mine")
    refused(*run(capfd, *sft(tmp_path)))
    assert (tmp_path / "file").read_text() == (tmp_path / "n").read_text() == "mine"


FULL = "Error while serializing: I/O error: No space left on device (os error 28)"


@pytest.mark.parametrize("at", ["adapter", "record", "metrics", "recipe"])
def test_a_full_disk_is_one_line_and_loses_nothing(at, tmp_path, capfd, monkeypatch):
    """ENOSPC at each kind of write; the finished stage before it stays, and the same command goes on."""
    import errno

    import safetensors.torch
    from safetensors import SafetensorError

    made("sft", "name=n", out=tmp_path)
    before = (tmp_path / "n" / "sft" / "adapter_model.safetensors").read_bytes()

    def full(*args, **kwargs):
        raise SafetensorError(FULL) if at == "adapter" else OSError(errno.ENOSPC, "No space left on device")

    original_write, original_open = Path.write_text, Path.open

    def write_text(self, *args, **kwargs):
        name = {"record": "checkpoint.json", "recipe": "recipe.yaml"}.get(at, "?")
        return full() if name in self.name and "reward_model" in str(self) else original_write(self, *args, **kwargs)

    def opened(self, mode="r", *args, **kwargs):
        return full() if at == "metrics" and mode == "a" else original_open(self, mode, *args, **kwargs)

    if at == "adapter":
        for module in ("peft.peft_model", "peft.utils.save_and_load", "align.work", "safetensors.torch"):
            found = sys.modules.get(module)
            for name in ("safe_save_file", "save_file"):
                if hasattr(found, name):
                    monkeypatch.setattr(found, name, full)
        assert safetensors.torch.save_file is full
    else:
        monkeypatch.setattr(Path, "write_text", write_text)
        monkeypatch.setattr(Path, "open", opened)
    words = [*pipeline_words("reward_model", "name=n", "stages.reward_model.init=n/sft"), f"out={tmp_path}"]
    line = refused(*run(capfd, *words))
    assert "space" in line
    assert (tmp_path / "n" / "sft" / "adapter_model.safetensors").read_bytes() == before
    assert not (tmp_path / "n" / "reward_model").exists()
    monkeypatch.undo()
    assert run(capfd, *words)[0] == 0
    checkpoint(tmp_path / "n", "sft").check_files()


def test_two_processes_on_one_run_folder(tmp_path, capfd):
    import fcntl

    (tmp_path / "n").mkdir()
    with (tmp_path / "n" / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "another process" in refused(*run(capfd, *sft(tmp_path)))


# ------------------------------------------------------------------------------------------- lengths and the tokenizer
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
    assert "256" in refused(*run(capfd, *words))
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
    assert "chat template" in line and "chat_template.jinja" in line


@pytest.mark.parametrize("pad", [None, "<|end|>"], ids=["no_pad", "pad_is_eos"])
def test_pad_tokens_are_a_documented_choice(pad, tmp_path, capfd):
    """The whole chain works, the choice is in every data card, and every row still learns to end."""
    model = retokenised(tmp_path / "model", pad_token=pad)
    words = [*pipeline_words("rlhf", "name=n", model=model), f"out={tmp_path}"]
    code, err = run(capfd, *words)
    assert code == 0, err
    for stage in ("sft", "reward_model", "ppo", "evaluate"):
        assert "pad_token" in read(tmp_path / "n" / stage / "data_card.json")["choices"]
    step0 = read(tmp_path / "n" / "run.json")["stages"][2]["metrics"]["step0"]
    assert step0["ratio_dev"] <= 1e-5 and step0["kl"] <= 1e-5
    clean = read(finished() / "sft" / "data_card.json")
    assert read(tmp_path / "n" / "sft" / "data_card.json")["tokens"] == clean["tokens"], "the end token is supervised"


def test_pad_is_eos_scores_and_replies_do_not_depend_on_padding(tmp_path):
    """Padding with the end token in rollouts, and eos inside a prompt, change nothing."""
    import torch

    from align.rollout import RolloutEngine, Sampling
    from tests.tiny_chain import fresh, sentences

    role = fresh("lora", __import__("align.options", fromlist=["Load"]).Load.fp32)
    prompts = [[*ids[:3], 1, *ids[3:]] for ids in sentences(5)]
    engine = RolloutEngine(role, end_id=1, pad_id=1)
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


def test_rows_of_the_tests_are_good_rows():
    """What the refusals above start from passes."""
    assert (rows_folder() / "conversations.jsonl").is_file() and finished().is_dir()

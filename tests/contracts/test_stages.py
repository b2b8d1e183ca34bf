"""What every registered stage leaves behind, when it is skipped, and what makes it run again (shared/CONTRACT.md).

A new stage enters by existing, with a pipeline recipe of its own name.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from align.checkpoints.checkpoint import Checkpoint
from align.config.compose import compose
from align.config.registries import adapters, stages
from align.stages.base import TrainingStage
from align.tracking.metrics import read_metrics
from data_prep.core.hashing import file_sha256
from tests.tiny_chain import HOME, base, copied, data_words, execute, finished, made, pipeline_words, read, rows_folder

STAGES = stages.names()
TRAINING = [name for name, cls in stages.items() if issubclass(cls, TrainingStage)]
MAKING = [name for name in TRAINING if stages.get(name).makes]
"""Those that leave weights; a training stage may also measure something and throw away what it trained."""
RLHF = ["sft", "reward_model", "ppo", "evaluate"]
RUN_KEYS = {"format_version", "name", "status", "pipeline", "seed", "command", "versions", "stages"}
ENTRY_KEYS = {
    *("name", "status", "dir", "digest", "parents", "adapter", "load", "skipped", "seconds"),
    *("peak_rss_bytes", "trainable", "total", "metrics"),
}
RECORD_KEYS = {
    *("format_version", "stage", "method", "options", "role", "on_parent", "base", "load", "parents"),
    *("tokenizer_digest", "template_digest", "files", "head", "reward_norm", "probe", "metrics", "forced"),
}
NUMBERS = {
    "sft": {"loss", "tokens"},
    "pretrain": {"loss", "tokens"},
    "lr_range": {"loss", "lr"},
    "reward_model": {"loss", "accuracy", "margin"},
    "refresh": {"loss", "accuracy", "margin"},
    "dpo": {"loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"},
    "kto": {"loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "kl"},
    "orpo": {"loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "nll"},
    "ppo": {
        *("objective/kl_k1", "objective/kl_k3", "objective/reward", "policy/clipfrac", "policy/approxkl"),
        *("value/explained_var", "response/eos_rate"),
    },
}


NEEDED = {"refresh": ["stages.refresh.judge={rule: length, target: 3}"]}
"""What a stage cannot do without beside its inputs."""


def inputs_of(name: str) -> list[str]:
    """Overrides that give a stage its parent and its reward model, where it takes one."""
    cls, chain = stages.get(name), finished()
    words = [f"stages.{name}.init={chain / 'ppo'}"] if not issubclass(cls, TrainingStage) else []
    if cls.needs_reward:
        words = words or [f"stages.{name}.init={chain / 'sft'}"]
        words.append(f"stages.{name}.reward={chain / 'reward_model'}")
    return [*words, *NEEDED.get(name, [])]


@cache
def alone(name: str) -> Path:
    """The run folder of one stage alone."""
    return made(name, *inputs_of(name), f"name=only-{name}", out=HOME / "stages")


@pytest.mark.parametrize("name", STAGES)
def test_run_record(name):
    run = alone(name)
    record = read(run / "run.json")
    assert record.keys() >= RUN_KEYS
    assert (record["status"], record["pipeline"], record["name"]) == ("done", name, run.name)
    (entry,) = record["stages"]
    assert entry.keys() >= ENTRY_KEYS
    assert (entry["name"], entry["status"], entry["skipped"]) == (name, "done", False)
    assert entry["adapter"] in adapters.names() and entry["load"] == "fp32"
    assert entry["seconds"] > 0 and entry["peak_rss_bytes"] > 1e6 and entry["metrics"]
    assert entry["phases"].keys() >= {"data"} and 0 < sum(entry["phases"].values()) <= entry["seconds"] + 0.01
    assert record["machine"]["cores"] >= 1 and len(record["config_digest"]) == 64
    folder = run / entry["dir"]
    kept = "checkpoint.json" if (folder / "checkpoint.json").is_file() else "result.json"
    assert entry["digest"] == file_sha256(folder / kept)
    assert {parent["role"] for parent in entry["parents"]} <= {"init", "reward"}
    assert (run / "report.html").is_file() and (run / "recipe.yaml").is_file()
    left_over = [path.name for path in run.iterdir() if "staging" in path.name]
    assert not left_over


@pytest.mark.parametrize("name", STAGES)
def test_stage_folder(name):
    folder = alone(name) / name
    card = read(folder / "data_card.json")
    rows = card["rows"]
    assert rows["in"] == rows["kept"] + sum(rows["dropped"].values()) and rows["kept"] > 0
    assert (folder / "recipe.yaml").read_text(encoding="utf-8").startswith("stage: ")
    assert (folder / "checkpoint.json").is_file() == (name in MAKING) != (folder / "result.json").is_file()
    if name in MAKING:
        assert (folder / "README.md").read_text(encoding="utf-8").startswith("---\nbase_model: ")


@pytest.mark.parametrize("name", MAKING)
def test_checkpoint(name):
    folder = alone(name) / name
    found = Checkpoint.open(folder)
    record = found.record
    assert record.keys() >= RECORD_KEYS
    assert record["stage"] == name and record["role"] == stages.get(name).makes
    assert record["base"].keys() == {"id", "revision", "fingerprint"} and len(record["base"]["fingerprint"]) == 64
    assert set(record["files"]) >= set(adapters.get(record["method"])().files())
    assert all(file_sha256(folder / file) == digest for file, digest in record["files"].items())
    assert (record["head"] is not None) == (record["role"] == "reward") == ("head.safetensors" in record["files"])
    if record["role"] == "reward":
        assert record["reward_norm"].keys() == {"mean", "std"} and record["reward_norm"]["std"] > 0
    assert record["probe"].keys() == {"input_ids", "expected", "atol"} and record["probe"]["expected"]
    assert all(check["ok"] for check in found.verify())


@pytest.mark.parametrize("name", TRAINING)
def test_metrics(name):
    rows = read_metrics(alone(name) / name / "metrics.jsonl")
    trained = [row for row in rows if row["split"] == "train"]
    assert [row["step"] for row in trained] == [1, 2]
    for row in rows:
        assert row["stage"] == name and row["split"] in ("train", "eval")
        assert all(isinstance(value, int | float) for key, value in row.items() if key not in ("stage", "split"))
    expected = NUMBERS.get(name, set())
    assert all(row.keys() >= expected for row in trained)
    if name in MAKING and name != "ppo":
        assert any(row["split"] == "eval" and row.keys() >= {"loss"} for row in rows)


def test_ppo_leaves_its_critic_and_its_checks():
    run = finished()
    folder = run / "ppo"
    critic = Checkpoint.open(folder / "value")
    assert (critic.record["role"], critic.record["stage"]) == ("value", "value")
    assert critic.record["head"] and all(check["ok"] for check in critic.verify())
    checks = Checkpoint.open(folder).verify()
    assert all(check["detail"] for check in checks), "every check says what it found"
    assert next(check for check in checks if check["name"] == "kept inside it")["detail"] == critic.label
    metrics = read(run / "run.json")["stages"][2]["metrics"]
    assert metrics["step0"].keys() >= {"kl", "ratio_dev", "reward_parity", "grad_roles"}
    assert metrics["memory"]["ratio"] <= 8 / 3 + 1e-9 and metrics["memory"]["bases"] == 1
    assert metrics["reference_unchanged"] is True


def test_evaluation_answers_the_same_prompts_with_every_stage():
    run = finished()
    result = read(run / "evaluate" / "result.json")
    assert list(result["stages"]) == ["base", "sft", "ppo"]
    for found in result["stages"].values():
        assert found.keys() >= {"loss", "reward", "gold", "n"} and found["loss"] > 0 and found["n"] == 6
        assert isinstance(found["reward"], float)
    win = result["win_rate"]
    assert win["against"] == "sft" and 0 <= win["low"] <= win["value"] <= win["high"] <= 1 and win["n"] == 6
    assert result["reward_model"].keys() >= {"accuracy", "low", "high", "ece", "length_corr", "n", "calibration"}
    assert sum(held["n"] for held in result["reward_model"]["calibration"]) == result["reward_model"]["n"]
    samples = [json.loads(line) for line in (run / "evaluate" / "samples.jsonl").read_text("utf-8").splitlines()]
    assert len(samples) == 6
    for row in samples:
        assert row.keys() - {"before"} == {"prompt", "features", "id", "replies"} and list(row["replies"]) == list(
            result["stages"]
        )
        for reply in row["replies"].values():
            assert reply.keys() == {"text", "reward", "score", "gold", "finished"}
    mean = sum(row["replies"]["ppo"]["reward"] for row in samples) / 6
    assert result["stages"]["ppo"]["reward"] == pytest.approx(mean)


def test_the_generator_serves_the_whole_chain(tmp_path):
    """The embedded data with a gold judge, a few rows of it."""
    kinds = ("conversations", "preferences", "prompts", "text")
    words = [word for word in pipeline_words("rlhf") if not word.startswith("data")]
    limits = [f"data.{kind}.limit=60" for kind in kinds] + [
        "data.preferences.options.off_topic=0",
        "data.conversations.options.history=0",  # rows that the tiny tokenizer fits into its context
        "data.prompts.options.history=0",
    ]
    config = compose([*words, "data=smalltalk", *limits, f"out={tmp_path}", "name=g"])
    assert execute(config)["status"] == "done"
    result = read(tmp_path / "g" / "evaluate" / "result.json")
    gold = result["stages"]["ppo"]["gold"]
    assert gold.keys() >= {"score", "topic", "persona", "wellformed", "n", "se"} and gold["n"] == 6
    assert result["win_rate"]["judge"] == "gold" and result["gain"].keys() == {"gold", "se"}


def test_eval_stays_on_the_base_and_data_of_the_run(tmp_path, capfd):
    """Also of a run that took them from an experiment's recipe, and with options of its own."""
    import gzip

    from align.cli.dispatch import main

    (tmp_path / "instruct").mkdir()
    rows = [{"instruction": f"asked {i}", "input": "", "output": f"told {i}"} for i in range(30)]
    with gzip.open(tmp_path / "instruct" / "alpaca_data.json.gz", "wt", encoding="utf-8") as file:
        json.dump(rows, file)
    short = ["stages.sft.max_steps=1", "stages.sft.max_length=64", "data.conversations.eval_share=0.3"]
    words = ["experiment=alpaca_sft", f"model.path={base()}", f"data.root={tmp_path}", f"out={tmp_path}"]
    assert main(["run", *words, *short, "name=a"]) == 0
    capfd.readouterr()
    options = ["stages.evaluate.prompts=4", "stages.evaluate.max_new_tokens=4"]
    assert main(["eval", "a", f"out={tmp_path}", *options, "--json"]) == 0
    folder = Path(json.loads(capfd.readouterr().out)["run"])
    samples = [json.loads(line) for line in (folder / "evaluate" / "samples.jsonl").read_text("utf-8").splitlines()]
    assert len(samples) == 4 and all(row["prompt"].startswith("asked") for row in samples)


# ------------------------------------------------------------------------------------------- skipping and running again
def tree_of(folder: Path) -> dict[str, str]:
    """Every published file of a stage and its hash."""
    return {str(p.relative_to(folder)): file_sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def again(tmp_path: Path, *changes: str, run: Path | None = None, upto: str = RLHF[-1]) -> dict[str, bool]:
    """Repeat the shared chain's command with changes on a copy, up to a stage; which ones were skipped."""
    if run is None:
        run = copied(finished(), tmp_path)
    words = pipeline_words("rlhf")
    config = compose([*words, *changes, f"out={tmp_path}", f"name={run.name}"])
    names = RLHF[: RLHF.index(upto) + 1]
    record = execute(replace(config, stages=config.stages[: len(names)]))
    found = {entry["name"]: entry["skipped"] for entry in record["stages"]}
    assert record["status"] == "done"
    return {name: found[name] for name in names}


def test_the_same_command_skips_everything_and_loads_nothing(tmp_path, monkeypatch):
    from transformers import PreTrainedModel

    run = copied(finished(), tmp_path)
    before, first = {name: tree_of(run / name) for name in RLHF}, read(run / "run.json")
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    for _ in range(2):
        assert all(again(tmp_path, run=run).values())
        assert {name: tree_of(run / name) for name in RLHF} == before
        for entry, was in zip(read(run / "run.json")["stages"], first["stages"], strict=True):
            assert entry == {**was, "skipped": True}
    assert not (run / ".archive").exists()


CHANGES = {
    "stages.evaluate.prompts=5": ["evaluate"],
    "stages.ppo.kl_coef=0.2": ["ppo", "evaluate"],
    "model.lr_scale=3": ["sft", "reward_model"],
}
"""Change -> what it trains again, up to the last that is named; a stage whose parent is another one always is."""


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_option_reruns_what_depends_on_it(change, tmp_path):
    run = copied(finished(), tmp_path)
    before = {name: tree_of(run / name) for name in RLHF}
    skipped = again(tmp_path, change, run=run, upto=CHANGES[change][-1])
    assert [name for name in skipped if not skipped[name]] == CHANGES[change]
    for name in skipped:
        kept = [tree_of(path) for path in (run / ".archive").rglob("*") if path.is_dir()]
        assert skipped[name] or before[name] in kept, f"the earlier {name} is lost"
        assert not skipped[name] or tree_of(run / name) == before[name]
    for record in (run / ".archive").rglob("checkpoint.json"):
        assert all(check["ok"] for check in Checkpoint.open(record.parent).verify()), "kept, but not whole"


@pytest.mark.parametrize(
    ("kind", "reruns"),
    [("preferences", ["reward_model", "ppo"]), ("conversations", ["sft", "reward_model"])],
)
def test_changed_data_reruns_what_reads_it(kind, reruns, tmp_path):
    rows = Path(shutil.copytree(rows_folder(), tmp_path / "rows"))
    (rows / f"{kind}.jsonl").write_text((rows / f"{kind}.jsonl").read_text("utf-8").replace("lion", "tiger"), "utf-8")
    skipped = again(tmp_path, *data_words(rows)[1:], upto=reruns[-1])
    assert [name for name in skipped if not skipped[name]] == reruns


def test_evaluation_runs_again_when_its_held_out_conversations_change(tmp_path):
    """Its loss is measured on conversations, though its prompts come from elsewhere."""
    rows = Path(shutil.copytree(rows_folder(), tmp_path / "rows"))
    init = f"stages.evaluate.init={finished() / 'sft'}"
    words = [init, *data_words(rows)[1:], f"data.prompts.path={rows_folder() / 'preferences.jsonl'}", "name=e"]
    run = made("evaluate", *words, out=tmp_path)
    first = read(run / "evaluate" / "result.json")
    talk = rows / "conversations.jsonl"
    talk.write_text(talk.read_text("utf-8").replace("lion", "tiger").replace("hall", "house"), "utf-8")
    made("evaluate", *words, out=tmp_path)
    assert read(run / "run.json")["stages"][0]["skipped"] is False
    assert read(run / "evaluate" / "result.json")["stages"]["sft"]["loss"] != first["stages"]["sft"]["loss"]


def test_another_place_for_base_and_data_is_no_change(tmp_path):
    """Digests are of contents: a moved base or data folder does not train anything again."""
    rows = Path(shutil.copytree(rows_folder(), tmp_path / "rows"))
    moved = Path(shutil.copytree(base(), tmp_path / "moved"))
    assert all(again(tmp_path, *data_words(rows)[1:], f"model.path={moved}").values())


def test_a_deleted_stage_is_made_again_bit_for_bit(tmp_path):
    run = copied(finished(), tmp_path)
    before = {name: tree_of(run / name) for name in RLHF}
    shutil.rmtree(run / "sft")
    skipped = again(tmp_path, run=run)
    assert skipped == {"sft": False, "reward_model": True, "ppo": True, "evaluate": True}
    assert tree_of(run / "sft")["adapter_model.safetensors"] == before["sft"]["adapter_model.safetensors"]
    assert tree_of(run / "sft")["checkpoint.json"] == before["sft"]["checkpoint.json"]


def test_a_failed_rerun_loses_nothing_that_was_known(tmp_path):
    """A refusal (here: a damaged file) and its repair leave run.json as rich as it was."""
    from data_prep.core.errors import UserError

    run = copied(finished(), tmp_path)
    first = read(run / "run.json")
    file = run / "sft" / "adapter_model.safetensors"
    held = file.read_bytes()
    file.write_bytes(held[:-1] + bytes([held[-1] ^ 1]))
    for _ in range(2):
        with pytest.raises(UserError, match="changed"):
            again(tmp_path, run=run)
    file.write_bytes(held)
    assert all(again(tmp_path, run=run).values())
    for entry, was in zip(read(run / "run.json")["stages"], first["stages"], strict=True):
        assert entry == {**was, "skipped": True}


def test_parameters_are_counted_alike_at_every_precision(tmp_path):
    config = read(Path(compose(pipeline_words("sft")).model.path or "") / "config.json")
    runs = {"lora": alone("sft"), "qlora": made("sft", "adapter=qlora", "name=qlora", out=tmp_path)}
    for method, run in runs.items():
        (entry,) = read(run / "run.json")["stages"]
        counts = adapters.get(method)().count(config)
        assert (entry["adapter"], entry["trainable"], entry["total"]) == (method, counts.trainable, counts.total)

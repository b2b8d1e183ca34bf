"""A chain that was tampered with is refused: one line, exit code 2, and before any weight is loaded into a model.

Every way of tampering is tried on every command that would stand on the damaged thing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import pytest

from align.cli.dispatch import main
from tests.tiny import save_tiny_llama
from tests.tiny_chain import HOME, base, copied, execute, made, pipeline_words, read, refused

RERUN, PPO, EVAL, VERIFY = "run", "ppo", "eval", "verify"
ALL = (RERUN, PPO, EVAL, VERIFY)
NAME = "name=chain"


@cache
def clean() -> Path:
    """A finished chain on a base of its own, at the place that its checkpoints record."""
    folder = save_tiny_llama(HOME / "tampering" / "base", seed=11)
    return made("rlhf", NAME, out=HOME / "tampering" / "runs", model=folder)


@cache
def other_sft() -> Path:
    """Another good SFT checkpoint on the same base."""
    return made("sft", "seed=5", "name=other-sft", out=HOME / "tampering" / "runs", model=clean().parents[1] / "base")


@dataclass
class Scene:
    """A copy of the chain and the base it stands on, free to be damaged."""

    run: Path
    base: Path
    model: Path = field(init=False)
    """What commands name as the base."""

    def __post_init__(self) -> None:
        self.model = self.base

    def words(self, command: str) -> list[str]:
        out = [f"out={self.run.parent}"]
        if command == VERIFY:
            return ["verify", "chain", *out]
        if command == EVAL:
            model = [] if self.model == self.base else ["model=hf", f"model.path={self.model}"]
            return ["eval", "chain", *model, *out, "stages.evaluate.prompts=2"]
        if command == RERUN:
            return ["run", *pipeline_words("rlhf", NAME, model=self.model), *out]
        inputs = ["stages.ppo.init=chain/sft", "stages.ppo.reward=chain/reward_model", "name=other"]
        return ["run", *pipeline_words("ppo", *inputs, model=self.model), *out]


@pytest.fixture
def scene(tmp_path):
    """The chain's copy; its base is damaged in place and put back afterwards."""
    run, _ = clean(), other_sft()
    folder, kept = HOME / "tampering" / "base", tmp_path / "kept"
    shutil.copytree(folder, kept)
    yield Scene(copied(run, tmp_path), folder)
    shutil.rmtree(folder)
    shutil.copytree(kept, folder)


@pytest.fixture
def no_weights(monkeypatch):
    """Fail as soon as a model is built from weights, by whatever road."""
    from transformers import AutoModelForCausalLM, PreTrainedModel

    loaded = []

    def spied(cls):
        real = cls.from_pretrained.__func__

        def spy(own, *args, **kwargs):
            if kwargs.get("device_map") == "meta":  # names and shapes alone
                return real(own, *args, **kwargs)
            loaded.append(args)
            raise AssertionError("weights were loaded before the refusal")

        monkeypatch.setattr(cls, "from_pretrained", classmethod(spy))

    spied(PreTrainedModel)
    spied(AutoModelForCausalLM)
    return loaded


def flip(path: Path, place: int = -1) -> None:
    """Change one bit of one byte."""
    held = bytearray(path.read_bytes())
    held[place] ^= 1
    path.write_bytes(bytes(held))


def edit(path: Path, change: Callable[[dict], None]) -> None:
    record = read(path)
    change(record)
    path.write_text(json.dumps(record, indent=2), encoding="utf-8")


def another_base_of_equal_shape(scene: Scene) -> None:
    scene.model = base(seed=12)


def base_with_other_weights(scene: Scene) -> None:
    flip(scene.base / "model.safetensors", -7)


def base_with_another_configuration(scene: Scene) -> None:
    edit(scene.base / "config.json", lambda config: config.update(rms_norm_eps=1e-3))


def another_tokenizer(scene: Scene) -> None:
    def swap(content: dict) -> None:
        vocab = content["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]

    edit(scene.base / "tokenizer.json", swap)


def another_template(scene: Scene) -> None:
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        path = scene.base / name
        if path.is_file():
            path.write_text(path.read_text("utf-8").replace("<|user|>' + m", "<|user|> ' + m"), encoding="utf-8")


def edited_alpha(scene: Scene) -> None:
    edit(scene.run / "sft" / "adapter_config.json", lambda config: config.update(lora_alpha=64))


def flipped_byte(scene: Scene) -> None:
    flip(scene.run / "sft" / "adapter_model.safetensors")


def truncated_adapter(scene: Scene) -> None:
    path = scene.run / "sft" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def missing_head(scene: Scene) -> None:
    (scene.run / "reward_model" / "head.safetensors").unlink()


def flipped_head(scene: Scene) -> None:
    flip(scene.run / "reward_model" / "head.safetensors")


def swapped_head(scene: Scene) -> None:
    shutil.copyfile(scene.run / "ppo" / "value" / "head.safetensors", scene.run / "reward_model" / "head.safetensors")


def edited_record(scene: Scene) -> None:
    """The option that is really used when the adapter is built again."""
    edit(scene.run / "sft" / "checkpoint.json", lambda record: record["options"].update(alpha=64.0))


def edited_norm(scene: Scene) -> None:
    edit(scene.run / "reward_model" / "checkpoint.json", lambda record: record["reward_norm"].update(mean=9.0))


def gutted_record(scene: Scene) -> None:
    (scene.run / "sft" / "checkpoint.json").write_text('{"format_version": 1}', encoding="utf-8")


def unreadable_record(scene: Scene) -> None:
    (scene.run / "sft" / "checkpoint.json").write_text("{", encoding="utf-8")


def newer_format(scene: Scene) -> None:
    edit(scene.run / "sft" / "checkpoint.json", lambda record: record.update(format_version=99))


def missing_parent(scene: Scene) -> None:
    shutil.rmtree(scene.run / "sft")


def wrong_parent(scene: Scene) -> None:
    """Another good SFT checkpoint in the parent's place."""
    shutil.rmtree(scene.run / "sft")
    shutil.copytree(other_sft() / "sft", scene.run / "sft")


def flipped_critic(scene: Scene) -> None:
    flip(scene.run / "ppo" / "value" / "head.safetensors")


CASES = [
    (another_base_of_equal_shape, "another base", (PPO, EVAL)),
    (base_with_other_weights, "another base", (PPO, EVAL, VERIFY)),
    (base_with_another_configuration, "another base", (PPO, EVAL, VERIFY)),
    (another_tokenizer, "another tokenizer", (PPO, EVAL, VERIFY)),
    (another_template, "another chat template", (PPO, EVAL, VERIFY)),
    (edited_alpha, "adapter_config.json", ALL),
    (flipped_byte, "adapter_model.safetensors", ALL),
    (truncated_adapter, "adapter_model.safetensors", (PPO, VERIFY)),
    (missing_head, "head.safetensors", ALL),
    (flipped_head, "head.safetensors", (PPO, VERIFY)),
    (swapped_head, "head.safetensors", (PPO, VERIFY)),
    (edited_record, "", ALL),
    (edited_norm, "", (RERUN, EVAL)),
    (gutted_record, "checkpoint.json", ALL),
    (unreadable_record, "checkpoint.json", (RERUN, EVAL)),
    (newer_format, "format", (RERUN, EVAL)),
    (missing_parent, "", (PPO, EVAL, VERIFY)),
    (wrong_parent, "another checkpoint", (EVAL, VERIFY)),
    (flipped_critic, "head.safetensors", (VERIFY,)),
]
MATRIX = [pytest.param(*case[:2], command, id=f"{case[0].__name__}-{command}") for case in CASES for command in case[2]]


@pytest.mark.parametrize(("tamper", "named", "command"), MATRIX)
def test_tampering_is_refused_before_weights_load(tamper, named, command, scene, no_weights, capfd):
    tamper(scene)
    before = {path: path.read_bytes() for path in scene.run.rglob("*.safetensors")}
    capfd.readouterr()
    code = main(scene.words(command))
    out, err = capfd.readouterr()
    if command == VERIFY and out:
        failed = [line for line in out.splitlines() if line.startswith("FAIL")]
        assert code == 2 and failed and "Traceback" not in out + err
        assert named in " ".join(failed)
    else:
        assert named in refused(code, err)
    assert not no_weights
    for path, held in before.items():
        assert path.is_file() and path.read_bytes() == held, f"{path} was saved and is lost"
    assert not (scene.run.parent / "other" / "ppo").exists()


@pytest.mark.parametrize("command", ALL)
def test_a_clean_chain_is_never_refused(command, scene, capfd):
    assert main(scene.words(command)) == 0, capfd.readouterr().err
    if command == RERUN:
        assert all(entry["skipped"] for entry in read(scene.run / "run.json")["stages"])


def test_a_clean_chain_is_accepted_from_any_folder(scene, tmp_path, monkeypatch, capfd):
    """Verified by path, after a move together with its parents, and from another working directory."""
    moved = tmp_path / "elsewhere" / "chain"
    shutil.copytree(scene.run, moved)
    monkeypatch.chdir(tmp_path)
    for target in (moved, moved / "ppo", "elsewhere/chain/reward_model", moved / "ppo" / "value"):
        assert main(["verify", str(target)]) == 0, capfd.readouterr().out


def test_verify_says_it_in_one_object(scene, capfd):
    flipped_byte(scene)
    capfd.readouterr()
    assert main([*scene.words(VERIFY), "--json"]) == 2
    answer = json.loads(capfd.readouterr().out)
    assert answer["ok"] is False
    assert all(check.keys() == {"name", "ok", "detail"} for check in answer["checks"])
    assert any(not check["ok"] and "adapter_model.safetensors" in check["detail"] for check in answer["checks"])


def test_a_reward_model_is_no_policy(scene, no_weights, capfd):
    words = ["stages.ppo.init=chain/reward_model", "stages.ppo.reward=chain/reward_model", "name=other"]
    code = main(["run", *pipeline_words("ppo", *words, model=scene.base), f"out={scene.run.parent}"])
    assert "where a policy is needed" in refused(code, capfd.readouterr().err)
    words = ["stages.ppo.init=chain/sft", "stages.ppo.reward=chain/sft", "name=other"]
    code = main(["run", *pipeline_words("ppo", *words, model=scene.base), f"out={scene.run.parent}"])
    assert "where a reward is needed" in refused(code, capfd.readouterr().err)
    assert not no_weights


def test_a_parent_named_in_a_middle_link_is_found_missing(scene, no_weights, capfd):
    """The reward model stands on an SFT that is gone; PPO itself starts from the base."""
    missing_parent(scene)
    words = ["stages.ppo.init=base", "stages.ppo.reward=chain/reward_model", "name=other"]
    code = main(["run", *pipeline_words("ppo", *words, model=scene.base), f"out={scene.run.parent}"])
    assert "parent of reward_model" in refused(code, capfd.readouterr().err)
    assert not no_weights


def test_fingerprints_are_cached_and_never_stale(scene, monkeypatch):
    """A known base is not hashed again, a changed one is, even when its size stays the same."""
    from align.models import fingerprint

    hashed = []
    original = fingerprint._tensor_hashes
    monkeypatch.setattr(fingerprint, "_tensor_hashes", lambda path: hashed.append(path) or original(path))
    first = fingerprint.base_fingerprint(scene.base)
    assert fingerprint.base_fingerprint(scene.base) == first
    assert len(hashed) <= 1
    base_with_other_weights(scene)
    hashed.clear()
    assert fingerprint.base_fingerprint(scene.base) != first and len(hashed) == 1


def test_a_base_changed_under_a_finished_run_is_not_mixed_into_it(scene):
    """The same command on another base keeps nothing of the old chain in place, and throws nothing away."""
    from align.config.compose import compose
    from data_prep.core.errors import UserError

    digest = read(scene.run / "run.json")["stages"][0]["digest"]
    base_with_other_weights(scene)
    config = compose(scene.words(RERUN)[1:])
    first = [spec.name for spec in config.stages[:2]]  # the later ones stand on them
    try:
        record = execute(replace(config, stages=config.stages[:2]))
    except UserError:
        assert read(scene.run / "run.json")["stages"][0]["digest"] == digest
        return
    assert [entry["skipped"] for entry in record["stages"] if entry["name"] in first] == [False, False]
    assert list((scene.run / ".archive").rglob("adapter_model.safetensors"))

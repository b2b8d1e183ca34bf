"""`align ship`: the form that suits each tool, said with its reason, and everything refused before anything is made."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from align.cli.dispatch import main
from align.inference.loaded import Opened
from align.weights import hub
from align.weights.drift import of_role
from tests.tiny_chain import base, copied, finished, made, read, refused


def shipped(capfd, target, *words, code=0):
    capfd.readouterr()
    assert main(["ship", str(target), *words]) == code
    return capfd.readouterr()


def logits_of(folder: Path, adapter: bool = False) -> torch.Tensor:
    """Of one prompt, by stock libraries and nothing else."""
    if adapter:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base()), folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)("say the owl and the lion", return_tensors="pt").input_ids
    with torch.no_grad():
        return model.eval()(ids).logits[0, -ids.shape[1] :]


# ------------------------------------------------------------------------------------------------------------- folder
def test_a_folder_is_merged_and_an_adapter_is_asked_for(tmp_path, capfd):
    target = finished() / "sft"
    out, _ = shipped(capfd, target, "to=folder", f"folder={tmp_path}/whole")
    assert "to=folder, as merged: one set of weights, which any tool loads" in out and "KL" in out
    out, _ = shipped(capfd, target, "to=folder", "adapter=true", f"folder={tmp_path}/part")
    assert "as peft: the adapter's own files" in out
    whole, part = logits_of(tmp_path / "whole"), logits_of(tmp_path / "part", adapter=True)
    ids = AutoTokenizer.from_pretrained(base())("say the owl and the lion").input_ids
    trained = of_role(Opened.target(str(target), "runs").role)(ids).detach()
    torch.testing.assert_close(whole, trained, rtol=0, atol=1e-5)
    torch.testing.assert_close(part, trained, rtol=0, atol=1e-5)
    assert "## Load it" in (tmp_path / "whole/README.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("method", "form", "why"),
    [
        ("full", "merged", "it is a whole model already"),
        ("prompt", "peft", "prompt is no change of weights: the adapter"),
    ],
)
def test_a_method_that_is_not_merged_has_another_form_and_says_why(method, form, why, tmp_path, capfd):
    run = made("sft", f"adapter={method}", "name=merge-" + method)
    out, _ = shipped(capfd, run / "sft", "to=folder", f"folder={tmp_path}/x")
    assert f"to=folder, as {form}: {why}" in out
    logits_of(tmp_path / "x", adapter=form == "peft")


def test_a_reward_model_is_a_classifier(tmp_path, capfd):
    out, _ = shipped(capfd, finished() / "reward_model", "to=folder", f"folder={tmp_path}/x")
    assert "as sequence_classification: a reward model" in out
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "x")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "to: say what shall load it; to=folder|vllm|gguf|ollama|hub"),
        (["to=floder"], "folder"),
        (["to=vllm", "adapter=true"], "adapter: to=vllm has no such option; it is for to=folder or to=hub"),
        (["to=folder", "push=true"], "push: to=folder has no such option; it is for to=hub"),
        (["to=folder", "load=nf4"], "load"),
        (["to=hub", "repo=a/b/c"], "repo=OWNER/NAME"),
        (["to=hub", "push=true"], "push: HF_HUB_OFFLINE is set: nothing can be uploaded"),
    ],
    ids=str,
)
def test_what_cannot_be_is_a_line_and_nothing_is_made(words, line, tmp_path, capfd):
    _, err = shipped(capfd, finished() / "sft", *words, f"folder={tmp_path}/x", code=2)
    assert line in refused(2, err) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("method", "words", "line"),
    [
        ("full", ["to=folder", "adapter=true"], "adapter: .*leave adapter=true out; its nearest LoRA: align extract"),
        ("bottleneck", ["to=folder"], "no stock model computes what .*; use it with align serve"),
        ("bottleneck", ["to=vllm"], "vLLM takes neither the method nor merged weights: bottleneck is no change"),
    ],
)
def test_a_method_that_no_tool_has_is_refused_by_name(method, words, line, tmp_path, capfd):
    run = made("sft", f"adapter={method}", "name=merge-" + method)
    _, err = shipped(capfd, run / "sft", *words, f"folder={tmp_path}/x", code=2)
    assert re.search(line, refused(2, err)) and not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------------- vLLM
def test_vllm_gets_a_lora_module_and_its_command(tmp_path, capfd):
    out, _ = shipped(capfd, finished() / "sft", "to=vllm", f"folder={tmp_path}/x")
    assert "as lora: a low-rank sum on the base" in out
    words = shlex.split(next(line for line in out.splitlines() if "vllm serve" in line))
    rank = int(words[words.index("--max-lora-rank") + 1])
    assert words[:3] == ["vllm", "serve", str(base())] and f"sft={tmp_path}/x" in words
    assert read(tmp_path / "x" / "adapter_config.json")["r"] <= rank
    readme = (tmp_path / "x" / "README.md").read_text("utf-8")
    within = shlex.split(re.search(r"^vllm serve .*$", readme, re.MULTILINE)[0])
    assert within == [base().name if word == str(base()) else word.replace(f"{tmp_path}/x", ".") for word in words]
    assert str(tmp_path) not in readme


def test_vllm_gets_merged_weights_where_a_module_cannot_be(tmp_path, capfd):
    run = made("sft", "adapter=ia3", "name=merge-ia3")
    out, _ = shipped(capfd, run / "sft", "to=vllm", "load=bf16", f"folder={tmp_path}/x")
    assert "as merged: it can be no LoRA module: its change is no low-rank sum" in out
    assert f"vllm serve {tmp_path}/x --served-model-name sft" in out
    _, err = shipped(capfd, finished() / "reward_model", "to=vllm", f"folder={tmp_path}/y", code=2)
    assert "form=sequence_classification" in refused(2, err) and not (tmp_path / "y").exists()


# ---------------------------------------------------------------------------------------------------------------- hub
def test_the_hub_is_a_dry_run_and_what_it_showed_is_what_is_pushed(tmp_path, capfd, monkeypatch):
    mine = copied(finished(), tmp_path)
    out, _ = shipped(capfd, mine / "sft", "to=hub")
    folder = mine / "export" / "sft-hub"
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert f"{mine.name}-sft: {len(sizes)} files" in out and "model.safetensors" in out
    assert "## Load it" in out and "nothing was uploaded" in out
    calls = []

    class Hub:
        def whoami(self):
            calls.append("whoami")

        def create_repo(self, repo, private, exist_ok):
            calls.append((repo, private, exist_ok))
            return SimpleNamespace(repo_id=f"me/{repo}")

        def upload_folder(self, repo_id, folder_path, commit_message):
            calls.append((repo_id, {path.name: path.stat().st_size for path in Path(folder_path).iterdir()}))

    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "HfApi", Hub)
    shipped(capfd, mine / "sft", "to=hub", "push=true", "repo=mine")
    assert calls == ["whoami", ("mine", True, True), ("me/mine", sizes)]
    _, err = shipped(capfd, mine / "sft", "to=hub", "load=bf16", code=2)
    assert "exists already; give another folder: folder=DIR" in refused(2, err)


def test_a_hub_that_turns_one_away_is_a_line_and_nothing_is_made(tmp_path, capfd, monkeypatch):
    class Hub:
        def whoami(self):
            raise RuntimeError("401 Unauthorized\nfor url: x")

    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "HfApi", Hub)
    _, err = shipped(capfd, finished() / "sft", "to=hub", "push=true", f"folder={tmp_path}/x", code=2)
    assert "(401 Unauthorized for url: x); log in: hf auth login" in refused(2, err) and not list(tmp_path.iterdir())

"""A base's tensors are damaged or renamed in every way that has been met: it is refused by name, or computed rightly.

transformers itself fills what it does not find with random numbers, so each case is compared with the sound model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from align.config.schema import Load
from align.models.forward import head_logits, packed_hidden
from align.models.loading import inspect_weights, load_weights
from align.models.packing import pack
from align.models.shared_base import BaseIdentity, SharedBase
from align.planning.check import check
from align.weights.drift import of_model
from data_prep.core.errors import UserError
from tests.tiny import save_tiny_llama
from tests.tiny_chain import CPU, HOME, compose, sentences, sft

Tensors = dict[str, Tensor]
Damage = Callable[[Path], Any]
DOWN, NORM, EMBED = "model.layers.1.mlp.down_proj.weight", "model.norm.weight", "model.embed_tokens.weight"


@cache
def sound(tied: bool = True) -> Path:
    """A tiny Llama, with its head tied to the embedding or with a head of its own."""
    folder = save_tiny_llama(HOME / f"sound-{tied}")
    if not tied:
        tensors = load_file(folder / "model.safetensors")
        head = torch.randn(tensors[EMBED].shape, generator=torch.Generator().manual_seed(1)) * 0.02
        write(folder, {**tensors, "lm_head.weight": head})
        settings(folder, tie_word_embeddings=False)
    return folder


def write(folder: Path, tensors: Tensors, name: str = "model.safetensors") -> None:
    """Tensors as a file of a folder."""
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name, metadata={"format": "pt"})


def settings(folder: Path, **changed: Any) -> None:
    """Change config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changed}), "utf-8")


def shards(folder: Path, parts: list[Tensors], names: dict[str, str] | None = None) -> None:
    """The weights as several files with an index; `names` is the index's map, if it is not to be the true one."""
    (folder / "model.safetensors").unlink()
    files = [f"model-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
    for file, part in zip(files, parts, strict=True):
        write(folder, part, file)
    true = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    index = {"metadata": {}, "weight_map": names or true}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")


def rewritten(change: Callable[[Tensors], Tensors]) -> Damage:
    """The weights written again, changed."""
    return lambda folder: write(folder, change(load_file(folder / "model.safetensors")))


def halves(folder: Path) -> list[Tensors]:
    """The weights in two parts."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    return [{name: tensors[name] for name in names[part::2]} for part in (0, 1)]


def renamed(change: Callable[[str], str]) -> Damage:
    """Every tensor under another name."""
    return rewritten(lambda tensors: {change(name): value for name, value in tensors.items()})


def without(*parts: str) -> Damage:
    """No tensors whose names have these parts."""
    return rewritten(lambda t: {name: value for name, value in t.items() if not any(part in name for part in parts)})


def poisoned(name: str, value: float) -> Damage:
    """One number of a tensor is no number."""

    def change(tensors: Tensors) -> Tensors:
        tensors[name].view(-1)[3] = value
        return tensors

    return rewritten(change)


def cut_short(folder: Path, name: str = "model.safetensors") -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[:-100])


def doubled(folder: Path) -> None:
    """The embedding stands in both shards."""
    first, last = halves(folder)
    embedding = {**first, **last}[EMBED]
    shards(folder, [{**first, EMBED: embedding}, {**last, EMBED: embedding + 1}])


def stale(folder: Path) -> None:
    """The index names a tensor that no shard has."""
    shards(folder, halves(folder))
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text("utf-8"))
    index["weight_map"]["model.layers.9.x"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index), "utf-8")


def indexed(folder: Path, index: Any) -> None:
    """An index beside the shards that says this."""
    shards(folder, halves(folder))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")


def retyped(folder: Path, name: str, kind: str) -> None:
    """The header calls a tensor one of another type."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header[name]["dtype"] = kind
    written = json.dumps(header).encode()
    path.write_bytes(len(written).to_bytes(8, "little") + written + content[8 + size :])


def linked(folder: Path, to: str) -> None:
    """The weights are a link to somewhere."""
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(to)


def other(folder: Path, name: str) -> None:
    """The weights in a form that is not read."""
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / "model.safetensors").rename(folder / name)


RIGHT = ""
"""Read rightly, and nothing is said of it."""
WAYS: dict[str, tuple[Damage, str]] = {
    "nothing": (lambda folder: None, RIGHT),
    "compiled": (renamed(lambda n: "_orig_mod." + n), "tensors have names of a wrapped model: _orig_mod."),
    "wrapped by DDP": (renamed(lambda n: "module." + n), "names of a wrapped model: module."),
    "compiled and wrapped": (renamed(lambda n: "module._orig_mod." + n), "names of a wrapped model: module._orig"),
    "layers compiled": (
        renamed(lambda n: n.replace("self_attn.", "self_attn._orig_mod.")),
        "names of a wrapped model: model.layers.0.self_attn._orig_mod.",
    ),
    "wrapped by FSDP": (
        renamed(lambda n: "_fsdp_wrapped_module." + n.replace("mlp.", "_checkpoint_wrapped_module.mlp._orig_mod.")),
        "names of a wrapped model: _fsdp_wrapped_module.",
    ),
    "in peft's model": (renamed(lambda n: "base_model.model." + n), "names of a wrapped model: base_model.model."),
    "no prefix": (renamed(lambda n: n.removeprefix("model.")), "tensors have no 'model.'"),
    "one prefix too many": (renamed(lambda n: "model." + n), "tensors have a further 'model.'"),
    "half compiled": (
        rewritten(lambda t: {("_orig_mod." * (i % 2)) + n: v for i, (n, v) in enumerate(t.items())}),
        "names of a wrapped model",
    ),
    "old rotary buffers": (
        rewritten(lambda t: {**t, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}),
        RIGHT,
    ),
    "two shards": (lambda folder: shards(folder, halves(folder)), RIGHT),
    "head written too": (rewritten(lambda t: {**t, "lm_head.weight": t[EMBED].clone()}), RIGHT),
    "an index that names more": (stale, RIGHT),
    "numbers of 64 bits": (rewritten(lambda t: {n: v.double() for n, v in t.items()}), RIGHT),
    "no word on who wrote it": (
        lambda folder: save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors"),
        RIGHT,
    ),
    "embedding only as head": (renamed(lambda n: "lm_head.weight" if n == EMBED else n), RIGHT),
    "tied, with a head for scores": (
        rewritten(lambda t: {**t, "score.weight": torch.zeros(1, 32)}),
        "no head for scores: score.weight",
    ),
    "tied, with TRL's value head": (
        rewritten(lambda t: {**t, "v_head.summary.weight": torch.zeros(1, 32), "v_head.summary.bias": torch.zeros(1)}),
        "no head for scores: v_head.summary.bias, v_head.summary.weight",
    ),
}
"""What was done to a tied base that is read rightly -> what is said of it."""
REFUSED: dict[str, tuple[Damage, str]] = {
    "one tensor missing": (without("layers.1.mlp.down_proj"), f"1 missing, 0 left over, 0 of another shape; first missing, and would be random numbers: {DOWN}"),  # noqa: E501
    "a layer missing": (without("layers.1."), "9 missing"),
    "the embedding missing": (without("embed_tokens"), "2 missing"),
    "a layer too many": (rewritten(lambda t: {**t, DOWN.replace("1", "2"): t[DOWN].clone()}), "1 left over"),
    "fewer layers in config.json": (lambda folder: settings(folder, num_hidden_layers=1), "9 left over"),
    "more layers in config.json": (lambda folder: settings(folder, num_hidden_layers=3), "9 missing"),
    "another shape": (rewritten(lambda t: {**t, NORM: t[NORM][:-1]}), f"{NORM} is [31] in the files, [32]"),
    "transposed": (rewritten(lambda t: {**t, DOWN: t[DOWN].T}), f"{DOWN} is [64, 32] in the files, [32, 64]"),
    "another vocabulary": (lambda folder: settings(folder, vocab_size=300), f"{EMBED} is ["),
    "one name misspelt": (renamed(lambda n: n.replace("layers.0.mlp.up_proj", "layers.0.mlp.upproj")), "1 missing, 1 left"),  # noqa: E501
    "another library's names": (renamed(lambda n: n.replace("self_attn.", "attention.")), "8 missing, 8 left over"),
    "fused projections": (
        rewritten(lambda t: {n.replace("q_proj", "qkv_proj"): v for n, v in t.items()}),
        "2 missing, 2 left over",
    ),
    "an unknown wrapper": (renamed(lambda n: "student." + n), "left over"),
    "LoRA beside it": (rewritten(lambda t: {**t, "base_model.model." + DOWN.replace("weight", "lora_A.weight"): t[NORM].clone()}), "1 left over"),  # noqa: E501
    "two copies, one compiled": (
        rewritten(lambda t: {**t, **{"_orig_mod." + n: torch.zeros_like(v) for n, v in t.items()}}),
        "two tensors have one name",
    ),
    "two copies, one without prefix": (
        rewritten(lambda t: {**t, **{n.removeprefix("model."): torch.zeros_like(v) for n, v in t.items()}}),
        "two tensors have one name",
    ),
    "a shard missing": (
        lambda folder: (shards(folder, halves(folder)), (folder / "model-00002-of-00002.safetensors").unlink()),
        "1 weight files of the index are missing",
    ),
    "an index of one shard only": (
        lambda folder: shards(folder, halves(folder), {EMBED: "model-00001-of-00002.safetensors"}),
        "missing",
    ),
    "shards without their index": (
        lambda folder: (shards(folder, halves(folder)), (folder / "model.safetensors.index.json").unlink()),
        "neither model.safetensors nor an index",
    ),
    "a file beside its shards": (
        lambda folder: (
            shutil.copy(folder / "model.safetensors", HOME / "kept.safetensors"),
            shards(folder, halves(folder)),
            shutil.copy(HOME / "kept.safetensors", folder / "model.safetensors"),
        ),
        "two sets of weights",
    ),
    "an adapter beside it": (
        lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}', "utf-8"),
        "holds a model and an adapter",
    ),
    "the index of another model": (
        lambda folder: shards(folder, halves(folder), {"h.0.weight": "model-00003-of-00003.safetensors"}),
        "1 weight files of the index are missing",
    ),
    "an index that is a list": (lambda folder: indexed(folder, [1]), "expected a JSON object"),
    "an index without its map": (lambda folder: indexed(folder, {"weight_map": ["a"]}), "has no weight_map"),
    "a tensor in two shards": (doubled, "two tensors have one name"),
    "the last shard cut short": (
        lambda folder: (shards(folder, halves(folder)), cut_short(folder, "model-00002-of-00002.safetensors")),
        "shorter than its header says",
    ),
    "a type that does not fit the bytes": (lambda folder: retyped(folder, DOWN, "F16"), "cannot be read as a llama"),
    "a scalar": (rewritten(lambda t: {**t, NORM: torch.ones(())}), f"{NORM} is [] in the files, [32]"),
    "parts never gathered": (rewritten(lambda t: {n: torch.empty(0) for n in t}), "20 of another shape"),
    "whole numbers": (rewritten(lambda t: {**t, DOWN: (t[DOWN] * 100).to(torch.int8)}), f"kept as I8 (first: {DOWN})"),
    "imaginary": (rewritten(lambda t: {**t, DOWN: t[DOWN].to(torch.complex64)}), f"kept as C64 (first: {DOWN})"),
    "numbers of 8 bits with scales": (
        rewritten(lambda t: {**t, DOWN: t[DOWN].to(torch.float8_e4m3fn), f"{DOWN}_scale_inv": torch.ones(1)}),
        "1 left over",
    ),
    "adapted": (renamed(lambda n: n.replace("q_proj.weight", "q_proj.base_layer.weight")), "2 missing, 2 left over"),
    "a vocabulary that was padded": (
        rewritten(lambda t: {**t, EMBED: torch.cat([t[EMBED], torch.zeros(5, 32)])}),
        f"{EMBED} is [275, 32] in the files, [270, 32]",
    ),
    "an optimiser beside it": (rewritten(lambda t: {**t, "optimizer.exp_avg": t[NORM].clone()}), "1 left over"),
    "weights that are gone": (lambda folder: linked(folder, "../blobs/none"), "is a link that leads nowhere"),
    "a pointer": (
        lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "is a pointer of Git LFS",
    ),
    "a page": (lambda folder: (folder / "model.safetensors").write_text("<html>Not found"), "not a safetensors file"),
    "GGUF alone": (lambda folder: other(folder, "model-Q4_K.gguf"), "(it has model-Q4_K.gguf: GGUF, of llama.cpp)"),
    "ONNX alone": (lambda folder: other(folder, "onnx/model.onnx"), "(it has onnx/model.onnx: ONNX)"),
    "as its authors published it": (
        lambda folder: (other(folder, "params.json"), (folder / "config.json").unlink()),
        "config.json is missing (it has params.json: ",
    ),
    "layers in words": (lambda folder: settings(folder, num_hidden_layers="two"), "num_hidden_layers"),
    "heads that do not divide it": (lambda folder: settings(folder, num_attention_heads=3), "not a multiple"),
    "an unknown activation": (lambda folder: settings(folder, hidden_act="foo"), "architecture llama is not supported"),
    "a quantisation that is no object": (lambda folder: settings(folder, quantization_config=[4]), "is no object"),
    "cut short": (cut_short, "shorter than its header says"),
    "pickled": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "only pickled weights here",
    ),
}  # fmt: skip
"""What was done to a tied base that is refused, by its headers already -> what the line says."""
NUMBERS: dict[str, tuple[Damage, str]] = {
    "NaN": (poisoned(DOWN, float("nan")), f"NaN or infinite in 1 of the tensors (first: {DOWN})"),
    "infinite": (poisoned(NORM, float("inf")), f"NaN or infinite in 1 of the tensors (first: {NORM})"),
    "NaN for a token": (poisoned(EMBED, float("nan")), f"(first: {EMBED})"),
}
"""What is wrong with the numbers, which only loading knows."""


def damaged(tmp_path: Path, damage: Damage, tied: bool = True) -> Path:
    """A copy of a sound base with something done to it."""
    folder = Path(shutil.copytree(sound(tied), tmp_path / "model"))
    damage(folder)
    return folder


def opened(folder: Path) -> SharedBase:
    """A folder as a base."""
    return SharedBase.open(folder, BaseIdentity("tiny", None, "0"), Load.fp32, CPU)


def logits(base: SharedBase) -> Tensor:
    """Logits of a few sentences, packed."""
    return head_logits(base.model, packed_hidden(base.model, pack(sentences())))


def stock(tied: bool) -> Tensor:
    """The same by transformers alone on the sound folder."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(sound(tied))
    with torch.no_grad():
        return torch.cat([of_model(model)(row) for row in sentences()])


@pytest.mark.parametrize("way", WAYS)
def test_a_base_under_other_names_is_read_rightly_and_said(tmp_path, capfd, way):
    damage, note = WAYS[way]
    folder = damaged(tmp_path, damage)
    notes = inspect_weights(folder)
    assert [note in line for line in notes] == ([True] if note else []), notes
    found = opened(folder)
    torch.testing.assert_close(logits(found), stock(True), rtol=0, atol=1e-5)
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith(f"{folder}: ")]
    assert said == [f"{folder}: {line}" for line in notes]


@pytest.mark.parametrize("way", REFUSED)
def test_a_damaged_base_is_refused_by_its_headers_and_when_it_is_loaded(tmp_path, way):
    damage, words = REFUSED[way]
    folder = damaged(tmp_path, damage)
    for open_it in (inspect_weights, opened):
        with pytest.raises(UserError) as caught:
            open_it(folder)
        assert words in str(caught.value), str(caught.value)


@pytest.mark.parametrize("way", ["one tensor missing", "whole numbers", "weights that are gone", "GGUF alone"])
def test_check_tells_it_before_a_run(tmp_path, way):
    damage, words = REFUSED[way]
    asked = compose(sft(tmp_path, model=damaged(tmp_path, damage)))
    assert any(words in str(problem) for problem in check(asked).problems)


def test_a_tied_head_that_differs_is_refused_when_it_is_loaded(tmp_path):
    folder = damaged(tmp_path, rewritten(lambda t: {**t, "lm_head.weight": t[EMBED] + 1}))
    with pytest.raises(UserError, match="ties the head to the embedding, but the files hold another head"):
        opened(folder)
    settings(folder, tie_word_embeddings=False)
    assert opened(folder).model.get_output_embeddings().weight is not opened(folder).model.get_input_embeddings().weight


@pytest.mark.parametrize("way", NUMBERS)
def test_weights_that_are_no_numbers_are_told_by_name(tmp_path, way):
    damage, words = NUMBERS[way]
    folder = damaged(tmp_path, damage)
    assert inspect_weights(folder) == []
    with pytest.raises(UserError) as caught:
        opened(folder)
    assert words in str(caught.value) and caught.value.code == "not_finite"


def test_a_head_of_its_own_is_read_and_one_that_is_missing_is_not_made_up(tmp_path):
    torch.testing.assert_close(logits(opened(sound(False))), stock(False), rtol=0, atol=1e-5)
    classifier = damaged(tmp_path, rewritten(lambda t: {**{n: v for n, v in t.items() if "lm_head" not in n}, "score.weight": torch.zeros(1, 32)}), tied=False)  # noqa: E501  # fmt: skip
    for open_it in (inspect_weights, opened):
        with pytest.raises(UserError) as caught:
            open_it(classifier)
        assert "1 missing, 1 left over" in str(caught.value)
        assert "this is a reward model or classifier, which cannot speak" in str(caught.value)


def test_every_sentence_is_in_the_details_and_the_line_has_the_first(tmp_path):
    folder = damaged(tmp_path, without("layers.1.mlp"))
    with pytest.raises(UserError) as caught:
        inspect_weights(folder)
    assert len(caught.value.details) == 3 and all("layers.1.mlp" in detail for detail in caught.value.details)


def test_a_classifier_is_loaded_with_its_own_head_by_the_same_function(tmp_path):
    from transformers import AutoModelForSequenceClassification

    head = torch.randn(1, 32, generator=torch.Generator().manual_seed(3))
    folder = damaged(tmp_path, rewritten(lambda t: {**t, "score.weight": head}))
    settings(folder, num_labels=1, id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0})
    model, notes = load_weights(folder, AutoModelForSequenceClassification)
    assert torch.equal(model.score.weight, head) and notes == []
    with pytest.raises(UserError, match=r"1 missing.*score.weight"):
        load_weights(sound(), AutoModelForSequenceClassification)


def test_what_was_renamed_is_saved_under_its_plain_names(tmp_path):
    found = opened(damaged(tmp_path, renamed(lambda n: "module._orig_mod." + n)))
    found.private().save_pretrained(tmp_path / "saved")
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == load_file(sound() / "model.safetensors").keys()

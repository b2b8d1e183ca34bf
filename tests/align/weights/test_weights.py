"""merge, export, extract, compress and count: what is written opens in stock libraries and says the same."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from align.cli.dispatch import main
from align.config.registries import adapters
from align.models.low_rank import Kept, LowRankTerm, combined, factored, share_lost, truncated
from tests.tiny_chain import base, finished, grid_beyond, made, own_data, refused, talk

MERGEABLE = [name for name, cls in adapters.items() if cls.traits.mergeable]
WHOLE = [name for name, cls in adapters.items() if cls.traits.owns_weights]
OTHERS = [name for name in adapters.names() if name not in MERGEABLE + WHOLE]


def call(capsys, *words):
    capsys.readouterr()
    code = main([*words, "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out), captured.err


def term(seed, rank=6, rows=20, columns=12, scale=1.5):
    generator = torch.Generator().manual_seed(seed)
    return LowRankTerm(
        torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator), scale
    )


# ------------------------------------------------------------------------------------------------------------ algebra
def test_combined_terms_are_the_sum():
    first, second = term(0), term(1, rank=3, scale=0.25)
    joined = combined([{"a": first, "b": first}, {"a": second}])
    assert joined["a"].down_RI.shape[0] == 9
    torch.testing.assert_close(joined["a"].delta(), first.delta() + second.delta())
    torch.testing.assert_close(joined["b"].delta(), first.delta())


@pytest.mark.parametrize("rank", [1, 3, 6, 50])
def test_truncation_is_the_svd_of_the_dense_product(rank):
    whole = term(2)
    small, singular = truncated(whole, Kept(rank=rank))
    u, s, vh = torch.linalg.svd(whole.delta().double())
    kept = min(rank, 6)
    best = u[:, :kept] @ torch.diag(s[:kept]) @ vh[:kept]
    torch.testing.assert_close(small.delta().double(), best, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(singular[:6], s[:6], atol=1e-5, rtol=1e-5)
    lost = (whole.delta().double() - best).norm() / whole.delta().double().norm()
    assert share_lost(singular, kept) == pytest.approx(float(lost), abs=1e-6)


def test_energy_keeps_the_fewest_directions_that_hold_it():
    delta = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5]))  # squares 9, 4, 1, 0.25 of 14.25
    ranks = [factored(delta, Kept(energy=share))[0].down_RI.shape[0] for share in (0.5, 0.63, 0.64, 0.91, 0.92, 1.0)]
    assert ranks == [1, 1, 2, 2, 3, 4]


# -------------------------------------------------------------------------------------------------------------- merge
@pytest.mark.parametrize("method", MERGEABLE)
def test_merge_keeps_the_function(method, tmp_path, capsys):
    run = made("sft", f"adapter={method}", "name=merge-" + method)
    code, answer, err = call(capsys, "merge", f"{run}/sft", f"to={tmp_path}/m")
    assert code == 0, err
    assert answer["reloaded_ok"] and answer["drift"]["kl"] < 1e-8 and answer["drift"]["argmax_agreement"] == 1.0
    assert (tmp_path / "m" / "config.json").is_file() and (tmp_path / "m" / "tokenizer.json").is_file()
    assert not list(tmp_path.glob(".staging*"))


@pytest.mark.parametrize("method", grid_beyond(OTHERS, OTHERS[:1]))
def test_what_is_no_change_of_weights_is_not_merged(method, tmp_path, capsys):
    run = made("sft", f"adapter={method}", "name=merge-" + method)
    code, answer, err = call(capsys, "merge", f"{run}/sft", f"to={tmp_path}/m")
    assert "cannot be merged" in refused(code, err) and answer["error"]["code"] == "not_mergeable"
    assert not list(tmp_path.iterdir())


def test_merge_in_bf16_is_measured_and_bounded(tmp_path, capsys):
    run = finished()
    code, answer, _ = call(capsys, "merge", f"{run}/ppo", f"to={tmp_path}/m", "load=bf16")
    assert code == 0 and 1e-9 < answer["drift"]["kl"] < 2e-2
    code, _, err = call(capsys, "merge", f"{run}/ppo", f"to={tmp_path}/n", "load=bf16", "max_kl=1e-12")
    assert "differs too much" in refused(code, err) and not (tmp_path / "n").exists()
    code, answer, _ = call(capsys, "merge", f"{run}/ppo", f"to={tmp_path}/n", "load=bf16", "max_kl=1e-12", "--force")
    assert code == 0 and answer["forced"]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["reward_model"], "would lose its head"),
        (["ppo", "load=nf4"], "round them again"),
        (["ppo", "lod=fp32"], "did you mean 'load'"),
        (["ppo", "to={tmp}"], "exists already"),
        (["ppoo"], "did you mean"),
    ],
)
def test_merge_refuses(words, part, tmp_path, capsys):
    words = [word.replace("{tmp}", str(tmp_path)) for word in words]
    code, _, err = call(capsys, "merge", f"{finished()}/{words[0]}", *words[1:])
    assert part in refused(code, err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("verb", "place"),
    [("merge", "merge.compare_model"), ("export", "output.write_json"), ("compress", "output.write_json")],
)
@pytest.mark.parametrize(("fault", "code"), [(KeyboardInterrupt, 130), (OSError(28, "No space left"), 2)])
def test_what_is_broken_off_leaves_nothing(verb, place, fault, code, tmp_path, capsys, monkeypatch):
    def broken(*args, **kwargs):
        raise fault

    monkeypatch.setattr(f"align.weights.{place}", broken)
    words = ["rank=2"] if verb == "compress" else []
    found, _, err = call(capsys, verb, f"{finished()}/sft", f"to={tmp_path}/deep/x", *words)
    assert found == code and "Traceback" not in err
    assert not [path for path in tmp_path.rglob("*") if path.name != "deep"]


# ------------------------------------------------------------------------------------------------------------- export
def test_a_stacked_chain_is_one_lora(tmp_path, capsys):
    below = [f"stages.sft.init={finished() / 'sft'}", "stages.sft.on_parent=stack"]
    run = made("sft", "adapter=vera", *below, "name=stacked")
    code, answer, err = call(capsys, "export", f"{run}/sft", f"to={tmp_path}/l")
    assert code == 0, err
    assert answer["form"] == "lora" and answer["drift"]["max_logit"] < 1e-4
    code, _, err = call(capsys, "export", f"{run}/sft", f"to={tmp_path}/p", "form=peft")
    assert "stacked on its parent" in refused(code, err) and "possible: lora, merged" in err


def test_the_adapter_alone_loads_in_stock_peft(tmp_path, capsys):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    code, answer, _ = call(capsys, "export", f"{finished()}/ppo", f"to={tmp_path}/p")
    assert code == 0 and answer["form"] == "peft" and answer["drift"]["max_logit"] < 1e-4
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base()), str(tmp_path / "p"))
    assert model.peft_config["default"].base_model_name_or_path == base().name


def test_a_reward_model_is_a_stock_classifier(tmp_path, capsys):
    from transformers import AutoModelForSequenceClassification

    run = finished()
    code, answer, err = call(capsys, "export", f"{run}/reward_model", f"to={tmp_path}/c")
    assert code == 0, err
    assert answer["form"] == "sequence_classification" and answer["drift"]["max_logit"] < 1e-5
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "c")
    record = json.loads((run / "reward_model" / "checkpoint.json").read_text())
    rows, scores = record["probe"]["input_ids"], record["probe"]["expected"]
    width = max(map(len, rows))
    pad = model.config.pad_token_id
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    batch = model(input_ids=ids, attention_mask=mask).logits[:, 0] + answer["score_offset"]
    torch.testing.assert_close(batch, torch.tensor(scores)[:, 0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", ["peft", "lora", "merged"])
def test_no_form_loses_a_head(form, capsys, tmp_path):
    code, _, err = call(capsys, "export", f"{finished()}/reward_model", f"form={form}", f"to={tmp_path}/x")
    assert "would lose" in refused(code, err) and "sequence_classification" in err


# ----------------------------------------------------------------------------------------------- extract and compress
def test_a_full_fine_tune_is_extracted(tmp_path, capsys):
    run = made("sft", "adapter=full", "stages.sft.lr=3e-3", "name=full")
    code, answer, err = call(capsys, "extract", f"{run}/sft", "rank=32", f"to={tmp_path}/l")
    assert code == 0, err
    assert max(layer["lost"] for layer in answer["layers"].values()) < 1e-5, "32 is the layers' full rank"
    assert 0.1 < answer["explained"] < 1.0, "norms and embeddings stay behind"
    assert any("norm" in name for name in answer["uncovered"])
    code, small, _ = call(capsys, "extract", f"{run}/sft", "rank=2", f"to={tmp_path}/s")
    assert small["explained"] < answer["explained"] and small["rank"] == 2


@pytest.mark.parametrize(
    "words", [["adapter=lora", "adapter.dora=true"], ["adapter=ia3", "model.load=nf4"]], ids=["dora", "ia3"]
)
def test_what_is_no_low_rank_sum_is_extracted(words, tmp_path, capsys):
    run = made("sft", "stages.sft.lr=3e-2", *words, "name=rows", out=tmp_path / "runs")
    code, _, err = call(capsys, "export", f"{run}/sft", "form=lora", f"to={tmp_path}/e")
    assert "is no low-rank sum; possible: peft, merged; its nearest LoRA: align extract" in refused(code, err)
    code, answer, err = call(capsys, "extract", f"{run}/sft", "rank=32", f"to={tmp_path}/l")
    assert code == 0, err
    assert answer["explained"] == pytest.approx(1.0, abs=1e-3) and not answer["uncovered"]
    assert answer["drift"]["max_logit"] < 1e-3
    _, small, _ = call(capsys, "extract", f"{run}/sft", "rank=2", f"to={tmp_path}/s")
    assert small["drift"]["kl"] > 10 * answer["drift"]["kl"] and small["explained"] < answer["explained"]


def test_compression_is_exact_at_the_rank_and_worse_below(tmp_path, capsys):
    run = made("sft", "adapter=lora", "adapter.rank=8", "stages.sft.lr=1e-2", "name=compress")
    code, same, err = call(capsys, "compress", f"{run}/sft", "rank=8", f"to={tmp_path}/a")
    assert code == 0, err
    assert same["drift"]["max_logit"] < 1e-4
    _, half, _ = call(capsys, "compress", f"{run}/sft", "rank=2", f"to={tmp_path}/b")
    assert half["rank"] == 2 and half["drift"]["kl"] > 10 * same["drift"]["kl"]
    _, held, _ = call(capsys, "compress", f"{run}/sft", "energy=0.9", f"to={tmp_path}/c")
    assert all(layer["lost"] <= 0.1**0.5 + 1e-6 for layer in held["layers"].values())


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["compress", "sft"], "either rank=N or energy=SHARE"),
        (["compress", "sft", "rank=2", "energy=0.5"], "either rank=N or energy=SHARE"),
        (["compress", "sft", "rank=0"], "expected at least 1"),
        (["compress", "reward_model", "rank=2"], "would lose its head"),
        (["extract", "sft", "rank=2"], "is an adapter already"),
        (["extract", "sft", "rank=2", "base={base}"], "is an adapter already"),
        (["extract", "reward_model", "rank=2"], "would lose its head"),
        (["compress", "sft", "rank=2", "to={base}/config.json/x"], "is a file, and no folder to write into"),
    ],
)
def test_svd_tools_refuse(words, part, tmp_path, capsys):
    words = [words[0], f"{finished()}/{words[1]}", *(word.replace("{base}", str(base())) for word in words[2:])]
    code, _, err = call(capsys, *words, *([] if "to=" in words[-1] else [f"to={tmp_path}/x"]))
    assert part in refused(code, err)
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------------------- count
def test_count_needs_no_weights(tmp_path, capsys):
    (tmp_path / "config.json").write_text((base() / "config.json").read_text())
    code, answer, _ = call(capsys, "count", f"model.config={tmp_path}/config.json", "adapter=lora", "adapter.rank=4")
    assert code == 0
    width, inner, layers = 32, 64, 2
    config = json.loads((base() / "config.json").read_text())
    width, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    expected = 4 * layers * (4 * 2 * width + 3 * (width + inner))
    assert answer["trainable"] == expected and answer["head"] == 0 and answer["method"] == "lora"
    assert answer["adapter_bytes"] == 4 * expected and answer["share"] == expected / answer["total"]


def test_count_of_a_pipeline_tells_the_head_apart(capsys):
    code, answer, _ = call(capsys, "count", "pipeline=rlhf", f"model.config={base()}", "model=nano")
    assert code == 0
    heads = {name: row["head"] for name, row in answer["stages"].items()}
    width = json.loads((base() / "config.json").read_text())["hidden_size"]
    assert heads == {"sft": 0, "reward_model": width + 1, "ppo": 0}


def test_count_refuses_what_is_no_model(tmp_path, capsys):
    code, _, err = call(capsys, "count", f"model.config={tmp_path}", "adapter=lora")
    assert "config.json is missing" in refused(code, err)


# ------------------------------------------------------------------------------------------------------------ combine
@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Two tasks on one base, learned by two methods."""
    folder, runs = tmp_path_factory.mktemp("tasks"), []
    for name, answer, method, lr in (("the", "the {i} the", "lora", "2e-2"), ("you", "you all {i}", "vera", "2e-1")):
        rows = own_data(folder / f"{name}.jsonl", talk(40, answer=answer))
        words = [*rows, "data.conversations.eval_share=0.2", f"adapter={method}", "stages.sft.max_steps=25"]
        runs.append(made("sft", *words, f"stages.sft.lr={lr}", f"name={name}", out=folder))
    return [f"{run}/sft" for run in runs]


def test_weights_one_and_zero_are_the_first_adapter(tasks, tmp_path, capsys):
    code, answer, err = call(capsys, "combine", *tasks, "weights=[1,0]", f"to={tmp_path}/c")
    assert code == 0, err
    own, other = answer["losses"].values()
    assert own["combined"] == pytest.approx(own["own"], abs=1e-5) and own["own"] < own["base"] - 0.3
    assert other["own"] < other["combined"] and other["own"] < other["base"] - 0.3
    assert answer["drift"]["max_logit"] < 1e-4 and answer["drift"]["kl"] < 1e-8


@pytest.mark.parametrize("how", ["linear", "svd", "ties", "dare_linear", "dare_ties"])
def test_every_combination_helps_both_tasks(how, tasks, tmp_path, capsys):
    rank = {"linear": [], "svd": ["rank=24"]}.get(how, ["rank=24", "density=0.9"])
    code, answer, err = call(capsys, "combine", *tasks, f"how={how}", "weights=[1,1]", *rank, f"to={tmp_path}/c")
    assert code == 0, err
    assert all(loss["combined"] < loss["base"] for loss in answer["losses"].values())
    assert answer["drift"]["max_logit"] < 1e-3, "stock peft computes what was measured"


def test_ties_elects_signs_on_the_dense_change():
    from align.weights.combine import _COMBINED
    from align.weights.options import CombineOptions, How

    def layers(*rows):
        return [{"w": factored(torch.tensor([row]), Kept(rank=1))[0]} for row in rows]

    options = CombineOptions(how=How.ties, rank=1, density=0.75)
    found = _COMBINED[How.ties](layers([4.0, -2.0, 1.0, 0.1], [2.0, 3.0, -0.2, 1.0]), [1.0, 1.0], options)
    # the smallest entry of each goes; in column 1 the signs sum to +1, so -2 goes; what agrees is averaged
    torch.testing.assert_close(found["w"].delta(), torch.tensor([[3.0, 3.0, 1.0, 1.0]]))


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["{one}"], "two or more TARGETs"),
        (["{one}", "{two}", "weights=[1]"], "one weight for each TARGET (got 1; expected 2)"),
        (["{one}", "{two}", "how=svd"], "needs a rank"),
        (["{one}", "{two}", "rank=4"], "how=linear is exact"),
        (["{one}", "{two}", "how=svd", "rank=4", "density=0.5"], "drops no entries"),
        (["{one}", "{two}", "how=tie"], "did you mean 'ties'"),
        (["{one}", "{reward}"], "would lose its head"),
    ],
)
def test_combine_refuses(words, part, tasks, tmp_path, capsys):
    names = {"one": tasks[0], "two": tasks[1], "reward": f"{finished()}/reward_model"}
    code, _, err = call(capsys, "combine", *(word.format(**names) for word in words), f"to={tmp_path}/x")
    assert part in refused(code, err)
    assert not list(tmp_path.iterdir())


def test_default_weights_average_once():
    """Where signs are elected, what agrees is averaged already: halving it as well would halve the change."""
    from align.weights.combine import _weights
    from align.weights.options import CombineOptions, How

    found = {how.value: _weights(CombineOptions(how=how, rank=None if how is How.linear else 4), 2) for how in How}
    half, one = [0.5, 0.5], [1.0, 1.0]
    assert found == {"linear": half, "svd": half, "dare_linear": half, "ties": one, "dare_ties": one}


def test_two_runs_of_one_name_are_told_apart(tasks, tmp_path, capsys):
    from pathlib import Path

    run = Path(tasks[1]).parent
    copy = shutil.copytree(run, tmp_path / "elsewhere" / run.name)
    code, answer, err = call(capsys, "combine", tasks[0], tasks[1], f"{copy}/sft", f"to={tmp_path}/c")
    assert code == 0, err
    assert len(answer["losses"]) == 3 and str(copy / "sft") in answer["losses"]
    assert all(row["rows"] > 0 for row in answer["losses"].values())


def test_a_task_without_held_out_rows_is_not_measured(tmp_path, capsys):
    rows = own_data(tmp_path / "rows.jsonl", talk(20))
    runs = [made("sft", *rows, "data.conversations.eval_share=0", f"name=n{i}", out=tmp_path) for i in range(2)]
    code, _, err = call(capsys, "combine", *(f"{run}/sft" for run in runs), f"to={tmp_path}/c")
    assert "has no held-out rows" in refused(code, err) and not (tmp_path / "c").exists()

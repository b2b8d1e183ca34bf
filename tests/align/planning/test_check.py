"""`align check`: every planted fault is found before any training, in one line; what is sound is not complained of."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console
from safetensors.torch import load_file, save_file

from align.cli.dispatch import main
from align.cli.terminal import print_findings, print_rows
from align.config.compose import compose
from align.planning.check import check
from align.planning.findings import Findings
from tests.tiny import TEMPLATE, save_tiny_llama, tiny_tokenizer, write_jsonl
from tests.tiny_chain import base, finished, own_data, pipeline_words, sft, talk


def found(*words: str) -> Findings:
    """The findings of a configuration."""
    return check(compose(words))


def lines(findings: Findings, severity: str = "error") -> list[str]:
    """The lines of a severity, each asserted to be one."""
    shown = [str(problem) for problem in findings.problems if problem.severity == severity]
    assert not any("\n" in line for line in shown)
    return shown


def only(findings: Findings, severity: str = "error") -> str:
    """The one line of a severity."""
    shown = lines(findings, severity)
    assert len(shown) == 1, shown
    return shown[0]


def command(capfd, *words: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of `align check`."""
    capfd.readouterr()
    code = main(["check", *words])
    out, err = capfd.readouterr()
    return code, out, err


def with_template(folder: Path, template: str, **settings: str) -> Path:
    """A copy of the tiny base with another chat template, and other settings of its tokenizer."""
    model = Path(shutil.copytree(base(), folder))
    (model / "chat_template.jinja").write_text(template, encoding="utf-8")
    if settings:
        path = model / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **settings}), "utf-8")
    return model


# ---------------------------------------- sound recipes
def test_a_sound_chain_has_no_problem_and_says_what_it_would_do(tmp_path):
    findings = found(*pipeline_words("rlhf", f"out={tmp_path}"))
    assert findings.ok and findings.problems == []
    stages = {stage["name"]: stage for stage in findings.stages}
    assert [stages[name]["init"] for name in stages] == ["base", "sft", "sft", "ppo"]
    assert stages["sft"]["on_parent"] is None and stages["ppo"]["on_parent"] == "continue"
    assert stages["ppo"]["reward"] == "reward_model" and stages["ppo"]["updates"] == 2
    assert stages["ppo"]["steps"] == 2 * 2 * 2 and stages["sft"]["steps"] == 2
    assert "adapter" not in stages["evaluate"] and set(findings.data) == {"conversations", "preferences", "prompts"}
    assert not list(tmp_path.iterdir()), "check leaves nothing behind"


def test_what_check_says_is_what_run_does():
    """Footing, counts, rows and steps of a finished run are those that check foretells."""
    run = finished()
    record = json.loads((run / "run.json").read_text("utf-8"))
    stages = {stage["name"]: stage for stage in found(*pipeline_words("rlhf")).stages}
    for entry in record["stages"]:
        foretold = stages[entry["name"]]
        assert entry["load"] == foretold["load"] and entry["on_parent"] == foretold["on_parent"]
        card = json.loads((run / entry["dir"] / "data_card.json").read_text("utf-8"))
        assert card["splits"]["train"] == foretold["rows"]
        if "adapter" in foretold:
            head = 33 if entry["name"] == "reward_model" else 0
            assert entry["trainable"] == foretold["trainable"] + head and entry["adapter"] == foretold["adapter"]
            steps = [json.loads(row) for row in (run / entry["dir"] / "metrics.jsonl").read_text("utf-8").splitlines()]
            expected = foretold.get("updates", foretold["steps"])
            assert max(row["step"] for row in steps if row["split"] == "train") == expected
            role = json.loads((run / entry["dir"] / "checkpoint.json").read_text("utf-8"))["role"]
            assert role == compose(pipeline_words("rlhf")).stages[list(stages).index(entry["name"])].stage.makes


# ---------------------------------------- planted faults: data
def test_a_mixture_says_what_it_draws(tmp_path, capfd):
    import json

    for name, count in (("a", 60), ("b", 20)):
        rows = [{"prompt": f"{name}{n}", "completion": "so<|endoftext|>" * (name == "b") or "so"} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {name: str(tmp_path / f"{name}.jsonl") for name in "ab"}
    words = [
        "pipeline=sft",
        "data=files",
        f"data.mix={{a: {{path: {files['a']}}}, b: {{path: {files['b']}, epochs: 2}}}}",
    ]
    code, out, err = command(capfd, *words, "data.conversations.eval_share=0", "data.mix.b.eval_share=0")
    said = " ".join(out.split())
    assert code == 0, err
    assert "40 rows drawn" in said and "2 epochs" in said and "b: literal <|endoftext|> cut off: 20" in said


def test_a_role_typo(tmp_path):
    rows = talk()
    rows[4]["messages"][1]["role"] = "asistant"
    findings = found(*sft(tmp_path, *own_data(tmp_path / "t.jsonl", rows)))
    line = only(findings)
    assert "t.jsonl:5:messages" in line and "asistant" in line and "'assistant'" in line
    assert findings.data["conversations"]["rows"]["kept"] == 23, "the rest is counted all the same"


def test_every_bad_row_has_its_line(tmp_path):
    rows = talk()
    rows[4]["messages"][1]["role"] = "asistant"
    rows[9] = {"messages": [{"role": "user", "content": "alone"}]}
    shown = lines(found(*sft(tmp_path, *own_data(tmp_path / "t.jsonl", rows))))
    assert ["t.jsonl:5" in shown[0], "t.jsonl:10" in shown[1], len(shown)] == [True, True, 2]


def test_an_answer_that_max_length_would_cut_off(tmp_path):
    rows = talk(40)
    rows[7]["messages"][0]["content"] = "say " * 80
    words = sft(tmp_path, *own_data(tmp_path / "t.jsonl", rows), "stages.sft.max_length=64")
    findings = found(*words)
    line = only(findings, "warning")
    assert findings.ok and "1 of 40 rows (2.5%)" in line and "t.jsonl:8" in line and "max_length" in line
    assert findings.data["conversations"]["rows"]["dropped"] == {"too_long": 1}
    line = only(found(*words, "stages.sft.max_lost=0"))
    assert "t.jsonl:8" in line and "raise stages.sft.max_length (now 64, at most 256" in line
    rows[7]["messages"][0]["content"] = "say " * 300
    words = sft(tmp_path, *own_data(tmp_path / "t.jsonl", rows), "stages.sft.max_length=900")
    line = only(found(*words), "warning")
    assert "the model's context of 256 is the limit: set stages.sft.on_long=truncate to cut prompts, or set" in line
    rows[7]["messages"].reverse()
    rows[7]["messages"][0]["role"], rows[7]["messages"][1]["role"] = "user", "assistant"
    line = only(found(*sft(tmp_path, *own_data(tmp_path / "t.jsonl", rows), "stages.sft.max_length=900")), "warning")
    assert "is the limit: shorten or split the answers, or set stages.sft.max_lost to lose such rows" in line


def test_no_row_is_short_enough(tmp_path):
    line = only(found(*sft(tmp_path, *own_data(tmp_path / "t.jsonl", talk()), "stages.sft.max_length=4")))
    assert "24 of 24 rows" in line and "raise stages.sft.max_length" in line


def test_rows_without_anything_to_learn(tmp_path):
    rows = talk()
    rows[2]["messages"][1]["train"] = False
    line = only(found(*sft(tmp_path, *own_data(tmp_path / "t.jsonl", rows))))
    assert "t.jsonl:3" in line and "nothing to train on" in line
    for row in rows:
        row["messages"][1]["train"] = False
    shown = lines(found(*sft(tmp_path, *own_data(tmp_path / "t.jsonl", rows))))
    assert "t.jsonl:1" in shown[0] and "nothing to train on" in shown[0] and "23 more" in shown[0]


def test_an_identical_pair(tmp_path):
    rows = [{"prompt": f"say {i}", "chosen": f"the {i}", "rejected": "no"} for i in range(24)]
    rows[3]["rejected"] = rows[3]["chosen"]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    line = only(found(*pipeline_words("reward_model", f"data.preferences.path={path}")))
    assert "p.jsonl:4" in line and "same" in line


# ---------------------------------------- planted faults: template and tokenizer
def test_a_template_that_never_ends_a_turn(tmp_path):
    model = with_template(
        tmp_path / "m", TEMPLATE.replace("m['content'] + '<|end|>' }}{% endgen", "m['content'] }}{% endgen")
    )
    line = only(found(*sft(tmp_path, model=model)))
    assert "ends an assistant turn without an end token" in line and "eos_token" in line


def test_a_template_without_generation_marks_works_and_says_so(tmp_path):
    model = with_template(tmp_path / "m", TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
    findings, marked = found(*sft(tmp_path, model=model)), found(*sft(tmp_path))
    assert findings.problems == [] and "no generation marks" in findings.model["notes"]["mask"]
    assert "mask" not in marked.model["notes"] and findings.preview == marked.preview
    assert findings.data["conversations"]["end_supervised_share"] == 1.0


def test_a_doubled_bos_is_folded_into_one_and_said(tmp_path):
    model = with_template(tmp_path / "m", "{{ '<|system|><|system|>' }}" + TEMPLATE, bos_token="<|system|>")
    findings = found(*sft(tmp_path, model=model))
    bos = tiny_tokenizer().convert_tokens_to_ids("<|system|>")
    assert findings.problems == [] and "folded into one" in findings.model["notes"]["bos"]
    assert [row["ids"].count(bos) for row in findings.preview] == [1, 1]


def test_a_bos_of_template_and_tokenizer_is_written_once(tmp_path):
    from transformers import AutoTokenizer

    model = with_template(tmp_path / "m", "{{ bos_token }}" + TEMPLATE, bos_token="<|system|>")
    adding = AutoTokenizer.from_pretrained(model)
    from tokenizers.processors import TemplateProcessing

    bos = adding.convert_tokens_to_ids("<|system|>")
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A", special_tokens=[("<|system|>", bos)]
    )
    adding.save_pretrained(model)
    assert AutoTokenizer.from_pretrained(model)("the")["input_ids"][0] == bos, "the fault is planted"
    findings = found(*sft(tmp_path, model=model))
    assert findings.problems == [] and "written once" in findings.model["notes"]["bos"]
    assert [row["ids"].count(bos) for row in findings.preview] == [1, 1]


def test_a_tokenizer_of_another_model(tmp_path):
    model = save_tiny_llama(tmp_path / "m")
    path, weights = model / "config.json", load_file(model / "model.safetensors")
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "vocab_size": 100}), "utf-8")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:100].clone()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert "the model has 100 tokens" in lines(found(*sft(tmp_path, model=model)))[0]


# ---------------------------------------- planted faults: configuration
@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("stages.sft.lr=abc", "stages.sft.lr: expected a number (got 'abc')"),
        (
            "stages.ppo.adapter.rnak=8",
            "stages.ppo.adapter.rnak: unknown option (did you mean 'stages.ppo.adapter.rank'?)",
        ),
        ("stages.sft.data.conversations.fromat=pairs", "stages.sft.data.conversations.fromat: unknown option"),
        ("data.conversations.options.foo=1", "sft: unknown option of the generator smalltalk 'foo'"),
        (
            "data.conversations.options.styls=1",
            "unknown option of the format answer_table 'styls' (did you mean 'styles'?",
        ),
        ("adapter=lorra", "unknown adapter 'lorra' (did you mean 'lora'?"),
    ],
)
def test_mistakes_in_the_configuration(word, said, capfd):
    small = [f"data.{kind}.limit=300" for kind in ("conversations", "preferences", "prompts")]
    code, out, _ = command(capfd, word, *small, "stages.ppo.batch_size=32")
    shown = [line for line in out.splitlines() if line.startswith("problem")]
    assert code == 2 and len(shown) == 1 and said in shown[0]
    assert out.splitlines()[-1].partition(",")[0] == "1 problem"


def test_two_mistakes_are_two_lines(capfd):
    code, out, _ = command(capfd, "stages.sft.lr=abc", "seed=1", "stages.ppo.klcoef=1")
    assert code == 2 and out.count("problem  ") == 2 and out.endswith("2 problems\n")
    assert "stages.sft.lr" in out and "'stages.ppo.kl_coef'" in out


# ---------------------------------------- the answer
def test_json_has_the_contracts_keys(tmp_path, capfd):
    rows = talk()
    rows[4]["messages"][1]["role"] = "asistant"
    code, out, _ = command(capfd, *sft(tmp_path, *own_data(tmp_path / "t.jsonl", rows)), "--json")
    answer = json.loads(out)
    assert code == 2 and answer["ok"] is False
    assert {"ok", "problems", "rows", "preview", "stages", "data", "model"} <= set(answer)
    assert set(answer["rows"]) == {"in", "kept", "dropped", "truncated"} and answer["rows"]["in"] == 24
    problem = answer["problems"][0]
    assert problem["row"] == 5 and problem["stage"] == "sft" and problem["severity"] == "error" and problem["hint"]
    row = answer["preview"][0]
    assert len(row["tokens"]) == len(row["ids"]) == len(row["mask"]) > 3 and "".join(row["tokens"]).startswith(
        "<|user|>"
    )
    code, out, _ = command(capfd, "stages.ppo.klcoef=1", "--json")
    answer = json.loads(out)
    assert code == 2 and answer["ok"] is False and answer["error"]["field"] == "stages.ppo.klcoef"
    assert answer["problems"][0]["code"] == "unknown_key"


def test_the_last_line_is_the_verdict(tmp_path, capfd):
    code, out, err = command(capfd, *sft(tmp_path))
    assert code == 0 and out.splitlines()[-1] == "no problems" and err == ""
    code, out, _ = command(capfd, *sft(tmp_path, "stages.sft.lr=0.5"))
    assert code == 0 and out.splitlines()[-1] == "no problems, 1 warning"


def test_a_configuration_mistake_answers_at_once_without_torch():
    """What takes longest is not imported, and nothing as large beside it."""
    program = (
        "import sys; from align.cli import main; code = main(['check', 'stages.ppo.klcoef=1']);"
        "print(code, len(sys.modules), *sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    code, count, *names = done.stdout.splitlines()[-1].split()
    assert code == "2" and not {"torch", "transformers", "accelerate", "peft", "datasets", "pyarrow"} & set(names)
    assert int(count) < 700


def test_data_path_goes_with_options_of_its_kind(tmp_path):
    rows = [*talk(40, "say {i}", "the {i}"), {"messages": [{"role": "asistant", "content": "x"}]}]
    path = write_jsonl(tmp_path / "t.jsonl", rows)
    words = ["data.conversations.path=null", f"data.path={path}", "data.conversations.on_bad_row=drop"]
    findings = found(*sft(tmp_path, *words))
    assert lines(findings) == [] and findings.rows()["dropped"] == {"unknown_role": 1}
    unread = found(*sft(tmp_path, f"data.path={path}"))
    assert "is not read: the data" in only(unread)


# ---------------------------------------- the screen
def shown(findings: Findings, **settings) -> str:
    """What is printed on a console of these settings."""
    stream = io.StringIO()
    print_findings(findings, Console(file=stream, highlight=False, emoji=False, markup=False, **settings))
    return stream.getvalue()


@pytest.mark.parametrize("width", [40, 80, 140])
def test_it_fits_the_terminal(width, tmp_path):
    rows = talk(
        12, "say \x1b[2J\u202e\tand go on and on and on for longer than forty columns {i}", "日本語 the {i}\nend"
    )
    findings = found(*sft(tmp_path, *own_data(tmp_path / "t.jsonl", rows), "stages.sft.lr=0.5"))
    text = shown(findings, width=width, force_terminal=False)
    *lines, verdict = text.splitlines()
    warnings = [line for line in lines if line.startswith("warning  ")]  # whole lines, for other programs
    assert max(cell_len(line) for line in lines if line not in warnings) <= width
    assert any(line.startswith("warning  stages.sft.lr") for line in warnings)
    assert verdict == f"no problems, {len(warnings)} warnings"
    assert "\x1b" not in text and "\u202e" not in text and "\\x1b" in text and "\\t" in text and "\\n" in text


def test_the_mask_is_in_colour_or_in_brackets(tmp_path, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    findings = found(*sft(tmp_path))
    plain = shown(findings, width=80, force_terminal=False)
    assert "│<|end|>]" in plain and "[<|user|>]" not in plain and "[ ]: in the loss" in plain
    coloured = shown(findings, width=80, force_terminal=True, color_system="standard")
    assert "\x1b[1;32m<|end|>" in coloured and "\x1b[1;32m<|user|>" not in coloured and "<|end|>]" not in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    silent = shown(findings, width=80, force_terminal=True, color_system="standard")
    assert "│<|end|>]" in silent and "32m" not in silent


def test_neighbours_in_the_loss_stand_in_one_bracket():
    row = {"kind": "conversations", "part": "whole", "id": "1"}
    few = {"tokens": ["Hi", "P", "ar", "cel", "<|end|>", "\n", "x"], "mask": [0, 1, 1, 1, 1, 0, 1], "ids": [0] * 7}
    many = {"tokens": ["a"] * 402, "mask": [1] * 402, "ids": [0] * 402}
    some = {"tokens": ["a"] * 230, "mask": [1] * 230, "ids": [0] * 230}
    stream = io.StringIO()
    print_rows(
        [{**row, **few}, {**row, **many}, {**row, **some}],
        Console(file=stream, highlight=False, markup=False, width=2000),
    )
    lines = [line.strip() for line in stream.getvalue().splitlines()]
    assert lines[2] == "Hi│[P│ar│cel│<|end|>]\\n│[x]"
    half = f"[{'│'.join('a' * 200)}]"
    assert lines[4] == f"{half} ... 2 more tokens ... {half}"
    assert lines[6] == f"[{'│'.join('a' * 230)}]"


def test_a_terminal_that_knows_ascii_alone(tmp_path):
    rows = talk(12, "say é {i}", "日本語 {i}")
    findings = found(*sft(tmp_path, *own_data(tmp_path / "t.jsonl", rows)))
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print_findings(findings, Console(file=stream, width=60, highlight=False, markup=False))
    stream.flush()
    assert b"<|user|>|" in stream.buffer.getvalue()  # type: ignore[attr-defined]


def test_answers_that_are_cut_open_are_said(tmp_path):
    rows = talk(40)
    rows[7]["messages"][1]["content"] = "the end " * 60
    words = ["stages.sft.max_length=64", "stages.sft.on_long_answer=open"]
    findings = found(*sft(tmp_path, *own_data(tmp_path / "t.jsonl", rows), *words))
    assert "end of turn is supervised in 97.5% of the rows" in only(findings, "warning")
    assert findings.rows()["truncated"] == 1
    assert "t.jsonl:8" in " ".join(shown(findings, width=140).split("cut short")[1].split("splits")[0].split())


def test_columns_that_would_be_left_out_and_grades_that_are_not_used(tmp_path, capfd):
    rows = [{"prompt": f"Why {n}?", "completion": "So.", "context": f"It rains {n}.", "score": n} for n in range(40)]
    words = sft(tmp_path, f"data.conversations.path={write_jsonl(tmp_path / 'a.jsonl', rows)}")
    findings = found(*words)
    assert f"{tmp_path / 'a.jsonl'}:context: is left out, though answers may depend on it" in only(findings)
    assert "a.jsonl:score: is not used: all rows are read alike; data.keep={score:" in only(findings, "warning")
    kept = found(*words, "data.unused=[context]", "data.keep={score: '>=10'}")
    assert kept.ok and kept.rows()["dropped"]["not_kept"] == 10
    capfd.readouterr()
    assert main(["run", *words]) == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith(f"align: {tmp_path / 'a.jsonl'}:context: is left out")
    assert main(["run", *words, "data.unused=[context]", "stages.sft.max_steps=1"]) == 0
    assert f"sft: warning: {tmp_path / 'a.jsonl'}:score: is not used" in capfd.readouterr().err


def test_rows_that_a_later_stage_cannot_read_are_refused_before_anything_is_trained(tmp_path, capsys):
    """A reward model's pairs that leave an article out are known before SFT has run."""
    talk = write_jsonl(tmp_path / "talk.jsonl", [{"prompt": f"say {i}", "completion": f"{i}"} for i in range(40)])
    pairs = [{"prompt": f"say {i}", "chosen": f"{i}", "rejected": "no", "article": "long"} for i in range(40)]
    path = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    words = ["pipeline=rlhf", "model=nano", "data=files", f"data.conversations.path={talk}"]
    words += [f"data.preferences.path={path}", f"out={tmp_path / 'runs'}", "name=r"]
    assert main(["run", *words]) == 2
    said = capsys.readouterr().err
    assert "article" in said and "data.unused" in said and not (tmp_path / "runs").exists()


def test_bad_rows_of_a_later_stage_are_named_before_anything_is_trained_and_all_at_once(tmp_path, capsys):
    """The first rows are looked at; where one of them is bad, all are."""
    talk = write_jsonl(tmp_path / "talk.jsonl", [{"prompt": f"say {i}", "completion": f"{i}"} for i in range(40)])
    pairs = [{"prompt": f"say {i}", "chosen": f"{i}", "rejected": "no"} for i in range(200)]
    pairs[3]["rejected"] = pairs[190]["rejected"] = {}
    path = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    words = ["pipeline=sft_dpo", "model=nano", "data=files", f"data.conversations.path={talk}"]
    words += [f"data.preferences.path={path}", f"out={tmp_path / 'runs'}", "name=r"]
    assert main(["run", *words]) == 2
    said = capsys.readouterr().err
    assert f"{path}:4:rejected" in said and f"{path}:191:rejected" in said and not (tmp_path / "runs").exists()

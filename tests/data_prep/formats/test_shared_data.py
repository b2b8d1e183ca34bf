"""Real public files, where they are present (ALIGN_SHARED, or ../shared beside the repository).

Every file of the folder loads, by automatic detection or by a recipe of recipes/data/, and gives as many rows as its
README says.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from data_prep.core.errors import UserError
from data_prep.options import DataOptions, LengthOptions, OnBadRow, SourceOptions
from data_prep.prepare.prepare import Renderer, prepare, template_digest, tokenizer_digest
from data_prep.records.stream import source_for
from data_prep.types import CONVERSATION, DOCUMENT, PREFERENCE, PROMPT, UNPAIRED, Conversation, Message, RowKind
from tests.records import read_records

SHARED = Path(os.environ.get("ALIGN_SHARED", Path(__file__).resolve().parents[3].parent / "shared"))
pytestmark = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="no shared data here")
LENGTH = LengthOptions(max_length=1024, max_lost=1.0)
_NAMES = {CONVERSATION: "conversations", PREFERENCE: "preferences", UNPAIRED: "preferences"}
_NAMES |= {PROMPT: "prompts", DOCUMENT: "text"}

Case = tuple[str, str, str, int, dict[str, int]]
"""(file or recipe, kind, format, records, dropped by reason)"""
CASES: list[Case] = [
    ("chitchat/persona_preference.jsonl.gz", PREFERENCE, "pairs", 7993, {}),
    ("chitchat/persona_table.jsonl.gz", CONVERSATION, "answer_table", 8018, {}),
    ("chitchat/qna_chitchat_caring.tsv.gz", CONVERSATION, "question_answer", 8307, {}),
    ("chitchat/qna_chitchat_enthusiastic.tsv.gz", CONVERSATION, "question_answer", 8310, {}),
    ("chitchat/qna_chitchat_friendly.tsv.gz", CONVERSATION, "question_answer", 8310, {}),
    ("chitchat/qna_chitchat_professional.tsv.gz", CONVERSATION, "question_answer", 8310, {}),
    ("chitchat/qna_chitchat_witty.tsv.gz", CONVERSATION, "question_answer", 8307, {}),
    ("corpus/fairytales.jsonl.gz", DOCUMENT, "text", 255, {}),
    ("corpus/novels.jsonl.gz", DOCUMENT, "text", 11, {}),
    ("corpus/short_answers.jsonl.gz", DOCUMENT, "text", 13282, {}),
    ("corpus/stories.jsonl.gz", DOCUMENT, "text", 11184, {}),
    ("data=stories", CONVERSATION, "prompt_completion", 11184, {}),
    ("instruct/alpaca_data.json.gz", CONVERSATION, "alpaca", 1494, {}),
    ("instruct/alpaca_en_demo.json.gz", CONVERSATION, "alpaca", 996, {}),
    ("instruct/code_alpaca_2k.json.gz", CONVERSATION, "alpaca", 2017, {"empty": 2}),
    ("instruct/constrained_answers_train.jsonl.gz", CONVERSATION, "prompt_completion", 2326, {}),
    ("instruct/fairytaleqa_train_questions.jsonl.gz", PROMPT, "prompts", 8548, {}),
    ("instruct/fairytaleqa_val_questions.jsonl.gz", PROMPT, "prompts", 1025, {}),
    ("data=fairytaleqa", CONVERSATION, "prompt_completion", 8548 + 1025, {}),
    ("instruct/glaive_toolcall_en_demo.json.gz", CONVERSATION, "sharegpt", 300, {}),
    ("data=toolcalls", CONVERSATION, "sharegpt", 300, {}),
    ("instruct/gpteacher_roleplay.json.gz", CONVERSATION, "alpaca", 1923, {}),
    ("instruct/oasst_en_100_tree.jsonl.gz", CONVERSATION, "oasst", 100, {}),
    ("instruct/oasst_en_100_tree.jsonl.gz", PREFERENCE, "oasst", 754, {}),
    ("instruct/self_instruct_seed_tasks.jsonl.gz", CONVERSATION, "self_instruct", 175, {}),
    ("data=sgd", CONVERSATION, "messages", 40, {}),
    ("instruct/sgd_train_messages.jsonl.gz", CONVERSATION, "messages", 12174, {}),
    ("instruct/sharegpt_identity.json.gz", CONVERSATION, "sharegpt", 500, {}),
    ("nlg/e2e_valid.txt.gz", DOCUMENT, "text", 4672, {}),
    ("data=e2e", CONVERSATION, "prompt_completion", 4672, {}),
    ("preference/alpaca_eval_pairs.jsonl.gz", PREFERENCE, "graded", 3428, {"empty": 7, "tied": 7}),
    ("preference/dpo_en_demo.json.gz", PREFERENCE, "sharegpt_ranking", 299, {}),
    ("preference/hh_harmless_base_dev.jsonl.gz", PREFERENCE, "hh", 813, {"other_prompt": 2}),
    ("preference/kto_en_demo.json.gz", UNPAIRED, "kto", 300, {}),
    ("preference/kto_en_demo.json.gz", CONVERSATION, "kto", 300, {"bad_reply": 150}),
    ("preference/stack_exchange_paired_tiny.json.gz", PREFERENCE, "stack_exchange", 25, {}),
    ("verifiable/gsm8k_train.jsonl.gz", CONVERSATION, "question_answer", 7473, {}),
    ("verifiable/scan_simple_train_6000.txt.gz", DOCUMENT, "text", 6000, {}),
    ("data=scan", CONVERSATION, "prompt_completion", 6000, {}),
    ("verifiable/spelling_train.jsonl.gz", CONVERSATION, "prompt_completion", 4396, {}),
    ("verifiable/step_by_step_math_train.jsonl.gz", CONVERSATION, "prompt_completion", 19038, {}),
    ("multitask/*.jsonl.gz", CONVERSATION, "prompt_completion", 7109, {}),
]


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    if not (SHARED / "models" / "mini").is_dir():
        pytest.skip("no shared model here")
    from transformers import AutoTokenizer

    return Renderer(AutoTokenizer.from_pretrained(SHARED / "models" / "mini"))


def data(path: str, kind: str = "conversations", **source: Any) -> DataOptions:
    return DataOptions(root=str(SHARED / "data"), **{kind: SourceOptions(path=path, **source)})


def options_of(case: str, kind: str) -> DataOptions:
    if not case.startswith("data="):
        return data(case, _NAMES[kind])
    from align.config.compose import compose

    return compose(["pipeline=sft", case, f"data.root={SHARED / 'data'}"]).stages[0].data


@pytest.mark.parametrize(("case", "kind", "form", "count", "dropped"), CASES)
def test_every_file_loads(case: str, kind: str, form: str, count: int, dropped: dict[str, int]) -> None:
    data = options_of(case, kind)
    if form == "answer_table":  # by name alone
        getattr(data, _NAMES[kind]).format = form
    records, tally, about = read_records(source_for(data, kind), kind, 0)
    assert (about["format"], tally.seen) == (form, count)
    assert {reason: n for reason, n in tally.dropped.items() if n} == dropped
    assert len(records) + sum(dropped.values()) == count
    assert len({record.id for record in records}) == len(records)


def test_the_cases_are_the_folder_and_its_readme() -> None:
    table = re.findall(
        r"^\| `([^`]+)`(?: \((\d+) files\))? \| ([\d,]+) \|", (SHARED / "data" / "README.md").read_text(), re.M
    )
    counts = {path: int(rows.replace(",", "")) for path, _, rows in table}
    ours: dict[str, int] = {}
    for case, _, _, count, _ in CASES:
        ours.setdefault(case, count)
    ours["instruct/sgd_dev_original_sample.json.gz"] = ours["data=sgd"]
    assert {path: count for path, count in ours.items() if not path.startswith("data=")} == counts
    files = {path.relative_to(SHARED / "data").as_posix() for path in (SHARED / "data").rglob("*.gz")}
    assert {path for path in files if not path.startswith("multitask/")} == counts.keys() - {"multitask/*.jsonl.gz"}


def test_messages(renderer: Renderer) -> None:
    card = prepare(
        RowKind.conversations, data("instruct/sgd_train_messages.jsonl.gz", limit=500), renderer, LENGTH, 0
    ).card
    assert (card["format"], card["rows"]["kept"]) == ("messages", 500)


@pytest.mark.parametrize("recipe", ["toolcalls", "sgd", "e2e"])
def test_recipes_render(renderer: Renderer, recipe: str) -> None:
    options = options_of(f"data={recipe}", CONVERSATION)
    options.conversations.limit = 100
    card = prepare(RowKind.conversations, options, renderer, LENGTH, 0).card
    assert card["rows"]["kept"] >= 0.7 * card["rows"]["in"] and 0 < card["supervised_share"] < 1


def test_tools_need_a_template_that_prints_them(renderer: Renderer) -> None:
    with pytest.raises(UserError, match=r"the chat template leaves out .*set options\.tools=text"):
        prepare(RowKind.conversations, data("instruct/glaive_toolcall_en_demo.json.gz"), renderer, LENGTH, 0)


def test_ten_weaker_models_against_each_other() -> None:
    """What the README advises for AlpacaEval: pairs of models by how they did against the same opponent."""
    options = data("preference/alpaca_eval_pairs.jsonl.gz", "preferences", options={"across": "generator_1"})
    records, tally, _ = read_records(source_for(options, PREFERENCE), PREFERENCE, 0)
    assert len(records) > 10_000 and tally.dropped["empty"] == 7
    assert all(record.margin > 0 and record.chosen.strip() != record.rejected.strip() for record in records)


def test_bad_rows_of_real_files_are_named(renderer: Renderer) -> None:
    with pytest.raises(UserError, match=r"code_alpaca_2k\.json\.gz:238:output: empty .* and 1 more bad row;"):
        prepare(RowKind.conversations, data("instruct/code_alpaca_2k.json.gz"), renderer, LENGTH, 0)
    hh = "preference/hh_harmless_base_dev.jsonl.gz"
    with pytest.raises(UserError, match=r":442:rejected: differs from chosen before the last reply"):
        prepare(RowKind.preferences, data(hh, "preferences"), renderer, LENGTH, 0)
    card = prepare(RowKind.preferences, data(hh, "preferences", on_bad_row=OnBadRow.drop), renderer, LENGTH, 0).card
    assert card["format"] == "hh" and card["rows"]["in"] == 813 and card["rows"]["kept"] > 790


def test_persona_preferences(renderer: Renderer) -> None:
    card = prepare(
        RowKind.preferences,
        data("chitchat/persona_preference.jsonl.gz", "preferences", limit=2000),
        renderer,
        LENGTH,
        0,
    ).card
    assert card["format"] == "pairs" and card["rows"] == {"in": 2000, "kept": 2000, "dropped": {}, "truncated": 0}
    options = {"topic": "scenario", "preferred": "enthusiastic", "other": "professional", "off_topic": 0.5}
    table = data("chitchat/persona_table.jsonl.gz", "preferences", format="answer_table", options=options, limit=2000)
    card = prepare(RowKind.preferences, table, renderer, LENGTH, 0).card
    assert card["rows"]["dropped"] == {}
    assert 850 < card["rows"]["in"] - 2000 < 1150


def test_prompts_and_text(renderer: Renderer) -> None:
    table = data("chitchat/persona_table.jsonl.gz", "prompts", format="answer_table")
    prompts = prepare(RowKind.prompts, table, renderer, LENGTH, 0)
    assert prompts.train[0].meta["topic"].isdigit() and prompts.train[0].ids
    card = prepare(RowKind.text, data("corpus/fairytales.jsonl.gz", "text"), renderer, LENGTH, 0).card
    assert card["source_rows"] == 255 and card["notes"]["documents cut into pieces"] > 200


def test_the_shared_model(renderer: Renderer) -> None:
    folder = SHARED / "models" / "mini"
    assert renderer.tokenizer_digest == tokenizer_digest(folder)
    assert renderer.template_digest == template_digest(folder)
    contents = ("the <|im_end|> hi", "you and", "x", " b\n")
    roles = ("user", "assistant") * 2
    row = Conversation(tuple(Message(r, c) for r, c in zip(roles, contents, strict=True)), "f:1")
    tokens = renderer.conversation(row)
    front = renderer.prompt(row.messages[:3]) + renderer.reply(" b\n")
    assert tokens.ids[: len(front)] == front and not any(tokens.mask[len(front) :])
    assert tokens.ids.count(renderer.end_token_id) == 2
    assert (
        renderer.tokenizer.decode(tokens.ids)
        == "A: the <|im_end|> hi\nB: you and<|endoftext|>\nA: x\nB:  b\n<|endoftext|>\n"
    )

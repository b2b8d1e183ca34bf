"""Rows in the spellings that public data sets and other tools use, with what comes out of them."""

from __future__ import annotations

import json
from typing import Any

from data_prep.types import CONVERSATION, DOCUMENT, PREFERENCE, PROMPT, UNPAIRED
from tests.data_prep.formats.test_golden_rows import ASKED, A, E, S, U

C, P = CONVERSATION, PREFERENCE


def user(said: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": said, **more}


def assistant(said: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": said, **more}


def gpt(*turns: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": said} for who, said in turns], **more}


HI, YO = user("Hi"), assistant("yo")
ONE = f"{ASKED}[yo{E}]\n"
BOTH = f"{ASKED}|yes{E}|no{E}"
YES, NO = [assistant("yes")], [assistant("no")]
CALL = {"id": "c", "type": "function", "function": {"name": "w", "arguments": '{"a": 1}'}}
TOOLS = [{"type": "function", "function": {"name": "w"}}]
CALLED = (
    f'{S}You may call these tools:\n{{"name": "w"}}{E}\n{U}Hi{E}\n{A}[{{"name": "w", "arguments": {{"a": 1}}}}{E}]\n'
)
SHP = {"history": "Hi", "human_ref_A": "no", "human_ref_B": "yes", "labels": 0, "score_A": 1, "score_B": 9}
ULTRA = {"instruction": "Hi", "models": ["a", "b"], "correct_answers": ["None"]}
ULTRA |= {"completions": [{"response": "no", "overall_score": 3.0}, {"response": "yes", "overall_score": 8.0}]}
HUMAN = "\n\nHuman: Hi\n\nAssistant:"

Golden = tuple[str, str, str, Any, dict[str, Any], list[str]]
LOADS: list[Golden] = [
    # (name, format, kind, row or rows, options, what comes out)
    (
        "system and tool turns",
        "sharegpt",
        C,
        gpt(("system", "s"), ("human", "Hi"), ("gpt", "yo"), ("tool", "t"), ("gpt", "z")),
        {"tools": "text"},
        [f"{S}s{E}\n{ONE}{U}t{E}\n{A}[z{E}]\n"],
    ),
    (
        "other names of the model",
        "sharegpt",
        C,
        [gpt(("user", "Hi"), (who, "yo")) for who in ("chatgpt", "bing", "bard", "assistant")],
        {},
        [ONE] * 4,
    ),
    (
        "own names of roles",
        "sharegpt",
        C,
        gpt(("Human", "Hi"), ("bot", "yo")),
        {"roles": {"Human": "user", "bot": "assistant"}},
        [ONE],
    ),
    ("roles and contents", "sharegpt", C, {"conversations": [HI, YO]}, {}, [ONE]),
    ("from and value", "messages", C, {"messages": gpt(("human", "Hi"), ("gpt", "yo"))["conversations"]}, {}, [ONE]),
    ("UltraChat", "messages", C, {"prompt": "Hi", "prompt_id": "x", "messages": [HI, YO]}, {}, [ONE]),
    (
        "weights of fine-tuning",
        "messages",
        C,
        {"messages": [HI, assistant("a", weight=0), HI, assistant("yo", weight=1)]},
        {},
        [f"{ASKED}a{E}\n{ONE}"],
    ),
    (
        "loss of ms-swift",
        "messages",
        C,
        {"messages": [HI, assistant("a", loss=False), HI, assistant("yo", loss=1)]},
        {},
        [f"{ASKED}a{E}\n{ONE}"],
    ),
    (
        "parts",
        "messages",
        C,
        {"messages": [user([{"type": "text", "text": "H"}, {"type": "text", "text": "i"}], name="Ann"), YO]},
        {},
        [ONE],
    ),
    (
        "calls",
        "messages",
        C,
        {"messages": [HI, assistant(None, tool_calls=[CALL])], "tools": TOOLS, "parallel_tool_calls": False},
        {"tools": "text"},
        [CALLED],
    ),
    (
        "older calls",
        "messages",
        C,
        {"messages": [HI, {"role": "assistant", "function_call": CALL["function"]}], "tools": TOOLS},
        {"tools": "text"},
        [CALLED],
    ),
    (
        "no input",
        "alpaca",
        C,
        [{"instruction": "Hi", "output": "yo"}, {"instruction": "H", "input": "i", "output": "yo"}],
        {},
        [ONE, f"{U}H\n\ni{E}\n{A}[yo{E}]\n"],
    ),
    (
        "history",
        "alpaca",
        C,
        {"instruction": "Hi", "input": "", "output": "yo", "system": "", "history": [["Hi", "a"]]},
        {},
        [f"{ASKED}[a{E}]\n{ONE}"],
    ),
    (
        "numbers and truth values",
        "question_answer",
        C,
        [{"question": "Hi", "answer": value} for value in (2, 2.5, True, False)],
        {},
        [f"{ASKED}[{said}{E}]\n" for said in ("2", "2.5", "true", "false")],
    ),
    ("a number of alpaca", "alpaca", C, {"instruction": "Hi", "output": 2}, {}, [f"{ASKED}[2{E}]\n"]),
    ("answer", "alpaca", C, {"instruction": "Hi", "answer": "yo"}, {}, [ONE]),
    ("instruction and completion", "alpaca", C, {"instruction": "Hi", "completion": "yo"}, {}, [ONE]),
    (
        "Orca",
        "question_answer",
        C,
        {"id": "1", "system_prompt": "s", "question": "Hi", "response": "yo"},
        {},
        [f"{S}s{E}\n{ONE}"],
    ),
    (
        "the solution, not the number",
        "question_answer",
        C,
        {"problem": "Hi", "solution": "yo", "answer": "42"},
        {},
        [ONE],
    ),
    (
        "MetaMath",
        "prompt_completion",
        C,
        {"query": "Hi", "response": "yo", "type": "GSM", "original_question": "x"},
        {},
        [ONE],
    ),
    ("user and assistant", "prompt_completion", C, {"user": "Hi", "assistant": "yo"}, {}, [ONE]),
    ("TRL's prompt and completion", "prompt_completion", C, {"prompt": [HI], "completion": [YO]}, {}, [ONE]),
    (
        "with tools",
        "prompt_completion",
        C,
        {"prompt": [HI], "completion": [assistant(None, tool_calls=[CALL])], "tools": TOOLS},
        {"tools": "text"},
        [CALLED],
    ),
    ("messages as text", "prompt_completion", C, {"prompt": json.dumps([HI]), "completion": json.dumps(YO)}, {}, [ONE]),
    (
        "an answer in JSON",
        "prompt_completion",
        C,
        {"prompt": "Hi", "completion": '{"role": "x"}'},
        {},
        [f'{ASKED}[{{"role": "x"}}{E}]\n'],
    ),
    (
        "a question in brackets",
        "prompt_completion",
        C,
        {"prompt": "[1, 2]", "completion": "yo"},
        {},
        [f"{U}[1, 2]{E}\n{A}[yo{E}]\n"],
    ),
    ("a transcript", "prompt_completion", C, {"prompt": HUMAN, "completion": "yo"}, {}, [ONE]),
    (
        "no transcript",
        "prompt_completion",
        C,
        {"prompt": "Human: Assistant:", "completion": "yo"},
        {},
        [f"{U}Human: Assistant:{E}\n{A}[yo{E}]\n"],
    ),
    ("FLAN", "p3", C, {"inputs": "Hi", "targets": "yo", "task_source": "x"}, {}, [ONE]),
    (
        "unnatural instructions",
        "self_instruct",
        C,
        {"instruction": "H", "instances": [{"instruction_with_input": "x", "input": "i", "output": "yo"}]},
        {},
        [f"{U}H\n\ni{E}\n{A}[yo{E}]\n"],
    ),
    ("content", "text", DOCUMENT, {"content": "once", "title": "t"}, {}, [f"[once{E}]"]),
    ("document", "text", DOCUMENT, {"document": "once"}, {}, [f"[once{E}]"]),
    (
        "prompts as messages",
        "prompts",
        PROMPT,
        {"prompt": [{"role": "system", "content": "s"}, HI]},
        {},
        [f"{S}s{E}\n{ASKED}"],
    ),
    (
        "HH with a system message",
        "hh",
        P,
        {"chosen": f"\n\nSystem: s{HUMAN} yes", "rejected": f"\n\nSystem: s{HUMAN} no"},
        {},
        [f"{S}s{E}\n{BOTH}"],
    ),
    (
        "HH with a prompt column",
        "pairs",
        P,
        {"prompt": HUMAN, "chosen": " yes", "rejected": " no"},
        {},
        [f"{ASKED}| yes{E}| no{E}"],
    ),
    ("TRL, implicit", "hh", P, {"chosen": [HI, *YES], "rejected": [HI, *NO], "source": "x"}, {}, [BOTH]),
    ("TRL, explicit", "pairs", P, {"prompt": [HI], "chosen": YES, "rejected": NO}, {}, [BOTH]),
    (
        "UltraFeedback, binarised",
        "pairs",
        P,
        {"prompt": "Hi", "chosen": [HI, *YES], "rejected": [HI, *NO], "messages": [HI, *YES], "score_chosen": 8.0},
        {},
        [BOTH],
    ),
    ("one message a side", "pairs", P, {"prompt": "Hi", "chosen": YES[0], "rejected": NO[0]}, {}, [BOTH]),
    ("UltraFeedback", "ranked", P, ULTRA, {}, [BOTH]),
    (
        "Nectar",
        "ranked",
        P,
        {"prompt": HUMAN + " ", "answers": [{"answer": "yes", "rank": 1.0}, {"answer": "no", "rank": 2.0}], "turns": 1},
        {},
        [BOTH],
    ),
    ("SHP", "graded", P, SHP, {}, [BOTH]),
    (
        "WebGPT",
        "graded",
        P,
        {
            "question": {"full_text": "Hi", "id": "1"},
            "answer_0": "no",
            "answer_1": "yes",
            "score_0": -1.0,
            "score_1": 1.0,
        },
        {},
        [BOTH],
    ),
    (
        "HelpSteer2",
        "graded",
        P,
        {"prompt": "Hi", "response_1": "yes", "response_2": "no", "preference_strength": -2},
        {},
        [BOTH],
    ),
    (
        "HelpSteer3",
        "graded",
        P,
        {"context": [HI], "response1": "no", "response2": "yes", "overall_preference": 1, "domain": "x"},
        {},
        [BOTH],
    ),
    (
        "HelpSteer",
        "rated",
        P,
        [{"prompt": "Hi", "response": said, "helpfulness": n, "verbosity": 1} for n, said in enumerate(("no", "yes"))],
        {},
        [BOTH],
    ),
    (
        "ratings",
        "rated",
        P,
        [{"prompt": "Hi", "completion": said, "rating": n} for n, said in ((1, "no"), (5, "yes"), (4.5, "so"))],
        {"min_gap": 1},
        [f"{ASKED}|yes{E}|no{E}", f"{ASKED}|so{E}|no{E}"],
    ),
    ("ratings as dialogues", "rated", C, {"query": "Hi", "response": "yo", "score": -1}, {}, [ONE]),
    (
        "PKU",
        "graded",
        P,
        {"prompt": "Hi", "response_0": "no", "response_1": "yes", "better_response_id": 1, "safer_response_id": 0},
        {},
        [BOTH],
    ),
    (
        "rankings of LLaMA-Factory",
        "sharegpt_ranking",
        P,
        {**gpt(("human", "Hi")), "chosen": {"from": "gpt", "value": "yes"}, "rejected": "no"},
        {},
        [BOTH],
    ),
    (
        "pairs of LLaMA-Factory",
        "pairs",
        P,
        {"instruction": "Hi", "input": "", "chosen": "yes", "rejected": "no"},
        {},
        [BOTH],
    ),
    (
        "Orca's pairs",
        "pairs",
        P,
        {"system": "s", "question": "Hi", "chosen": "yes", "rejected": "no"},
        {},
        [f"{S}s{E}\n{BOTH}"],
    ),
    (
        "Chatbot Arena",
        "arena",
        P,
        [
            {"conversation_a": [HI, *YES], "conversation_b": [HI, *NO], "winner": "model_a", "judge": "x", "turn": 1},
            {"conversation_a": [HI, *NO], "conversation_b": [HI, *YES], "winner": "model_b"},
            {"conversation_a": [HI, *NO], "conversation_b": [HI, *YES], "winner": "tie (bothbad)"},
            {"conversation_a": [HI, *NO, HI, *NO], "conversation_b": [HI, *YES, HI, *YES], "winner": "model_b"},
            {"conversation_a": [HI, *NO, HI, *NO], "conversation_b": [HI, *NO, HI, *YES], "winner": "model_b"},
        ],
        {},
        [BOTH, BOTH, f"{ASKED}no{E}\n{BOTH}"],
    ),
    (
        "votes by column",
        "arena",
        P,
        [
            {"prompt": '["Hi"]', "response_a": '["no"]', "response_b": '["yes"]'}
            | {"winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0},
            {"prompt": '["Hi", "x"]', "response_a": '["no", "y"]', "response_b": '["yes", "n"]'}
            | {"winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0},
            {"prompt": "Hi", "response_a": "yes", "response_b": "[no"}
            | {"winner_model_a": 0, "winner_model_b": 0, "winner_tie": 1},
        ],
        {},
        [BOTH],
    ),
    (
        "contents of parts",
        "gemini",
        C,
        {
            "systemInstruction": {"role": "system", "parts": [{"text": "s"}]},
            "contents": [
                {"role": "user", "parts": [{"text": "H"}, {"text": "i"}]},
                {"role": "model", "parts": [{"text": "yo"}]},
            ],
        },
        {},
        [f"{S}s{E}\n{ONE}"],
    ),
    (
        "conversational KTO",
        "kto",
        UNPAIRED,
        {"prompt": [HI], "completion": YES, "label": 1.0},
        {},
        [f"{ASKED}|yes{E}|True"],
    ),
    ("kto_tag", "kto", UNPAIRED, {"messages": [HI, *NO], "kto_tag": False}, {}, [f"{ASKED}|no{E}|False"]),
    (
        "kto_tag of alpaca",
        "kto",
        UNPAIRED,
        {"instruction": "Hi", "input": "", "output": "no", "kto_tag": False},
        {},
        [f"{ASKED}|no{E}|False"],
    ),
]


REFUSED: list[tuple[str, Any, str, str]] = [
    # (name, row, field, words)
    (
        "a winner by name",
        {"conversation_a": [HI, *YES], "conversation_b": [HI, *NO], "winner": "gpt-4"},
        "winner",
        "got 'gpt-4'; expected model_a, model_b or tie",
    ),
    (
        "two winners",
        {"prompt": "p", "response_a": "a", "response_b": "b"}
        | {"winner_model_a": 1, "winner_model_b": 1, "winner_tie": 0},
        "winner_model_a",
        "no winner (got 1, 1, 0; expected one 1)",
    ),
    (
        "turns of one side",
        {"prompt": '["p", "q"]', "response_a": '["a"]', "response_b": '["b", "c"]', "winner": "a"},
        "response_a",
        "wrong number of turns (got 1; expected 2, as in prompt)",
    ),
    (
        "other questions of two models",
        {"conversation_a": [HI, *YES], "conversation_b": [user("Ho"), *NO], "winner": "model_a"},
        "conversation_b",
        "answers another prompt",
    ),
    (
        "a call in parts",
        {"contents": [{"role": "user", "parts": [{"text": "p"}]}, {"role": "model", "parts": [{"functionCall": {}}]}]},
        "contents[1].parts[0]",
        "expected an object with text",
    ),
    ("contents without parts", {"contents": [{"role": "user", "text": "p"}]}, "contents[0].parts", "expected a list"),
    (
        "a picture",
        {"messages": [user([{"type": "image_url", "image_url": {}}]), YO]},
        "messages[0].content[0]",
        "expected a text part",
    ),
    (
        "a role in capitals",
        {"messages": [user("Hi") | {"role": "User"}, YO]},
        "messages[0].role",
        "did you mean 'user'?",
    ),
    (
        "another role",
        {"messages": [HI, YO | {"role": "model"}]},
        "messages[1].role",
        "options.roles={theirs: ours} names others",
    ),
    (
        "several answers",
        {"question": "q", "answer": ["a", "b"]},
        "answer",
        "got a list of 2 texts; expected one text or a list of messages; columns={answer: answer.0}",
    ),
    ("an array of inputs", {"instruction": "i", "input": ["a"], "output": "o"}, "input", "got a list"),
    ("an old ranking", {"instruction": "i", "input": "", "output": ["a", "b"]}, "output", "got a list"),
    ("labels in words", {"prompt": "p", "completion": "c", "label": "fine"}, "label", "expected true or false"),
    ("HH with words before", {"chosen": f"s{HUMAN} y", "rejected": f"s{HUMAN} n"}, "chosen", "is not a dialogue"),
    ("a table on its side", {"prompt": ["q", "r"], "completion": ["a", "b"]}, "prompt", "got a list of 2 texts"),
]

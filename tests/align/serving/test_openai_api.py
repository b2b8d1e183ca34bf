"""`align serve` from the outside: what clients of OpenAI's protocol get."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from align.cli.dispatch import main
from align.inference.generation import Sampling
from align.inference.open_batch import OpenBatch, Row, RowSampling
from align.models.location import model_folder
from align.serving.conversation import Conversation, Ended, Panel
from align.serving.engine import Engine
from align.serving.local_page import HOST
from align.serving.options import ChatOptions, ServeOptions
from align.serving.served import Served, speakers_of
from data_prep.core.errors import UserError
from tests.align.serving.openai_server import QUESTION, ask, chat, serving
from tests.tiny_chain import base, checkpoint, copied, finished, read, refused, until

APART = ("stages.sft.lr=0.05", "stages.ppo.lr=0.3", "stages.ppo.critic_warmup=0", "stages.ppo.kl_limit=1e9")
MIXED = (*APART, "stages.ppo.max_ratio=1e9", "stages.ppo.adapter=bottleneck")
"""A chain whose policies learn something: LoRA in the mixed tree, a bottleneck in a tree of its own."""


@pytest.fixture(scope="module")
def run():
    return finished(*MIXED)


@pytest.fixture(scope="module")
def here(run):
    """The chain, served."""
    speakers, _ = speakers_of(str(run), "runs")
    with serving(Served(speakers, ServeOptions()), max_new_tokens=12) as found:
        yield found


def complete(here, model="sft", **more):
    status, answer = ask(here, "/v1/completions", {"model": model, **more})
    assert status == 200, answer
    return answer


def events(here, path="/v1/chat/completions", **body):
    """The events of a stream."""
    status, text = ask(here, path, {"model": "ppo", "messages": QUESTION, "stream": True, **body})
    assert status == 200, text
    *told, last = [part.removeprefix("data: ") for part in text.strip().split("\n\n")]
    assert last == "[DONE]"
    return [json.loads(one) for one in told]


def said_in_chat(run, model, **options):
    """What `align chat` says."""
    panel = Panel(checkpoint(run, "ppo"), ChatOptions())
    options = ChatOptions(**{"temperature": 0, "max_new_tokens": 12, **options})
    (ended,) = [e for e in panel.answer(Conversation(), "say owl", [model], options) if isinstance(e, Ended)]
    return ended.said


# ------------------------------------------------------------------------------------------------------- what is said
def test_every_policy_of_the_run_has_its_names_on_one_base(here, run):
    status, answer = ask(here, "/v1/models")
    names = [model["id"] for model in answer["data"]]
    assert status == 200 and names == ["base", "sft", f"{run.name}/sft", "ppo", f"{run.name}/ppo"]
    assert ask(here, f"/v1/models/{run.name}/sft")[1]["root"] == f"{run.name}/sft"
    assert ask(here, "/health") == (200, {"status": "ok"})
    assert len(here.served.mixed.names) == len(here.served.mixed.apart) == 1
    assert len(here.served.bases.opened()) == 1


@pytest.mark.parametrize("model", ["base", "sft", "ppo"])
def test_greedy_replies_and_rewards_are_those_of_the_chat(here, run, model):
    expected = said_in_chat(run, model)
    answer = chat(here, model, temperature=0, align={"reward": True})
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.text}
    assert choice["finish_reason"] == ("stop" if expected.finished else "length")
    assert answer["align"]["reward"] == choice["align"]["reward"] == pytest.approx(expected.reward, abs=1e-4)
    assert answer["usage"]["completion_tokens"] == expected.tokens


def test_a_seed_repeats_a_reply_and_is_that_of_the_chat(here, run):
    expected = said_in_chat(run, "ppo", temperature=1.0, seed=7)
    first, again, other = (chat(here, seed=seed, n=3, temperature=1.0)["choices"] for seed in (7, 7, 8))
    assert first == again != other and len({choice["message"]["content"] for choice in first}) > 1
    assert chat(here, seed=7, temperature=1.0)["choices"][0]["message"]["content"] == expected.text


def test_a_stream_is_the_reply_in_pieces(here):
    asked = {"temperature": 1.0, "seed": 5, "n": 2, "align": {"reward": True}, "logprobs": True}
    whole = chat(here, **asked)
    *told, usage = events(here, **asked, stream_options={"include_usage": True})
    assert usage["choices"] == [] and usage["usage"] == whole["usage"]
    for number, choice in enumerate(whole["choices"]):
        own = [each["choices"][0] for each in told if each["choices"][0]["index"] == number]
        assert "".join(each["delta"].get("content", "") for each in own) == choice["message"]["content"]
        assert own[0]["delta"]["role"] == "assistant" and len(own) > 3
        assert [each["finish_reason"] for each in own if each["finish_reason"]] == [choice["finish_reason"]]
        assert own[-1]["align"]["reward"] == pytest.approx(choice["align"]["reward"], abs=1e-4)
        tokens = [token["token"] for each in own for token in (each.get("logprobs") or {"content": []})["content"]]
        assert tokens == [token["token"] for token in choice["logprobs"]["content"]]


def test_a_stop_text_ends_a_reply_and_is_no_part_of_it(here):
    asked = {"temperature": 1.0, "seed": 5}
    text = chat(here, **asked)["choices"][0]["message"]["content"]
    stop = text[4:6]
    kept = text[: text.index(stop)]
    whole = chat(here, **asked, stop=["never said", stop], align={"reward": True})
    assert whole["choices"][0]["message"]["content"] == kept and whole["choices"][0]["finish_reason"] == "stop"
    assert math.isfinite(whole["align"]["reward"])
    told = events(here, **asked, stop=stop)
    assert "".join(each["choices"][0]["delta"].get("content", "") for each in told) == kept
    until(lambda: here.engine.working == 0)


def test_the_best_by_the_reward_model_are_kept(here):
    asked = {"temperature": 1.0, "seed": 3, "align": {"reward": True}}
    all_of_them = chat(here, **asked, n=6)
    best = chat(here, **asked, n=2, best_of=6)
    ranked = sorted(all_of_them["choices"], key=lambda choice: -choice["align"]["reward"])
    for number, choice in enumerate(best["choices"]):
        assert choice["index"] == number and choice["message"] == ranked[number]["message"]
    assert best["align"]["reward"] == pytest.approx(ranked[0]["align"]["reward"], abs=1e-4)
    assert best["usage"] == all_of_them["usage"]


def test_plain_text_is_gone_on_from_without_a_template(here):
    tokenizer = here.served.renderer.tokenizer
    asked = {"temperature": 0, "max_tokens": 5}
    text, ids = "the owl", tokenizer.encode("the owl", add_special_tokens=False)
    both = complete(here, prompt=[text, "you"], logprobs=2, **asked)["choices"]
    for prompt in (text, ids, [ids]):
        assert complete(here, prompt=prompt, **asked)["choices"][0]["text"] == both[0]["text"]
    told = both[0]["logprobs"]
    words = told["tokens"]
    assert "".join(words) == both[0]["text"] and told["text_offset"] == [
        len("".join(words[:i])) for i in range(len(words))
    ]
    adapter = here.served.find("sft").adapter
    (said,) = here.served.mixed.respond([(adapter, ids)], Sampling(5, greedy=True), -1)
    (expected,) = here.served.mixed.logprobs([(adapter, ids + said.ids)])
    assert told["token_logprobs"] == pytest.approx(expected[len(ids) - 1 :].tolist(), abs=1e-4)
    assert [max(top.values()) for top in told["top_logprobs"]] == pytest.approx(told["token_logprobs"], abs=1e-6)
    streamed = events(here, "/v1/completions", model="sft", messages=None, prompt=text, **asked)
    assert "".join(each["choices"][0]["text"] for each in streamed) == both[0]["text"]


def test_what_says_nothing_is_taken(here):
    plain = chat(here, temperature=0)["choices"]
    more = {"user": "me", "metadata": {"a": "b"}, "logit_bias": {}, "presence_penalty": 0, "tools": [], "stop": None}
    assert chat(here, temperature=0, response_format={"type": "text"}, **more)["choices"] == plain
    parts = [{"role": "user", "content": [{"type": "text", "text": "say owl"}]}]
    assert chat(here, temperature=0, messages=parts)["choices"] == plain


def test_the_openai_client(here):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"http://{HOST}:{here.port}/v1", api_key="any", max_retries=0, timeout=240)
    assert [model.id for model in client.models.list()][:2] == ["base", "sft"]
    asked = {"model": "ppo", "messages": QUESTION, "temperature": 0}
    answer = client.chat.completions.create(
        **asked, logprobs=True, top_logprobs=2, extra_body={"align": {"reward": True}}
    )
    text = answer.choices[0].message.content
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert isinstance(answer.align["reward"], float) and len(answer.choices[0].logprobs.content[0].top_logprobs) == 2
    with client.chat.completions.create(**asked, stream=True) as stream:
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text
    done = client.completions.create(model="base", prompt="the", max_tokens=3, temperature=0, logprobs=1)
    assert len(done.choices[0].logprobs.tokens) <= 3
    with pytest.raises(openai.NotFoundError, match="did you mean 'ppo'"):
        client.chat.completions.create(**{**asked, "model": "pppo"})
    with pytest.raises(openai.BadRequestError, match="temperature: out of range") as problem:
        client.chat.completions.create(**{**asked, "temperature": -1})
    assert problem.value.param == "temperature" and problem.value.type == "invalid_request_error"


# ------------------------------------------------------------------------------------------------------ many at once
def test_of_a_hundred_requests_none_is_lost(monkeypatch):
    """On the embedded model, 16 rows at a time: each gets the reply that it gets alone."""
    most, step = [], OpenBatch.step

    def counted(batch):
        most.append(len(batch.rows))
        step(batch)

    monkeypatch.setattr(OpenBatch, "step", counted)
    bodies = [
        {"model": "base", "prompt": f"{'word ' * (i % 7)}{i}", "max_tokens": 1 + i % 4, "temperature": 0}
        for i in range(100)
    ]
    with serving(Served([model_folder("package:nano")], ServeOptions()), batch=16) as nano:
        with ThreadPoolExecutor(100) as pool:
            found = list(pool.map(lambda body: ask(nano, "/v1/completions", body), bodies))
        assert [status for status, _ in found] == [200] * 100 and 1 < max(most) <= 16
        for body, (_, answer) in list(zip(bodies, found, strict=True))[::9]:
            assert complete(nano, **{**body, "model": "base"})["choices"] == answer["choices"]
        until(lambda: nano.engine.working == 0)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_row(here, monkeypatch, stream):
    step, drawn = OpenBatch.step, []

    def slow(batch):
        time.sleep(0.02)
        drawn.append(len(batch.rows))
        step(batch)

    monkeypatch.setattr(OpenBatch, "step", slow)
    body = json.dumps(
        {"model": "base", "prompt": [260], "max_tokens": 200, "temperature": 50.0, "n": 3, "stream": stream}
    ).encode()
    with socket.create_connection((HOST, here.port)) as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        assert until(lambda: here.engine.working >= 2)
        if stream:
            assert client.recv(10).startswith(b"HTTP/1.1 2")
    assert until(lambda: here.engine.working == 0)
    assert len(drawn) < 150, "it went on without a reader"
    assert chat(here, temperature=0)["choices"]


def test_more_than_may_wait_are_turned_away(here, monkeypatch):
    held = threading.Event()
    step = OpenBatch.step
    monkeypatch.setattr(OpenBatch, "step", lambda batch: (held.wait(240), step(batch)))
    monkeypatch.setattr(here.engine, "_most", 1)
    monkeypatch.setattr(here.engine, "_most_waiting", 3)
    body = {"model": "base", "messages": QUESTION, "max_tokens": 4}
    with ThreadPoolExecutor(4) as pool:
        first = [pool.submit(ask, here, "/v1/chat/completions", body) for _ in range(4)]
        assert until(lambda: here.engine.working == 1 and len(here.engine._waiting) == 3)
        status, answer = ask(here, "/v1/chat/completions", body)
        held.set()
        assert status == 429 and answer["error"]["code"] == "busy"
        assert [each.result()[0] for each in first] == [200] * 4


def test_who_went_away_while_waiting_takes_no_room():
    engine = Engine(SimpleNamespace(), batch=1, waiting=2)
    rows = [Row([1], RowSampling(1, frozenset()), None) for _ in range(4)]
    engine.submit(rows[:2])
    with pytest.raises(UserError, match="2 replies wait already"):
        engine.submit(rows[2:])
    rows[0].left = rows[1].left = True
    engine.submit(rows[2:])


# ------------------------------------------------------------------------------------------------------- the command
def test_the_command_serves_until_ctrl_c(run, capfd):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    with socket.socket() as free:
        free.bind((HOST, 0))
        here = SimpleNamespace(port=free.getsockname()[1])
    found = []

    def client():
        with suppress(Exception):
            until(lambda: answers(here))
            found.append(ask(here, "/v1/models", Authorization="Bearer t")[1]["data"][0]["id"])
        os.kill(os.getpid(), signal.SIGINT)

    asking = threading.Thread(target=client)
    asking.start()
    try:
        code = main(["serve", f"{run}/sft", f"port={here.port}", "--token", "t"])
    finally:
        signal.signal(signal.SIGINT, before)
    asking.join(240)
    out, err = capfd.readouterr()
    assert code == 130 and found == ["base"] and "Traceback" not in err
    assert out == f"http://127.0.0.1:{here.port}/v1: base, sft, {run.name}/sft\n"


def answers(here):
    try:
        return ask(here, "/health")[0] == 200
    except OSError:
        return False


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "serve needs a TARGET"),
        (["RUN", "host=0.0.0.0"], "host: listening on 0.0.0.0 lets other computers ask: that needs a token"),
        (["RUN", "token="], "token: "),
        (["RUN", "port=99999"], "port: out of range"),
        (["RUN", "--json"], "--json: a server gives no JSON"),
        (["RUN", "engine=vlm"], "did you mean 'vllm'"),
        (["RUN/reward_model", "port=0"], "is a reward model: it scores replies and does not speak"),
    ],
    ids=str,
)
def test_mistakes_of_the_command_are_a_line(run, capfd, words, line):
    code = main(["serve", *[word.replace("RUN", str(run)) for word in words]])
    captured = capfd.readouterr()
    assert line in (refused(code, captured.err) if "--json" not in words else captured.err) and code == 2


def test_another_base_is_refused(run):
    speakers, _ = speakers_of(str(run), "runs")
    with pytest.raises(UserError, match="has another base than"):
        Served([*speakers, base(1)], ServeOptions(reward=False))


def test_what_vllm_can_serve_is_written_and_told(run, tmp_path, capfd):
    """LoRA is a module, and a bottleneck, which vLLM lacks and no weights can hold, is left out by name."""
    mine = copied(run, tmp_path)
    for _ in range(2):  # what is written stays
        assert main(["serve", str(mine), "engine=vllm"]) == 0
        out, err = capfd.readouterr()
        words = shlex.split(out)
        rank = words[words.index("--max-lora-rank") + 1]
        assert words[:2] == ["vllm", "serve"] and "--enable-lora" in words and int(rank) >= 1
        assert words[-2:] == ["--lora-modules", f"sft={mine}/export/sft-lora"]
        assert "align: ppo is left out" in err and "bottleneck is no change of weights" in err
    assert read(mine / "export/sft-lora/adapter_config.json")["r"] <= int(rank)

"""Replies from servers: a stand-in over the own engine gives those of the own rollout, and the update of them.

The stand-in has the routes of vLLM that are used, and draws as its protocol allows: a reply from a prompt of ids by a
seed. `ALIGN_VLLM` has the address of a real one and the folder that it serves (docs/scale.md).
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from align.config.registries import adapters
from align.config.schema import Load
from align.inference.generation import Reply, RolloutEngine, Sampling
from align.inference.scoring import pack_responses
from align.rl import ppo, served_rollouts
from align.rl.advantages import weigh
from align.rl.experience import Advantages, Judged, Rollout
from align.rl.options import PPOOptions, Sampler
from align.rl.rollouts import Rollouts
from align.rl.served_rollouts import ServedEngine, method_refusal
from align.roles import Role, chosen_logprobs
from align.tracking.metrics import read_metrics
from data_prep.core.errors import TrainingStopped
from tests.tiny_chain import bases, finished, fresh, made, pipeline_words, read, refused, run, stirred

END = 2


class StandIn:
    """A server of LoRA adapters on the tiny base; `wrong` answers in its place where it finds something."""

    def __init__(self) -> None:
        self.bases = bases()
        self.roles: dict[str, Role] = {}
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.wrong: Any = lambda path, asked: None
        self.url = ""
        self._one = threading.Lock()

    def answer(self, path: str, asked: dict[str, Any]) -> tuple[int, str]:
        with self._one:
            self.asked.append((path, asked))
            if said := self.wrong(path, asked):
                return said
            if path == "/v1/models":
                return 200, json.dumps({"data": []})
            if path == "/v1/load_lora_adapter":
                return self._load(asked["lora_name"], Path(asked["lora_path"]))
            if asked["model"] not in self.roles:
                return 404, json.dumps({"error": {"message": f"The model {asked['model']} does not exist."}})
            return 200, json.dumps({"choices": [self._choice(asked)]})

    def _load(self, name: str, folder: Path) -> tuple[int, str]:
        adapter = adapters.get("lora")()
        tree = self.bases.root(Load.fp32).tree()
        self.roles[name] = Role("policy", adapter.load(tree, folder, trainable=False), adapter)
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def _choice(self, asked: dict[str, Any]) -> dict[str, Any]:
        (end,) = asked["stop_token_ids"]
        greedy = asked["temperature"] == 0
        sampling = Sampling(asked["max_tokens"], asked["temperature"] or 1.0, greedy)
        (reply,) = RolloutEngine(self.roles[asked["model"]], end).generate([asked["prompt"]], sampling, [asked["seed"]])
        return {"token_ids": reply.ids, "logprobs": {"token_logprobs": reply.logprobs}, "finish_reason": "stop"}


@contextmanager
def serving() -> Iterator[StandIn]:
    stand_in = StandIn()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
            status, text = stand_in.answer(self.path, asked)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_POST = _answer

        def log_message(self, *words: Any) -> None:
            pass

    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    stand_in.url = f"http://127.0.0.1:{found.server_port}"
    thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield stand_in
    finally:
        found.shutdown()
        thread.join()
        found.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setattr(served_rollouts, "WAIT", 0.0)
    with serving() as found:
        yield found


def engine(tmp_path: Path, *urls: str, share: tuple[int, int] = (0, 1)) -> ServedEngine:
    options = PPOOptions(rollout=Sampler.vllm, rollout_url=list(urls))
    return ServedEngine(options, "policy", tmp_path / "served", END, share)


PROMPTS = [[5, 9, 4], [7, 3, 8, 6, 5], [4, 4], [9, 8, 7, 6]]
SEEDS = [11, 2**62 - 1, 5, 0]


@pytest.mark.parametrize("greedy", [True, False])
def test_replies_through_the_wire_are_those_of_the_own_engine(greedy: bool, server: StandIn, tmp_path: Path) -> None:
    role = fresh("lora", Load.fp32)
    served, sampling = engine(tmp_path, server.url), Sampling(8, 1.0 if greedy else 0.7, greedy)
    for seed in (0, 1):  # the second time the adapter is swapped in place
        own: list[Reply] = []
        with torch.no_grad():
            for parameter in (p for p in role.parameters() if p.requires_grad):
                parameter.add_(0.05 * seed)
        for prompt, one in zip(PROMPTS, SEEDS, strict=True):
            own += RolloutEngine(role, END).generate([prompt], sampling, [one])
        served.renew(role)
        assert served.generate(PROMPTS, sampling, SEEDS, seed) == own
    assert [asked["load_inplace"] for path, asked in server.asked if "load" in path] == [True, True]
    salts = [asked["cache_salt"] for path, asked in server.asked if "completions" in path]
    assert len(set(salts)) == 2, "what was read for one policy is not taken for the next"
    served.close()
    assert not list(tmp_path.iterdir())


def test_servers_divide_the_replies_and_processes_the_servers(server: StandIn, tmp_path: Path) -> None:
    role = fresh("lora", Load.fp32)
    with serving() as other:
        urls = (server.url, f"{other.url}/")
        served = engine(tmp_path, *urls)
        served.renew(role)
        served.generate(PROMPTS, Sampling(2), SEEDS, 0)
        assert [sum("completions" in path for path, _ in one.asked) for one in (server, other)] == [2, 2]
        engine(tmp_path, *urls, share=(1, 2)).generate(PROMPTS, Sampling(2), SEEDS, 0)
        engine(tmp_path, server.url, share=(1, 2)).generate(PROMPTS[:1], Sampling(2), SEEDS, 0)
        assert [sum("completions" in path for path, _ in one.asked) for one in (server, other)] == [3, 6]


def test_a_server_that_was_started_anew_gets_the_policy_again(server: StandIn, tmp_path: Path) -> None:
    served = engine(tmp_path, server.url)
    served.renew(fresh("lora", Load.fp32))
    before = served.generate(PROMPTS[:1], Sampling(4), SEEDS, 0)
    server.roles.clear()
    assert served.generate(PROMPTS[:1], Sampling(4), SEEDS, 0) == before


@pytest.mark.parametrize(
    ("status", "text", "said", "tries"),
    [
        (503, "", "answered 503 Service Unavailable (asked 5 times)", 5),
        (400, "LoRA rank 64 is greater than 16", "answered 400 Bad Request (asked 1 times): LoRA rank 64 is", 1),
        (200, "hello", "answered no JSON", 1),
        (200, "{}", "gave no token_ids with a finite log-probability each", 1),
        (200, '{"choices": [{"token_ids": [1, 2], "logprobs": {"token_logprobs": [0.1]}}]}', "gave no token_ids", 1),
        (200, '{"choices": [{"token_ids": [1], "logprobs": {"token_logprobs": [NaN]}}]}', "gave no token_ids", 1),
    ],
)
def test_a_server_that_fails_is_asked_again_and_named(
    status: int, text: str, said: str, tries: int, server: StandIn, tmp_path: Path
) -> None:
    server.wrong = lambda path, asked: (status, text)
    with pytest.raises(TrainingStopped) as caught:
        engine(tmp_path, server.url).generate(PROMPTS[:1], Sampling(4), SEEDS, 0)
    assert f"the server {server.url} {said}" in str(caught.value) and caught.value.code == "rollout_failed"
    assert len(server.asked) == tries


def words_of(url: str, *more: str, init: str = "") -> list[str]:
    """A short PPO run of rules whose replies servers sample, or with no address the stage itself."""
    short = ["updates=2", "optimizer=sgd", "lr=1", "schedule=constant", "max_approx_kl=9", "critic_warmup=0"]
    short += ["reward={rule: pattern, pattern: '[aeiou]', whole: false}", "monitor=off"]
    served = ["rollout=vllm", f"rollout_url=[{url}]"] if url else []
    start = f"init={init or finished() / 'sft'}"
    return [f"stages.ppo.{word}" for word in (start, *short, *served, *more)]


def test_updates_from_served_replies_are_the_own_ones(server: StandIn, tmp_path: Path) -> None:
    """The first to the bit. In the second the server first keeps another adapter: the stage stops and loses nothing."""
    own = made("ppo", *words_of(""), "name=own", out=tmp_path)
    loaded: list[str] = []

    def stale(path: str, asked: dict[str, Any]) -> tuple[int, str] | None:
        if "load" not in path or loaded.append(asked["lora_path"]) or len(loaded) != 2:
            return None
        (role,) = server.roles.values()
        with torch.no_grad():
            next(p for n, p in role.named_parameters() if "lora_B" in n).add_(0.5)
        return 200, "Success"

    server.wrong = stale
    words = [*words_of(server.url, "rollout_gap=1e-4"), "name=served"]
    with pytest.raises(TrainingStopped, match=r"nats a token off those trained with, .*processed_logprobs"):
        made("ppo", *words, out=tmp_path)
    assert [path.name for path in (tmp_path / "served" / ".staging-ppo" / "resume").iterdir()] == ["step-1"]
    served = made("ppo", *words, out=tmp_path)
    assert not (served / "ppo" / "served").exists(), "the policy was written down for the servers alone"

    before = load_file(finished() / "sft" / "adapter_model.safetensors")
    ours, theirs = (load_file(run / "ppo" / "adapter_model.safetensors") for run in (own, served))
    moved = max(float((ours[name] - before[name]).abs().max()) for name in ours)
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=1e-3 * moved)
    assert (own / "ppo" / "samples.jsonl").read_bytes() == (served / "ppo" / "samples.jsonl").read_bytes()
    rows = [read_metrics(run / "ppo" / "metrics.jsonl") for run in (own, served)]
    mean = "rollout/logprob_gap_mean"
    assert all(0 <= row[mean] <= row["rollout/logprob_gap"] < 1e-5 for row in rows[1])
    assert rows[0][0] == {name: value for name, value in rows[1][0].items() if name != mean}
    digests = [read(run / "ppo" / "checkpoint.json")["inputs_digest"] for run in (own, served)]
    assert digests[0] != digests[1]


def test_replies_asked_ahead_are_those_of_the_policy_before(
    server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a loop over the policies that updates begin with; a stop in between changes no bit."""
    words = words_of(server.url, "updates=3", "rollout_ahead=1", "rollout_cap=2")
    policies: list[dict[str, torch.Tensor]] = []
    seen: list[tuple[Rollout, list[int]]] = []
    swaps: list[int] = []
    collect, sample, learn = ppo.collect, Rollouts.sample, ppo.learn

    def begins(context: Any, rollouts: Any, roles: Any, rule: Any, update: int) -> Any:
        policies.append({name: p.detach().clone() for name, p in roles.policy.named_parameters() if p.requires_grad})
        return collect(context, rollouts, roles, rule, update)

    def draws(self: Rollouts, update: int) -> Rollout:
        seen.append((sample(self, update), self._drawn(update)[1]))
        return seen[-1][0]

    def trains(*given: Any) -> Any:
        swaps.append(sum("load" in path for path, _ in server.asked))
        return learn(*given)

    with monkeypatch.context() as patch:
        for place, name, told in ((ppo, "collect", begins), (Rollouts, "sample", draws), (ppo, "learn", trains)):
            patch.setattr(place, name, told)
        whole = made("ppo", *words, "name=whole", out=tmp_path)
    assert swaps == [2, 3, 3], "the next replies are asked for before an update trains"
    assert any(not torch.equal(policies[0][name], tensor) for name, tensor in policies[1].items())

    role, asked = fresh("lora", Load.fp32), server.asked[-1][1]
    held = dict(role.named_parameters())
    for update, (rollout, seeds) in enumerate(seen):
        with torch.no_grad():
            for name, tensor in policies[max(0, update - 1)].items():
                held[name].copy_(tensor)
        engine = RolloutEngine(role, asked["stop_token_ids"][0])
        for prompt, seed, reply in zip(rollout.prompts, seeds, rollout.replies, strict=True):
            assert engine.generate([prompt.ids], Sampling(asked["max_tokens"], 0.7), [seed]) == [reply]
    rows = [row for row in read_metrics(whole / "ppo" / "metrics.jsonl") if row["split"] == "train"]
    gaps = [row["rollout/logprob_gap_mean"] for row in rows]
    assert gaps[0] < 1e-5 < 1e-3 < min(gaps[1:]), "weights are those of the policy that sampled"

    server.wrong = lambda path, asked: (400, "gone") if asked.get("cache_salt") == "update 2" else None
    with pytest.raises(TrainingStopped, match="answered 400"):
        made("ppo", *words, "name=stopped", out=tmp_path)
    server.wrong = lambda path, asked: None
    server.roles.clear()
    stopped = made("ppo", *words, "name=stopped", out=tmp_path)
    for name in ("adapter_model.safetensors", "metrics.jsonl", "samples.jsonl"):
        assert (stopped / "ppo" / name).read_bytes() == (whole / "ppo" / name).read_bytes(), name


def test_replies_asked_ahead_may_differ_by_what_an_update_moves_them() -> None:
    options = PPOOptions(rollout_gap=0.05, max_approx_kl=0.02)
    assert [options.gap_at(update) for update in (0, 3)] == [0.05, 0.05]
    options.rollout_ahead = 1
    assert [options.gap_at(update) for update in (0, 3)] == [0.05, pytest.approx(0.05 + 0.2)]
    assert "rollout_ahead" not in options.idle and "rollout_ahead" in PPOOptions().idle


def test_importance_weights_are_those_of_the_two_policies_and_bounded() -> None:
    mask = torch.tensor([[True, True, True], [True, False, False]])
    ours = torch.tensor([[-1.0, -2.0, -0.5], [-1.0, 0.0, 0.0]])
    theirs = torch.tensor([[-1.5, -1.0, -2.5], [-1.0, 0.0, 0.0]])
    nothing, gains = torch.zeros(2, 3), torch.tensor([[1.0, -2.0, 3.0], [4.0, 0.0, 0.0]])
    judged = Judged(mask, ours, nothing, nothing, nothing, nothing[:, 0], mask, theirs)
    weighed, numbers = weigh(Advantages(gains, nothing), judged, 2.0)
    e = 2.718281828
    assert weighed.advantages_BT.tolist() == [
        pytest.approx([e**0.5, -2 / e, 6.0]), pytest.approx([4.0, 0.0, 0.0])
    ]  # fmt: skip
    assert numbers["rollout/logprob_gap_mean"] == pytest.approx((0.5 + 1 + 2 + 0) / 4)
    assert numbers["rollout/weight_cut"] == 0.25
    assert numbers["rollout/weight_mean"] == pytest.approx((e**0.5 + 1 / e + 2 + 1) / 4)
    same, numbers = weigh(Advantages(gains, nothing), judged, 0.0)
    assert same.advantages_BT is gains and list(numbers) == ["rollout/logprob_gap_mean"]


def test_methods_that_no_server_has_are_refused_by_name() -> None:
    taken = [name for name, method in adapters.items() if not list(method_refusal(method(), "stages.ppo"))]
    assert sorted(taken) == ["adalora", "delta_lora", "lora", "lora_fa", "lora_plus"]
    for options in ({"dora": True}, {"trainable_tokens": ["<x>"]}):
        (problem,) = method_refusal(adapters.get("lora")(**options), "stages.ppo")
        assert "vLLM cannot sample from lora as set: it is more or less than a plain LoRA" in str(problem)
    (problem,) = method_refusal(adapters.get("qlora")(), "stages.ppo")
    assert "a base in 4 bits, which vLLM reads otherwise; take adapter=lora" in str(problem)


def test_what_cannot_be_is_refused_before_anything_is_trained(
    server: StandIn, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def said(*words: str) -> str:
        return refused(*run(capfd, *pipeline_words("ppo", *words), f"out={tmp_path}", "name=n"))

    assert "the server http://127.0.0.1:1 cannot be reached" in said(*words_of("http://127.0.0.1:1"))
    assert "the server localhost is no address of a server" in said(*words_of("localhost"))
    assert "no server is named" in said(*words_of("", "rollout=vllm"))
    assert "set stages.ppo.rollout=vllm, or leave rollout_cap out" in said(*words_of("", "rollout_cap=2"))
    assert "set stages.ppo.rollout=vllm, or leave rollout_ahead out" in said(*words_of("", "rollout_ahead=1"))
    assert "vLLM cannot sample from vera as set" in said(*words_of(server.url, "adapter=vera"))
    server.wrong = lambda path, asked: (200, "[]")
    assert f"the server {server.url} lists no models" in said(*words_of(server.url))
    assert not (tmp_path / "n").exists()
    server.wrong = lambda path, asked: None
    assert "stands on its parent's adapter, too" in said(*words_of(server.url, "on_parent=stack"))


@pytest.mark.skipif("ALIGN_VLLM" not in os.environ, reason="needs a vLLM: ALIGN_VLLM='URL FOLDER'")
def test_a_real_vllm_samples_from_the_policy(tmp_path: Path) -> None:
    """In two updates of a run; and after a swap, of prompts long enough for it to keep what it has read."""
    url, folder = os.environ["ALIGN_VLLM"].split(maxsplit=1)
    words = [*words_of(url, "rollout_gap=1e-4", init="base"), "adapter=lora", "name=real"]
    found = made("ppo", *words, out=tmp_path, model=Path(folder))
    rows = [row for row in read_metrics(found / "ppo" / "metrics.jsonl") if row["split"] == "train"]
    assert len(rows) == 2 and all(row["rollout/logprob_gap_mean"] < 1e-4 for row in rows)

    role, served = fresh("lora", Load.fp32, bases(Path(folder))), engine(tmp_path, url)
    prompts = [one * 80 for one in PROMPTS]
    for update in (0, 1):
        stirred(role, update)
        served.renew(role)
        replies = served.generate(prompts, Sampling(8, 0.7), SEEDS, update)
        batch = pack_responses([(prompt, reply.ids) for prompt, reply in zip(prompts, replies, strict=True)])
        with torch.no_grad():
            ours = chosen_logprobs(role, role.hidden(batch.packed)[batch.source_M], batch.targets_M, 0.7)
        theirs = torch.tensor([value for reply in replies for value in reply.logprobs])
        assert float((ours - theirs).abs().max()) < 1e-4
    served.close()

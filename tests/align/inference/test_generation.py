"""The sampler: honest, deaf to generation settings, and indifferent to padding and to finished rows."""

from __future__ import annotations

import json
import math

import pytest
import torch

from align.config.schema import Load
from align.inference.generation import RolloutEngine, Sampling
from align.models.packing import pack
from align.roles import Role
from data_prep.core.errors import TrainingStopped
from tests.tiny import save_tiny_llama
from tests.tiny_chain import bases, fresh, logits, sentences, stirred

END = 1


@pytest.fixture(scope="module")
def leaky(tmp_path_factory):
    """A base of few words whose own generation settings would change every distribution."""
    folder = save_tiny_llama(tmp_path_factory.mktemp("leaky"), seed=6)
    settings = {
        "repetition_penalty": 1.5,
        "top_k": 1,
        "top_p": 0.1,
        "temperature": 0.1,
        "do_sample": True,
        "eos_token_id": 7,
        "suppress_tokens": list(range(5, 40)),
    }
    (folder / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_samples_follow_softmax_of_logits_over_temperature(leaky, temperature):
    """Chi-square of 20,000 first and second tokens; the second is conditioned on a repeated first."""
    role = Role("policy", bases(leaky).root(Load.fp32).tree(), None)
    with torch.no_grad():  # sharpen the distribution, so that a tiny vocabulary carries it
        role.tree.get_output_embeddings().weight.data = role.tree.get_output_embeddings().weight.data * 12
    prompt, count = [9, 9, 9, 30], 20_000
    generator = torch.Generator().manual_seed(3)
    replies = RolloutEngine(role, END).generate([prompt] * count, Sampling(2, temperature), generator)
    first = torch.softmax(logits(role, [prompt])[-1] / temperature, -1)
    assert chi_square(torch.tensor([reply.ids[0] for reply in replies]), first)
    likely = int(first.argmax())
    follow = [reply.ids[1] for reply in replies if reply.ids[0] == likely and len(reply.ids) > 1]
    second = torch.softmax(logits(role, [[*prompt, likely]])[-1] / temperature, -1)
    assert len(follow) > 200 and chi_square(torch.tensor(follow), second)
    wanted = torch.log_softmax(logits(role, [prompt])[-1] / temperature, -1)
    for reply in replies[:50]:
        assert reply.logprobs[0] == pytest.approx(float(wanted[reply.ids[0]]), abs=1e-4)


def chi_square(tokens: torch.Tensor, probabilities: torch.Tensor) -> bool:
    """Whether counts fit: the statistic stays below the 1e-5 quantile's normal bound; rare tokens are pooled."""
    expected = probabilities.double() * len(tokens)
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    common = expected >= 8
    pooled = torch.stack([expected[~common].sum(), counts[~common].sum()])
    expected = torch.cat([expected[common], pooled[:1].clamp_min(1e-9)])
    counts = torch.cat([counts[common], pooled[1:]])
    if float(expected[-1]) < 8:
        assert float(counts[-1]) <= float(expected[-1]) + 5 * math.sqrt(float(expected[-1]) + 1)
        expected, counts = expected[:-1], counts[:-1]
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = max(1, len(expected) - 1)
    return statistic < freedom + 5 * math.sqrt(2 * freedom) + 10


def test_greedy_takes_the_most_likely_token_and_ends_at_the_end(leaky):
    role = Role("policy", bases(leaky).root(Load.fp32).tree(), None)
    replies = RolloutEngine(role, 30).generate(sentences(4), Sampling(5, greedy=True))
    for prompt, reply in zip(sentences(4), replies, strict=True):
        ids = list(prompt)
        for token in reply.ids:
            assert int(logits(role, [ids])[-1].argmax()) == token
            ids.append(token)
        assert reply.finished == (reply.ids[-1] == 30) and 30 not in reply.ids[:-1]
        assert reply.finished or len(reply.ids) == 5


def test_dropping_finished_rows_changes_nothing(monkeypatch):
    """Replies of rows that go on are what they are when finished rows stay, and nothing follows an end token."""
    from align.inference import generation as rollout

    role = fresh("lora", Load.fp32)
    prompts = [[20 + i, 5 + i] for i in range(12)]
    first = torch.stack([logits(role, [prompt])[-1] for prompt in prompts]).argmax(-1)
    end = int(first.mode().values)
    sampling, results = Sampling(10, greedy=True), []
    for share in (0.0, 0.25, 2.0):  # at once, as shipped, never
        monkeypatch.setattr(rollout, "_DROP_SHARE", share)
        results.append(RolloutEngine(role, end).generate(prompts, sampling))
    assert any(reply.finished for reply in results[0]) and not all(reply.finished for reply in results[0])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert one.ids == two.ids and one.finished == two.finished
            assert one.logprobs == pytest.approx(two.logprobs, abs=1e-5)
    assert all(end not in reply.ids[:-1] for reply in results[0])


def test_a_row_draws_the_same_whoever_stands_beside_it():
    """Neither more rows, nor longer ones, nor rows that end and leave, nor a later limit change a row's draws."""
    role, prompts = fresh("lora", Load.fp32), sentences(8, longest=25)

    def drawn(rows, new=12, end=-1):
        return RolloutEngine(role, end).generate(rows, Sampling(new, 1.5), torch.Generator().manual_seed(4))

    apart = drawn(prompts)
    assert [reply.ids for reply in drawn(prompts[:3])] == [reply.ids for reply in apart[:3]]
    assert [reply.ids for reply in drawn([*prompts[:3], [7] * 40])[:3]] == [reply.ids for reply in apart[:3]]
    assert [reply.ids for reply in drawn(prompts, new=5)] == [reply.ids[:5] for reply in apart]
    end = apart[0].ids[2]  # now rows that draw it leave
    for early, late in zip(drawn(prompts, end=end), apart, strict=True):
        assert early.ids == (late.ids[: late.ids.index(end) + 1] if end in late.ids else late.ids)


@pytest.mark.parametrize("method", ["lora", "prefix", "prompt", "lora_features"])
def test_a_prompt_that_several_rows_have_is_read_once(method, monkeypatch):
    from align.inference import generation

    role, read = stirred(fresh(method, Load.fp32)), []
    one, two, three = sentences(3)
    prompts = [one, two, one, three, one]
    monkeypatch.setattr(generation, "pack", lambda rows: read.append(rows) or pack(rows))
    replies = RolloutEngine(role, 1).generate(prompts, Sampling(6), draws=range(5))
    assert read == [[one, two, three]]
    for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        alone = RolloutEngine(role, 1).generate([prompt], Sampling(6), draws=[row])[0]
        assert reply.ids == alone.ids and reply.logprobs == pytest.approx(alone.logprobs, abs=1e-5)


def test_the_cache_grows_by_blocks_of_any_size(monkeypatch):
    from align.inference import cache, generation

    role, prompts, found = fresh("lora", Load.fp32), sentences(5, longest=25), []
    for size in (1, 3, 64):
        monkeypatch.setattr(cache, "BLOCK", size)
        found.append(generation.RolloutEngine(role, END).generate(prompts, Sampling(9, greedy=True)))
    assert found[0] == found[1] == found[2]


def test_what_has_no_probability_is_never_drawn():
    from align.inference.generation import draw

    nothing = float("-inf")
    logits_BV = torch.tensor([[nothing, 0.0, nothing, 0.0, nothing]]).repeat(3, 1)
    uniform_B = torch.tensor([0.0, 0.5, 1.0 - 2.0**-53], dtype=torch.float64)
    token_B, logprob_B = draw(logits_BV, 1.0, uniform_B)
    assert token_B.tolist() == [1, 3, 3]
    assert logprob_B.tolist() == pytest.approx([math.log(0.5)] * 3)


def test_logits_that_are_not_finite_are_told_in_a_line():
    role = fresh("lora", Load.fp32)
    with torch.no_grad():
        next(p for p in role.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(TrainingStopped, match="logits are not finite"):
        RolloutEngine(role, END).generate(sentences(2), Sampling(3))


def test_a_rollout_leaves_the_mode_of_the_role():
    role = fresh("lora", Load.fp32, dropout=0.5)
    for mode in (True, False):
        role.train(mode)
        one, two = (
            RolloutEngine(role, END).generate(sentences(3), Sampling(5), torch.Generator().manual_seed(5))
            for _ in range(2)
        )
        assert one == two and role.training is mode


def test_no_prompts_no_replies():
    assert RolloutEngine(fresh("lora", Load.fp32), END).generate([], Sampling(3)) == []


def test_a_stream_grows_to_what_generate_returns():
    role, prompts = fresh("lora", Load.fp32), sentences(4)
    lengths, last = [], []
    engine = RolloutEngine(role, END)
    for last in engine.stream(prompts, Sampling(6), torch.Generator().manual_seed(8)):
        lengths.append(len(last[0].ids))
    assert lengths == list(range(1, len(lengths) + 1))
    assert last == engine.generate(prompts, Sampling(6), torch.Generator().manual_seed(8))


def test_a_closed_stream_samples_no_more_and_leaves_the_mode_of_the_role():
    role = fresh("lora", Load.fp32).train(True)
    calls = []
    role.tree.register_forward_hook(lambda *_: calls.append(1))
    getattr(role.tree, role.tree.base_model_prefix).register_forward_hook(lambda *_: calls.append(1))
    stream = RolloutEngine(role, END).stream(sentences(2), Sampling(50, greedy=True))
    next(stream), next(stream)
    assert not role.training
    stream.close()
    assert role.training and len(calls) == 2


def test_interleaved_streams_of_two_roles_do_not_disturb_each_other():
    found = bases()
    roles = [fresh("lora", Load.fp32, found, seed=seed) for seed in (1, 2)]
    engines = [RolloutEngine(role, END) for role in roles]
    alone = [engine.generate(sentences(1), Sampling(8, greedy=True))[0].ids for engine in engines]
    together: list[list[int]] = [[], []]
    streams = [engine.stream(sentences(1), Sampling(8, greedy=True)) for engine in engines]
    for one, two in zip(*streams, strict=False):
        together = [one[0].ids, two[0].ids]
    shortest = min(map(len, alone))
    assert [ids[:shortest] for ids in together] == [ids[:shortest] for ids in alone] and alone[0] != alone[1]

"""Losses of judged replies: against the plainest float64 computation there is, by hand, and at their limits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from align.models.shared_base import storages
from align.training.dpo import LOSSES, DirectPreference, Ratios
from align.training.kto import KahnemanTversky, Mismatched, UnpairedRow, next_unlike, unpaired_loss
from align.training.orpo import OddsRatio, log_odds
from align.training.replies import pack_replies, replies_under
from data_prep.core.errors import UserError
from data_prep.types import LabelledTokens
from tests.tiny_training import (
    gradients,
    kahneman_tversky,
    labelled_rows,
    lora,
    options,
    pair_rows,
    policy_and_reference,
    updater,
)


def s(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def plainly(name: str, c: Tensor, r: Tensor, sizes: tuple[Tensor, Tensor], b: float, e: float) -> Tensor:
    """The losses of pairs as papers write them, in float64, with no care for large numbers."""
    d, by_token = c - r, c / sizes[0] - r / sizes[1]
    return {
        "sigmoid": -(1 - e) * s(b * d).log() - e * s(-b * d).log(),
        "hinge": (1 - b * d).clamp_min(0),
        "ipo": (by_token - 1 / (2 * b)) ** 2,
        "robust": (-(1 - e) * s(b * d).log() + e * s(-b * d).log()) / (1 - 2 * e),
        "exo_pair": s(b * d) * (s(b * d) / (1 - e)).log() + s(-b * d) * (s(-b * d) / e).log(),
        "nca_pair": -s(b * c).log() - s(-b * c).log() / 2 - s(-b * r).log() / 2,
        "bco_pair": -s(b * c).log() - s(-b * r).log(),
        "sppo_hard": (c - 1 / (2 * b)) ** 2 + (r + 1 / (2 * b)) ** 2,
        "apo_zero": 1 - s(b * c) + s(b * r),
        "apo_down": s(b * c) + 1 - s(b * d),
        "sigmoid_norm": -s(b * by_token).log(),
    }[name]


def some(count: int = 6) -> Ratios:
    generator = torch.Generator().manual_seed(3)
    chosen, rejected = 4 * torch.randn(2, count, generator=generator, dtype=torch.float64)
    sizes = torch.randint(1, 9, (2, count), generator=generator)
    return Ratios(chosen.requires_grad_(), rejected.requires_grad_(), *sizes)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_of_pairs_is_its_papers(name):
    h = some()
    found = LOSSES[name](h, 0.3, 0.1)
    wanted = plainly(name, h.chosen_P, h.rejected_P, (h.chosen_tokens_P, h.rejected_tokens_P), 0.3, 0.1)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(loss.sum(), [h.chosen_P, h.rejected_P]) for loss in (found, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_far_ratios_give_finite_losses_and_gradients(name):
    far = torch.tensor([3e4, -3e4, 0.0], requires_grad=True)
    sizes = torch.tensor([1, 2, 3])
    loss = LOSSES[name](Ratios(far, -far, sizes, sizes), 1.0, 0.1).sum()
    loss.backward()
    assert math.isfinite(loss.item()) and bool(torch.isfinite(far.grad).all())


def test_the_options_name_every_loss():
    from align.stages.dpo import PairLoss
    from align.stages.kto import LabelLoss
    from align.training import kto

    assert {loss.value for loss in PairLoss} == set(LOSSES)
    assert {loss.value for loss in LabelLoss} == set(kto.LOSSES)


def plain_logprob(role, prompt: list[int], reply: list[int]) -> Tensor:
    """A reply's log-probability from a forward pass of it alone."""
    ids = torch.tensor([[*prompt, *reply]])
    logits = role.carrier(input_ids=ids, use_cache=False).logits[0].double()
    picked = torch.log_softmax(logits[:-1], -1)[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
    return picked[len(prompt) - 1 :].sum()


def close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys() and found
    for name, gradient in wanted.items():
        assert float((found[name] - gradient).abs().max()) <= 2e-5 * float(gradient.abs().max()), name


def test_dpo_and_its_gradients_are_those_of_replies_computed_alone():
    policy, reference = policy_and_reference(seed=5)
    objective, rows = DirectPreference(policy, reference, beta=0.4), pair_rows(7)
    losses, margins = [], []
    for row in rows:
        with torch.no_grad():
            below = [plain_logprob(reference, row.prompt, reply) for reply in (row.chosen, row.rejected)]
        above = [plain_logprob(policy, row.prompt, reply) for reply in (row.chosen, row.rejected)]
        margin = 0.4 * ((above[0] - below[0]) - (above[1] - below[1]))
        losses.append(torch.log1p((-margin).exp()))
        margins.append(margin.item())
    torch.stack(losses).mean().backward()
    wanted = gradients(objective)
    numbers = updater(objective, options(), 1, lr=0.0).step([objective.collate(rows[i : i + 3]) for i in (0, 3, 6)])
    assert numbers["loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-6)
    assert numbers["rewards/margins"] == pytest.approx(sum(margins) / 7, rel=1e-4)
    assert numbers["rewards/margins"] == pytest.approx(
        numbers["rewards/chosen"] - numbers["rewards/rejected"], rel=1e-4
    )
    assert numbers["rewards/accuracies"] == pytest.approx(sum(margin > 0 for margin in margins) / 7)
    close(gradients(objective), wanted)


def test_orpo_and_its_gradients_are_those_of_replies_computed_alone():
    role, rows = lora(seed=6), pair_rows(7)
    objective = OddsRatio(role, beta=0.7)
    losses = []
    for row in rows:
        likely = [plain_logprob(role, row.prompt, reply) / len(reply) for reply in (row.chosen, row.rejected)]
        odds = [(mean.exp() / (1 - mean.exp())).log() for mean in likely]
        losses.append(-likely[0] - 0.7 * s(odds[0] - odds[1]).log())
    torch.stack(losses).mean().backward()
    wanted = gradients(objective)
    numbers = updater(objective, options(), 1, lr=0.0).step([objective.collate(rows[i : i + 4]) for i in (0, 4)])
    assert numbers["loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-6)
    close(gradients(objective), wanted)


def test_odds_of_a_certain_reply_are_finite():
    sure = torch.tensor([0.0, -1e-9, -1e-4, -50.0], requires_grad=True)
    found = log_odds(sure)
    found.sum().backward()
    assert bool(torch.isfinite(found).all()) and bool(torch.isfinite(sure.grad).all())
    assert found[2].item() == pytest.approx(math.log(math.exp(-1e-4) / (1 - math.exp(-1e-4))), rel=1e-6)
    assert found[3].item() == pytest.approx(-50.0)


def kto_alone(rows: list[UnpairedRow], objective: KahnemanTversky) -> Tensor:
    """The mean loss of rows computed one by one."""
    ratio, distance = [], []
    for row in rows:
        with torch.no_grad():
            below = plain_logprob(objective.reference, row.prompt, row.reply)
            other = [plain_logprob(role, row.prompt, row.other) for role in (objective.role, objective.reference)]
        ratio.append(plain_logprob(objective.role, row.prompt, row.reply) - below)
        distance.append(other[0] - other[1])
    point = torch.stack(distance).mean().clamp_min(0)
    signs = [1.0 if row.good else -1.0 for row in rows]
    weights = [objective.weights[0] if row.good else objective.weights[1] for row in rows]
    losses = [
        weight * (1 - s(objective.beta * sign * (own - point)))
        for own, sign, weight in zip(ratio, signs, weights, strict=True)
    ]
    likely = [plain_logprob(objective.role, row.prompt, row.reply) / len(row.reply) for row in rows if row.good]
    return torch.stack(losses).mean() - objective.sft_weight * torch.stack(likely).sum() / len(rows)


@pytest.mark.parametrize(("seed", "above"), [(2, True), (1, False)])
def test_kto_and_its_gradients_are_those_of_replies_computed_alone(seed, above):
    """Also where the estimate of the KL is below 0, which then counts as 0."""
    objective, rows = kahneman_tversky(seed)
    plain = kto_alone(rows, objective)
    plain.backward()
    wanted = gradients(objective)
    numbers = updater(objective, options(), 1, lr=0.0).step(in_fives(objective, rows))
    assert numbers["loss"] == pytest.approx(plain.item(), rel=1e-6)
    assert numbers["kl"] == pytest.approx(objective.point) and (objective.point > 0.02) == above
    close(gradients(objective), wanted)


def in_fives(objective: KahnemanTversky, rows: list[UnpairedRow]) -> list:
    return [objective.collate(rows[i : i + 5]) for i in range(0, len(rows), 5)]


def test_means_over_good_and_over_bad_replies():
    objective, rows = kahneman_tversky()
    numbers = updater(objective, options(), 1, lr=0.0).step(
        [objective.collate(rows[i : i + 5]) for i in (0, 5, 10, 15)]
    )
    with torch.no_grad():
        batch = objective.collate(rows)
        logprobs, below = (replies_under(role, batch) for role in (objective.role, objective.reference))
        ratio = logprobs - below
    good = torch.tensor([row.good for row in rows])
    for side, own in (("chosen", good), ("rejected", ~good)):
        assert numbers[f"rewards/{side}"] == pytest.approx(0.5 * float(ratio[own].mean()), rel=1e-4)
        assert numbers[f"logps/{side}"] == pytest.approx(float(logprobs[own].mean()), rel=1e-5)
    lengths = torch.tensor([float(len(row.reply)) for row in rows])
    assert numbers["nll"] == pytest.approx(-float((logprobs / lengths)[good].mean()), rel=1e-5)
    assert numbers["rewards/margins"] == pytest.approx(numbers["rewards/chosen"] - numbers["rewards/rejected"])


def test_a_step_with_good_replies_alone_says_nothing_of_bad_ones():
    objective, rows = kahneman_tversky()
    numbers = updater(objective, options(), 1, lr=0.0).step([objective.collate([row for row in rows if row.good])])
    assert "rewards/chosen" in numbers and not {"rewards/rejected", "rewards/margins"} & numbers.keys()
    assert all(math.isfinite(value) for value in numbers.values())


def test_without_a_reference_point():
    ratio, good = torch.tensor([1.5, -0.5]), torch.tensor([True, False])
    found = unpaired_loss("apo_zero_unpaired", ratio, good, 9.0, 2.0)
    assert found.tolist() == pytest.approx([1 - float(s(torch.tensor(3.0))), float(s(torch.tensor(-1.0)))])
    objective = KahnemanTversky(*policy_and_reference(), loss_type="apo_zero_unpaired")
    batch = objective.collate([LabelledTokens([5, 6], [7], True, "a:1")])
    objective.survey([batch], lambda own: own)
    assert batch.others is None and objective.point == 0


@pytest.mark.parametrize(
    ("keys", "pool", "wanted"),
    [
        ([1, 2, 3], [1, 2, 3], [1, 2, 0]),
        ([1, 1, 2, 2], [1, 1, 2, 2], [2, 2, 0, 0]),
        ([2, 1, 1], [2, 1, 1], [1, 0, 0]),
        ([9, 8, 9, 8], [1, 2], [0, 1, 0, 1]),
        ([1, 2], [1, 1, 2], [2, 1]),
        ([5], [1, 1], [0]),
    ],
)
def test_every_row_finds_the_next_prompt_that_is_another(keys, pool, wanted):
    assert next_unlike(keys, pool).tolist() == wanted


def test_a_single_prompt_is_refused():
    with pytest.raises(UserError, match="single prompt"):
        next_unlike([1, 1], [1, 1])


def test_rows_beside_replies_to_other_prompts():
    rows = [LabelledTokens([1 + i // 2], [10 + i], i % 2 == 0, f"r:{i}") for i in range(4)]
    found = Mismatched(rows, rows)
    assert [row.other for row in found] == [[12], [12], [10], [10]]
    assert found[1:3] == [found[1], found[2]] and found[-1] == found[3] and len(found) == 4
    assert [(row.prompt, row.reply, row.good, row.id) for row in found] == [
        (row.prompt, row.reply, row.good, row.id) for row in rows
    ]


def test_replies_of_one_prompt_do_not_see_each_other():
    role, rows = lora(seed=1), pair_rows(5)
    batch = pack_replies([row.prompt for row in rows], [(row.chosen, row.rejected) for row in rows], ["r"] * 5)
    with torch.no_grad():
        found = replies_under(role, batch)
        alone = [plain_logprob(role, row.prompt, reply) for row in rows for reply in (row.chosen, row.rejected)]
    torch.testing.assert_close(found.double(), torch.stack(alone), rtol=1e-5, atol=1e-5)
    index_M, share_M = batch.read()
    assert len(index_M) == len(share_M) and float(share_M.sum()) == pytest.approx(batch.weight)


def test_policy_and_reference_stand_on_one_base_and_only_one_is_trained():
    policy, reference = policy_and_reference()
    objective = DirectPreference(policy, reference)
    objective.train()
    assert policy.training and not reference.training
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    own, below = storages([policy]), storages([reference])
    assert below.keys() <= own.keys(), "the reference holds nothing that the policy does not"
    trained = {id(p) for p in objective.parameters() if p.requires_grad}
    assert trained == {id(p) for p in policy.parameters() if p.requires_grad}


def test_labels_have_no_part_in_the_reference_point():
    objective, rows = kahneman_tversky()
    points = []
    for order in (rows, rows[::-1], labelled_rows()[:16]):
        objective.survey([objective.collate(order[i : i + 3]) for i in range(0, 16, 3)], lambda own: own)
        points.append(objective.point)
    assert points == pytest.approx([points[0]] * 3, rel=1e-4)

"""The table of the details of docs/ppo.md: where each stands, what would be wrong there, and which test sees it.

`tests/rl_mutations.py` puts each wrong line into a copy of the tree.
"""

from __future__ import annotations

from dataclasses import dataclass

WITHOUT = {30: "not built"}
"""Details that there is no code of."""


@dataclass(frozen=True)
class Mutation:
    """A detail, `right` as it stands once in a file, what is put in its place, and the tests that must see it."""

    detail: int
    what: str
    file: str
    right: str
    wrong: str
    guards: tuple[str, ...]


ADVANTAGES, DETAILS, PPO = (f"tests/align/rl/test_{name}.py::test_" for name in ("advantages", "details", "ppo"))
FUNCTIONAL, SAMPLER = "tests/align/test_functional.py::test_", "tests/align/inference/test_generation.py::test_"
LOOP, SHAPING = "tests/align/training/test_loop.py::test_", "tests/reward/test_shaping.py::test_"
BY_HAND = f"{PPO}rewards_advantages_and_returns_by_hand"
RATIO_1 = f"{PPO}ratio_is_one_and_kl_zero_before_the_first_update"
STEP = f"{SHAPING}each_step_by_hand"

MUTATIONS = (
    Mutation(
        1,
        "tokens are drawn at the temperature",
        "align/inference/generation.py",
        "torch.softmax(logits_BV / temperature, dim=-1)",
        "torch.softmax(logits_BV, dim=-1)",
        (f"{SAMPLER}samples_follow_softmax_of_logits_over_temperature[0.5]",),
    ),
    Mutation(
        2,
        "the ratio is taken at the sampling temperature",
        "align/rl/actor_critic.py",
        "batch.targets_M, self.loss.temperature)",
        "batch.targets_M, 1.0)",
        (f"{RATIO_1}[0.6-0.0]",),
    ),
    Mutation(
        2,
        "the reference is read at the sampling temperature",
        "align/rl/experience.py",
        "chosen_logprobs(roles.reference, hidden_MD, batch.targets_M, temperature)",
        "chosen_logprobs(roles.reference, hidden_MD, batch.targets_M, 1.0)",
        (f"{RATIO_1}[0.6-0.0]",),
    ),
    Mutation(
        3,
        "a reply ends at its first end token",
        "align/inference/generation.py",
        "reply.finished = int(token) == self.end_id",
        "reply.finished = False",
        (f"{SAMPLER}dropping_finished_rows_changes_nothing",),
    ),
    Mutation(
        3,
        "nothing is kept after the end token",
        "align/inference/generation.py",
        "            if not reply.finished:\n",
        "            if True:\n",
        (f"{SAMPLER}dropping_finished_rows_changes_nothing",),
    ),
    Mutation(
        4,
        "a reply that does not end costs the penalty",
        "reward/shaping.py",
        "reward_B, reward_B - missing_eos_penalty)",
        "reward_B, reward_B)",
        (STEP,),
    ),
    Mutation(
        4,
        "which replies ended is asked of the replies",
        "align/rl/experience.py",
        "torch.tensor([reply.finished for reply in rollout.replies])",
        "torch.ones(len(rollout.replies), dtype=torch.bool)",
        (BY_HAND,),
    ),
    Mutation(
        5,
        "positions go on where a row's own prompt ends",
        "align/inference/generation.py",
        "else None, length_B + virtual",
        "else None, torch.full_like(length_B, max(lengths)) + virtual",
        (f"{RATIO_1}[1.0-0.0]",),
    ),
    Mutation(
        5,
        "padding is not attended to",
        "align/inference/cache.py",
        "return own_BC >= 0",
        "return own_BC >= -1",
        (f"{RATIO_1}[1.0-0.0]",),
    ),
    Mutation(
        6,
        "the score is read at the reply's last token",
        "align/inference/scoring.py",
        "int(every[-1]) for every",
        "int(every[-1]) - 1 for every",
        (f"{PPO}a_score_is_read_at_the_replies_last_token",),
    ),
    Mutation(
        6,
        "the score is given at the reply's last token",
        "align/rl/experience.py",
        "judged.mask_BT.sum(1) - 1] += shaped_B",
        "0 * judged.mask_BT.sum(1)] += shaped_B",
        (BY_HAND,),
    ),
    Mutation(
        7,
        "the head starts with the published spread",
        "reward/head.py",
        "std=(width + 1) ** -0.5",
        "std=0.02",
        ("tests/reward/test_loss.py::test_head_start_has_the_published_spread",),
    ),
    Mutation(
        8,
        "scores are centred and counted in deviations",
        "reward/shaping.py",
        "(scores_B.float() - mean) / std",
        "scores_B.float() / std",
        (STEP,),
    ),
    Mutation(
        8,
        "mean and deviation are those of both sides of the held-out pairs",
        "align/stages/reward_model.py",
        "torch.tensor(chosen + rejected, dtype=torch.float64)",
        "torch.tensor(chosen, dtype=torch.float64)",
        (f"{DETAILS}a_reward_model_is_measured_over_both_sides",),
    ),
    Mutation(
        9,
        "running statistics take every update's scores in",
        "align/rl/signals/weighed.py",
        "[a + b for a, b in zip(",
        "[a for a, b in zip(",
        (
            "tests/align/rl/test_signals.py::"
            "test_running_statistics_are_those_of_all_scores_so_far_and_looks_keep_the_first",
        ),
    ),
    Mutation(
        10, "normalised scores are clipped", "reward/shaping.py", "reward_B.clamp(-clip, clip)", "reward_B", (STEP,)
    ),
    Mutation(
        11,
        "rewards are not whitened",
        "align/rl/experience.py",
        "return Rewards(rewards_BT, shaped_B, kl_BT)",
        "return Rewards(rewards_BT / (1 + rewards_BT.std()), shaped_B, kl_BT)",
        (BY_HAND,),
    ),
    Mutation(
        12,
        "KL is subtracted",
        "align/rl/experience.py",
        "rewards_BT = -rule.kl_coef * kl_BT",
        "rewards_BT = rule.kl_coef * kl_BT",
        (BY_HAND,),
    ),
    Mutation(
        12,
        "the penalty is k1",
        "align/rl/experience.py",
        "kl_BT = kl_k1(judged.logprobs_BT",
        "kl_BT = kl_k3(judged.logprobs_BT",
        (BY_HAND,),
    ),
    Mutation(
        13,
        "the coefficient is the one that was set",
        "align/stages/ppo.py",
        "kl_coef=self.kl_coef,",
        "kl_coef=0.05,",
        (f"{DETAILS}what_is_set_of_the_reward_reaches_it",),
    ),
    Mutation(
        14,
        "an adaptive coefficient grows with the KL",
        "align/rl/ppo.py",
        "kl / options.kl_target - 1.0",
        "1.0 - kl / options.kl_target",
        (f"{DETAILS}the_coefficient_moves_by_at_most_e_in_a_horizon",),
    ),
    Mutation(
        14,
        "an adaptive coefficient stays near where it began",
        "align/rl/ppo.py",
        "min(options.kl_coef * REACH, moved)",
        "moved",
        (f"{DETAILS}no_horizon_and_no_kl_makes_the_coefficient_explode_or_negative",),
    ),
    Mutation(
        15,
        "errors further on count lambda times less",
        "align/functional.py",
        "delta_B + gamma * lam * running_B",
        "delta_B + gamma * running_B",
        (f"{FUNCTIONAL}gae_by_hand",),
    ),
    Mutation(
        15,
        "a lambda by length follows each reply's own",
        "align/rl/advantages.py",
        "judged.mask_BT.sum(1).to(judged.values_BT)",
        "judged.mask_BT.sum(1).max().to(judged.values_BT)",
        (f"{ADVANTAGES}gae_with_one_lambda_and_with_one_by_length",),
    ),
    Mutation(
        16,
        "a value stands before its token",
        "align/inference/scoring.py",
        "np.concatenate([[end - 1], targets[place][:-1]])",
        "targets[place]",
        (f"{PPO}a_score_is_read_at_the_replies_last_token",),
    ),
    Mutation(
        16,
        "after the last token there is no value",
        "align/functional.py",
        "    values_BT = torch.where(mask_BT, values_BT, zeros)\n",
        "",
        (f"{FUNCTIONAL}gae_equals_the_quadratic_reference_and_reads_no_padding",),
    ),
    Mutation(
        17,
        "the value's change is clipped",
        "align/functional.py",
        "0.5 * torch.maximum(error, bounded_error)",
        "0.5 * error",
        (f"{FUNCTIONAL}value_loss_by_hand", f"{PPO}losses_of_one_token_by_hand"),
    ),
    Mutation(
        17,
        "it is not while the critic warms up",
        "align/rl/actor_critic.py",
        "clip = 0.0 if self.warming else self.loss.value_clip",
        "clip = self.loss.value_clip",
        (f"{DETAILS}the_value_is_not_clipped_while_it_warms_up",),
    ),
    Mutation(
        18,
        "the value loss has its weight",
        "align/rl/actor_critic.py",
        "loss + self.loss.value_coef * value_M",
        "loss + value_M",
        (f"{DETAILS}the_value_loss_has_its_weight",),
    ),
    Mutation(
        18,
        "the critic has a learning rate of its own",
        "align/stages/ppo.py",
        "context.config.model.lr_scale) * self.value_lr_ratio",
        "context.config.model.lr_scale)",
        (f"{DETAILS}the_optimiser_is_the_one_that_was_set",),
    ),
    Mutation(
        19,
        "advantages are whitened over the batch of all processes",
        "align/functional.py",
        "count = reduce(mask.sum())",
        "count = mask.sum()",
        (f"{FUNCTIONAL}whitening_over_two_shares_is_whitening_over_their_union",),
    ),
    Mutation(
        19,
        "padding does not count in whitening",
        "align/functional.py",
        "mean = reduce(masked_sum(values, mask)) / count",
        "mean = reduce(values.sum()) / count",
        (f"{FUNCTIONAL}masked_mean_and_whiten_ignore_poison",),
    ),
    Mutation(
        20,
        "the clip only ever makes the surrogate worse",
        "align/functional.py",
        "loss = torch.maximum(unclipped, clipped)",
        "loss = clipped",
        (f"{FUNCTIONAL}policy_loss_clips_only_what_goes_too_far",),
    ),
    Mutation(
        20,
        "dual clip bounds negative advantages alone",
        "align/functional.py",
        "torch.where(advantages < 0, torch.minimum",
        "torch.where(advantages > 0, torch.minimum",
        (f"{FUNCTIONAL}dual_clip_bounds_the_loss_of_negative_advantages",),
    ),
    Mutation(
        21,
        "log ratios are clamped",
        "align/functional.py",
        "(logprobs - old_logprobs).clamp(-20.0, 20.0)",
        "(logprobs - old_logprobs)",
        (f"{FUNCTIONAL}policy_loss_survives_absurd_log_ratios",),
    ),
    Mutation(
        21,
        "a mean ratio past max_ratio stops the stage",
        "align/rl/ppo.py",
        "> options.max_ratio:",
        "> 1e9 * options.max_ratio:",
        (f"{DETAILS}a_mean_ratio_past_its_bound_stops",),
    ),
    Mutation(
        22,
        "so many passes over so many minibatches",
        "align/rl/ppo.py",
        "for number in range(options.ppo_epochs):",
        "for number in range(1):",
        (f"{DETAILS}every_pass_takes_every_reply_once",),
    ),
    Mutation(
        22,
        "every pass draws its minibatches anew",
        "align/rl/ppo.py",
        "[context.seed, update, number, 0]",
        "[context.seed, update, 0, 0]",
        (f"{DETAILS}every_pass_takes_every_reply_once",),
    ),
    Mutation(
        23,
        "the loss is a mean over the tokens of the whole minibatch",
        "align/training/optimizer.py",
        "float(sum(batch.weight for batch in window)) if counts",
        "float(len(window)) if counts",
        (f"{LOOP}gradient_of_step_1_does_not_depend_on_the_cut[actor_critic]",),
    ),
    Mutation(
        24,
        "a policy that has moved far enough ends the passes",
        "align/rl/ppo.py",
        "> options.max_approx_kl:\n            break",
        "> options.max_approx_kl:\n            pass",
        (f"{DETAILS}passes_end_once_the_policy_has_moved_far_enough",),
    ),
    Mutation(
        24,
        "a KL past kl_limit ends the stage",
        "align/rl/watch.py",
        'numbers["objective/kl_k1"] > self._options.kl_limit',
        'numbers["objective/kl_k1"] > 1e9 * self._options.kl_limit',
        (f"{DETAILS}a_kl_past_its_limit_ends_the_stage",),
    ),
    Mutation(25, "dropout is off", "align/roles.py", "module.p = 0.0", "pass", (f"{RATIO_1}[1.0-0.5]",)),
    Mutation(
        26,
        "Adam's constants are those that were set",
        "align/training/optimizer.py",
        '"betas": (0.9, options.beta2), "eps": options.eps',
        '"betas": (0.9, 0.999), "eps": 1e-8',
        (f"{DETAILS}the_optimiser_is_the_one_that_was_set",),
    ),
    Mutation(
        27,
        "the rate falls to zero in a line",
        "align/training/optimizer.py",
        "return max(0.0, 1.0 - done)",
        "return 1.0",
        (f"{LOOP}learning_rate_at_every_step[linear-0.0]",),
    ),
    Mutation(
        27,
        "updates whose passes ended early leave their steps out of the schedule",
        "align/rl/ppo.py",
        "    updater.go_to(update * options.steps_per_update)\n",
        "",
        (f"{DETAILS}passes_end_once_the_policy_has_moved_far_enough",),
    ),
    Mutation(
        28,
        "gradients are clipped apart for each role",
        "align/rl/actor_critic.py",
        "return [[p for p in role.parameters() if p.requires_grad] for role in roles]",
        "return [[p for role in roles for p in role.parameters() if p.requires_grad]] * 2",
        (f"{LOOP}policy_and_value_are_clipped_apart",),
    ),
    Mutation(
        29,
        "the policy rests while the critic warms up",
        "align/training/optimizer.py",
        'if self.step_number < group.get("wait", 0):',
        "if False:",
        (f"{DETAILS}the_policy_rests_while_the_critic_warms_up",),
    ),
    Mutation(
        31,
        "a rollout whose log-probabilities are off is computed again",
        "align/rl/experience.py",
        "if not (trusted and gap <= GAP):",
        "if not trusted:",
        (f"{PPO}a_trusted_rollout_that_is_off_is_computed_again",),
    ),
    Mutation(
        31,
        "served tokens are weighed by how much likelier they are to the policy that is trained, up to a bound",
        "align/rl/advantages.py",
        "advantages.advantages_BT * ratio_BT.clamp_max(cap)",
        "advantages.advantages_BT * ratio_BT",
        ("tests/align/rl/test_served_rollouts.py::test_importance_weights_are_those_of_the_two_policies_and_bounded",),
    ),
    Mutation(
        32,
        "the penalty is subtracted after the clip",
        "reward/shaping.py",
        "    reward_B = (scores_B.float() - mean) / std\n",
        "    reward_B = (scores_B.float() - mean) / std\n"
        "    reward_B = reward_B - torch.where(finished_B.bool(), 0.0, missing_eos_penalty)\n"
        "    missing_eos_penalty = 0.0\n",
        (f"{SHAPING}penalty_is_felt_below_the_clip",),
    ),
    Mutation(
        32,
        "returns are taken before whitening",
        "align/rl/advantages.py",
        "return Advantages(whiten(advantages_BT, judged.mask_BT, reduce), returns_BT)",
        "white = whiten(advantages_BT, judged.mask_BT, reduce)\n"
        "    return Advantages(white, (white + judged.values_BT) * judged.mask_BT)",
        (BY_HAND,),
    ),
)

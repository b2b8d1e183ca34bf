"""Reinforcement learning: experience, losses of policy and critic, the update loop.

Notation, of every file here. A tensor's name ends in its axes: `values_BT`.

    B  replies of an update      T  tokens of the longest reply      N  packed tokens of prompts and replies
    M  reply tokens of all rows, in order                            D  width of the hidden states      V  vocabulary

    x, y            prompt and reply; y_t the reply's token t, s_t = (x, y_<t) what stands before it
    pi, pi_old, q   policy; policy that sampled the replies; reference, which the policy started as
    v_t, R(x, y)    the value role's output before y_t; the reward role's score of the whole reply
    beta            `kl_coef`, weight of the KL penalty
    gamma, lambda   `gamma`, `lam`: discount, and decay of generalised advantage estimation
    r_t             reward of token t: -beta (log pi_old - log q), and the shaped R on top at the last token
    A_t             `advantages`: sum over l of (gamma lambda)^l (r_t+l + gamma v_t+l+1 - v_t+l), then whitened
    G_t             `returns`: A_t + v_t, before whitening; what v_t is trained towards
    rho_t           `ratio`: pi(y_t | s_t) / pi_old(y_t | s_t)
                    it counts within 1 - `clip` .. 1 + `clip`

Papers: PPO, arXiv 1707.06347; GAE, arXiv 1506.02438; the reward with its KL penalty, arXiv 1909.08593; all of it put
together for language models, arXiv 2403.17031.
"""

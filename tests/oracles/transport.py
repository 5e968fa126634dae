"""Routers that carry tokens to experts by a transport plan between them, in float64 NumPy, by loops.

Written from the papers cited at each function. Conventions as in `tests.oracles.routing`: no padding, ties to the
lower index, float64 on entry.
"""

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from tests.oracles import operators
from tests.oracles.routing import Rows, queue, sigmoid, softmax


def sinkhorn_plan(scores_TE: ArrayLike, iterations: int) -> Float[np.ndarray, "T E"]:
    """S-BASE (arXiv 2202.01169, section 3.2.1): exp(scores), each iteration scaled to rows of 1, then columns of T/E.

    In plain numbers, without logarithms: for moderate scores only.
    """
    plan_TE = np.exp(np.asarray(scores_TE, np.float64))
    num_tokens, num_experts = plan_TE.shape
    for _ in range(iterations):
        plan_TE = plan_TE / plan_TE.sum(axis=1, keepdims=True)
        plan_TE = plan_TE / plan_TE.sum(axis=0, keepdims=True) * (num_tokens / num_experts)
    return plan_TE


def chosen_by(scores_TE: ArrayLike, logits_TE: ArrayLike, k: int, gate: str) -> Rows:
    """Each token's k highest scores, in that order, weighted by softmax(logits) or sigmoid(logits)."""
    scores_TE = np.asarray(scores_TE, np.float64)
    selected_TE = np.array([operators.hard_mask(scores_E, k) for scores_E in scores_TE])
    weights_TE = softmax(logits_TE) if gate == "softmax" else sigmoid(logits_TE)
    # Scores may be negative, which queues rank as well as any.
    ranked = queue(scores_TE, selected_TE, k)
    return ranked._replace(weight=weights_TE[ranked.token, ranked.expert])


def projection(x: ArrayLike, mass: float) -> Float[np.ndarray, "n"]:
    """The Euclidean projection onto {y >= 0, Σ y = mass}: y = (x - τ)_+, τ by bisection."""
    x = np.asarray(x, np.float64)
    tau = operators.bisect(lambda t: mass - float(np.maximum(x - t, 0.0).sum()), x.max() - mass, x.max())
    return np.maximum(x - tau, 0.0)


def sparse_columns(scores_TE: ArrayLike, k: int, strength: float) -> Float[np.ndarray, "T E"]:
    """Sparsity-constrained transport (arXiv 2209.15466), the plan of given duals: column by column, an expert's
    ⌈T k / E⌉ highest scores over γ projected onto the simplex of mass T/E.
    """
    scores_TE = np.asarray(scores_TE, np.float64)
    num_tokens, num_experts = scores_TE.shape
    plan_TE = np.zeros_like(scores_TE)
    for e in range(num_experts):
        chosen = operators.top_indices(scores_TE[:, e], -(-num_tokens * k // num_experts))
        plan_TE[chosen, e] = projection(scores_TE[chosen, e] / strength, num_tokens / num_experts)
    return plan_TE


def sparse_transport_duals(log_probs_TE: ArrayLike, k: int, strength: float, iterations: int) -> Float[np.ndarray, "T"]:
    """Nesterov's method on the semi-dual from 0, by steps of γ/E: a token's variable grows by what its mass lacks."""
    log_probs_TE = np.asarray(log_probs_TE, np.float64)
    num_tokens, num_experts = log_probs_TE.shape
    dual_T, ahead_T, t = np.zeros(num_tokens), np.zeros(num_tokens), 1.0
    for _ in range(iterations):
        plan_TE = sparse_columns(log_probs_TE + ahead_T[:, None], k, strength)
        new_T = ahead_T + strength / num_experts * (1.0 - plan_TE.sum(axis=1))
        next_t = (1.0 + np.sqrt(1.0 + 4.0 * t * t)) / 2.0
        dual_T, ahead_T, t = new_T, new_T + (t - 1.0) / next_t * (new_T - dual_T), next_t
    return dual_T

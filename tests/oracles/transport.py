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

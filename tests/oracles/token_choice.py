"""Routers whose tokens choose their experts, beyond those of `tests.oracles.routing`, in float64 NumPy, by loops.

Written from the papers cited at each function. Conventions as in `tests.oracles.routing`: no padding, ties to the
lower index, float64 on entry.
"""

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike

from tests.oracles import operators
from tests.oracles.routing import Rows, queue, sigmoid


def group_limited_choice(
    scores_TE: ArrayLike, k: int, expert_groups: int, groups_per_token: int, summed: int
) -> Bool[np.ndarray, "T E"]:
    """Each token's k best experts among those of its best groups.

    Expert e stands in group e // (E / expert_groups). A group scores the sum of its `summed` best experts' scores: 1 in
    DeepSeek-V2 (arXiv 2405.04434, section 2.2.2), 2 in DeepSeek-V3 (arXiv 2412.19437, section 2.1.2, with the released
    model's eight groups, four per token).
    """
    scores_TE = np.asarray(scores_TE, np.float64)
    selected_TE = np.zeros(scores_TE.shape, bool)
    size = scores_TE.shape[1] // expert_groups
    for t, scores_E in enumerate(scores_TE):
        group_scores = [np.sort(scores_E[g * size : (g + 1) * size])[::-1][:summed].sum() for g in range(expert_groups)]
        groups = set(operators.top_indices(group_scores, groups_per_token))
        ranked = [e for e in operators.top_indices(scores_E, len(scores_E)) if e // size in groups]
        selected_TE[t, ranked[:k]] = True
    return selected_TE


def sigmoid_router(
    logits_TE: ArrayLike,
    k: int,
    bias_E: ArrayLike,
    *,
    renormalize: bool = True,
    scaling: float = 1.0,
    expert_groups: int = 1,
    groups_per_token: int = 1,
) -> Rows:
    """DeepSeek-V3 (arXiv 2412.19437, eq. 12-16): chosen by score + bias, weighted by the scores alone."""
    scores_TE = sigmoid(logits_TE)
    biased_TE = scores_TE + np.asarray(bias_E, np.float64)
    selected_TE = group_limited_choice(biased_TE, k, expert_groups, groups_per_token, summed=2)
    chosen_TE = np.where(selected_TE, scores_TE, 0.0)
    weights_TE = scaling * (chosen_TE / chosen_TE.sum(axis=1, keepdims=True) if renormalize else chosen_TE)
    # A token's choices queue by what they were chosen by.
    ranked = queue(biased_TE, selected_TE, k)
    return ranked._replace(weight=weights_TE[ranked.token, ranked.expert])


def sequence_balance_loss(logits_TE: ArrayLike, k: int, example_T: ArrayLike) -> float:
    """DeepSeek-V3 (arXiv 2412.19437) eq. 17-20, without its α: the mean over examples of Σ_e f_e P_e.

    f_e = E/(K L) times the number of the example's L tokens that have e among their k highest scores, without bias;
    P_e: the example's mean of score_e / Σ scores. 1 at balance. `example_T`: the example that a token belongs to.
    """
    scores_TE, example_T = sigmoid(logits_TE), np.asarray(example_T)
    losses = []
    for example in np.unique(example_T):
        scores_LE = scores_TE[example_T == example]
        length, num_experts = scores_LE.shape
        selected_LE = np.array([operators.hard_mask(scores_E, k) for scores_E in scores_LE])
        f_E = num_experts / (k * length) * selected_LE.sum(axis=0)
        P_E = (scores_LE / scores_LE.sum(axis=1, keepdims=True)).mean(axis=0)
        losses.append(float(f_E @ P_E))
    return float(np.mean(losses))


def updated_bias(bias_E: ArrayLike, load_E: ArrayLike, rate: float) -> Float[np.ndarray, "E"]:
    """Auxiliary-loss-free balancing (arXiv 2408.15664, algorithm 1): b_e + rate sign(mean load - load_e)."""
    bias_E, load_E = np.array(bias_E, np.float64), np.asarray(load_E, np.float64)
    for e, load in enumerate(load_E):
        if load < load_E.mean():
            bias_E[e] += rate
        elif load > load_E.mean():
            bias_E[e] -= rate
    return bias_E

"""Routers whose tokens choose their experts, beyond those of `tests.oracles.routing`, in float64 NumPy, by loops.

Written from the papers cited at each function. Conventions as in `tests.oracles.routing`: no padding, ties to the
lower index, float64 on entry.
"""

import numpy as np
from jaxtyping import Bool
from numpy.typing import ArrayLike

from tests.oracles import operators


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

"""Successive halving over the tokens of an expert, in float64 NumPy, by loops, as in `tests.oracles.routing`."""

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from tests.oracles import operators
from tests.oracles.routing import sigmoid


def halving_slots_of_experts(logits_TE: ArrayLike, num_slots: int, base: float = 20.0) -> Float[np.ndarray, "T E C"]:
    """arXiv 2010.15552: the tokens of a group pooled into the slots of each expert by sigmoid(logits)_te.

    The weights are those of dispatch, and transposed those of the way back.
    """
    scores_TE = sigmoid(logits_TE)
    identity = np.eye(len(scores_TE))
    slots = [operators.successive_halving(identity, scores_T, num_slots, base=base)[2] for scores_T in scores_TE.T]
    return np.stack(slots).transpose(2, 0, 1)

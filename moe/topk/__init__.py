"""Differentiable top-k operators over the solvers of `moe.isotonic`."""

from moe.topk.halving import (
    Selection,
    SlotWeights,
    iterative_softmax,
    successive_halving,
    successive_halving_matrix,
)
from moe.topk.hard import hard_magnitude, hard_mask
from moe.topk.pair_weights import BoostedNormalised, BoostedSoftmax, CentredBoost, PairWeights, Round, Softmax
from moe.topk.pnorm import magnitude, mask

__all__ = [
    "BoostedNormalised",
    "BoostedSoftmax",
    "CentredBoost",
    "PairWeights",
    "Round",
    "Selection",
    "SlotWeights",
    "Softmax",
    "hard_magnitude",
    "hard_mask",
    "iterative_softmax",
    "magnitude",
    "mask",
    "successive_halving",
    "successive_halving_matrix",
]

"""Differentiable top-k operators over the solvers of `moe.isotonic`."""

from moe.topk.alternatives import entropic, lapsum, perturbed, straight_through
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
from moe.topk.soft import soft_rank, soft_sort

PAIR_WEIGHTS = {
    "boosted_softmax": BoostedSoftmax,
    "boosted_normalised": BoostedNormalised,
    "softmax": Softmax,
    "centred_boost": CentredBoost,
}

__all__ = [
    "PAIR_WEIGHTS",
    "BoostedNormalised",
    "BoostedSoftmax",
    "CentredBoost",
    "PairWeights",
    "Round",
    "Selection",
    "SlotWeights",
    "Softmax",
    "entropic",
    "hard_magnitude",
    "hard_mask",
    "iterative_softmax",
    "lapsum",
    "magnitude",
    "mask",
    "perturbed",
    "soft_rank",
    "soft_sort",
    "straight_through",
    "successive_halving",
    "successive_halving_matrix",
]

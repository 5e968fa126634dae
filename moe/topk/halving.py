"""Successive halving: k mixtures of n embeddings, chosen by score through log2(n/k) rounds of pairwise tournaments.

Pietruszka, Borchmann and Graliński, "Successive Halving Top-k Operator" (AAAI 2021, arXiv 2010.15552), here with exactly
k rows for every 1 <= k <= n.
"""

import dataclasses
import math
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Beyond e^20 two distinct float32 numbers have boosts so far apart that the weight is 1 in float32 already.
_MAX_LOG_BOOST = 20.0


class PairWeights(Protocol):
    """How a pair of candidates shares one row: the stronger gets sigmoid(log_odds), the weaker the rest."""

    def log_odds(
        self, strong: Float[Array, "... m"], weak: Float[Array, "... m"], round_index: int
    ) -> Float[Array, "... m"]:
        """Log odds of the stronger one's weight, for all pairs of one round; strong >= weak."""
        ...


@dataclasses.dataclass(frozen=True)
class BoostedSoftmax:
    """softmax(b^strong, b^weak), the weights of the paper's released code (base 20, scores in (0, 1]).

    Any finite score is safe: no power overflows.
    """

    base: float = 20.0

    def __post_init__(self) -> None:
        _require(self.base > 1, "base", self.base, "a number greater than 1")

    def log_odds(
        self, strong: Float[Array, "... m"], weak: Float[Array, "... m"], round_index: int
    ) -> Float[Array, "... m"]:
        """b^strong - b^weak, factored so that close scores do not cancel."""
        log_base = math.log(self.base)
        boost = jnp.exp(jnp.minimum(log_base * strong, _MAX_LOG_BOOST))
        return -boost * jnp.expm1(log_base * (weak - strong))


@dataclasses.dataclass(frozen=True)
class Softmax:
    """softmax(sharpness * strong, sharpness * weak)."""

    sharpness: float = 10.0

    def __post_init__(self) -> None:
        _require(self.sharpness > 0, "sharpness", self.sharpness, "a positive number")

    def log_odds(
        self, strong: Float[Array, "... m"], weak: Float[Array, "... m"], round_index: int
    ) -> Float[Array, "... m"]:
        """sharpness * (strong - weak)."""
        return self.sharpness * (strong - weak)


@dataclasses.dataclass(frozen=True)
class BoostedNormalised:
    """b^strong / (b^strong + b^weak): a softmax with base b instead of e, as the paper's text reads."""

    base: float = 20.0

    def __post_init__(self) -> None:
        _require(self.base > 1, "base", self.base, "a number greater than 1")

    def log_odds(
        self, strong: Float[Array, "... m"], weak: Float[Array, "... m"], round_index: int
    ) -> Float[Array, "... m"]:
        """log(b) * (strong - weak)."""
        return math.log(self.base) * (strong - weak)


class SlotWeights(NamedTuple):
    """A row-stochastic k x n matrix with one entry in each column: every input lands in exactly one row.

    slot: the row that the input lands in. weight: its weight there; the weights of a row sum to 1.
    """

    slot: Int[Array, "... n"]
    weight: Float[Array, "... n"]


def successive_halving_matrix(
    scores: Float[Array, "... n"], k: int, *, weights: PairWeights | None = None
) -> Float[Array, "... k n"]:
    """The row-stochastic matrix of the selection, so that `matrix @ embeddings` are the k rows.

    Rows are in descending order of the last round's ranks; every column has exactly one nonzero entry (up to underflow).
    Raises ValueError for k outside 1..n and for scores that are not floating.
    """
    slot, weight = _slot_weights(scores, k, BoostedSoftmax() if weights is None else weights)
    rows = jnp.arange(k, dtype=slot.dtype)
    matrix = jnp.where(
        slot[..., None, :] == jnp.expand_dims(rows, (*range(slot.ndim - 1), -1)), weight[..., None, :], 0
    )
    return matrix.astype(scores.dtype)


def _slot_weights(scores: Float[Array, "... n"], k: int, weights: PairWeights) -> SlotWeights:
    """Run the rounds on the scores alone, then follow every input through them to its slot."""
    n = scores.shape[-1] if scores.ndim else 0
    _require(jnp.issubdtype(scores.dtype, jnp.floating), "scores.dtype", scores.dtype, "a floating dtype")
    _require(1 <= k <= n, "k", k, f"an integer in 1..{n}, the number of scores")
    scores = scores.astype(jnp.float32)
    ranks, shares = [], []
    for round_index, size in enumerate(_round_sizes(n, k)):
        order = jnp.argsort(-jax.lax.stop_gradient(scores), axis=-1)
        ranked = jnp.take_along_axis(scores, order, axis=-1)
        # The field is padded to 2 * size with candidates that always lose, so that the strongest have a bye.
        byes = 2 * size - ranked.shape[-1]
        strong, weak = ranked[..., byes:size], ranked[..., size:][..., ::-1]
        log_odds = weights.log_odds(strong, weak, round_index)
        share, rest = jax.nn.sigmoid(log_odds), jax.nn.sigmoid(-log_odds)
        scores = jnp.concatenate([ranked[..., :byes], share * strong + rest * weak], axis=-1)
        ranks.append(jnp.argsort(order, axis=-1))
        shares.append(jnp.concatenate([jnp.ones_like(ranked[..., :byes]), share, rest[..., ::-1]], axis=-1))
    slot = jnp.broadcast_to(jnp.arange(k, dtype=jnp.int32), (*scores.shape[:-1], k))
    weight = jnp.ones_like(scores)
    for rank, share in zip(reversed(ranks), reversed(shares), strict=True):
        survivor = jnp.minimum(rank, 2 * slot.shape[-1] - 1 - rank)
        weight = jnp.take_along_axis(share, rank, axis=-1) * jnp.take_along_axis(weight, survivor, axis=-1)
        slot = jnp.take_along_axis(slot, survivor, axis=-1)
    return SlotWeights(slot, weight)


def _round_sizes(n: int, k: int) -> list[int]:
    """Rows left after each round: k * 2^m, ..., 2k, k. The first round has the byes, all later ones halve."""
    sizes = []
    while k < n:
        sizes.append(k)
        k *= 2
    return sizes[::-1]


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value}, but must be {allowed}")

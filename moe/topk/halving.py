"""Successive halving, which mixes n embeddings into k by rounds of pairwise contests, and the baseline it was held to.

Pietruszka, Borchmann and Graliński, "Successive Halving Top-k Operator" (AAAI 2021, arXiv 2010.15552).
"""

import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from moe.isotonic.checks import check_floating, compute_dtype, require
from moe.topk.order import descending_order
from moe.topk.pair_weights import BoostedSoftmax, PairWeights, Round

# The score that takes a winner of iterative softmax out of the contest, as in the paper's code.
_REMOVED = -1e4
_RELEASED = BoostedSoftmax(base=20.0)


class SlotWeights(NamedTuple):
    """A row-stochastic k x n matrix with one entry in each column: every input lands in exactly one of k slots.

    slot: the row in which the input lands, int32. weight: its weight there; the weights in a slot sum to 1.
    """

    slot: Int[Array, "*b n"]
    weight: Float[Array, "*b n"]

    def matrix(self, k: int) -> Float[Array, "*b k n"]:
        """The same weights as a dense matrix."""
        slots = lax.broadcasted_iota(jnp.int32, (*self.slot.shape[:-1], k, 1), self.slot.ndim - 1)
        return jnp.where(self.slot[..., None, :] == slots, self.weight[..., None, :], 0)


class Selection(NamedTuple):
    """k rows selected out of n.

    embeddings: the rows, mixtures of the input rows. scores: the scores of the rows, the same mixtures of input scores.
    weights: what mixes them, `SlotWeights` or a row-stochastic matrix [..., k, n].
    """

    embeddings: Float[Array, "*b k d"]
    scores: Float[Array, "*b k"]
    weights: SlotWeights | Float[Array, "*b k n"]


def successive_halving(
    embeddings: Float[Array, "*b n d"],
    scores: Float[Array, "*b n"],
    k: int,
    *,
    weights: PairWeights = _RELEASED,
) -> Selection:
    """Select k of n rows softly, in O(n log n + n d).

    Every round sorts its m candidates by score (equal scores: the earlier first), pairs rank i with rank m-1-i, and
    puts w_i E_i + w_j E_j with score w_i v_i + w_j v_j in place i of the next round, until k are left. `weights` gives
    w from the scores; gradients flow through weights, scores and embeddings, not through the order. Where n is not
    k 2^r, the first round is filled up to it with candidates that always lose, which gives the strongest a bye.
    Pietruszka et al. 2020 (arXiv 2010.15552); `weights` are by default those of the released code, base 20, which
    expect scores in (0, 1].

    The result's weights are `SlotWeights`. k = n plays no round and returns the input, in its own order. Scores must be
    finite; a NaN spoils its own batch entry only. Computed in float32 at least, returned in the dtypes of the inputs.

    Raises ValueError for k outside 1..n, shapes that do not match, and dtypes that are not floating.
    """
    check_floating("embeddings", embeddings)
    _check_shapes(embeddings, scores)
    (slot, weight), row_scores = _play(scores, k, weights)
    wide = compute_dtype(embeddings)

    def mix(rows: Array, slot: Array, weight: Array) -> Array:
        return jnp.zeros((k, rows.shape[-1]), wide).at[slot].add(weight[:, None] * rows, mode="promise_in_bounds")

    for _ in range(scores.ndim - 1):
        mix = jax.vmap(mix)
    rows = mix(embeddings.astype(wide), slot, weight.astype(wide))
    dtype = scores.dtype
    return Selection(rows.astype(embeddings.dtype), row_scores.astype(dtype), SlotWeights(slot, weight.astype(dtype)))


def successive_halving_matrix(
    scores: Float[Array, "*b n"], k: int, *, weights: PairWeights = _RELEASED
) -> Float[Array, "*b k n"]:
    """The row-stochastic matrix by which `successive_halving` mixes embeddings with these weights, from scores alone.

    Raises ValueError for k outside 1..n and a dtype that is not floating.
    """
    (slot, weight), _ = _play(scores, k, weights)
    return SlotWeights(slot, weight.astype(scores.dtype)).matrix(k)


def iterative_softmax(
    embeddings: Float[Array, "*b n d"], scores: Float[Array, "*b n"], k: int, *, sharpness: float = 2.0
) -> Selection:
    """Select k of n rows by k softmaxes around the highest of the scores, which then leaves the contest; O(k n d).

    Row i mixes the embeddings with weights softmax(-sharpness (v - max v)^2), v the scores, after which the best
    score is set to -10^4 (Goyal et al. 2017; the baseline of arXiv 2010.15552 has sharpness 2; 10^5 selects far more
    cleanly). The result's weights are the k x n matrix, which is not built under `jit` unless it is read.

    Raises ValueError for k outside 1..n, sharpness <= 0, shapes that do not match, and dtypes that are not floating.
    """
    require(sharpness > 0, "sharpness", sharpness, "positive")
    check_floating("embeddings", embeddings)
    _check_shapes(embeddings, scores)
    _check_selection(scores, k)
    rows = embeddings.astype(compute_dtype(embeddings))

    def select(remaining: Array, _: None) -> tuple[Array, tuple[Array, Array, Array]]:
        best = jnp.max(remaining, axis=-1, keepdims=True)
        weight = jax.nn.softmax(-sharpness * (remaining - best) ** 2, axis=-1)
        mixture = jnp.einsum("...n,...nd->...d", weight.astype(rows.dtype), rows)
        winner = jnp.argmax(remaining, axis=-1, keepdims=True)
        positions = lax.broadcasted_iota(winner.dtype, remaining.shape, remaining.ndim - 1)
        return jnp.where(positions == winner, _REMOVED, remaining), (mixture, jnp.sum(weight * remaining, -1), weight)

    _, (mixtures, row_scores, matrix) = lax.scan(select, scores.astype(compute_dtype(scores)), length=k)
    return Selection(
        jnp.moveaxis(mixtures, 0, -2).astype(embeddings.dtype),
        jnp.moveaxis(row_scores, 0, -1).astype(scores.dtype),
        jnp.moveaxis(matrix, 0, -2).astype(scores.dtype),
    )


def _play(scores: Float[Array, "*b n"], k: int, weights: PairWeights) -> tuple[SlotWeights, Float[Array, "*b k"]]:
    """Play all rounds on the scores alone; return where each input ends, with which weight, and the rows' scores."""
    _check_selection(scores, k)
    n = scores.shape[-1]
    scores = scores.astype(compute_dtype(scores))
    rounds = []
    for size in _round_sizes(n, k):
        order = descending_order(scores)
        ranked = _take(scores, order)
        byes = 2 * size - ranked.shape[-1]
        seeded, strong, weak = ranked[..., :byes], ranked[..., byes:size], ranked[..., size:][..., ::-1]
        share, rest = weights.shares(strong, weak, Round(inputs=n, entrants=ranked.shape[-1]))
        scores = jnp.concatenate([seeded, share * strong + rest * weak], axis=-1)
        share = jnp.concatenate([jnp.ones_like(seeded), share], axis=-1)
        rest = jnp.concatenate([jnp.zeros_like(seeded), rest], axis=-1)
        # Fillers have indices past the end, where the last scatter drops them; distinct, since it wants unique ones.
        fillers = n + lax.broadcasted_iota(order.dtype, seeded.shape, seeded.ndim - 1)
        rounds.append((jnp.concatenate([order, fillers], axis=-1), share, rest))
    return _follow(rounds, scores, n), scores


def _follow(rounds: list[tuple[Array, Array, Array]], scores: Float[Array, "*b k"], n: int) -> SlotWeights:
    """Unfold the k slots, from the last round to the first, into the inputs that met in them.

    The list of candidates doubles with every round: entry i belongs to slot i mod k throughout.
    """
    k = scores.shape[-1]
    candidate = lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    weight = jnp.ones_like(scores)
    for order, share, rest in reversed(rounds):
        rank = jnp.concatenate([candidate, order.shape[-1] - 1 - candidate], axis=-1)
        weight = jnp.concatenate([weight * _take(share, candidate), weight * _take(rest, candidate)], axis=-1)
        candidate = _take(order, rank)
    slot = lax.broadcasted_iota(jnp.int32, candidate.shape, candidate.ndim - 1) % k

    def scatter(values: Array, candidate: Array) -> Array:
        return jnp.zeros(n, values.dtype).at[candidate].set(values, mode="drop", unique_indices=True)

    for _ in range(scores.ndim - 1):
        scatter = jax.vmap(scatter)
    return SlotWeights(scatter(slot, candidate), scatter(weight, candidate))


def _round_sizes(n: int, k: int) -> list[int]:
    """Rows left after each round: k 2^r < n, ..., 2 k, k."""
    sizes = []
    while k < n:
        sizes.append(k)
        k *= 2
    return sizes[::-1]


def _take(x: Array, index: Array) -> Array:
    return jnp.take_along_axis(x, index, axis=-1, mode="promise_in_bounds")


def _check_shapes(embeddings: Array, scores: Array) -> None:
    require(
        embeddings.ndim > 0 and embeddings.shape[:-1] == scores.shape,
        "scores.shape",
        scores.shape,
        f"the shape of the embeddings without its last axis, {embeddings.shape[:-1]}",
    )


def _check_selection(scores: Array, k: int) -> None:
    check_floating("scores", scores)
    require(scores.ndim > 0, "scores.shape", scores.shape, "of at least one axis")
    n = scores.shape[-1]
    require(
        isinstance(k, numbers.Integral) and 1 <= k <= n, "k", k, f"a Python integer in 1..{n}, the number of scores"
    )

"""The top-k operators in float64 NumPy, written from the papers' definitions: slow, plain, and the judge of `moe.topk`.

Sources: Sander, Puigcerver, Djolonga, Peyré, Blondel, "Fast, Differentiable and Sparse Top-k: a Convex Analysis
Perspective" (ICML 2023, arXiv 2302.01425); Pietruszka, Borchmann, Graliński, "Successive Halving Top-k Operator"
(AAAI 2021, arXiv 2010.15552); Goyal et al., "A Continuous Relaxation of Beam Search" (2017, arXiv 1708.00111).
Everything acts on one vector, or on one set of n entries; a batch is a loop in the test. Inputs become float64.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike

PairWeights = Callable[[float, float], tuple[float, float]]

_HALVINGS = 200  # of a bracket: beyond this float64 cannot represent what is left


def conjugate_exponent(p: float) -> float:
    """q with 1/p + 1/q = 1, for p in (1, 2]: p=2 gives 2, 3/2 gives 3, 4/3 gives 4."""
    return p / (p - 1.0)


def bisect(increasing: Callable[[float], float], low: float, high: float) -> float:
    """The root of an increasing function on [low, high], to the last bit or to 2^-200 of the bracket."""
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        if not low < middle < high:
            break
        if increasing(middle) < 0.0:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)


# ---------------------------------------------------------------------------------------------------------------------
# Isotonic optimisation
# ---------------------------------------------------------------------------------------------------------------------


class _Block(NamedTuple):
    """Neighbours start..stop-1 that share the value s[start] + offset (the offset apart, as it may be far smaller)."""

    start: int
    stop: int
    offset: float


def _block_offset(
    s: Float[np.ndarray, "m"], w: Float[np.ndarray, "m"], strength: float, q: float, magnitude: bool
) -> float:
    """argmin over u of Σ |s_i - v|^q / (q λ^(q-1)) + w_i φ(v), where v = s_0 + u; φ(v) = v, or v²/2 for magnitude."""
    d = s - s[0]
    total = float(w.sum())
    if q == 2.0:
        pull = total * s[0] if magnitude else total
        return float((d.sum() - strength * pull) / (len(s) + (strength * total if magnitude else 0.0)))
    if len(s) == 1 and total == 0.0:
        return 0.0
    if len(s) == 1 and not magnitude:
        return -strength * math.copysign(abs(total) ** (1.0 / (q - 1.0)), total)

    def slope(u: float) -> float:
        # Divided by (scale/λ)^(q-1), which changes no sign and keeps every power below 1.
        distance = np.abs(d - u)
        scale = max(float(distance.max()), strength if total else 0.0)
        if scale == 0.0:
            return 0.0
        pull = total * (s[0] + u) if magnitude else total
        return float(np.sum(np.sign(u - d) * (distance / scale) ** (q - 1.0)) + pull * (strength / scale) ** (q - 1.0))

    if magnitude:
        return bisect(slope, min(float(d.min()), -s[0]), max(float(d.max()), -s[0]))
    reach = strength * (abs(total) / len(s)) ** (1.0 / (q - 1.0))
    return bisect(slope, float(d.min()) - reach, float(d.max()) + reach)


def _pool(
    s: Float[np.ndarray, "n"], w: Float[np.ndarray, "n"], strength: float, p: float, magnitude: bool
) -> list[_Block]:
    """Pool adjacent violators: while a block's value exceeds that of the block before it, solve the two as one."""
    q = conjugate_exponent(p)
    blocks: list[_Block] = []
    for i in range(len(s)):
        start, stop = i, i + 1
        offset = _block_offset(s[start:stop], w[start:stop], strength, q, magnitude)
        while blocks and s[blocks[-1].start] + blocks[-1].offset < s[start] + offset:
            start = blocks.pop().start
            offset = _block_offset(s[start:stop], w[start:stop], strength, q, magnitude)
        blocks.append(_Block(start, stop, offset))
    return blocks


def pav(s: ArrayLike, w: ArrayLike, strength: float, p: float, magnitude: bool = False) -> Float[np.ndarray, "n"]:
    """argmin over v_1 ≥ … ≥ v_n of Σ |s_i - v_i|^q / (q λ^(q-1)) + w_i φ(v_i), with q = p/(p-1), λ = strength.

    φ(v) = v, or v²/2 when `magnitude` (then w ≥ 0, or the problem is not convex). The order of s and w is taken as it
    stands; s need not be sorted. Source: arXiv 2302.01425; pool adjacent violators.
    """
    values, _ = pav_with_residuals(s, w, strength, p, magnitude)
    return values


def pav_with_residuals(
    s: ArrayLike, w: ArrayLike, strength: float, p: float, magnitude: bool = False
) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """`pav`'s v, and s - v without the cancellation of subtracting the two (s may be 10^10 times the strength)."""
    s, w = np.asarray(s, np.float64), np.asarray(w, np.float64)
    values, residuals = np.empty_like(s), np.empty_like(s)
    for start, stop, offset in _pool(s, w, strength, p, magnitude):
        values[start:stop] = s[start] + offset
        residuals[start:stop] = (s[start:stop] - s[start]) - offset
    return values, residuals


# ---------------------------------------------------------------------------------------------------------------------
# p-norm regularised top-k
# ---------------------------------------------------------------------------------------------------------------------


def mask(x: ArrayLike, k: int, strength: float, p: float) -> Float[np.ndarray, "n"]:
    """The regularised top-k mask, argmax over y in P(w) of <x, y> - (λ/p) ‖y‖_p^p, w = k ones and n-k zeros.

    In the published form: sort descending, `pav`, ((s - v)_+/λ)^(q-1), undo the sort. Sums to k; entries in [0, 1].
    """
    x = np.asarray(x, np.float64)
    order = np.argsort(-x, kind="stable")
    # The mask does not change when a constant is added to x; near x_(k), where blocks pool, this one spares rounding.
    s = x[order] - x[order][k - 1]
    w = (np.arange(len(x)) < k).astype(np.float64)
    _, residuals = pav_with_residuals(s, w, strength, p)
    y = np.empty_like(x)
    y[order] = (np.maximum(residuals, 0.0) / strength) ** (conjugate_exponent(p) - 1.0)
    return y


def mask_by_bisection(x: ArrayLike, k: int, strength: float, p: float) -> Float[np.ndarray, "n"]:
    """`mask` in another form: P(w) is {0 ≤ y ≤ 1, Σ y = k}, so y_i = clip((x_i - τ)/λ, 0, 1)^(q-1) with Σ y = k.

    Bisects the scalar τ. Vectorised, so that it also judges long vectors.
    """
    x = np.asarray(x, np.float64)
    n = len(x)
    if k == n:
        return np.ones(n)
    descending = np.sort(x)[::-1]
    kth, following = descending[k - 1], descending[k]
    if kth - following >= strength:
        return (x >= kth).astype(np.float64)
    z = x - kth
    power = conjugate_exponent(p) - 1.0

    def y(tau: float) -> Float[np.ndarray, "n"]:
        return np.clip((z - tau) / strength, 0.0, 1.0) ** power

    return y(bisect(lambda tau: k - float(y(tau).sum()), -strength, float(following - kth)))


def magnitude(x: ArrayLike, k: int, strength: float, p: float, rescale: bool = True) -> Float[np.ndarray, "n"]:
    """Regularised top-k in magnitude: φ(x) = x²/2 on |x|, with the signs put back.

    `rescale` (published) returns sign(x) (y + λ y^(1/(q-1))), so that a selected, unpooled entry returns exactly x;
    without it sign(x) y, where such an entry is shrunk to the v that solves ((|x| - v)/λ)^(q-1) = v.
    """
    x = np.asarray(x, np.float64)
    order = np.argsort(-np.abs(x), kind="stable")
    w = (np.arange(len(x)) < k).astype(np.float64)
    _, residuals = pav_with_residuals(np.abs(x)[order], w, strength, p, magnitude=True)
    residuals = np.maximum(residuals, 0.0)
    y = (residuals / strength) ** (conjugate_exponent(p) - 1.0)
    out = np.empty_like(x)
    out[order] = y + residuals if rescale else y  # λ y^(1/(q-1)) is the residual itself
    return np.sign(x) * out


# ---------------------------------------------------------------------------------------------------------------------
# Successive halving and its baseline
# ---------------------------------------------------------------------------------------------------------------------


def boosted_softmax(base: float = 20.0) -> PairWeights:
    """softmax(b^{v_i}, b^{v_j}): the released weights."""
    return lambda a, b: _softmax_pair(base**a, base**b)


def power_softmax(base: float = 20.0) -> PairWeights:
    """(b^{v_i}, b^{v_j}) / (b^{v_i} + b^{v_j}): a softmax with another base than e, as the paper's text reads."""
    return lambda a, b: _softmax_pair(math.log(base) * a, math.log(base) * b)


def scaled_softmax(scale: float) -> PairWeights:
    """softmax(C v_i, C v_j)."""
    return lambda a, b: _softmax_pair(scale * a, scale * b)


def _softmax_pair(a: float, b: float) -> tuple[float, float]:
    top = max(a, b)
    ea, eb = math.exp(a - top), math.exp(b - top)
    return ea / (ea + eb), eb / (ea + eb)


def halving_rounds(n: int, k: int) -> int:
    """The least m with k 2^m ≥ n."""
    rounds = 0
    while k * 2**rounds < n:
        rounds += 1
    return rounds


def successive_halving(
    embeddings: ArrayLike,
    scores: ArrayLike,
    k: int,
    weight: PairWeights | list[PairWeights] | None = None,
    base: float = 20.0,
) -> tuple[Float[np.ndarray, "k d"], Float[np.ndarray, "k"], Float[np.ndarray, "k n"]]:
    """k mixtures of n embeddings by knock-out rounds, their scores, and the row-stochastic matrix that makes them.

    A round sorts its m rows by score, descending (equal scores: the earlier row first), pairs rank i with rank m-1-i,
    and replaces the pair by (w_i E_i + w_j E_j, w_i v_i + w_j v_j), (w_i, w_j) = weight(v_i, v_j). Row i of a round's
    result is the pair of its rank i. `weight` is `boosted_softmax(base)` unless given; a list gives one per round.

    The released code (arXiv 2010.15552) is right only where n = k 2^m. Here, for every 1 ≤ k ≤ n: with m the least
    such that k 2^m ≥ n, the input is first filled up to k 2^m rows with entries that rank last and never win: their
    partner's weight is exactly 1, whatever `weight` says. As there are k 2^m - n < k 2^(m-1) of them, none meets
    another, and none is left after the first round; put otherwise, the k 2^m - n best-scored entries get a bye in round
    one, and every later round halves exactly. k = n plays no round: the rows come back in their own order.
    """
    rows, values = np.asarray(embeddings, np.float64), np.asarray(scores, np.float64)
    n = len(values)
    rounds = halving_rounds(n, k)
    if weight is None:
        weight = boosted_softmax(base)
    weights = weight if isinstance(weight, list) else [weight] * rounds
    matrix = np.eye(n)
    byes = k * 2**rounds - n
    for r in range(rounds):
        order = np.argsort(-values, kind="stable")
        m = len(values) + byes  # ranks len(values)..m-1 are the fillers
        new_values, new_matrix = np.empty(m // 2), np.empty((m // 2, n))
        for i in range(m // 2):
            strong, partner = order[i], m - 1 - i
            if partner >= len(values):
                new_values[i], new_matrix[i] = values[strong], matrix[strong]
                continue
            weak = order[partner]
            a, b = weights[r](float(values[strong]), float(values[weak]))
            new_values[i] = a * values[strong] + b * values[weak]
            new_matrix[i] = a * matrix[strong] + b * matrix[weak]
        values, matrix, byes = new_values, new_matrix, 0
    return matrix @ rows, values, matrix


def iterative_softmax(
    embeddings: ArrayLike, scores: ArrayLike, k: int, sharpness: float
) -> tuple[Float[np.ndarray, "k d"], Float[np.ndarray, "k"], Float[np.ndarray, "k n"]]:
    """The published baseline (Goyal et al. 2017): k times softmax(-α (v - max v)²), the winner's score then -10⁴.

    Returns the k mixtures, their scores Σ w v (of the scores as they then are) and the k×n weights.
    """
    rows, values = np.asarray(embeddings, np.float64), np.array(scores, np.float64)
    matrix, out_scores = np.empty((k, len(values))), np.empty(k)
    for i in range(k):
        winner = int(np.argmax(values))
        unnormalised = np.exp(-sharpness * (values - values[winner]) ** 2)
        matrix[i] = unnormalised / unnormalised.sum()
        out_scores[i] = matrix[i] @ values
        values[winner] = -1e4
    return matrix @ rows, out_scores, matrix


# ---------------------------------------------------------------------------------------------------------------------
# Helpers for tests
# ---------------------------------------------------------------------------------------------------------------------


def hard_mask(x: ArrayLike, k: int) -> Bool[np.ndarray, "n"]:
    """True at the k largest entries; of equal entries the earlier ones."""
    chosen = np.zeros(len(np.asarray(x)), bool)
    chosen[top_indices(x, k)] = True
    return chosen


def top_indices(x: ArrayLike, k: int) -> Int[np.ndarray, "k"]:
    """Indices of the k largest entries, largest first; of equal entries the earlier first."""
    return np.argsort(-np.asarray(x, np.float64), kind="stable")[:k]


def numerical_jacobian(
    f: Callable[[np.ndarray], np.ndarray | float], x: ArrayLike, eps: float = 1e-6
) -> Float[np.ndarray, "*out n"]:
    """Central differences, (f(x + eps e_j) - f(x - eps e_j)) / 2 eps, for x of one axis; j is the last axis."""
    x = np.asarray(x, np.float64)
    columns = []
    for j in range(len(x)):
        step = np.zeros_like(x)
        step[j] = eps
        columns.append((np.asarray(f(x + step), np.float64) - np.asarray(f(x - step), np.float64)) / (2.0 * eps))
    return np.stack(columns, axis=-1)

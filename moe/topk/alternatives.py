"""Other differentiable top-k masks, in the shape of call of `mask`, for comparison with it.

`lapsum` and `entropic` are both F((x - tau)/strength) for a distribution function F, with tau such that the mask sums
to k. Neither has exact zeros; strength -> 0 gives the hard mask. Entries must be finite; NaN makes its own row NaN.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.scipy.stats import laplace, logistic
from jaxtyping import Array, Float, Key

from moe.isotonic.checks import check_floating, check_strength, compute_dtype, require
from moe.topk.hard import hard_mask
from moe.topk.pnorm import mask

_HALVINGS = 40


def lapsum(
    x: Float[Array, "..."], k: int, *, strength: float | Float[Array, ""] = 1.0, axis: int = -1
) -> Float[Array, "..."]:
    """Mask F((x - tau)/strength) with the Laplace distribution function F, summing to k along `axis`.

    Struski et al. 2025, "LapSum" (arXiv 2503.06242), their F_alpha at alpha = strength. k = n gives ones.
    Raises ValueError for k outside 1..n, strength <= 0 when it is concrete, and a dtype that is not floating.
    """
    return _distribution_mask(laplace, x, k, strength, axis)


def entropic(
    x: Float[Array, "..."], k: int, *, strength: float | Float[Array, ""] = 1.0, axis: int = -1
) -> Float[Array, "..."]:
    """Mask sigmoid((x - tau)/strength) that sums to k along `axis`: entropic optimal transport, solved exactly.

    Xie et al. 2020, "Differentiable top-k with optimal transport" (arXiv 2002.06504), transport x to the points 0 and 1
    with masses n-k and k at cost (x - point)^2 and entropic weight epsilon. With two points, Sinkhorn's fixed point is
    this mask at strength = epsilon/2, so one threshold replaces the iterations. k = n gives ones.
    Raises ValueError for k outside 1..n, strength <= 0 when it is concrete, and a dtype that is not floating.
    """
    return _distribution_mask(logistic, x, k, strength, axis)


def perturbed(
    x: Float[Array, "..."],
    k: int,
    *,
    key: Key[Array, ""],
    strength: float = 1.0,
    samples: int = 100,
    noise: Any = None,
    axis: int = -1,
) -> Float[Array, "..."]:
    """Mean hard mask of x + strength * noise over `samples` draws, with the score-function gradient of its expectation.

    Berthet et al. 2020 (arXiv 2002.08676), through `optax.perturbations`; `noise` is one of its distributions, Gumbel
    by default, and `key` draws it. Every slice along `axis` draws noise of its own, so the others add no variance to
    its gradient.
    Raises ValueError for k outside 1..n, strength <= 0, samples < 1, and a dtype that is not floating.
    """
    check_floating("x", x)
    check_strength(strength)
    require(samples >= 1, "samples", samples, "at least 1")
    moved = jnp.moveaxis(x, axis, -1)
    _check_static_k(k, moved.shape[-1])
    smooth = optax.perturbations.make_perturbed_fun(
        lambda row: hard_mask(row, k), samples, strength, noise or optax.perturbations.Gumbel()
    )
    for _ in range(moved.ndim - 1):
        smooth = jax.vmap(smooth)
    out = smooth(jax.random.split(key, moved.shape[:-1]), moved.astype(compute_dtype(x)))
    return jnp.moveaxis(out, -1, axis).astype(x.dtype)


def straight_through(
    x: Float[Array, "..."],
    k: int,
    *,
    strength: float | Float[Array, ""] = 1.0,
    relaxed: Callable[..., Float[Array, "..."]] = mask,
    axis: int = -1,
) -> Float[Array, "..."]:
    """The hard mask, with the derivative of `relaxed(x, k, strength=strength, axis=axis)`.

    Bengio et al. 2013 (arXiv 1308.3432). Raises what `relaxed` and `hard_mask` raise.
    """
    soft = relaxed(x, k, strength=strength, axis=axis)
    return hard_mask(x, k, axis=axis) + (soft - lax.stop_gradient(soft))


def _distribution_mask(
    distribution: Any, x: Float[Array, "..."], k: int, strength: float | Float[Array, ""], axis: int
) -> Float[Array, "..."]:
    check_floating("x", x)
    check_strength(strength)
    moved = jnp.moveaxis(x, axis, -1).astype(compute_dtype(x))
    _check_static_k(k, moved.shape[-1])
    if k == moved.shape[-1]:
        y = jnp.ones_like(moved)
    else:
        y = distribution.cdf(_levels(distribution, k, moved, jnp.asarray(strength, moved.dtype)))
    y = jnp.where(jnp.any(jnp.isnan(moved), axis=-1, keepdims=True), jnp.nan, y)
    return jnp.moveaxis(y, -1, axis).astype(x.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _levels(distribution: Any, k: int, x: Float[Array, "*b n"], strength: Float[Array, ""]) -> Float[Array, "*b n"]:
    """(x - tau)/strength, tau by bisection between bounds on its distance from the k-th largest entry.

    In units of strength, F(-c) < 1/(n-k+1) for c > log(n-k+1) leaves less than k in the sum, and at c below the next
    entry by log(2k) the sum has reached k, for every F whose tails are bounded by e^-|z|.
    """
    top = lax.top_k(x, k + 1)[0]
    relative = (x - top[..., k - 1 : k]) / strength
    high = jnp.full((*x.shape[:-1], 1), math.log(x.shape[-1] - k + 1) + 1, x.dtype)
    low = (top[..., k:] - top[..., k - 1 : k]) / strength - math.log(2 * k) - 1

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) / 2
        above = jnp.sum(distribution.cdf(relative - middle), axis=-1, keepdims=True) > k
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    low, high = lax.fori_loop(0, _HALVINGS, halve, (low, high))
    return relative - (low + (high - low) / 2)


@_levels.defjvp
def _levels_jvp(distribution: Any, k: int, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    """Implicit: the tangent of tau keeps the sum of the mask at k."""
    (x, strength), (dx, dstrength) = primals, tangents
    z = _levels(distribution, k, x, strength)
    density = distribution.pdf(z)
    total = jnp.sum(density, axis=-1, keepdims=True)
    share = density / jnp.where(total > 0, total, 1)
    dz = dx / strength - z * (dstrength / strength)
    return z, dz - jnp.sum(share * dz, axis=-1, keepdims=True)


def _check_static_k(k: int, n: int) -> None:
    require(
        isinstance(k, int) and 1 <= k <= n, "k", k, f"a Python integer in 1..{n}, the number of entries along the axis"
    )

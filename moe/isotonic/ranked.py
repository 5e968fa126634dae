"""Top-k by a solver that wants its values sorted: rank them, solve, and read the threshold off rank k."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe.isotonic import pnorm
from moe.isotonic.implementation import Crossing
from moe.isotonic.layout import finite


def topk(
    x: Float[Array, "*b n"],
    strength: Float[Array, ""],
    *,
    solver: Any,
    k: Any,
    p: float,
    magnitude: bool = False,
) -> Crossing:
    """The threshold of every problem along the last axis, by `solver.solve`; NaN where x has one.

    Infinities act as the largest numbers; x >= 0 for the magnitude.
    """
    x = finite(x)
    ranked = jnp.flip(jnp.sort(x, axis=-1), axis=-1)
    w = (jnp.arange(x.shape[-1]) < k).astype(x.dtype)
    index = jnp.asarray(k) - 1
    kth = jnp.take(ranked, index, axis=-1)[..., None]
    origin = kth
    if magnitude:
        # A solution far below x_(k) would cancel if it were counted from there.
        r = pnorm.exponent(p)
        origin = jnp.where(pnorm.power(pnorm.selected_root(kth, strength, r), r) > 0.5 * kth, kth, 0)
    solution = solver.solve(ranked - origin, w, strength=strength, p=p, magnitude=magnitude, origin=origin)
    value = jnp.take(solution.value, index, axis=-1)[..., None]
    # Sorting has moved a NaN away from its place.
    center = jnp.where(jnp.any(jnp.isnan(x), axis=-1, keepdims=True), jnp.nan, kth)
    offset, tau = (kth - origin) - value, origin + value
    return Crossing(center[..., 0], offset[..., 0], tau[..., 0], solution.residual)

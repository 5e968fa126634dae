"""The exact solver for top-k: one scalar equation in place of an isotonic problem.

For w = (1, ..., 1, 0, ..., 0) the permutahedron is the capped simplex {0 <= y <= 1, sum y = k}, at most one block pools,
and mask_i = clip((x_i - tau)/strength, 0, 1)^r with one tau such that the mask sums to k. No sort and no permutation.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from moe.isotonic import pnorm


@dataclasses.dataclass(frozen=True)
class Threshold:
    """Bisection for the threshold, on unsorted values, in a number of steps that depends on no data.

    steps: halvings of the bracket [x_(k) - strength, x_(k)].
    """

    steps: int = 26

    def topk(self, x: Float[Array, "*b n"], k: Any, *, strength: Float[Array, ""], p: float) -> Float[Array, "*b n"]:
        """Levels z = (x - tau)/strength; the mask is clip(z, 0, 1)^r. Not differentiable: see `moe.topk.mask`."""
        r = pnorm.exponent(p)
        ordered = jnp.sort(x, axis=-1, descending=True)
        kth = jnp.take(ordered, jnp.asarray(k) - 1, axis=-1)[..., None]
        above = (x - kth) / strength + 1

        def halve(_: int, bracket: tuple) -> tuple:
            low, high = bracket
            middle = 0.5 * (low + high)
            total = jnp.sum(pnorm.power(pnorm.unit_clip(above - middle), r), axis=-1, keepdims=True)
            return jnp.where(total >= k, middle, low), jnp.where(total >= k, high, middle)

        low, high = lax.fori_loop(0, self.steps, halve, (jnp.zeros_like(kth), jnp.ones_like(kth)))
        hard = jnp.sum(above > 0, axis=-1, keepdims=True) <= k
        return above - jnp.where(hard, 0, 0.5 * (low + high))

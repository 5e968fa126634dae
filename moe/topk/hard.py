"""The hard top-k operators: the limit that the relaxed ones approach as strength goes to 0."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe.isotonic.checks import Count, Input, check_axis, check_floating, check_k
from moe.isotonic.layout import Fence, finite, over_problems
from moe.isotonic.selection import kth_largest


def hard_mask(x: Input, k: Count, *, axis: int = -1) -> Float[Array, "..."]:
    """1 at the k largest entries along `axis`, 0 elsewhere, in x's dtype; of equal entries the first are taken.

    Linear in n, without a sort. Infinities act as the largest numbers. The derivative is 0. NaN makes its own row NaN.
    Raises ValueError for k outside 1..n and for x that is not floating.
    """
    check_floating("x", x)
    check_axis(axis, x.ndim)
    k = check_k(k, x.shape[axis])
    entries = finite(jax.lax.stop_gradient(jnp.moveaxis(x, axis, -1)).astype(jnp.promote_types(x.dtype, jnp.float32)))

    def find(entries: Array, axes: tuple[int, ...], k: Any, _: Array, fence: Fence) -> Array:
        return kth_largest(entries, k, axes, fence)

    kth = over_problems(find, entries, k, jnp.ones((), entries.dtype))[..., None]
    above, tied = entries > kth, entries == kth
    room = k - jnp.sum(above, axis=-1, keepdims=True, dtype=jnp.int32)
    chosen = above | (tied & (jnp.cumsum(tied, axis=-1, dtype=jnp.int32) <= room))
    out = jnp.where(jnp.isnan(kth), jnp.nan, chosen.astype(entries.dtype))
    return jnp.moveaxis(out, -1, axis).astype(x.dtype)


def hard_magnitude(x: Input, k: Count, *, axis: int = -1) -> Float[Array, "..."]:
    """x at the k entries that are largest in magnitude along `axis`, 0 elsewhere; the derivative is the mask.

    Of equal magnitudes the first are taken. NaN makes its own row NaN. Raises ValueError as `hard_mask`.
    """
    selected = hard_mask(jnp.abs(x), k, axis=axis)
    return jnp.where(selected > 0, x, selected * 0)

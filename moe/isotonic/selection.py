"""The k-th largest of many entries without sorting them: the point that top-k values are centred on."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

# Below this many minimum/maximum operations per entry, keeping the k largest so far beats counting bit by bit.
_MAX_INSERTIONS = 24
# Insertion is unrolled over the entries: beyond this it would only make the program long.
_MAX_UNROLLED = 512


def kth_largest(entries: Float[Array, "a n c"], k: Any, axes: tuple[int, ...]) -> Float[Array, "#a 1 #c"]:
    """The k-th largest over `axes`, (1,) or (1, 2); ties count each. k is static or traced. NaN where an entry is."""
    n = entries.shape[1]
    if axes == (1,) and isinstance(k, int) and min(k, n - k + 1) <= _MAX_INSERTIONS and n <= _MAX_UNROLLED:
        return _by_insertion(entries, k)
    poison = jnp.any(jnp.isnan(entries), axis=axes, keepdims=True)
    return jnp.where(poison, jnp.nan, _by_counting(entries, k, axes))


def _by_insertion(entries: Float[Array, "a n c"], k: int) -> Float[Array, "a 1 c"]:
    """Keep the k largest so far in order (or the n-k+1 smallest, if those are fewer); linear in n k.

    A NaN survives every minimum and maximum, and so replaces all that is kept.
    """
    n = entries.shape[1]
    from_above = k <= n - k + 1
    outer, inner = (jnp.maximum, jnp.minimum) if from_above else (jnp.minimum, jnp.maximum)
    kept: list[Array] = []
    for i in range(n):
        entry, updated = entries[:, i : i + 1], []
        for other in kept:
            updated.append(outer(other, entry))
            entry = inner(other, entry)
        kept = [*updated, entry][: k if from_above else n - k + 1]
    return kept[-1]


def _by_counting(entries: Float[Array, "a n c"], k: Any, axes: tuple[int, ...]) -> Float[Array, "#a 1 #c"]:
    """Two bits of the result at a time, by counting the entries at or above three candidates: 16 passes for float32."""
    keys = _ordered_integers(entries)
    bits = keys.dtype.itemsize * 8
    unit = jnp.ones((), keys.dtype)
    wanted = jnp.asarray(k, jnp.int32)

    def refine(step: Int[Array, ""], found: Int[Array, "#a 1 #c"]) -> Int[Array, "#a 1 #c"]:
        shift = (bits - 2 - 2 * step).astype(keys.dtype)
        digit = jnp.zeros_like(found)
        for candidate in (1, 2, 3):
            # Counting starts at the most negative integer, so that the largest digit wraps around correctly.
            reached = (keys >= found + (candidate * unit << shift)).astype(jnp.int32)
            digit += (add_up(reached, axes) >= wanted).astype(keys.dtype)
        return found + (digit << shift)

    shape = tuple(1 if axis in axes else size for axis, size in enumerate(keys.shape))
    found = lax.fori_loop(0, bits // 2, refine, jnp.full(shape, jnp.iinfo(keys.dtype).min, keys.dtype))
    return _from_ordered_integers(found, entries.dtype)


def add_up(values: Array, axes: tuple[int, ...]) -> Array:
    """Sum over axes one after the other, in blocks: rounding errors stay small, and lanes stay vectors."""
    for axis in axes:
        values = jnp.sum(values, axis=axis, keepdims=True)
    return values


def _ordered_integers(x: Float[Array, "*s"]) -> Int[Array, "*s"]:
    """Signed integers in the order of the floats that they are the bits of."""
    dtype = jnp.int64 if x.dtype == jnp.float64 else jnp.int32
    bits = lax.bitcast_convert_type(x, dtype)
    return jnp.where(bits < 0, bits ^ jnp.iinfo(dtype).max, bits)


def _from_ordered_integers(keys: Int[Array, "*s"], dtype: jnp.dtype) -> Float[Array, "*s"]:
    """The inverse of `_ordered_integers`, which undoes itself."""
    return lax.bitcast_convert_type(jnp.where(keys < 0, keys ^ jnp.iinfo(keys.dtype).max, keys), dtype)

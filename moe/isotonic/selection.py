"""The k-th largest of many entries without sorting them: the point that top-k values are centred on."""

import math
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from moe.isotonic.layout import vary_like

# Below this many minimum/maximum operations per entry, keeping the k largest so far beats counting bit by bit.
_MAX_INSERTIONS = 24
# Insertion is unrolled: beyond this it would only make the program long.
_MAX_UNROLLED = 1024


def kth_largest(entries: Float[Array, "a n c"], k: Any, axes: tuple[int, ...]) -> Float[Array, "#a 1 #c"]:
    """The k-th largest over `axes`, (1,) or (1, 2); ties count each. k is static or traced. NaN where an entry is."""
    n = entries.shape[1]
    if axes == (1,) and isinstance(k, int) and min(k, n - k + 1) <= _MAX_INSERTIONS and n <= _MAX_UNROLLED:
        return _by_insertion(entries, k)
    poison = jnp.any(jnp.isnan(entries), axis=axes, keepdims=True)
    return jnp.where(poison, jnp.nan, _by_counting(entries, k, axes))


def _by_insertion(entries: Float[Array, "a n c"], k: int) -> Float[Array, "a 1 c"]:
    """Keep the k largest so far in order (or the n-k+1 smallest, if those are fewer); linear in n k.

    First in groups side by side, then among what the groups have kept: all is unrolled, and so the program stays short.
    """
    a, n, c = entries.shape
    from_above = k <= n - k + 1
    count = k if from_above else n - k + 1
    rows = min(n, max(8, math.isqrt(n * count)))
    padding = ((0, 0), (0, -n % rows), (0, 0))
    padded = jnp.pad(entries, padding, constant_values=-jnp.inf if from_above else jnp.inf)
    grouped = padded.reshape(a, rows, -1, c)
    # Without the barriers, every use of a value would compute all that leads to it once more.
    grouped = lax.optimization_barrier(grouped)
    kept = lax.optimization_barrier(_insert([grouped[:, i] for i in range(rows)], count, from_above))
    if grouped.shape[2] == 1:
        return kept[-1]
    survivors = [group[:, g : g + 1] for group in kept for g in range(grouped.shape[2])]
    return _insert(survivors, count, from_above)[-1]


def _insert(values: Iterable[Array], count: int, from_above: bool) -> list[Array]:
    """The `count` outermost values, elementwise, in order. A NaN survives every comparison, and replaces them all."""
    outer, inner = (jnp.maximum, jnp.minimum) if from_above else (jnp.minimum, jnp.maximum)
    kept: list[Array] = []
    for value in values:
        updated = []
        for other in kept:
            updated.append(outer(other, value))
            value = inner(other, value)
        kept = [*updated, value][:count]
    return kept


def _by_counting(entries: Float[Array, "a n c"], k: Any, axes: tuple[int, ...]) -> Float[Array, "#a 1 #c"]:
    """Two bits of the result at a time, by counting the entries at or above three candidates: 16 passes for float32."""
    keys = ordered_integers(entries)
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
    lowest = vary_like(jnp.full(shape, jnp.iinfo(keys.dtype).min, keys.dtype), entries)
    found = lax.fori_loop(0, bits // 2, refine, lowest)
    return from_ordered_integers(found, entries.dtype)


def add_up(values: Array, axes: tuple[int, ...]) -> Array:
    """Sum over axes one after the other, in blocks: rounding errors stay small, and lanes stay vectors."""
    for axis in axes:
        values = jnp.sum(values, axis=axis, keepdims=True)
    return values


def ordered_integers(x: Float[Array, "*s"]) -> Int[Array, "*s"]:
    """Signed integers in the order of the floats that they are the bits of."""
    dtype = jnp.int64 if x.dtype == jnp.float64 else jnp.int32
    bits = lax.bitcast_convert_type(x, dtype)
    return jnp.where(bits < 0, bits ^ jnp.iinfo(dtype).max, bits)


def from_ordered_integers(keys: Int[Array, "*s"], dtype: jnp.dtype) -> Float[Array, "*s"]:
    """The inverse of `ordered_integers`, which undoes itself."""
    return lax.bitcast_convert_type(jnp.where(keys < 0, keys ^ jnp.iinfo(keys.dtype).max, keys), dtype)

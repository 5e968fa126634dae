"""The k-th largest of many entries without sorting them all: the point that top-k values are centred on."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from moe.isotonic import networks
from moe.isotonic.layout import Fence, vary_like

# Entries that one network of comparators selects from; more are cut into groups of this many.
_WIRES = 32
# A group keeps at most this many; if more are wanted, counting bit by bit is no slower.
_MAX_KEPT = _WIRES // 2
# Comparators between two stores. Fewer write more; more compute what several outputs share once for each of them.
_LAYERS_AT_ONCE = 3


def kth_largest(entries: Float[Array, "a n c"], k: Any, axes: tuple[int, ...], fence: Fence) -> Float[Array, "#a 1 #c"]:
    """The k-th largest over `axes`, (1,) or (1, 2); ties count each. k is static or traced. NaN where an entry is."""
    n = entries.shape[1]
    if axes == (1,) and isinstance(k, int):
        if n <= _WIRES or k <= _MAX_KEPT:
            return _by_networks(entries, k, fence)
        if n - k < _MAX_KEPT:
            return -_by_networks(-entries, n - k + 1, fence)
    poison = jnp.any(jnp.isnan(entries), axis=axes, keepdims=True)
    return jnp.where(poison, jnp.nan, _by_counting(entries, k, axes))


def _by_networks(entries: Float[Array, "a n c"], k: int, fence: Fence) -> Float[Array, "a 1 c"]:
    """Selection networks, each over one group of entries and all groups at once; then again among what they keep."""
    while entries.shape[1] > _WIRES:
        a, n, c = entries.shape
        padded = jnp.pad(entries, ((0, 0), (0, -n % _WIRES), (0, 0)), constant_values=-jnp.inf)
        groups = padded.reshape(a, _WIRES, -1, c)
        entries = jnp.concatenate(_largest([groups[:, i] for i in range(_WIRES)], k, fence), axis=1)
    return _largest([entries[:, i : i + 1] for i in range(entries.shape[1])], k, fence)[-1]


def _largest(values: Sequence[Array], k: int, fence: Fence) -> list[Array]:
    """The k largest values, elementwise, the k-th last. A NaN survives every comparison, and reaches the k-th."""
    network = networks.select(len(values), k)
    layers = network.layers()
    wires = dict(enumerate(values))
    for first in range(0, len(layers), _LAYERS_AT_ONCE):
        comparators = list(itertools.chain.from_iterable(layers[first : first + _LAYERS_AT_ONCE]))
        touched = {wire: wires[wire] for wire in itertools.chain.from_iterable(comparators)}
        wires |= fence(functools.partial(_compare, comparators=comparators), touched)
    return [wires[i] for i in network.order[:k]]


def _compare(wires: dict[int, Array], *, comparators: Sequence[tuple[int, int]]) -> dict[int, Array]:
    """Apply comparators, which leave the larger of two values on the first wire."""
    wires = dict(wires)
    for i, j in comparators:
        wires[i], wires[j] = jnp.maximum(wires[i], wires[j]), jnp.minimum(wires[i], wires[j])
    return wires


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

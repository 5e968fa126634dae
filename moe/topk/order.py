"""Sorting permutations, the cost that dominates operators that must rank their input."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt

_DIGIT = 16


def descending_order(x: Float[Array, "*b n"]) -> Int[Array, "*b n"]:
    """Indices that sort the last axis in descending order; equal entries keep their order, NaN comes last.

    The permutation carries no gradient.
    """
    x = lax.stop_gradient(x)
    # A digit and a position must share one 32-bit key.
    if x.dtype != jnp.float32 or x.shape[-1] > 2 ** (32 - _DIGIT):
        return _compared(x)
    return lax.platform_dependent(x, cpu=_by_digits, default=_compared)


def _compared(x: Float[Array, "*b n"]) -> Int[Array, "*b n"]:
    return jnp.argsort(-x, axis=-1, stable=True).astype(jnp.int32)


def _by_digits(x: Float[Array, "*b n"]) -> Int[Array, "*b n"]:
    """A radix sort with two digits of 16 bits, each digit sorted with its position packed below it.

    XLA sorts one array of integers several times faster on CPUs than floats, or keys that carry values.
    """
    # Negative zero must tie with zero, as it does in a comparison.
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0, -x), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    ascending = jnp.where(bits >= sign, ~bits, bits | sign)
    keys = jnp.where(jnp.isnan(x), ~jnp.uint32(0), ascending)
    low = _order_of_digit(keys & jnp.uint32(2**_DIGIT - 1))
    high = _order_of_digit(jnp.take_along_axis(keys, low, axis=-1, mode="promise_in_bounds") >> _DIGIT)
    return jnp.take_along_axis(low, high, axis=-1, mode="promise_in_bounds")


def _order_of_digit(digit: UInt[Array, "*b n"]) -> Int[Array, "*b n"]:
    bits = (digit.shape[-1] - 1).bit_length()
    position = lax.broadcasted_iota(jnp.uint32, digit.shape, digit.ndim - 1)
    packed = lax.sort((digit << bits) | position, dimension=-1)
    return (packed & jnp.uint32(2**bits - 1)).astype(jnp.int32)

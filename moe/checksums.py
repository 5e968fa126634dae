"""Checksums of arrays that lie on devices: what was restored is, to the bit, what was saved, on whatever mesh.

Of an array with entries x_i, as unsigned integers of their bits: the sums of x_i m(i) and of x_i n(i) modulo 2^32,
where m and n are odd numbers that depend on the entry's place in the whole array alone. Sums of integers don't depend
on their order, so neither do these on how many devices and processes hold the array. A change of one entry always
shows, since odd numbers have inverses modulo 2^32; any other change goes unseen with a chance of some 2^-64. They are
made where the array is, at the speed of its memory: nothing is copied or read a second time. Arrays in this machine's
memory are summed by NumPy, which has nothing to compile. Against damage, not against forgery.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from moe.types import PyTree

# Entries that NumPy takes at a time, so that what it makes of them stays in the processor's caches.
_AT_ONCE = 2**16


def name_leaves(tree: PyTree) -> dict[str, Any]:
    """The leaves by their path: {"variables/params/embed/w": …}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def checksums(tree: PyTree) -> dict[str, str]:
    """The checksum of every array by its name, 16 hexadecimal digits. Every process that holds a part has to ask."""
    named = name_leaves(tree)
    if not named:
        return {}
    if all(map(_is_here, named.values())):
        return {
            name: f"{high:08x}{low:08x}" for name, (high, low) in zip(named, map(_sums, named.values()), strict=True)
        }
    shardings = (getattr(leaf, "sharding", None) for leaf in named.values())
    sharding = next((one for one in shardings if isinstance(one, NamedSharding)), None)
    everywhere = None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec())
    sums = np.asarray(_program(everywhere)(list(named.values())))
    return {name: f"{high:08x}{low:08x}" for name, (high, low) in zip(named, sums.tolist(), strict=True)}


def _is_here(x: Any) -> bool:
    return not isinstance(x, jax.Array) or (
        x.is_fully_addressable and all(device.platform == "cpu" for device in x.devices())
    )


def _sums(x: Any) -> tuple[int, int]:
    """The two sums, a few entries at a time."""
    flat = np.ascontiguousarray(np.asarray(x)).reshape(-1)
    flat = flat.view(f"u{flat.dtype.itemsize}")
    sums = [0, 0]
    for start in range(0, flat.size, _AT_ONCE):
        bits = flat[start : start + _AT_ONCE].astype(np.uint32)
        mixed = _mix(np.arange(start, start + bits.size).astype(np.uint32), np)
        for lane, factor in enumerate((mixed, _mix(mixed + np.uint32(0x9E3779B9), np))):
            sums[lane] += int(np.sum(bits * (factor | np.uint32(1)), dtype=np.uint32))
    return sums[0] % 2**32, sums[1] % 2**32


@functools.lru_cache(maxsize=8)
def _program(out_sharding: Any) -> Any:
    return jax.jit(lambda leaves: jnp.stack([_checksum(leaf) for leaf in leaves]), out_shardings=out_sharding)


def _checksum(x: jax.Array) -> jax.Array:
    bits = _bits(x)
    place = jnp.zeros((), jnp.uint32)
    stride = 1
    for axis in reversed(range(x.ndim)):
        along = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        place = along * jnp.uint32(stride % 2**32) + place
        stride *= x.shape[axis]
    mixed = _mix(place, jnp)
    factors = (mixed | jnp.uint32(1), _mix(mixed + jnp.uint32(0x9E3779B9), jnp) | jnp.uint32(1))
    return jnp.stack([jnp.sum(bits * factor, dtype=jnp.uint32) for factor in factors])


def _bits(x: jax.Array) -> jax.Array:
    """The entries' bits as uint32; those of wider entries would need 64-bit types, which JAX has switched off."""
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)


def _mix(x: Any, xp: Any) -> Any:
    """The finalizer of MurmurHash3, of NumPy's arrays or of JAX's: every bit of x moves every bit of the result."""
    x = (x ^ (x >> 16)) * xp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * xp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)

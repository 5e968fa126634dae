"""Checksums against their definition, on every layout, and against every kind of damage."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from moe.checksums import checksums


def mix(x: int) -> int:
    x = ((x ^ x >> 16) * 0x85EBCA6B) % 2**32
    x = ((x ^ x >> 13) * 0xC2B2AE35) % 2**32
    return x ^ x >> 16


def expected(x: np.ndarray) -> str:
    """The definition, in whole numbers of any size."""
    bits = [int.from_bytes(entry.tobytes(), "little") for entry in x.reshape(-1)]
    high = sum(bit * (mix(i) | 1) for i, bit in enumerate(bits)) % 2**32
    low = sum(bit * (mix((mix(i) + 0x9E3779B9) % 2**32) | 1) for i, bit in enumerate(bits)) % 2**32
    return f"{high:08x}{low:08x}"


ARRAYS: dict[str, Any] = {
    "float32": np.random.default_rng(0).normal(size=(8, 6, 5)).astype(np.float32),
    "special": np.array([np.nan, -np.inf, -0.0, 0.0], np.float32),
    "bfloat16": np.asarray(jnp.arange(24, dtype=jnp.bfloat16).reshape(8, 3) / 7),
    "int32": np.arange(-8, 8, dtype=np.int32).reshape(8, 2),
    "bool": np.array([True, False, True]),
    "uint8": np.arange(5, dtype=np.uint8),
    "scalar": np.array(3, np.int32),
    "empty": np.zeros((0, 4), np.float32),
}


def compiled(tree: Any) -> dict[str, str]:
    """As on devices whose memory this process doesn't see."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe.checksums._is_here", lambda x: False)
        return checksums(tree)


@pytest.mark.parametrize("checksums", [checksums, compiled], ids=["host", "devices"])
def test_it_is_its_definition(checksums: Any) -> None:
    assert checksums(jax.tree.map(jnp.asarray, ARRAYS)) == {name: expected(array) for name, array in ARRAYS.items()}


def test_large_arrays_are_taken_in_parts() -> None:
    x = jax.random.normal(jax.random.key(0), (3, 70_001))
    assert checksums({"x": x}) == compiled({"x": x})


def test_layout_over_devices_does_not_matter() -> None:
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    for spec in (("a", "b"), (("a", "b"), None), (None, "b")):
        x = jax.device_put(ARRAYS["float32"], NamedSharding(mesh, PartitionSpec(*spec)))
        for way in (checksums, compiled):
            assert way({"x": {"y": x}}) == {"x/y": expected(ARRAYS["float32"])}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 8 * ARRAYS["float32"].nbytes - 1))
def test_every_flipped_bit_shows(bit: int) -> None:
    data = bytearray(ARRAYS["float32"].tobytes())
    data[bit // 8] ^= 1 << bit % 8
    changed = np.frombuffer(bytes(data), np.float32).reshape(8, 6, 5)
    assert checksums({"x": jnp.asarray(changed)}) != checksums({"x": jnp.asarray(ARRAYS["float32"])})


@pytest.mark.parametrize(("one", "other"), [(0, 1), (3, 239)])
def test_exchanged_entries_show(one: int, other: int) -> None:
    changed = ARRAYS["float32"].reshape(-1).copy()
    changed[[one, other]] = changed[[other, one]]
    changed = changed.reshape(8, 6, 5)
    assert checksums({"x": jnp.asarray(changed)}) != checksums({"x": jnp.asarray(ARRAYS["float32"])})

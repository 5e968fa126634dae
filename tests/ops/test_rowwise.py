"""The elementwise kernel in Pallas's interpret mode, value and gradient, with rows in use that end within a tile."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.ops.rowwise import map_rows


def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("used", [0, 5, 16, 24])
def test_rows_in_use_are_those_of_the_function(used: int, dtype: str, tolerance: float) -> None:
    """Three tiles of rows, one and a half of columns; the rest holds NaN and reaches nothing."""
    rng = np.random.default_rng(used)
    gate, up, dy = (jnp.asarray(rng.normal(size=(24, 3072)), dtype).at[used:].set(jnp.nan) for _ in range(3))

    @jax.jit
    def run(gate, up, dy, used):
        y, back = jax.vjp(lambda *arrays: map_rows(gated, arrays, used, True), gate, up)
        return y, *back(dy)

    expected, back = jax.vjp(gated, gate.astype(jnp.float32), up.astype(jnp.float32))
    wanted = (expected, *back(dy.astype(jnp.float32)))
    for got, want in zip(run(gate, up, dy, jnp.int32(used)), wanted, strict=True):
        assert got.dtype == dtype
        np.testing.assert_allclose(got[:used].astype(jnp.float32), want[:used], rtol=tolerance, atol=tolerance)

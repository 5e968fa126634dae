"""The grouped matmul against a loop in float64, and its compiled cost against the rows it has."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.ops.grouped_matmul import block_experts, grouped_matmul
from tests.flops import compiled_flops

X, Y, BLOCK = 6, 10, 4
SIZES = [(8, 0, 4, 12), (0, 0, 0, 24), (24, 0, 0, 0), (4, 4, 4, 4), (0, 0, 0, 0)]


def make(sizes: tuple[int, ...], rows: int = 28, dtype: str = "float32") -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(sum(sizes))
    x, w = rng.normal(size=(rows, X)), rng.normal(size=(len(sizes), X, Y))
    return jnp.asarray(x, dtype), jnp.asarray(w, dtype), jnp.asarray(sizes, jnp.int32)


def by_loop(x: np.ndarray, w: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """The definition, in float64."""
    y, first = np.zeros((len(x), w.shape[2])), 0
    for expert, size in enumerate(sizes):
        y[first : first + size] = np.asarray(x, np.float64)[first : first + size] @ np.asarray(w[expert], np.float64)
        first += size
    return y


@pytest.mark.parametrize("implementation", [None, "blocks", "ragged_dot"])
@pytest.mark.parametrize("sizes", SIZES)
def test_values_and_gradients_are_those_of_the_loop(implementation: str, sizes: tuple[int, ...]) -> None:
    x, w, sizes_E = make(sizes)
    readout = jnp.asarray(np.random.default_rng(1).normal(size=(len(x), Y)), jnp.float32)

    @jax.jit
    def run(x, w):
        y = grouped_matmul(x, w, sizes_E, block=BLOCK, implementation=implementation)
        return jnp.vdot(y, readout), y

    (_, y), (dx, dw) = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)(x, w)
    np.testing.assert_allclose(y, by_loop(x, w, sizes), atol=1e-5)
    np.testing.assert_allclose(dx, by_loop(readout, np.swapaxes(w, 1, 2), sizes), atol=1e-5)
    first = np.cumsum([0, *sizes])
    for expert, (start, stop) in enumerate(itertools.pairwise(first)):
        expected = np.asarray(x, np.float64)[start:stop].T @ np.asarray(readout, np.float64)[start:stop]
        np.testing.assert_allclose(dw[expert], expected, atol=1e-5)


def test_a_matrix_too_large_for_the_cache_is_cut_into_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, sizes_E = make((8, 0, 4, 12))
    gradient = jax.grad(lambda w: jnp.sum(jnp.sin(grouped_matmul(x, w, sizes_E, block=BLOCK, implementation="blocks"))))
    whole = gradient(w)
    monkeypatch.setattr("moe.ops.grouped_matmul._PIECE_BYTES", 4 * X * 3)  # 10 columns in pieces of 2
    np.testing.assert_allclose(gradient(w), whole, rtol=1e-6, atol=1e-6)


def test_bfloat16_is_summed_in_float32() -> None:
    x, w, sizes_E = make((8, 0, 4, 12), dtype="bfloat16")
    y = grouped_matmul(x, w, sizes_E, block=BLOCK)
    assert y.dtype == jnp.bfloat16
    expected = by_loop(np.asarray(x, np.float64), np.asarray(w, np.float64), (8, 0, 4, 12))
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-8, atol=1e-6)


def test_blocks_know_their_experts() -> None:
    sizes_E = jnp.array([8, 0, 4, 12])
    np.testing.assert_array_equal(block_experts(sizes_E, 4, 7), [0, 0, 2, 3, 3, 3, 4])


def test_mistakes_are_named() -> None:
    x, w, sizes_E = make((8, 0, 4, 12))
    with pytest.raises(ValueError, match=r"x \(28, 6\), w \(4, 10, 6\) and sizes \(4,\) must have the shapes"):
        grouped_matmul(x, jnp.swapaxes(w, 1, 2), sizes_E)
    with pytest.raises(ValueError, match=r"block = 5 must be positive and divide the 28 rows"):
        grouped_matmul(x, w, sizes_E, block=5)
    with pytest.raises(
        ValueError, match=re.escape("implementation = 'dense' must be None or one of blocks, ragged_dot")
    ):
        grouped_matmul(x, w, sizes_E, implementation="dense")


# Cost -----------------------------------------------------------------------------------------------------------------


def flops_of(implementation: str | None, rows: int, block: int, num_experts: int = 8, width: int = 64) -> float:
    """Of value and gradients, as compiled, over 3 products of the rows with one matrix each."""
    x = jax.ShapeDtypeStruct((rows, width), jnp.float32)
    w = jax.ShapeDtypeStruct((num_experts, width, 2 * width), jnp.float32)
    sizes_E = jax.ShapeDtypeStruct((num_experts,), jnp.int32)
    product = functools.partial(grouped_matmul, block=block, implementation=implementation)
    step = jax.value_and_grad(lambda x, w, sizes_E: jnp.sum(jnp.sin(product(x, w, sizes_E))), argnums=(0, 1))
    compiled = jax.jit(step).lower(x, w, sizes_E).compile()
    return compiled_flops(compiled.as_text()) / (3 * 2 * rows * width * 2 * width)


def test_compiled_flops_are_those_of_the_rows() -> None:
    assert flops_of(None, rows=1024, block=32) <= 1.02


def test_the_count_sees_a_fall_back_to_dense() -> None:
    assert flops_of("ragged_dot", rows=1024, block=32) >= 6

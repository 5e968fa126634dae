"""The grouped matmul against a loop in float64, and its compiled cost against the rows it has."""

import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.ops.blocks import cut
from moe.ops.grouped_matmul import grouped_matmul
from tests.compiling import AS_USERS
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


@pytest.mark.parametrize("sizes", [(37, 0, 3, 24), (1, 62, 0, 1), (0, 0, 0, 64), (16, 16, 16, 16), (5, 1, 2, 0)])
def test_blocks_of_every_length(sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups that end anywhere: shorter and longer than a block, and at the last row."""
    monkeypatch.setattr("moe.ops.blocks._LEAST_ROWS", 2)
    x, w, sizes_E = make(sizes, rows=64)
    readout = jnp.asarray(np.random.default_rng(1).normal(size=(64, Y)), jnp.float32)

    @jax.jit
    def run(x, w):
        y = grouped_matmul(x, w, sizes_E, implementation="blocks")
        return jnp.vdot(y, readout), y

    (_, y), (dx, dw) = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)(x, w)
    np.testing.assert_allclose(y, by_loop(x, w, sizes), atol=1e-5)
    np.testing.assert_allclose(dx, by_loop(readout, np.swapaxes(w, 1, 2), sizes), atol=1e-5)
    first = np.cumsum([0, *sizes])
    for expert, (start, stop) in enumerate(itertools.pairwise(first)):
        np.testing.assert_allclose(dw[expert], np.asarray(x)[start:stop].T @ readout[start:stop], atol=1e-5)


def test_bfloat16_is_summed_in_float32() -> None:
    x, w, sizes_E = make((8, 0, 4, 12), dtype="bfloat16")
    y = grouped_matmul(x, w, sizes_E, block=BLOCK)
    assert y.dtype == jnp.bfloat16
    expected = by_loop(np.asarray(x, np.float64), np.asarray(w, np.float64), (8, 0, 4, 12))
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-8, atol=1e-6)


def test_groups_are_cut_into_blocks() -> None:
    """Blocks of 8 rows, the average group's: three, none, one and two of them, and one in reserve."""
    blocks = cut(jnp.array([20, 0, 3, 9]), 32)
    assert blocks.size == 8
    np.testing.assert_array_equal(blocks.rows, [8, 8, 4, 3, 8, 1, 0])
    np.testing.assert_array_equal(blocks.group[:6], [0, 0, 0, 2, 3, 3])
    np.testing.assert_array_equal(blocks.start[:6], [0, 8, 16, 20, 23, 31])


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


def flops_of(implementation: str | None, rows: int, choose: Any = max, width: int = 64) -> float:
    """Of value and gradients, as compiled, over 3 products of the rows with one matrix each.

    choose: what a conditional counts as, given the counts of its branches.
    """
    return compiled_flops(program(implementation, rows, width), choose) / (3 * 2 * rows * width * 2 * width)


@functools.cache
def program(implementation: str | None, rows: int, width: int, num_experts: int = 8) -> str:
    x = jax.ShapeDtypeStruct((rows, width), jnp.float32)
    w = jax.ShapeDtypeStruct((num_experts, width, 2 * width), jnp.float32)
    sizes_E = jax.ShapeDtypeStruct((num_experts,), jnp.int32)
    product = functools.partial(grouped_matmul, implementation=implementation)
    step = jax.value_and_grad(lambda x, w, sizes_E: jnp.sum(jnp.sin(product(x, w, sizes_E))), argnums=(0, 1))
    return jax.jit(step).lower(x, w, sizes_E).compile(AS_USERS).as_text()


def test_compiled_flops_are_those_of_the_rows_and_a_block_per_expert() -> None:
    """Even if every product were of a whole block."""
    rows, num_experts = 1024, 8
    block = cut(jnp.zeros(num_experts, jnp.int32), rows).size
    assert flops_of(None, rows) <= 1.15 + block * num_experts / rows


@pytest.mark.parametrize("share", [1 / 8, 0.6, 1.0])
def test_flops_at_run_time_are_within_a_seventh_of_the_rows(share: float) -> None:
    """A product is compiled for each length of a block, at the cost of that length; a group runs those it needs."""
    rows, num_experts = 1024, 8
    others = int(rows * (1 - share)) // (num_experts - 1)
    sizes = np.array([rows - others * (num_experts - 1)] + [others] * (num_experts - 1))
    blocks = cut(jnp.asarray(sizes), rows)
    lengths = list(blocks.lengths)
    for index in (0, 1, len(lengths) - 1):
        counted = flops_of("blocks", rows, choose=lambda costs, index=index: costs[index])
        assert counted == pytest.approx(len(blocks.rows) * lengths[index] / rows)
    run = -(-np.asarray(blocks.rows) // blocks.lengths.step) * blocks.lengths.step
    assert run.sum() <= 1.15 * rows


def test_the_count_sees_a_fall_back_to_dense() -> None:
    assert flops_of("ragged_dot", rows=1024) >= 6

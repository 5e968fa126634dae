"""Two-layer networks block by block, against a loop in float64; what they cost and what they keep."""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.layers.mlp import mlp
from moe.ops.blocks import cut
from moe.ops.feed_forward import feed_forward
from moe.ops.products import BATCHED, Grouped
from tests.compiling import AS_USERS
from tests.flops import compiled_flops
from tests.jaxprs import equations_of

ROWS, WIDTH, HIDDEN, EXPERTS = 64, 6, 10, 4
SIZES = [(37, 0, 3, 24), (1, 62, 0, 1), (0, 0, 0, 64), (16, 16, 16, 16), (5, 1, 2, 0), (0, 0, 0, 0)]
# By the number of their arguments.
FUNCTIONS: dict[int, Callable[..., jax.Array]] = {1: jax.nn.gelu, 2: lambda gate, up: jax.nn.silu(gate) * up}


def make(arguments: int, dtype: str = "float32", *, rows: int = ROWS, width: int = WIDTH, hidden: int = HIDDEN) -> list:
    """x [N, D], the first matrices [E, D, F] and the last one [E, F, D]."""
    rng = np.random.default_rng(arguments)
    shapes = [(rows, width), *[(EXPERTS, width, hidden)] * arguments, (EXPERTS, hidden, width)]
    x, *first, last = (jnp.asarray(rng.normal(size=shape) / shape[-1] ** 0.5, dtype) for shape in shapes)
    return [x, tuple(first), last]


def by_loop(x: jax.Array, first: tuple[jax.Array, ...], last: jax.Array, sizes: tuple[int, ...], function) -> jax.Array:
    """The definition, an expert after the other; its gradients are JAX's own."""
    parts = []
    for expert, (start, stop) in enumerate(itertools.pairwise(np.cumsum([0, *sizes]))):
        parts.append(function(*(x[start:stop] @ w[expert] for w in first)) @ last[expert])
    return jnp.concatenate([*parts, jnp.zeros((len(x) - sum(sizes), x.shape[1]), x.dtype)])


@pytest.mark.parametrize("arguments", FUNCTIONS)
@pytest.mark.parametrize("sizes", SIZES)
def test_values_and_gradients_are_those_of_the_loop(sizes: tuple[int, ...], arguments: int) -> None:
    given, function = make(arguments), FUNCTIONS[arguments]
    sizes_E = jnp.asarray(sizes, jnp.int32)
    readout = jnp.asarray(np.random.default_rng(3).normal(size=(ROWS, WIDTH)), jnp.float32)
    y, pull = jax.vjp(jax.jit(lambda *given: feed_forward(*given, sizes_E, function)), *given)
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda leaf: jnp.asarray(leaf, "float64"), given)
        exact_y, exact_pull = jax.vjp(lambda *given: by_loop(*given, sizes, function), *exact)
        expected = [exact_y, *jax.tree.leaves(exact_pull(readout.astype(exact_y.dtype)))]
    found = [y, *jax.tree.leaves(pull(readout))]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4, rtol=1e-4)


def test_rows_of_others_never_meet() -> None:
    """What isn't a number in one expert's rows, or past the last group, stays there, forward and backward."""
    x, first, last = make(2)
    sizes_E = jnp.asarray((20, 9, 0, 30), jnp.int32)
    y, pull = jax.vjp(
        lambda *given: feed_forward(*given, sizes_E, FUNCTIONS[2]),
        x.at[22].set(jnp.nan).at[60].set(jnp.nan),
        first,
        last,
    )
    dx, (dgate, _), dlast = pull(jnp.ones_like(y))
    assert np.flatnonzero(np.isnan(y).any(axis=1)).tolist() == [22]
    assert np.flatnonzero(np.isnan(dx).any(axis=1)).tolist() == [22]
    for gradient in (dgate, dlast):
        assert np.flatnonzero(np.isnan(gradient).any(axis=(1, 2))).tolist() == [1]


def test_bfloat16_is_that_of_single_products() -> None:
    """The same roundings as one grouped matmul after the other, but for the sum of both gradients in x."""
    x, first, last = make(2, "bfloat16")
    weights = {"w_gate": first[0], "w_in": first[1], "w_out": last}
    sizes_E = jnp.asarray((37, 0, 3, 24), jnp.int32)
    found, one_by_one = (
        jax.value_and_grad(lambda x, w, way=way: jnp.sum(mlp(w, x, "swiglu", Grouped(sizes_E, 1, way)) ** 2), (0, 1))(
            x, weights
        )
        for way in ("blocks", "ragged_dot")
    )
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(one_by_one), strict=True):
        assert one.dtype == jnp.bfloat16
        scale = np.abs(np.asarray(other, "float32")).max()
        np.testing.assert_allclose(np.asarray(one, "float32") / scale, np.asarray(other, "float32") / scale, atol=2e-2)


def test_no_rows_give_no_rows() -> None:
    x, first, last = make(1)
    assert feed_forward(x[:0], first, last, jnp.zeros(EXPERTS, jnp.int32), jax.nn.gelu).shape == (0, WIDTH)


# Cost -----------------------------------------------------------------------------------------------------------------


def test_compiled_flops_are_those_of_the_rows_and_a_block_per_expert() -> None:
    """Nine products forward and backward, none of them twice, even if every block were whole."""
    rows, width, hidden = 1024, 32, 64
    given = make(2, rows=rows, width=width, hidden=hidden)
    sizes_E = jnp.zeros(EXPERTS, jnp.int32)

    def step(x, first, last, sizes_E):
        return jnp.sum(jnp.sin(feed_forward(x, first, last, sizes_E, FUNCTIONS[2])))

    hlo = jax.jit(jax.value_and_grad(step, (0, 1, 2))).lower(*given, sizes_E).compile(AS_USERS).as_text()
    active = 9 * 2 * rows * width * hidden
    assert compiled_flops(hlo) / active <= 1.15 + cut(sizes_E, rows).size * EXPERTS / rows


@pytest.mark.parametrize("checkpoint", [False, True])
def test_between_the_passes_only_arguments_are_kept(*, checkpoint: bool) -> None:
    """No array has an entry for every block; hidden rows are made twice, and never for all rows at once."""
    sizes_E = jnp.asarray((37, 0, 3, 24), jnp.int32)

    def step(x, first, last):
        run = lambda *given: feed_forward(*given, sizes_E, FUNCTIONS[2])  # noqa: E731
        if checkpoint:
            run = jax.checkpoint(run, policy=lambda primitive, *_, **__: primitive.name != "convert_element_type")
        return jnp.sum(run(x, first, last))

    program = jax.make_jaxpr(jax.grad(step, (0, 1, 2)))(*make(2))
    shapes = [
        out.aval.shape for one in equations_of(program.jaxpr) for out in one.outvars if one.primitive.name == "scan"
    ]
    blocks = len(cut(sizes_E, ROWS).rows)
    assert [shape for shape in shapes if len(shape) == 3 and shape[0] == blocks] == []
    assert shapes.count((ROWS, HIDDEN)) == 2


def test_it_is_what_experts_side_by_side_compute() -> None:
    x, first, last = make(2)
    weights = {"w_gate": first[0], "w_in": first[1], "w_out": last}
    apart = mlp(weights, x.reshape(EXPERTS, -1, WIDTH), "swiglu", BATCHED)
    sorted_rows = mlp(weights, x, "swiglu", Grouped(jnp.full(EXPERTS, ROWS // EXPERTS), 1, "blocks"))
    np.testing.assert_allclose(sorted_rows, apart.reshape(ROWS, WIDTH), atol=1e-4)

"""Rows sorted by expert through their experts' two-layer networks, block by block: for CPU."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe.ops.blocks import Block, loop, times, transposed_times, vary_alike, zeros_like

Matrices = tuple[Float[Array, "E X Y"], ...]


def feed_forward(
    x_ND: Float[Array, "N D"],
    first: Matrices,
    last_EFD: Float[Array, "E F _"],
    sizes_E: Int[Array, "E"],
    function: Callable[..., Array],
) -> Float[Array, "N _"]:
    """function(x_n w for each w of `first`) `last`, with the matrices of the group of row n; products sum in float32.

    Group e holds sizes_E[e] rows and begins where group e - 1 ends; rows past the last give zeros.
    first: matrices [E, D, F], one for each argument of `function`, which is elementwise.

    As `moe.ops.grouped_matmul` for every matrix, but a block's rows and matrices are read once, and between forward and
    backward pass only x and the arguments of `function` are kept: what it returns, and all gradients between the
    layers, are never whole.
    """
    x_ND, last_EFD, *others = vary_alike(x_ND, last_EFD, *first)
    if x_ND.shape[0] == 0:
        return x_ND @ others[0][0].astype(x_ND.dtype) @ last_EFD[0].astype(x_ND.dtype)
    return _feed_forward(x_ND, tuple(others), last_EFD, sizes_E, function)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _feed_forward(x: Array, first: Matrices, last: Array, sizes: Array, function: Callable[..., Array]) -> list[Array]:
    """The result, and the arguments of `function`, for the backward pass alone."""
    first, last = tuple(w.astype(x.dtype) for w in first), last.astype(x.dtype)

    def run(block: Block, length: int) -> list[Array]:
        rows = block.read(x, length)
        arguments = [times(rows, block.matrix(w)).astype(x.dtype) for w in first]
        y = times(function(*arguments), block.matrix(last)).astype(x.dtype)
        return [block.widen(part) for part in (y, *arguments)]

    def update(block: Block, wholes: list[Array], parts: list[Array]) -> list[Array]:
        return [block.write_to(whole, part) for whole, part in zip(wholes, parts, strict=True)]

    widths = [w.shape[2] for w in (last, *first)]
    return loop(sizes, x.shape[0], run, update, [zeros_like((x.shape[0], width), x) for width in widths])


def _forward(x: Array, first: Matrices, last: Array, sizes: Array, function: Callable[..., Array]) -> Any:
    # A call of what has its own derivative, since `jax.checkpoint` would take the loop itself apart.
    results = _feed_forward(x, first, last, sizes, function)
    return results, (x, first, last, sizes, results[1:])


def _backward(function: Callable[..., Array], saved: Any, gradients: list[Array]) -> Any:
    dy = gradients[0]
    x, first, last, sizes, arguments = saved
    first_matrices, last_matrices = tuple(w.astype(x.dtype) for w in first), last.astype(x.dtype)

    def run(block: Block, length: int) -> tuple[Array, list[Array]]:
        rows, dy_rows, *given = (block.read(whole, length) for whole in (x, dy, *arguments))
        hidden, pull = jax.vjp(function, *given)
        pulled = pull(times(dy_rows, block.matrix(last_matrices), transpose=True).astype(x.dtype))
        dx = sum(times(d, block.matrix(w), transpose=True) for d, w in zip(pulled, first_matrices, strict=True))
        products = [transposed_times(rows, d) for d in pulled]
        return block.widen(jnp.asarray(dx, x.dtype)), [*products, transposed_times(hidden, dy_rows)]

    def update(block: Block, carried: tuple[Array, list[Array]], result: tuple[Array, list[Array]]) -> Any:
        (dx, sums), (part, products) = carried, result
        return block.write_to(dx, part), [block.add_to(*pair) for pair in zip(sums, products, strict=True)]

    start = zeros_like(x.shape, x), [zeros_like(w.shape, x, jnp.float32) for w in (*first, last)]
    dx, (*dfirst, dlast) = loop(sizes, x.shape[0], run, update, start)
    return dx, tuple(d.astype(w.dtype) for d, w in zip(dfirst, first, strict=True)), dlast.astype(last.dtype), None


_feed_forward.defvjp(_forward, _backward)

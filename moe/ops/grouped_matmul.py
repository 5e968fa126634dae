"""Rows sorted by expert, each times its own expert's matrix, at the cost of the rows alone.

`lax.ragged_dot` is the definition. XLA compiles it to a product of every row with every expert, masked, on CPU, and on
TPU unless a compiler option says otherwise (in the weights' gradient on some versions always): hence the others.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from moe.ops.blocks import Block, loop, times, transposed_times, vary_alike, zeros_like

IMPLEMENTATIONS = ("blocks", "ragged_dot", "megablox")

# On TPU: rows of a tile at most, and columns; bytes of a tile of a matrix; rows and columns of a tile of its gradient.
# Two tiles of each operand and the sums must fit into the 16 MiB of vector memory that a kernel is given.
_TILE_ROWS, _TILE_COLUMNS, _TILE_BYTES, _GRADIENT_TILE = 512, 512, 4 << 20, (1024, 512)
# Rows of bfloat16 that one register packs.
_LEAST_TILE_ROWS = 16


def grouped_matmul(
    x_NX: Float[Array, "N X"],
    w_EXY: Float[Array, "_ _ Y"],
    sizes_E: Int[Array, "_"],
    *,
    block: int = 1,
    implementation: str | None = None,
    clean: bool = True,
) -> Float[Array, "N Y"]:
    """y_n = x_n w_e for the rows n of x_NX in group e, w_e of w_EXY; float32 sums, in x's dtype.

    Group e holds sizes_E[e] rows and begins where group e - 1 ends; rows past the last group give zeros, or without
    `clean` anything, also in the gradient of x, which saves megablox to write them.
    block: every size, and N, is a multiple of it; megablox multiplies fewer rows twice if it is large.
    implementation: "blocks", a loop over products of some rows of one group each, as many as it has; "ragged_dot",
        `lax.ragged_dot`; "megablox", the Pallas kernel for TPUs that comes with JAX. None: blocks on CPU, megablox on
        TPU, ragged_dot elsewhere.
    Raises ValueError for shapes that don't fit, and NotImplementedError for megablox off TPUs.
    """
    if x_NX.shape[1] != w_EXY.shape[1] or sizes_E.shape[0] != w_EXY.shape[0]:
        raise ValueError(
            f"x {x_NX.shape}, w {w_EXY.shape} and sizes {sizes_E.shape} must have the shapes [N, X], [E, X, Y] and [E]."
        )
    if block < 1 or x_NX.shape[0] % block:
        raise ValueError(f"block = {block} must be positive and divide the {x_NX.shape[0]} rows.")
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation = {implementation!r} must be None or one of {', '.join(IMPLEMENTATIONS)}.")
    # In shard_map, what the rows' devices add to a matrix's gradient is summed where the matrix came to vary.
    x_NX, w_EXY = vary_alike(x_NX, w_EXY)
    if x_NX.shape[0] == 0:
        return x_NX @ w_EXY[0].astype(x_NX.dtype)
    return _product(x_NX, w_EXY, sizes_E, _How(block, implementation, clean))


class _How(NamedTuple):
    """The settings of `grouped_matmul`."""

    block: int
    implementation: str | None
    clean: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(x: Array, w: Array, sizes: Array, how: _How) -> Array:
    return _rows_by_matrices(x, w.astype(x.dtype), sizes, how, transpose=False)


def _forward(x: Array, w: Array, sizes: Array, how: _How) -> Any:
    return _product(x, w, sizes, how), (x, w, sizes)


def _backward(how: _How, saved: Any, dy: Array) -> tuple[Array, Array, None]:
    x, w, sizes = saved
    dx = _rows_by_matrices(dy, w.astype(dy.dtype), sizes, how, transpose=True)
    return dx, _rows_by_rows(x, dy, sizes, how).astype(w.dtype), None


_product.defvjp(_forward, _backward)


def _rows_by_matrices(x: Array, w: Array, sizes: Array, how: _How, *, transpose: bool) -> Array:
    """x_n w_e, or with `transpose` x_n w_e^T."""
    return _run(
        how.implementation,
        {
            "blocks": functools.partial(_blocks_by_matrices, transpose=transpose),
            "ragged_dot": functools.partial(_ragged_by_matrices, transpose=transpose),
            "megablox": functools.partial(_megablox_by_matrices, how=how, transpose=transpose),
        },
        x,
        w,
        sizes,
    )


def _rows_by_rows(x: Array, y: Array, sizes: Array, how: _How) -> Array:
    """Σ_n x_n^T y_n over the rows of each group, [E, X, Y], float32."""
    return _run(
        how.implementation,
        {
            "blocks": _blocks_by_rows,
            "ragged_dot": _ragged_by_rows,
            "megablox": functools.partial(_megablox_by_rows, block=how.block),
        },
        x,
        y,
        sizes,
    )


def _run(implementation: str | None, table: dict[str, Callable], *arguments: Array) -> Array:
    if implementation is not None:
        return table[implementation](*arguments)
    return lax.platform_dependent(*arguments, cpu=table["blocks"], tpu=table["megablox"], default=table["ragged_dot"])


# Blocks ---------------------------------------------------------------------------------------------------------------


def _blocks_by_matrices(x: Array, w: Array, sizes: Array, *, transpose: bool) -> Array:
    num_rows, width = x.shape[0], w.shape[1] if transpose else w.shape[2]

    def run(block: Block, length: int) -> Array:
        return block.widen(times(block.read(x, length), block.matrix(w), transpose=transpose).astype(x.dtype))

    return loop(sizes, num_rows, run, Block.write_to, zeros_like((num_rows, width), x))


def _blocks_by_rows(x: Array, y: Array, sizes: Array) -> Array:
    def run(block: Block, length: int) -> Array:
        return transposed_times(block.read(x, length), block.read(y, length))

    start = zeros_like((sizes.shape[0], x.shape[1], y.shape[1]), x, jnp.float32)
    return loop(sizes, x.shape[0], run, Block.add_to, start)


# Ragged dot -----------------------------------------------------------------------------------------------------------


def _ragged_by_matrices(x: Array, w: Array, sizes: Array, *, transpose: bool) -> Array:
    matrices = jnp.swapaxes(w, 1, 2) if transpose else w
    y = lax.ragged_dot(x, matrices, sizes, preferred_element_type=jnp.float32).astype(x.dtype)
    return _used(y, sizes)


def _ragged_by_rows(x: Array, y: Array, sizes: Array) -> Array:
    numbers = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    return lax.ragged_dot_general(_used(x, sizes), y, sizes, numbers, preferred_element_type=jnp.float32)


def _used(rows: Array, sizes: Array) -> Array:
    """The rows of a group as they are, and zeros past the last, where implementations leave anything."""
    return jnp.where((jnp.arange(rows.shape[0]) < jnp.sum(sizes))[:, None], rows, 0)


# Megablox -------------------------------------------------------------------------------------------------------------


def _megablox_by_matrices(x: Array, w: Array, sizes: Array, *, how: _How, transpose: bool) -> Array:
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    contraction, width = x.shape[1], w.shape[1] if transpose else w.shape[2]
    columns = min(width, _TILE_COLUMNS)
    # Where the contraction is one tile, a matrix stays in place from one tile of its rows to the next; otherwise every
    # tile of few rows waits for it to be read anew.
    pieces = -(-contraction * columns * w.dtype.itemsize // _TILE_BYTES)
    depth = contraction if pieces == 1 else -(-contraction // (128 * pieces)) * 128
    tiles = (_row_tile(x.shape[0], how.block), depth, columns)
    y = gmm(x, w, sizes, x.dtype, tiles, transpose_rhs=transpose)
    return _used(y, sizes) if how.clean else y


def _megablox_by_rows(x: Array, y: Array, sizes: Array, *, block: int) -> Array:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    tiles = (_row_tile(x.shape[0], block), min(x.shape[1], _GRADIENT_TILE[0]), min(y.shape[1], _GRADIENT_TILE[1]))
    return tgmm(x.T, y, sizes, jnp.float32, tiles)


def _row_tile(rows: int, block: int) -> int:
    """Rows of a tile, which must divide all rows; where it divides the block, too, no row is multiplied twice.

    The kernel multiplies a whole tile once for each group that has rows in it. Blocks too small for the hardware's
    layout leave such tiles: at most one more for each group.
    """
    aligned = math.gcd(block, _TILE_ROWS)
    if aligned >= _LEAST_TILE_ROWS:
        return aligned
    return math.gcd(rows, 128) if rows % 8 == 0 else rows

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

from moe.ops.permute import most_blocks

IMPLEMENTATIONS = ("blocks", "ragged_dot", "megablox")

# On CPU: rows of a block at most and at least, and how many lengths of blocks are compiled.
_MOST_ROWS, _LEAST_ROWS, _LENGTHS = 512, 8, 16
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
    """y_n = x_n w_e for the rows n of group e; float32 sums, in x's dtype.

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
    x_NX, w_EXY = _vary_alike(x_NX, w_EXY)
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


class Blocks(NamedTuple):
    """The M products that cover all groups, of `size` rows at most, a power of two; those in excess have none.

    group: whose rows. start: the first one. rows: how many.
    """

    size: int
    group: Int[Array, "M"]
    start: Int[Array, "M"]
    rows: Int[Array, "M"]

    @property
    def lengths(self) -> range:
        """Row counts that a program is compiled for; a block takes the least that holds its rows."""
        return range(0, self.size + 1, max(self.size // _LENGTHS, min(self.size, _LEAST_ROWS)))


def cut(sizes_E: Int[Array, "E"], num_rows: int) -> Blocks:
    """Cuts groups of `sizes_E` consecutive rows, `num_rows` at most in all, into blocks."""
    num_groups = sizes_E.shape[0]
    # As long as a group of average size, so that most groups are one block or two.
    average = 1 << max(0, num_rows // num_groups - 1).bit_length()
    size = min(_MOST_ROWS, max(_LEAST_ROWS, average), 1 << num_rows.bit_length() - 1)
    blocks_E = -(-sizes_E // size)
    index_M = jnp.arange(most_blocks(num_rows, num_groups, size), dtype=jnp.int32)
    found_M = jnp.searchsorted(jnp.cumsum(blocks_E), index_M, side="right").astype(jnp.int32)
    group_M = jnp.minimum(found_M, num_groups - 1)
    before_M = size * (index_M - (jnp.cumsum(blocks_E) - blocks_E)[group_M])
    count_M = jnp.where(found_M < num_groups, jnp.clip(sizes_E[group_M] - before_M, 0, size), 0)
    return Blocks(size, group_M, (jnp.cumsum(sizes_E) - sizes_E)[group_M] + before_M, count_M)


def _blocks_by_matrices(x: Array, w: Array, sizes: Array, *, transpose: bool) -> Array:
    num_rows, width = x.shape[0], w.shape[1] if transpose else w.shape[2]
    numbers = (((1,), (1 if transpose else 0,)), ((), ()))
    blocks = cut(sizes, num_rows)

    def add(y: Array, item: tuple[Array, Array, Array]) -> tuple[Array, None]:
        group, start, count = item
        first = jnp.minimum(start, num_rows - blocks.size)

        def multiply(length: int, matrix: Array) -> Array:
            part = _zeros_like((blocks.size, width), matrix)
            if length == 0:
                return part
            at, rows = _rows(x, start, count, length)
            sums = lax.dot_general(rows, matrix, numbers, preferred_element_type=jnp.float32)
            return lax.dynamic_update_slice_in_dim(part, sums.astype(x.dtype), at - first, axis=0)

        part = _by_length(blocks, count, multiply, lax.dynamic_index_in_dim(w, group, keepdims=False))
        # Other blocks' rows get zeros from this one: to add keeps what they have, and it is done in place.
        part += lax.dynamic_slice_in_dim(y, first, blocks.size)
        return lax.dynamic_update_slice_in_dim(y, part, first, axis=0), None

    return lax.scan(add, _zeros_like((num_rows, width), x), blocks[1:])[0]


def _blocks_by_rows(x: Array, y: Array, sizes: Array) -> Array:
    blocks = cut(sizes, x.shape[0])
    matrix = (x.shape[1], y.shape[1])

    def add(sums: Array, item: tuple[Array, Array, Array]) -> tuple[Array, None]:
        group, start, count = item

        def multiply(length: int, y: Array) -> Array:
            if length == 0:
                return _zeros_like(matrix, y, jnp.float32)
            at, rows = _rows(x, start, count, length)
            others = lax.dynamic_slice_in_dim(y, at, length)
            return lax.dot_general(rows, others, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)

        product = _by_length(blocks, count, multiply, y)
        return sums.at[group].add(product, mode="promise_in_bounds"), None

    return lax.scan(add, _zeros_like((sizes.shape[0], *matrix), x, jnp.float32), blocks[1:])[0]


def _by_length(blocks: Blocks, count: Array, multiply: Callable[[int, Array], Array], operand: Array) -> Array:
    """multiply(length, operand) for the least compiled length that holds `count` rows."""
    lengths = blocks.lengths
    branches = [functools.partial(multiply, length) for length in lengths]
    return lax.switch(-(-count // lengths.step), branches, operand)


def _rows(x: Array, start: Array, count: Array, length: int) -> tuple[Array, Array]:
    """`length` rows of x that hold the `count` rows from `start` on, zeros in place of others; and where they begin."""
    at = jnp.minimum(start, x.shape[0] - length)
    index = at + jnp.arange(length, dtype=jnp.int32)
    theirs = (index >= start) & (index < start + count)
    return at, jnp.where(theirs[:, None], lax.dynamic_slice_in_dim(x, at, length), 0)


def _zeros_like(shape: tuple[int, ...], like: Array, dtype: Any = None) -> Array:
    """Zeros that differ between the devices that `like` differs between (in shard_map)."""
    return _vary_alike(jnp.zeros(shape, like.dtype if dtype is None else dtype), like)[0]


def _vary_alike(*arrays: Array) -> list[Array]:
    """Mark all arrays as differing between the devices that any of them differs between (in shard_map)."""
    varying = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    missing = [tuple(frozenset().union(*varying) - axes) for axes in varying]
    return [lax.pcast(a, axes, to="varying") if axes else a for a, axes in zip(arrays, missing, strict=True)]


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

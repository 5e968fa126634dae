"""Loops over blocks of sorted rows, each of one group: what XLA multiplies at the cost of the rows on CPU."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from moe.ops.permute import most_blocks

# Rows of a block at most and at least, and how many lengths of blocks are compiled.
_MOST_ROWS, _LEAST_ROWS, _LENGTHS = 512, 8, 16

Result = TypeVar("Result")
Carried = TypeVar("Carried")


class Blocks(NamedTuple):
    """The M pieces that cover all groups of N rows, of `size` rows at most, a power of two; those in excess have none.

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


class Block(NamedTuple):
    """One of the `Blocks` of `num_rows` rows, within the loop; `size` is theirs."""

    num_rows: int
    size: int
    group: Int[Array, ""]
    start: Int[Array, ""]
    rows: Int[Array, ""]

    def read(self, x: Float[Array, "N X"], length: int) -> Float[Array, "L X"]:
        """`length` rows of x that hold those of the block, zeros in place of others."""
        at = jnp.minimum(self.start, self.num_rows - length)
        return jnp.where(self._own(at, length), lax.dynamic_slice_in_dim(x, at, length), 0)

    def matrix(self, w: Float[Array, "E X Y"]) -> Float[Array, "X Y"]:
        """That of the block's group."""
        return lax.dynamic_index_in_dim(w, self.group, keepdims=False)

    def write_to(self, x: Float[Array, "N X"], part: Float[Array, "size X"]) -> Float[Array, "N X"]:
        """x, in place, with the block's rows of what `widen` returned."""
        at = jnp.minimum(self.start, self.num_rows - self.size)
        kept = lax.dynamic_slice_in_dim(x, at, self.size)
        return lax.dynamic_update_slice_in_dim(x, jnp.where(self._own(at, self.size), part, kept), at, axis=0)

    def add_to(self, sums: Float[Array, "E X Y"], product: Float[Array, "X Y"]) -> Float[Array, "E X Y"]:
        """sums, in place, with the product added to that of the block's group."""
        return sums.at[self.group].add(product, mode="promise_in_bounds")

    def widen(self, part: Float[Array, "L X"]) -> Float[Array, "size X"]:
        """Rows that were read by that length, among zeros, where `write_to` expects them."""
        length = part.shape[0]
        if length == self.size:
            return part
        at, first = (jnp.minimum(self.start, self.num_rows - n) for n in (length, self.size))
        wide = zeros_like((self.size, *part.shape[1:]), part)
        return lax.dynamic_update_slice_in_dim(wide, part, at - first, axis=0)

    def _own(self, at: Array, length: int) -> Array:
        index = at + jnp.arange(length, dtype=jnp.int32)
        return ((index >= self.start) & (index < self.start + self.rows))[:, None]


def loop(
    sizes_E: Int[Array, "E"],
    num_rows: int,
    run: Callable[[Block, int], Result],
    update: Callable[[Block, Carried, Result], Carried],
    start: Carried,
) -> Carried:
    """update(block, carried, run(block, length)) for the blocks of all groups in their order, from `start` on.

    run: compiled for every length, and called with the least that holds the block's rows; zeros where it has none.
    """
    blocks = cut(sizes_E, num_rows)
    lengths = blocks.lengths
    like = jax.tree.leaves(start)[0]

    def step(carried: Carried, item: tuple[Array, Array, Array]) -> tuple[Carried, None]:
        block = Block(num_rows, blocks.size, *item)
        results = jax.eval_shape(lambda: run(block, blocks.size))

        def nothing() -> Result:
            return jax.tree.map(lambda result: zeros_like(result.shape, like, result.dtype), results)

        branches: list[Callable[[], Result]] = [
            nothing,
            *(functools.partial(run, block, length) for length in lengths[1:]),
        ]
        return update(block, carried, lax.switch(-(-block.rows // lengths.step), branches)), None

    return lax.scan(step, start, blocks[1:])[0]


def zeros_like(shape: tuple[int, ...], like: Array, dtype: Any = None) -> Array:
    """Zeros that differ between the devices that `like` differs between (in shard_map)."""
    return vary_alike(jnp.zeros(shape, like.dtype if dtype is None else dtype), like)[0]


def vary_alike(*arrays: Array) -> list[Array]:
    """Mark all arrays as differing between the devices that any of them differs between (in shard_map)."""
    varying = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    missing = [tuple(frozenset().union(*varying) - axes) for axes in varying]
    return [lax.pcast(a, axes, to="varying") if axes else a for a, axes in zip(arrays, missing, strict=True)]


def times(x: Float[Array, "L X"], w: Float[Array, "_ _"], *, transpose: bool = False) -> Float[Array, "L Y"]:
    """x w, or with `transpose` x w^T, summed in float32."""
    return lax.dot_general(x, w, (((1,), (1 if transpose else 0,)), ((), ())), preferred_element_type=jnp.float32)


def transposed_times(x: Float[Array, "L X"], y: Float[Array, "L Y"]) -> Float[Array, "X Y"]:
    """x^T y, summed in float32."""
    return lax.dot_general(x, y, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)

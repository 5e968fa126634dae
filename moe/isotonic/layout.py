"""Where entries and problems lie in memory, chosen per platform: the same arithmetic, several times the speed."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

# Beyond this many entries, each problem fills vector lanes by itself.
_LONG = 2048
_LONG_LANES = 1024
# A block of problems that stays in a core's cache through all passes over it.
_BLOCK_ENTRIES = 32768
_BLOCK_PROBLEMS = 1024
# Problems are cut into this many parts first, and every block takes a piece of each part, so that the parts may lie on
# as many devices and no block needs what another device holds.
_PARTS = 8


@runtime_checkable
class Fence(Protocol):
    """fence(function, *arguments) is function(*arguments), kept apart from what comes before and after it.

    XLA on CPU merges elementwise operations into those that use them, once for each use: where every result depends on
    all results before it, that takes exponential time. `lax.optimization_barrier` does not stop the older jaxlib.
    """

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any: ...


Solve = Callable[[Array, tuple[int, ...], Any, Array, Fence], Any]


def no_fence(function: Callable[..., Any], *arguments: Any) -> Any:
    """Where compilers merge no more than they can share."""
    return function(*arguments)


def _fence_in_loop(index: Array) -> Fence:
    """A branch always taken, as the index of the loop around it is never negative; but XLA does not know that."""

    def fence(function: Callable[..., Any], *arguments: Any) -> Any:
        def never(*arguments: Any) -> Any:
            shapes = jax.eval_shape(function, *arguments)
            zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
            return vary_like(zeros, jax.tree.leaves(arguments)[0])

        return lax.cond(index >= 0, function, never, *arguments)

    return fence


def over_problems(solve: Solve, x: Float[Array, "*b n"], k: Any, strength: Float[Array, ""]) -> Any:
    """Call `solve(entries, axes, k, strength, fence)` with entries of shape [a, n, c], whose `axes` hold one problem's
    entries.

    solve returns a pytree of arrays of the entries' shape with 1 in place of `axes`; they come back in shape *b.
    Infinities act as the largest numbers. Padding entries are -inf, padding problems 0.
    """
    *batch, n = x.shape
    rows = x.reshape(-1, n)
    if n > _LONG:
        lanes = _LONG_LANES
        padded = jnp.pad(finite(rows), ((0, 0), (0, -n % lanes)), constant_values=-jnp.inf)
        result = solve(padded.reshape(rows.shape[0], -1, lanes), (1, 2), k, strength, no_fence)
    elif isinstance(k, int):
        result = lax.platform_dependent(
            rows,
            strength,
            cpu=lambda rows, strength: _in_blocks(solve, rows, k, strength),
            default=lambda rows, strength: _at_once(solve, rows, k, strength),
        )
    else:
        result = lax.platform_dependent(
            rows,
            strength,
            k,
            cpu=lambda rows, strength, k: _in_blocks(solve, rows, k, strength),
            default=lambda rows, strength, k: _at_once(solve, rows, k, strength),
        )
    return jax.tree.map(lambda a: a.reshape(batch), result)


def vary_like(values: Any, like: Array) -> Any:
    """Mark constants that start a loop as differing between the devices that `like` differs between (in shard_map)."""
    varying = jax.typeof(like).manual_axis_type.varying

    def mark(value: Array) -> Array:
        missing = tuple(varying - jax.typeof(value).manual_axis_type.varying)
        return lax.pcast(value, missing, to="varying") if missing else value

    return jax.tree.map(mark, values)


def _at_once(solve: Solve, rows: Float[Array, "T n"], k: Any, strength: Float[Array, ""]) -> Any:
    """All problems in one array, entries along the minor axis as they lie."""
    return jax.tree.map(lambda a: a.reshape(-1), solve(finite(rows)[..., None], (1,), k, strength, no_fence))


def _in_blocks(solve: Solve, rows: Float[Array, "T n"], k: Any, strength: Float[Array, ""]) -> Any:
    """Blocks of problems that fit the cache, one after the other, with problems as vector lanes."""
    problems, n = rows.shape
    parts, each, width = _block_sizes(problems, n)
    padded = jnp.pad(rows.reshape(parts, each, n), ((0, 0), (0, -each % width), (0, 0)))
    blocks = padded.reshape(parts, -1, width, n)

    def one(index: Array) -> Any:
        fence = _fence_in_loop(index)
        block = lax.dynamic_index_in_dim(blocks, index, axis=1, keepdims=False)
        # Merged with other operations, or left to a layout (as without the leading axis), the transpose would be read
        # with a stride in every pass.
        entries = fence(lambda rows: rows.T[None], fence(lambda block: finite(block).reshape(-1, n), block))
        return jax.tree.map(lambda a: a.reshape(parts, width), solve(entries, (1,), k, strength, fence))

    result = lax.map(one, jnp.arange(blocks.shape[1]))
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(parts, -1)[:, :each].reshape(-1), result)


def finite(entries: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Infinities as the largest numbers of their sign. Where entries are first read, this takes no pass of its own."""
    largest = jnp.finfo(entries.dtype).max
    return jnp.clip(entries, -largest, largest)


def over_columns(solve: Callable[..., Any], *columns: Float[Array, "n T"]) -> Any:
    """solve(*columns), whose results have one entry per problem along their last axis; in cache-sized blocks on CPU."""
    return lax.platform_dependent(*columns, cpu=lambda *columns: _in_column_blocks(solve, columns), default=solve)


def _in_column_blocks(solve: Callable[..., Any], columns: tuple[Float[Array, "n T"], ...]) -> Any:
    """As `_in_blocks`, for problems that lie along the last axis already. Padding problems are 0."""
    n, problems = columns[0].shape
    parts, each, width = _block_sizes(problems, n)
    cut = [
        jnp.pad(a.reshape(n, parts, each), ((0, 0), (0, 0), (0, -each % width))).reshape(n, parts, -1, width)
        for a in columns
    ]

    def one(index: Array) -> Any:
        return solve(*(lax.dynamic_index_in_dim(a, index, axis=2, keepdims=False).reshape(n, -1) for a in cut))

    def join(a: Array) -> Array:
        lead = a.shape[1:-1]
        split = jnp.moveaxis(a.reshape(a.shape[0], *lead, parts, width), 0, -2)
        return split.reshape(*lead, parts, -1)[..., :each].reshape(*lead, problems)

    return jax.tree.map(join, lax.map(one, jnp.arange(cut[0].shape[2])))


def _block_sizes(problems: int, n: int) -> tuple[int, int, int]:
    """Parts, problems in each part, and how many of each part are in one block."""
    parts = _PARTS if problems % _PARTS == 0 else 1
    each = problems // parts
    return parts, each, max(1, min(each, _BLOCK_PROBLEMS // parts, _BLOCK_ENTRIES // (parts * n)))

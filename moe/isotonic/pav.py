"""Pool adjacent violators: exact for every w, one entry after the other, many problems at once.

A stack holds blocks of decreasing value. Each step either pools the two topmost blocks, if they violate the order, or
pushes the next entry as a block of its own; 2n - 1 steps end every problem, so the loop depends on no data.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from moe.isotonic import pnorm
from moe.isotonic.layout import vary_like
from moe.isotonic.problem import Problem, as_problem, from_columns
from moe.types import Solution


@dataclasses.dataclass(frozen=True)
class Pav:
    """Pool adjacent violators: exact for every w, one entry after the other.

    Best and Chakravarti (1990); Sander et al. 2023 (arXiv 2302.01425), section 4, for the values of blocks.
    O(n) after the sort for p = 2 (block values are means) and p = 4/3 (roots of cubics in a block's first three central
    moments). For other p a block's value has no such summary: each step sums over its block, so that the whole is
    O(n^2).
    """

    def solve(
        self,
        s: Float[Array, "*b n"],
        w: Float[Array, "*#b n"],
        *,
        strength: Float[Array, ""],
        p: float,
        magnitude: bool = False,
        origin: Float[Array, "*#b 1"] | float = 0.0,
    ) -> Solution:
        """Solve along the last axis for any w; `origin` is what was subtracted from s (and is missing in the value)."""
        problem = as_problem(s, w, strength, p, magnitude, jnp.asarray(origin, s.dtype))
        value = from_columns(_pool(problem), s.shape)
        batch = s.shape[:-1]
        steps = jnp.full(batch, max(2 * s.shape[-1] - 1, 0), jnp.int32)
        return Solution(value, steps, jnp.zeros(batch, s.dtype))


class _Block(NamedTuple):
    """What is known of a block: where it starts, its value, and the sums that its value follows from.

    square, cube: sums of the second and third powers of (s - mean)/strength. linear, quadratic: sums over the block.
    """

    start: Int[Array, "*s T"]
    value: Float[Array, "*s T"]
    size: Float[Array, "*s T"]
    mean: Float[Array, "*s T"]
    square: Float[Array, "*s T"]
    cube: Float[Array, "*s T"]
    linear: Float[Array, "*s T"]
    quadratic: Float[Array, "*s T"]


def _pool(problem: Problem) -> Float[Array, "n T"]:
    """Run the stack to its end and write every block's value to its entries."""
    n, problems = problem.s.shape
    lanes = jnp.arange(problems)
    singles = vary_like(_singles(problem), problem.s)

    def step(_: Array, carry: tuple) -> tuple:
        stack, depth, top, following = carry
        below = _Block(*(a[jnp.maximum(depth - 1, 0), lanes] for a in stack))
        merge = (depth > 0) & (below.value < top.value)
        push = ~merge & (following < n)
        # A push writes the top onto the stack; otherwise the write goes out of bounds and is dropped.
        row = jnp.where(push, depth, n)
        stack = _Block(*(a.at[row, lanes].set(b, mode="drop") for a, b in zip(stack, top, strict=True)))
        merged = _merge(problem, below, top, following)
        entry = _Block(*(a[jnp.minimum(following, n - 1), lanes] for a in singles))
        top = _Block(*(jnp.where(merge, a, jnp.where(push, b, c)) for a, b, c in zip(merged, entry, top, strict=True)))
        return stack, depth + push - merge, top, following + push

    zero = vary_like(jnp.zeros(problems, jnp.int32), problem.s)
    first = _Block(*(a[0] for a in singles))
    stack, depth, top, _ = lax.fori_loop(0, 2 * n - 1, step, (singles, zero, first, zero + 1))

    values = stack.value.at[depth, lanes].set(top.value)
    starts = stack.start.at[depth, lanes].set(top.start)
    rows = jnp.where(jnp.arange(n)[:, None] <= depth[None], starts, n)
    is_start = jnp.zeros((n, problems), jnp.int32).at[rows, lanes[None]].set(1, mode="drop")
    return jnp.take_along_axis(values, jnp.cumsum(is_start, axis=0) - 1, axis=0)


def _singles(problem: Problem) -> _Block:
    """Every entry as a block of its own."""
    s, linear, quadratic, _, _ = problem
    zero = jnp.zeros_like(s)
    start = jnp.broadcast_to(jnp.arange(s.shape[0], dtype=jnp.int32)[:, None], s.shape)
    block = _Block(start, zero, zero + 1, s, zero, zero, linear, zero if quadratic is None else quadratic)
    total = linear if quadratic is None else linear + quadratic * s
    pull = None if quadratic is None else quadratic * problem.strength
    return block._replace(value=s - problem.strength * pnorm.balance(total, zero, pull, problem.r))


def _merge(problem: Problem, low: _Block, high: _Block, stop: Int[Array, "T"]) -> _Block:
    """The union of two neighbours, of which the second ends before `stop` (moments as in Pebay 2008, SAND2008-6212)."""
    size = low.size + high.size
    distance = (high.mean - low.mean) / problem.strength
    share_low, share_high = low.size / size, high.size / size
    spread = distance * distance * low.size * share_high
    merged = _Block(
        start=low.start,
        value=low.value,
        size=size,
        mean=low.mean + problem.strength * distance * share_high,
        square=low.square + high.square + spread,
        cube=low.cube
        + high.cube
        + distance * (spread * (share_low - share_high) + 3 * (share_low * high.square - share_high * low.square)),
        linear=low.linear + high.linear,
        quadratic=low.quadratic + high.quadratic,
    )
    return merged._replace(value=merged.mean - problem.strength * _offset(problem, merged, low, high, stop))


def _offset(problem: Problem, block: _Block, low: _Block, high: _Block, stop: Int[Array, "T"]) -> Float[Array, "T"]:
    """How far the block's mean lies above its value, in units of strength."""
    strength, r = problem.strength, problem.r
    total = (block.linear + block.quadratic * block.mean) / block.size
    pull = block.quadratic * strength / block.size
    if r == 1:
        return total / (1 + pull)
    if r == 3:
        zero = jnp.zeros_like(total)
        return pnorm.balance(total - block.cube / block.size, zero, pull + 3 * block.square / block.size, r)

    rows = jnp.arange(problem.s.shape[0], dtype=jnp.int32)[:, None]
    inside = (rows >= block.start[None]) & (rows < stop[None])
    distances = jnp.where(inside, (problem.s - block.mean[None]) / strength, 0)

    def halve(_: Array, bracket: tuple) -> tuple:
        near, far = bracket
        middle = 0.5 * (near + far)
        powers = jnp.where(inside, pnorm.signed_power(distances + middle[None], r), 0)
        enough = jnp.sum(powers, axis=0) / block.size + pull * middle >= total
        return jnp.where(enough, near, middle), jnp.where(enough, middle, far)

    # The value lies between those of the two parts, and the union's value is only used where they violate the order.
    bracket = ((block.mean - high.value) / strength, (block.mean - low.value) / strength)
    near, far = lax.fori_loop(0, 30, halve, bracket)
    return 0.5 * (near + far)

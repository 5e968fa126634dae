"""Dykstra's alternating projections, in its dual form: one multiplier per pair of neighbours.

Sander et al. 2023 (arXiv 2302.01425, section 5) project in turn onto C1 = {v1 >= v2, v3 >= v4, ...} and
C2 = {v2 >= v3, v4 >= v5, ...}, carrying a correction for each set. A correction is determined by one number a_j >= 0
per pair, the multiplier of v_j >= v_(j+1): with sign(d_i) |d_i|^r = linear_i + quadratic_i v_i + a_(i-1) - a_i,
d_i = (s_i - v_i)/strength, projecting onto one set sets its multipliers to make its violating pairs equal, and all
others to 0. So a sweep with p = 2 is a_j <- max(0, (g_j + a_(j-1) + a_(j+1))/2), first for all odd j, then for all
even ones; the iterates are those of the published algorithm, at a third of the state and of the arithmetic. In this
form the algorithm also serves p < 2, where a violating pair meets at the root of a scalar equation, and weighted pairs.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from moe.isotonic import pnorm, ranked
from moe.isotonic.checks import require
from moe.isotonic.implementation import Bound, Crossing, check_implementation, choose, refusal
from moe.isotonic.layout import finite, over_columns, vary_like
from moe.isotonic.problem import Problem, as_problem, from_columns
from moe.types import Solution

_FLAT_BELOW_P = 1.25


@dataclasses.dataclass(frozen=True)
class Dykstra:
    """Alternating projections: adds, compares and selects only, so it vectorises over problems. Iterative, not exact.

    A pooled block of m entries needs about m^2 sweeps: right for routers, wrong for pruning a weight matrix. The
    residual of the solution says how far the two projections of the last sweep lie apart. With eps the rounding unit,
    multipliers determine (s - v)/strength no better than eps^(p-1), though its power 1/(p-1), the mask, as well as eps;
    below p = 1.25 that limit exceeds what a sweep moves, and the residual is at least it.

    steps: most sweeps; a sweep is both projections.
    tol: a problem stops after the sweep whose residual is at most tol * strength. With tol = 0 all problems run all
    steps; then nothing in the program depends on data, and a batch that is sharded needs no communication.
    implementation: of top-k. "xla" is plain JAX; "pallas_tpu" is a kernel for TPUs (the mask with p = 2, static k and
    n <= 256; elsewhere NotImplementedError), which runs all steps; None picks the kernel where it can run.
    """

    steps: int = 100
    tol: float = 1e-6
    implementation: str | None = None

    def __post_init__(self) -> None:
        check_implementation(self.implementation)
        require(isinstance(self.steps, int) and self.steps >= 1, "steps", self.steps, "an integer >= 1")
        require(self.tol >= 0, "tol", self.tol, "a number >= 0")

    def topk(
        self, x: Float[Array, "*b n"], k: Any, *, strength: Float[Array, ""], p: float, magnitude: bool = False
    ) -> Crossing:
        """Find tau on unsorted values (x >= 0 for magnitude), infinities acting as the largest numbers; NaN where x has
        a NaN. k is static or traced.
        """
        kernel = Bound(_by_kernel, (("k", k), ("steps", self.steps)))
        reference = Bound(ranked.topk, (("solver", self), ("k", k), ("p", p), ("magnitude", magnitude)))
        refused = refusal(x, k, p, (1,), magnitude)
        return choose(self.implementation, kernel, reference, refused, x, strength)

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
        # A mask has no quadratic part, which is no array.
        columns = [a for a in problem[:3] if a is not None]

        def sweep(s: Array, linear: Array, *quadratic: Array) -> tuple[Array, Array, Array]:
            columns = Problem(s, linear, quadratic[0] if quadratic else None, problem.strength, problem.r)
            return _solve(columns, self.steps, self.tol)

        value, steps, residual = over_columns(sweep, *columns)
        if p < _FLAT_BELOW_P:
            residual = jnp.maximum(residual, strength * float(jnp.finfo(s.dtype).eps) ** (p - 1))
        batch = s.shape[:-1]
        return Solution(from_columns(value, s.shape), steps.reshape(batch), residual.reshape(batch))


def _by_kernel(x: Float[Array, "*b n"], strength: Float[Array, ""], *, k: int, steps: int) -> Crossing:
    """The TPU kernel, imported where it is wanted."""
    from moe.isotonic.kernels import dykstra

    return dykstra.crossing(finite(x), strength, k=k, steps=steps)


class _State(NamedTuple):
    """Multipliers of C1 and C2, the value after both projections, residual (NaN if s has one), and sweeps so far."""

    first: Float[Array, "m1 T"]
    second: Float[Array, "m2 T"]
    value: Float[Array, "n T"]
    residual: Float[Array, "T"]
    steps: Int[Array, "T"]


def _solve(problem: Problem, steps: int, tol: float) -> tuple[Array, Array, Array]:
    """Sweep until every problem is done; one that is done keeps its state, whatever its neighbours still do."""
    n, problems = problem.s.shape
    dtype = problem.s.dtype
    start = (
        jnp.zeros((n // 2, problems), dtype),
        jnp.zeros(((n - 1) // 2, problems), dtype),
        jnp.zeros((n, problems), dtype),
        jnp.full(problems, jnp.inf, dtype),
        jnp.zeros(problems, jnp.int32),
    )
    state = _State(*vary_like(start, problem.s))

    def sweep(state: _State) -> _State:
        first, halfway = _project(problem, 0, state.second)
        second, value = _project(problem, 1, first)
        residual = jnp.max(jnp.abs(value - halfway), axis=0)
        return _State(first, second, value, residual, state.steps + 1)

    if tol == 0:
        # The last sweep stands apart, so that only it spends time on values and residual.
        def sweep_multipliers(_: Array, multipliers: tuple[Array, Array]) -> tuple[Array, Array]:
            first, _ = _project(problem, 0, multipliers[1])
            return first, _project(problem, 1, first)[0]

        first, second = lax.fori_loop(0, steps - 1, sweep_multipliers, (state.first, state.second))
        state = sweep(state._replace(first=first, second=second))
        return state.value, jnp.full(problems, steps, jnp.int32), state.residual

    goal = tol * problem.strength

    def active(state: _State) -> Bool[Array, "T"]:
        return (state.residual > goal) & (state.steps < steps)

    def sweep_active(state: _State) -> _State:
        going = active(state)
        new = sweep(state)
        return _State(*(jnp.where(_like(going, a), a, b) for a, b in zip(new, state, strict=True)))

    state = lax.while_loop(lambda state: jnp.any(active(state)), sweep_active, state)
    return state.value, state.steps, state.residual


def _like(flag: Bool[Array, "T"], array: Array) -> Array:
    """The flag with the array's rank: one for all rows."""
    return flag if array.ndim == 1 else flag[None]


def _project(problem: Problem, start: int, other: Float[Array, "m T"]) -> tuple[Array, Array]:
    """Project onto the set whose pairs are (start, start+1), (start+2, start+3), ...: its multipliers, and the value.

    other: the multipliers of the other set, which act on the same entries.
    """
    s, _, quadratic, strength, r = problem
    pairs = (s.shape[0] - start) // 2
    stop = start + 2 * pairs
    one, two = slice(start, stop, 2), slice(start + 1, stop, 2)
    force = _force(problem, 1 - start, other)
    middle, spread = 0.5 * (s[one] + s[two]), (0.5 / strength) * (s[one] - s[two])
    force1, joint = force[one], 0.5 * (force[one] + force[two])
    if quadratic is None:
        offset = pnorm.balance(joint, spread, None, r)
        pooled = middle - strength * offset
    else:
        pull = 0.5 * (quadratic[one] + quadratic[two])
        offset = pnorm.balance(joint + pull * middle, spread, pull * strength, r)
        pooled = middle - strength * offset
        force1 += quadratic[one] * pooled
    multiplier = force1 - pnorm.signed_power(offset + spread, r)

    alone = _alone(problem, force)
    violated = multiplier > 0
    both = jnp.stack([jnp.where(violated, pooled, alone[one]), jnp.where(violated, pooled, alone[two])], axis=1)
    value = jnp.concatenate([alone[:start], both.reshape(2 * pairs, s.shape[1]), alone[stop:]])
    return jnp.maximum(multiplier, 0), value


def _force(problem: Problem, start: int, multipliers: Float[Array, "m T"]) -> Float[Array, "n T"]:
    """linear_i + a_(i-1) - a_i, where only the pairs (start, start+1), (start+2, ...), ... have multipliers."""
    n, problems = problem.s.shape
    signed = jnp.stack([-multipliers, multipliers], axis=1).reshape(2 * multipliers.shape[0], problems)
    return problem.linear + jnp.pad(signed, ((start, n - start - signed.shape[0]), (0, 0)))


def _alone(problem: Problem, force: Float[Array, "n T"]) -> Float[Array, "n T"]:
    """The value of every entry that its set leaves alone."""
    s, _, quadratic, strength, r = problem
    if quadratic is None:
        return s - strength * pnorm.signed_root(force, r)
    return s - strength * pnorm.balance(force + quadratic * s, jnp.zeros_like(s), quadratic * strength, r)

"""Isotonic optimisation with any solver, differentiated in closed form from the blocks of its solution."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from moe.isotonic import pnorm
from moe.isotonic.checks import (
    Input,
    Scalar,
    check_floating,
    check_p,
    check_strength,
    compute_dtype,
    concrete,
    require,
)
from moe.isotonic.dykstra import Dykstra
from moe.isotonic.pav import Pav
from moe.isotonic.threshold import Threshold
from moe.types import Solution

Solver = Dykstra | Pav | Threshold


def solve(
    s: Input,
    w: Input,
    *,
    strength: Scalar,
    p: float | int,
    magnitude: bool = False,
    solver: Solver | None = None,
) -> Solution:
    """argmin over v_1 >= ... >= v_n of sum_i |s_i - v_i|^q / (q strength^(q-1)) + w_i phi(v_i), along the last axis.

    q = p/(p-1); phi(v) = v, or v^2/2 for the magnitude (Sander et al. 2023, arXiv 2302.01425, eq. 9). Computed in
    float32 (float64 for float64), returned in s's dtype; derivatives in s, w and strength, of any order where they
    exist.

    s: [*b, n], finite, usually in descending order, for the magnitude >= 0; NaN makes its own row NaN.
    w: [*b, n] or [n], for the magnitude >= 0. strength: a positive scalar. p: in (1, 2], static.
    solver: `Pav` and `Dykstra` serve any s and w. `Threshold` serves s in descending order and w = (1, .., 1, 0, ..,
    0), not all 0. None takes Threshold where s and w are so as far as they are concrete, otherwise Pav.
    Raises ValueError for mismatched shapes, p outside (1, 2], strength <= 0, s or w that is not floating.
    """
    p = check_p(p)
    check_floating("s", s)
    check_floating("w", w)
    check_strength(strength)
    require(s.ndim >= 1 and s.shape[-1] >= 1, "s.shape", s.shape, "of at least one entry along the last axis")
    require(w.shape in (s.shape, s.shape[-1:]), "w.shape", w.shape, f"{s.shape} or {s.shape[-1:]}, as s has")
    fits = _is_ranked_topk(s, w)
    if solver is None:
        solver = Threshold() if fits and concrete(w) is not None else Pav()
    if isinstance(solver, Threshold):
        require(fits, "solver", solver, "Dykstra or Pav, unless s is descending and w is ones, then zeros")
    dtype = compute_dtype(s)
    w = jnp.broadcast_to(w.astype(dtype), s.shape)
    found = _solve(solver, p, magnitude, s.astype(dtype), w, jnp.asarray(strength, dtype))
    return found._replace(value=found.value.astype(s.dtype), residual=found.residual.astype(s.dtype))


def _is_ranked_topk(s: Any, w: Any) -> bool:
    """Whether s descends and w is the same number of ones, then zeros, in every row; what is traced passes."""
    s, w = concrete(s), concrete(w)
    if s is not None and np.any(np.diff(s, axis=-1) > 0):
        return False
    if w is None:
        return True
    count = w.reshape(-1, w.shape[-1])[0].sum()
    return bool(count >= 1 and np.all(w == (np.arange(w.shape[-1]) < count)))


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
@partial(jax.jit, static_argnums=(0, 1, 2))
def _solve(
    solver: Solver,
    p: float,
    magnitude: bool,
    s: Float[Array, "*b n"],
    w: Float[Array, "*b n"],
    strength: Float[Array, ""],
) -> Solution:
    solution = solver.solve(s, w, strength=strength, p=p, magnitude=magnitude)
    poison = jnp.any(jnp.isnan(s) | jnp.isnan(w), axis=-1, keepdims=True)
    return solution._replace(value=jnp.where(poison, jnp.nan, solution.value))


@partial(_solve.defjvp, symbolic_zeros=True)
def _solve_jvp(solver: Solver, p: float, magnitude: bool, primals: tuple, tangents: tuple) -> tuple[Solution, Solution]:
    """Per block of equal v, with d = (s - v)/strength, sum sign(d) |d|^r = sum w phi'(v), differentiated."""
    s, w, strength = primals
    ds, dw, dstrength = tangents
    solution = _solve(solver, p, magnitude, s, w, strength)
    v, r = solution.value, pnorm.exponent(p)
    block = _blocks(s, solution)
    distance = (s - v) / strength
    slope = jnp.ones_like(v) if r == 1 else pnorm.power(jnp.abs(distance), r - 1)
    # A block whose entries all lie on v moves with their mean.
    slope = jnp.where(_block_sum(slope, block) > 0, slope, 1)
    total, change = slope, jnp.zeros_like(v)
    if magnitude:
        total = total + (strength / r) * w
    if not isinstance(ds, SymbolicZero):
        change += slope * ds
    if not isinstance(dstrength, SymbolicZero):
        change -= slope * distance * dstrength
    if not isinstance(dw, SymbolicZero):
        change -= (strength / r) * (dw * v if magnitude else dw)
    dv = _block_sum(change, block) / _block_sum(total, block)
    no_steps: Any = np.zeros(solution.steps.shape, jax.dtypes.float0)
    return solution, Solution(dv, no_steps, jnp.zeros_like(solution.residual))


def _blocks(s: Float[Array, "*b n"], solution: Solution) -> Array:
    """Block number of each entry: exact solvers repeat the value, iterative ones up to their residual and rounding."""
    v, residual = jax.lax.stop_gradient((solution.value, solution.residual[..., None]))
    rounding = 4 * jnp.finfo(v.dtype).eps * jnp.max(jnp.abs(s), axis=-1, keepdims=True)
    tolerance = jnp.where(residual > 0, 2 * residual + rounding, 0)
    starts = v[..., :-1] - v[..., 1:] > tolerance
    return jnp.concatenate([jnp.zeros_like(v[..., :1], jnp.int32), jnp.cumsum(starts, axis=-1, dtype=jnp.int32)], -1)


def _block_sum(values: Float[Array, "*b n"], block: Array) -> Float[Array, "*b n"]:
    """The sum over each entry's block, at every entry."""

    def one(values: Array, block: Array) -> Array:
        sums = jax.ops.segment_sum(values, block, num_segments=values.shape[0], indices_are_sorted=True)
        return sums[block]

    for _ in range(values.ndim - 1):
        one = jax.vmap(one)
    return one(values, block)

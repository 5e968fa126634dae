"""Where entries cross the threshold of a top-k operator: found by any solver, differentiated in closed form.

Mask: sum_i clip(u_i/strength, 0, 1)^r = k with u = x - tau. Magnitude (x >= 0): sum_i min((u_i/strength)^r, tau)_+ = k
tau. Differentiating these equations gives tau's derivative from the solution alone; a second derivative differentiates
that rule.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float

from moe.isotonic import Solver, pnorm, ranked
from moe.isotonic.layout import finite


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3))
def crossing(
    solver: Solver,
    p: float,
    magnitude: bool,
    static_k: int | None,
    x: Float[Array, "*b n"],
    strength: Float[Array, ""],
    traced_k: Any,
) -> tuple[Float[Array, "*b n"], Float[Array, "*b 1"]]:
    """x - tau and tau, for any x (>= 0 for the magnitude). k is static_k, or where that is None, traced_k."""
    return _find(solver, p, magnitude, static_k, x, strength, traced_k)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _find(
    solver: Solver, p: float, magnitude: bool, static_k: int | None, x: Array, strength: Array, traced_k: Any
) -> tuple[Array, Array]:
    """Ask the solver: on unsorted values if it can, otherwise for the solution at rank k of the sorted ones."""
    k = traced_k if static_k is None else static_k
    if hasattr(solver, "topk"):
        found = solver.topk(x, k, strength=strength, p=p, magnitude=magnitude)
    else:
        found = ranked.topk(x, strength, solver=solver, k=k, p=p, magnitude=magnitude)
    return (finite(x) - found.center[..., None]) + found.offset[..., None], found.value[..., None]


def is_pooled(
    u: Float[Array, "*b n"], tau: Float[Array, "*b 1"], strength: Float[Array, ""], r: float | int, magnitude: bool
) -> tuple[Bool[Array, "*b n"], Bool[Array, "*b n"]]:
    """Which entries share tau, and which are selected without: at least as far above it as selecting in full takes."""
    # For the magnitude, that distance is rounded several times on its way.
    full = strength * pnorm.root(tau, r) * (1 - 4 * jnp.finfo(u.dtype).eps) if magnitude else strength
    return (u > 0) & (u < full), u >= full


@partial(crossing.defjvp, symbolic_zeros=True)
def _crossing_jvp(
    solver: Solver, p: float, magnitude: bool, static_k: int | None, primals: tuple, tangents: tuple
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    x, strength, traced_k = primals
    dx, dstrength, _ = tangents
    u, tau = crossing(solver, p, magnitude, static_k, x, strength, traced_k)
    r = pnorm.exponent(p)
    pooled, alone = is_pooled(u, tau, strength, r, magnitude)
    ratio = jnp.where(pooled, u, 0) / strength
    slope = pooled.astype(x.dtype) if r == 1 else jnp.where(pooled, pnorm.power(ratio, r - 1), 0)
    total = jnp.sum(slope, axis=-1, keepdims=True)
    change = jnp.zeros_like(tau)
    if magnitude:
        k = traced_k if static_k is None else static_k
        pooled_k = k - jnp.sum(alone, axis=-1, keepdims=True, dtype=x.dtype)
        total += pooled_k * (strength / r)
        if not isinstance(dstrength, SymbolicZero):
            change -= pooled_k * tau * dstrength
    elif not isinstance(dstrength, SymbolicZero):
        change -= jnp.sum(slope * ratio, axis=-1, keepdims=True) * dstrength
    if not isinstance(dx, SymbolicZero):
        change += jnp.sum(slope * dx, axis=-1, keepdims=True)
    # Where nothing pools, tau is not unique, and no output depends on it.
    dtau = change / jnp.where(total > 0, total, jnp.inf)
    du = jnp.broadcast_to(-dtau, x.shape) if isinstance(dx, SymbolicZero) else dx - dtau
    return (u, tau), (du, dtau)

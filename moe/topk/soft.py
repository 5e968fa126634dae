"""Soft sorting and ranking: the same isotonic problem with other w than top-k's.

Blondel, Teboul, Berthet, Djolonga, "Fast Differentiable Sorting and Ranking" (ICML 2020, arXiv 2002.08871), here for
every p in (1, 2]; p = 2 is theirs.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe import isotonic
from moe.isotonic import pnorm
from moe.isotonic.checks import Input, Scalar, check_axis, check_floating, check_p, check_strength, compute_dtype


def soft_sort(
    x: Input,
    *,
    strength: Scalar = 1.0,
    p: float | int = 2.0,
    solver: isotonic.Solver | None = None,
    axis: int = -1,
) -> Float[Array, "..."]:
    """x in descending order along `axis`, softly: argmax over permutahedron(x) of <(n, .., 1), y> - R(y).

    R(y) = (strength/p) ||y||_p^p. strength -> 0 sorts exactly (below the smallest gap's inverse for p = 2), and
    strength -> infinity gives every entry the mean; the sum is kept. solver: None for `isotonic.Pav()`.
    Raises ValueError as `mask` does.
    """
    p, entries, strength = _prepare(x, strength, p, axis)
    w = jnp.flip(jnp.sort(entries, axis=-1), axis=-1)
    n = entries.shape[-1]
    s = jnp.broadcast_to(jnp.arange(n, 0, -1, dtype=entries.dtype), entries.shape)
    out = _project(s, w, strength, p, solver)
    return jnp.moveaxis(out, -1, axis).astype(x.dtype)


def soft_rank(
    x: Input,
    *,
    strength: Scalar = 1.0,
    p: float | int = 2.0,
    solver: isotonic.Solver | None = None,
    axis: int = -1,
) -> Float[Array, "..."]:
    """Ranks along `axis`, 1 for the largest, softly: argmax over permutahedron((n, .., 1)) of <-x, y> - R(y).

    R(y) = (strength/p) ||y||_p^p. strength -> 0 ranks exactly, strength -> infinity gives every entry (n + 1)/2; the
    sum is n (n + 1)/2. solver: None for `isotonic.Pav()`. Raises ValueError as `mask` does.
    """
    p, entries, strength = _prepare(x, strength, p, axis)
    n = entries.shape[-1]
    order = jnp.argsort(entries, axis=-1)
    s = jnp.take_along_axis(-entries, order, axis=-1)
    w = jnp.broadcast_to(jnp.arange(n, 0, -1, dtype=entries.dtype), entries.shape)
    ranks = jnp.take_along_axis(_project(s, w, strength, p, solver), jnp.argsort(order, axis=-1), axis=-1)
    return jnp.moveaxis(ranks, -1, axis).astype(x.dtype)


def _prepare(x: Array, strength: Scalar, p: float | int, axis: int) -> tuple[float, Array, Array]:
    """Check the arguments, and bring the axis last and everything to the computing dtype."""
    p = check_p(p)
    check_floating("x", x)
    check_axis(axis, x.ndim)
    check_strength(strength)
    dtype = compute_dtype(x)
    return p, jnp.moveaxis(x, axis, -1).astype(dtype), jnp.asarray(strength, dtype)


def _project(s: Array, w: Array, strength: Array, p: float, solver: isotonic.Solver | None) -> Array:
    """The regularised linear maximiser over permutahedron(w) in direction s, both in descending order."""
    solver = isotonic.Pav() if solver is None else solver
    v = isotonic.solve(s, w, strength=strength, p=p, solver=solver).value
    return pnorm.signed_power((s - v) / strength, pnorm.exponent(p))

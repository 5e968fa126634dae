"""Sparse differentiable top-k operators with p-norm regularisation (Sander et al. 2023, arXiv 2302.01425)."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from moe.isotonic import Threshold, pnorm
from moe.isotonic.checks import check_floating, check_k, check_p, check_strength, compute_dtype


def mask(
    x: Float[Array, "..."],
    k: int | Int[Array, ""],
    *,
    strength: float | Float[Array, ""] = 1.0,
    p: float = 4 / 3,
    solver: Any = None,
    axis: int = -1,
) -> Float[Array, "..."]:
    """Relaxed indicator of the k largest entries along `axis`: values in [0, 1] that sum to k, most of them 0 or 1.

    argmax over {0 <= y <= 1, sum y = k} of <x, y> - (strength/p) ||y||_p^p, which is clip((x - tau)/strength, 0, 1)^r with
    r = 1/(p-1). strength -> 0 gives the hard mask.
    """
    p = check_p(p)
    check_floating("x", x)
    check_strength(strength)
    moved = jnp.moveaxis(x, axis, -1)
    check_k(k, moved.shape[-1])
    dtype = compute_dtype(x)
    z = levels(solver or Threshold(), p, moved.astype(dtype), jnp.asarray(strength, dtype), jnp.asarray(k))
    y = pnorm.power(pnorm.unit_clip(z), pnorm.exponent(p))
    return jnp.moveaxis(y, -1, axis).astype(x.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def levels(
    solver: Any, p: float, x: Float[Array, "*b n"], strength: Float[Array, ""], k: Int[Array, ""]
) -> Float[Array, "*b n"]:
    """z = (x - tau)/strength, with the derivative of the implicit tau; outside 0 < z < 1 the tangent is 0."""
    return solver.topk(x, k, strength=strength, p=p)


@partial(levels.defjvp, symbolic_zeros=True)
def _levels_jvp(solver: Any, p: float, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    x, strength, k = primals
    dx, dstrength, _ = tangents
    z = levels(solver, p, x, strength, k)
    r = pnorm.exponent(p)
    inside = (z > 0) & (z < 1)
    slope = jnp.where(inside, pnorm.power(jnp.where(inside, z, 0.5), r - 1) if r > 1 else 1.0, 0.0)
    total = jnp.sum(slope, axis=-1, keepdims=True)
    share = slope / jnp.where(total > 0, total, 1)
    dz = jnp.zeros_like(z)
    if not isinstance(dx, SymbolicZero):
        dz += dx / strength
    if not isinstance(dstrength, SymbolicZero):
        dz -= jnp.where(inside, z, 0) * (dstrength / strength)
    return z, jnp.where(inside, dz - jnp.sum(share * dz, axis=-1, keepdims=True), 0)

"""Sparse differentiable top-k operators with p-norm regularisation.

Sander, Puigcerver, Djolonga, Peyré, Blondel, "Fast, Differentiable and Sparse Top-k: a Convex Analysis Perspective"
(ICML 2023, arXiv 2302.01425). Derivatives are closed forms of the solution, with respect to x and strength, in forward
and reverse mode, and of any order where they exist; none passes through a solver's iterations.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe.isotonic import Solver, Threshold, pnorm
from moe.isotonic.checks import (
    Count,
    Input,
    Scalar,
    check_axis,
    check_floating,
    check_k,
    check_p,
    check_strength,
    compute_dtype,
)
from moe.topk.crossing import crossing, is_pooled


def mask(
    x: Input,
    k: Count,
    *,
    strength: Scalar = 1.0,
    p: float | int = 4 / 3,
    solver: Solver | None = None,
    axis: int = -1,
) -> Float[Array, "..."]:
    """Relaxed indicator of the k largest entries along `axis`: in [0, 1], summing to k, exactly 0 or 1 where it is.

    argmax of <x, y> - (strength/p) ||y||_p^p over {0 <= y <= 1, sum y = k}, which is clip((x - tau)/strength, 0,
    1)^(1/(p-1)); Sander et al. 2023 (arXiv 2302.01425), eq. 5 with phi(x) = x. strength -> 0 gives the hard mask (ties
    share), strength -> infinity k/n.

    x: any batch shape; computed in float32 (float64 for float64), returned in x's dtype. An infinity acts as the
        largest finite number of that sign, so -inf marks entries that are not to be selected. NaN makes its own row
        NaN.
    k: static, or a traced integer. strength: a positive scalar; changing it compiles nothing anew.
    p: in (1, 2], static. 2 is fastest and piecewise linear; smaller p is smooth where entries enter the support.
    solver: None for `isotonic.Threshold()`; or any other solver.
    Raises ValueError for k outside 1..n, p outside (1, 2], strength <= 0, and x that is not floating.
    """
    entries, k, strength, p = _prepare(x, k, strength, p, axis)
    u, _ = _crossing(solver, p, False, entries, strength, k)
    y = pnorm.power(pnorm.unit_clip(u / strength), pnorm.exponent(p))
    return jnp.moveaxis(y, -1, axis).astype(x.dtype)


def magnitude(
    x: Input,
    k: Count,
    *,
    strength: Scalar = 1.0,
    p: float | int = 4 / 3,
    rescale: bool = True,
    solver: Solver | None = None,
    axis: int = -1,
) -> Float[Array, "..."]:
    """Relaxation of 'x at the k entries that are largest in magnitude, 0 elsewhere'.

    Sander et al. 2023 (arXiv 2302.01425), eq. 5 with phi(x) = x^2/2.

    With s = |x|: y = ((s - v)_+/strength)^(1/(p-1)), v the isotonic solution; an entry that is selected and shares no
    threshold with others has v = f(s) = y. rescale=True (published) returns sign(x) (y + (s - v)), which at such an
    entry is x exactly; rescale=False returns sign(x) y, which is smoother where entries enter the support with p < 2.
    The derivative at x = 0 is 0. k or more infinities make a row NaN.

    x, k, strength, p, solver, axis, and what is raised: as for `mask`.
    """
    entries, k, strength, p = _prepare(x, k, strength, p, axis)
    r = pnorm.exponent(p)
    s = jnp.abs(entries)
    u, tau = _crossing(solver, p, True, s, strength, k)
    pooled, alone = is_pooled(u, tau, strength, r, True)
    above = jnp.where(pooled, u, 0)
    y = pnorm.power(above / strength, r)
    finite = jnp.where(alone & (s < jnp.inf), s, 0)
    full = s if rescale else jnp.where(s < jnp.inf, pnorm.power(pnorm.selected_root(finite, strength, r), r), s)
    size = jnp.where(alone, full, y + above if rescale else y)
    # A NaN compares as neither pooled nor alone.
    out = jnp.sign(entries) * jnp.where(jnp.isnan(u), u, size)
    return jnp.moveaxis(out, -1, axis).astype(x.dtype)


def _prepare(x: Array, k: Any, strength: Any, p: Any, axis: int) -> tuple[Array, Any, Array, float]:
    """Check the arguments; bring the axis last, and everything to the computing dtype."""
    p = check_p(p)
    check_floating("x", x)
    check_axis(axis, x.ndim)
    check_strength(strength)
    k = check_k(k, x.shape[axis])
    dtype = compute_dtype(x)
    return jnp.moveaxis(x, axis, -1).astype(dtype), k, jnp.asarray(strength, dtype), p


def _crossing(
    solver: Solver | None, p: float, magnitude: bool, x: Array, strength: Array, k: Any
) -> tuple[Array, Array]:
    """`crossing`, with a static k kept out of the traced arguments."""
    static_k, traced_k = (k, 0) if isinstance(k, int) else (None, k)
    return crossing(Threshold() if solver is None else solver, p, magnitude, static_k, x, strength, traced_k)

"""Powers that belong to the p-norm regulariser, safe to differentiate where they vanish.

With q = p/(p-1) the conjugate exponent, everything is written in r = q - 1 = 1/(p-1) >= 1: p = 2 gives r = 1, p = 3/2
gives r = 2, p = 4/3 gives r = 3. The gradient of the conjugate of R(y) = (strength/p) ||y||_p^p is
sign(z) (|z| / strength)^r (Sander et al. 2023, arXiv 2302.01425, section 4).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

# Powers are kept below this by clipping their base, so that differences of two of them stay numbers.
_LARGEST_POWER = 1e30


def exponent(p: float) -> float | int:
    """r = 1/(p-1), an int where it is one up to the rounding of p (p = 4/3 is no binary fraction)."""
    r = 1.0 / (p - 1.0)
    nearest = round(r)
    return nearest if abs(r - nearest) < 1e-9 * r else r


def power(base: Float[Array, "*s"], r: float | int) -> Float[Array, "*s"]:
    """base^r for base >= 0, with derivatives 0 rather than NaN at base = 0."""
    if isinstance(r, int):
        return lax.integer_pow(base, r)
    positive = base > 0
    return jnp.where(positive, jnp.where(positive, base, 1) ** r, 0)


def root(value: Float[Array, "*s"], r: float | int) -> Float[Array, "*s"]:
    """value^(1/r) for value >= 0, with derivatives 0 rather than NaN at value = 0."""
    if r == 1:
        return value
    positive = value > 0
    safe = jnp.where(positive, value, 1)
    if r == 2:
        return jnp.where(positive, jnp.sqrt(safe), 0)
    return jnp.where(positive, jnp.cbrt(safe) if r == 3 else safe ** (1.0 / r), 0)


def signed_power(base: Float[Array, "*s"], r: float | int) -> Float[Array, "*s"]:
    """sign(base) |base|^r."""
    if isinstance(r, int) and r % 2:
        return lax.integer_pow(base, r)
    return jnp.sign(base) * power(jnp.abs(base), r)


def signed_root(value: Float[Array, "*s"], r: float | int) -> Float[Array, "*s"]:
    """sign(value) |value|^(1/r)."""
    return jnp.sign(value) * root(jnp.abs(value), r)


def unit_clip(z: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """z clipped to [0, 1]; the derivative is 0 at and beyond both ends."""
    return lax.clamp(jnp.zeros((), z.dtype), z, jnp.ones((), z.dtype))


def balance(
    total: Float[Array, "*s"], spread: Float[Array, "*s"], pull: Float[Array, "*s"] | None, r: float | int
) -> Float[Array, "*s"]:
    """The root u of (spow(u + spread) + spow(u - spread))/2 + pull u = total, where spow(x) = sign(x) |x|^r.

    This is what two entries that share one value solve (u: distance of their midpoint above it, in units of strength;
    spread: half their distance; pull >= 0, None for 0, comes from a quadratic phi), and with spread = 0 what one entry
    solves.
    Not differentiable: callers have closed forms. Newton's method, started on the convex side at a point that is
    close for every r, converges in a fixed number of steps.
    """
    if r == 1:
        return total if pull is None else total / (1 + pull)
    pull = jnp.zeros_like(total) if pull is None else pull
    target, spread = jnp.abs(total), jnp.minimum(jnp.abs(spread), _LARGEST_POWER ** (1.0 / r))
    slope_at_0 = r * power(spread, r - 1) + pull
    # Each of these bounds the root from above (the linear one for r >= 2, where the left side is convex).
    start = jnp.minimum(root(target, r), target / jnp.where(slope_at_0 > 0, slope_at_0, 1e-30))
    unrolled = r in (2, 3)
    most = jnp.inf if unrolled else root(2 * target + power(spread, r), r)
    if not unrolled:
        start = jnp.minimum(start, most - spread)

    def step(_: Array, u: Array) -> Array:
        excess = 0.5 * (signed_power(u + spread, r) + signed_power(u - spread, r)) + pull * u - target
        slope = 0.5 * r * (power(u + spread, r - 1) + power(jnp.abs(u - spread), r - 1)) + pull
        # From a start that rounding put below the root, a flat slope leads beyond `most`, where powers overflow.
        return jnp.clip(u - excess / jnp.where(slope > 0, slope, 1), 0, most)

    u = lax.fori_loop(0, 5 if unrolled else 12, step, jnp.maximum(start, 0), unroll=unrolled)
    return jnp.sign(total) * u


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def selected_root(s: Float[Array, "*s"], strength: Float[Array, ""], r: float | int) -> Float[Array, "*s"]:
    """f^(1/r), where f = ((s - f)/strength)^r is what the magnitude gives an entry s >= 0, selected and not pooled."""
    return balance(s, jnp.zeros_like(s), jnp.broadcast_to(strength, s.shape), r)


@selected_root.defjvp
def _selected_root_jvp(r: float | int, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    (s, strength), (ds, dstrength) = primals, tangents
    a = selected_root(s, strength, r)
    slope = strength + (1 if r == 1 else r * power(a, r - 1))
    return a, (ds - a * dstrength) / slope

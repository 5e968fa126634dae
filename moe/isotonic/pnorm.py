"""Powers that belong to the p-norm regulariser, safe to differentiate where they vanish.

With q = p/(p-1) the conjugate exponent, everything is written in r = q - 1 = 1/(p-1) >= 1: p = 2 gives r = 1, p = 3/2
gives r = 2, p = 4/3 gives r = 3. The gradient of the conjugate of R(y) = (strength/p) ||y||_p^p is
sign(z) (|z| / strength)^r (Sander et al. 2023, arXiv 2302.01425, section 4).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


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
    return jnp.where(positive, jnp.cbrt(safe) if r == 3 else safe ** (1.0 / r), 0)


def unit_clip(z: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """z clipped to [0, 1]; the derivative is 0 at and beyond both ends."""
    return lax.clamp(jnp.zeros((), z.dtype), z, jnp.ones((), z.dtype))

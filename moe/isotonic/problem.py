"""The isotonic problem as solvers see it: entries along the leading axis, independent problems along the last.

minimise over v_1 >= ... >= v_n:  sum_i |s_i - v_i|^q / (q strength^(q-1)) + linear_i v_i + quadratic_i v_i^2 / 2

The mask has phi(v) = v, so linear = w and quadratic = 0. The magnitude has phi(v) = v^2/2, so quadratic = w; where s
was centred (s - origin, to keep float32 from cancelling), phi(v + origin) adds linear = w origin. Optimality of one
block that shares the value v reads sum_i sign(s_i - v) (|s_i - v|/strength)^r = sum_i linear_i + quadratic_i v.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe.isotonic import pnorm


class Problem(NamedTuple):
    """One problem per column; one row per entry. quadratic >= 0, and None where phi is linear."""

    s: Float[Array, "n T"]
    linear: Float[Array, "n T"]
    quadratic: Float[Array, "n T"] | None
    strength: Float[Array, ""]
    r: float | int


def as_problem(
    s: Float[Array, "*b n"],
    w: Float[Array, "*#b n"],
    strength: Float[Array, ""],
    p: float,
    magnitude: bool,
    origin: Float[Array, "*#b 1"] | Float[Array, ""],
) -> Problem:
    """Bring a batch with entries along its last axis into columns: problems become vector lanes."""

    def columns(a: Array) -> Array:
        return jnp.broadcast_to(a, s.shape).reshape(-1, s.shape[-1]).T

    w = jnp.broadcast_to(w, s.shape)
    linear, quadratic = (columns(w * origin), columns(w)) if magnitude else (columns(w), None)
    return Problem(columns(s), linear, quadratic, strength, pnorm.exponent(p))


def from_columns(value: Float[Array, "n T"], shape: tuple[int, ...]) -> Float[Array, "*b n"]:
    """Undo `as_problem` for an array of one number per entry."""
    return value.T.reshape(shape)

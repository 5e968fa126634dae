"""Checks of what a user passes to solvers and operators: one sentence with the number and what is allowed."""

import numbers
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

# What public functions accept before they check it: an annotation that rejected more would hide the sentence below.
Input: TypeAlias = Shaped[Array, "..."]
Scalar: TypeAlias = float | int | np.number | Shaped[Array, "..."] | Shaped[np.ndarray, "..."]
Count: TypeAlias = int | np.integer | Shaped[Array, "..."] | Shaped[np.ndarray, "..."]


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raise ValueError '<name> is <value>, but must be <allowed>' unless the condition holds."""
    if not condition:
        raise ValueError(f"{name} is {value}, but must be {allowed}")


def concrete(value: Any) -> Any | None:
    """The value as NumPy scalar or array, or None where it is traced and cannot be looked at."""
    return None if isinstance(value, jax.core.Tracer) else np.asarray(value)


def check_p(p: object) -> float:
    """p as a Python float in (1, 2]; it is static, since it decides which formulas are compiled."""
    require(isinstance(p, numbers.Real) and 1.0 < float(p) <= 2.0, "p", p, "a Python number in (1, 2]")
    return float(p)  # type: ignore[arg-type]


def check_strength(strength: Any) -> None:
    """strength is a positive finite scalar; a traced one cannot be looked at and is taken on trust."""
    require(jnp.ndim(strength) == 0, "strength", f"of shape {jnp.shape(strength)}", "a scalar (vmap for several)")
    value = concrete(strength)
    if value is not None:
        require(bool(value > 0) and bool(np.isfinite(value)), "strength", value, "positive and finite")


def check_k(k: Any, n: int) -> Any:
    """k as a Python int in 1..n, or as it is where it is traced: then it is taken on trust to lie there."""
    require(jnp.ndim(k) == 0, "k", f"of shape {jnp.shape(k)}", "a scalar (vmap for several)")
    require(jnp.issubdtype(jnp.result_type(k), jnp.integer), "k", k, "an integer")
    value = concrete(k)
    if value is None:
        return k
    require(1 <= int(value) <= n, "k", value, f"in 1..{n}, the number of entries along the axis")
    return int(value)


def check_axis(axis: int, rank: int) -> None:
    """axis names a dimension of an array of that rank."""
    require(-rank <= axis < rank, "axis", axis, f"in {-rank}..{rank - 1} for an array of {rank} dimensions")


def check_floating(name: str, x: Any) -> None:
    """x has a floating dtype; integers would be truncated silently on return."""
    dtype = jnp.result_type(x)
    require(jnp.issubdtype(dtype, jnp.floating), f"{name}.dtype", dtype, "a floating dtype")


def compute_dtype(x: Float[Array, "..."]) -> jnp.dtype:
    """float32, except that float64 stays float64."""
    return jnp.promote_types(x.dtype, jnp.float32)

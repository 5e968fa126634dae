"""How a parameter is born: initial value, and the logical axes that `moe.parallel.mesh` maps to the mesh."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe.parallel.mesh import Axes


class RouterState(nnx.Variable[Any]):
    """What a router adapts outside the gradient; the same on every device."""


def matrix(key: jax.Array, shape: tuple[int, ...], axes: Axes, fan_in: int) -> nnx.Param[jax.Array]:
    """A float32 parameter with truncated normal values of variance 1 / fan_in."""
    # The truncation at two standard deviations leaves 0.87962566 of one.
    scale = fan_in**-0.5 / 0.87962566
    value = scale * jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32)
    return nnx.Param(value, axes=axes)


def axes(*names: str | None) -> dict[str, Any]:
    """Metadata of a Flax layer's own parameter."""
    return {"axes": names}


def stack(make: Callable[[jax.Array], nnx.Module], keys: jax.Array) -> Any:
    """One module whose parameters are those of `make(key)` for every key, stacked along a first axis, "layers"."""
    stacked = nnx.vmap(make)(keys)
    for _, variable in nnx.to_flat_state(nnx.state(stacked)):
        variable.set_metadata("axes", ("layers", *variable.get_metadata("axes")))
    return stacked

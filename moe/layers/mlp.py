"""The feed-forward network: of a dense block, and of each expert."""

from typing import Literal

import jax
from flax import nnx
from jaxtyping import Array, Float

from moe.layers.param import matrix
from moe.ops.products import BATCHED, Product
from moe.parallel.mesh import Axes

Activation = Literal["gelu", "swiglu"]
Weights = dict[str, Float[Array, "..."]]

WEIGHT_AXES: dict[str, Axes] = {"w_in": ("embed", "mlp"), "w_gate": ("embed", "mlp"), "w_out": ("mlp", "embed")}


def mlp(
    weights: Weights, x: Float[Array, "*e n D"], activation: Activation, product: Product = BATCHED
) -> Float[Array, "*e n D"]:
    """gelu: gelu(x w_in) w_out. swiglu (2002.05202): (silu(x w_gate) * x w_in) w_out. No biases.

    w_in, w_gate [*e, D, F], w_out [*e, F, D]; computed in x's dtype, sums in float32. product: times a matrix, or times
    that of each row's expert.
    """
    if activation == "swiglu":
        return product.feed_forward(x, (weights["w_gate"], weights["w_in"]), weights["w_out"], _gated)
    return product.feed_forward(x, (weights["w_in"],), weights["w_out"], jax.nn.gelu)


def _gated(gate: Array, up: Array) -> Array:
    return jax.nn.silu(gate) * up


def init_mlp(
    key: jax.Array, width: int, hidden: int, activation: Activation, num_experts: int | None = None
) -> dict[str, nnx.Param[jax.Array]]:
    """The weights of `mlp`; with `num_experts`, stacked along a first axis, each expert drawn on its own."""
    shapes: dict[str, tuple[int, ...]] = {"w_in": (width, hidden), "w_out": (hidden, width)}
    if activation == "swiglu":
        shapes["w_gate"] = (width, hidden)
    params = {}
    for index, (name, shape) in enumerate(shapes.items()):
        axes = WEIGHT_AXES[name]
        if num_experts is not None:
            shape, axes = (num_experts, *shape), ("expert", *axes)
        params[name] = matrix(jax.random.fold_in(key, index), shape, axes, fan_in=shape[-2])
    return params


class Mlp(nnx.Module):
    """A dense feed-forward network."""

    def __init__(self, width: int, hidden: int, activation: Activation, *, key: jax.Array) -> None:
        self.activation = activation
        self.weights = nnx.Dict(init_mlp(key, width, hidden, activation))

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """Applies the network to every token."""
        flat = x.reshape(-1, x.shape[-1])
        return mlp({name: w[...] for name, w in self.weights.items()}, flat, self.activation).reshape(x.shape)

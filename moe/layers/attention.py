"""Multi-head self-attention."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moe.layers.param import matrix


class Attention(nnx.Module):
    """Full (bidirectional) multi-head self-attention without biases (1706.03762)."""

    def __init__(self, width: int, heads: int, *, key: jax.Array) -> None:
        if width % heads:
            raise ValueError(f"model.heads = {heads} must divide model.width = {width}.")
        head_width = width // heads
        key_in, key_out = jax.random.split(key)
        # Queries, keys and values of one head lie together, so that heads can be cut along the tensor axis.
        self.w_in = matrix(key_in, (width, heads, 3 * head_width), ("embed", "heads", None), fan_in=width)
        self.w_out = matrix(key_out, (heads, head_width, width), ("heads", None, "embed"), fan_in=width)

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """Attends among the L tokens of each example."""
        projected = jnp.einsum("BLD,DHd->BLHd", x, self.w_in[...].astype(x.dtype))
        query, key, value = jnp.split(projected, 3, axis=-1)
        mixed = jax.nn.dot_product_attention(query, key, value)
        return jnp.einsum("BLHd,HdD->BLD", mixed, self.w_out[...].astype(x.dtype))

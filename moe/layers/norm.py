"""Normalisation of representations, its statistics in float32."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moe.layers.param import axes
from moe.parallel.mesh import Axes


class RmsNorm(nnx.Module):
    """x / √(mean x² + eps) times a scale (Zhang & Sennrich 2019, arXiv 1910.07467), over the last axes of x."""

    def __init__(self, shape: tuple[int, ...], scale_axes: Axes, eps: float) -> None:
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(shape, jnp.float32), axes=scale_axes)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Normalises over as many axes as the scale has; returns x's dtype."""
        over = tuple(range(x.ndim - self.scale[...].ndim, x.ndim))
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=over, keepdims=True) + self.eps)
        scale = self.scale[...]
        return (wide * scale.reshape((1,) * (x.ndim - scale.ndim) + scale.shape)).astype(x.dtype)


Norm = nnx.LayerNorm | RmsNorm


def make_norm(width: int, dtype: str, rms_eps: float, key: jax.Array) -> Norm:
    """RmsNorm over the width, or LayerNorm where `rms_eps` is 0."""
    if rms_eps:
        return RmsNorm((width,), (None,), rms_eps)
    return nnx.LayerNorm(
        width, dtype=jnp.dtype(dtype), scale_metadata=axes(None), bias_metadata=axes(None), rngs=nnx.Rngs(key)
    )

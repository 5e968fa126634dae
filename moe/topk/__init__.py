"""Differentiable top-k operators over the solvers of `moe.isotonic`."""

from moe.topk.pnorm import mask

__all__ = ["mask"]

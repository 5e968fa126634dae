"""Flax NNX modules: each owns parameters, names their logical axes, and calls pure functions."""

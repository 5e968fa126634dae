"""Sparse mixture-of-experts models in JAX and Flax, with the router as a part that one swaps by config."""

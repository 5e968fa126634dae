"""Pallas kernels of the solvers, one file each beside its XLA reference; imported only by that solver."""

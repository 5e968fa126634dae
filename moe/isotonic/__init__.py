"""Solvers of the isotonic problems behind the top-k operators, each an object: swap a solver by constructing another."""

from moe.isotonic.threshold import Threshold

SOLVERS = {"threshold": Threshold}

__all__ = ["SOLVERS", "Threshold"]

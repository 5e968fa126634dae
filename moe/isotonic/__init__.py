"""Solvers of the isotonic problems behind the top-k operators: swap a solver by constructing another."""

from moe.isotonic.dykstra import Dykstra
from moe.isotonic.pav import Pav
from moe.isotonic.solve import Solver, solve
from moe.isotonic.threshold import Threshold

SOLVERS = {"threshold": Threshold, "dykstra": Dykstra, "pav": Pav}

__all__ = ["SOLVERS", "Dykstra", "Pav", "Solver", "Threshold", "solve"]

"""Solvers of the isotonic problems behind the top-k operators: swap a solver by constructing another."""

from typing import TypeAlias

from moe.isotonic.dykstra import Dykstra
from moe.isotonic.pav import Pav
from moe.isotonic.threshold import Threshold

SOLVERS = {"threshold": Threshold, "dykstra": Dykstra, "pav": Pav}
Solver: TypeAlias = Dykstra | Pav | Threshold

__all__ = ["SOLVERS", "Dykstra", "Pav", "Solver", "Threshold"]

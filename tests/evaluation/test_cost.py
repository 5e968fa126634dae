"""What is timed as the cost of a router."""

import jax
import numpy as np

from moe.evaluation import cost
from moe.parallel.mesh import MeshConfig, make_mesh
from moe.routers import Softmax
from tests.jaxprs import equations_of

SHAPE = (8, 4, 16)


def test_the_gate_and_the_router_are_timed_and_making_tokens_is_not() -> None:
    route, arguments = cost.router_program(Softmax(), 4, 2, SHAPE, make_mesh(MeshConfig()))
    names = [equation.primitive.name for equation in equations_of(jax.make_jaxpr(route)(*arguments).jaxpr)]
    assert "dot_general" in names
    assert "top_k" in names
    assert [name for name in names if "random" in name or "threefry" in name] == []
    x_BLD = np.asarray(arguments[0])
    assert x_BLD.shape == SHAPE
    assert 0.8 < x_BLD.std() < 1.2
    assert np.isfinite(route(*arguments))

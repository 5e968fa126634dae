"""What a traced program computes."""

from collections.abc import Iterator
from typing import Any

import jax


def equations_of(jaxpr: Any) -> Iterator[Any]:
    """All equations, those of inner programs (loops, branches, shard_map) included."""
    for equation in jaxpr.eqns:
        yield equation
        for leaf in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(leaf, "jaxpr", leaf)
            if hasattr(inner, "eqns"):
                yield from equations_of(inner)

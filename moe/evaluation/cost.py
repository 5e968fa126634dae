"""What routing costs in time, measured."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moe.layers.moe import group_count
from moe.parallel.mesh import batch_sharding, replicated
from moe.routers import Router
from moe.types import GROUP_AXIS, Layout, RouterInputs

_REPEATS = 5


def seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """Median time of five calls, after one that compiles; of a result that is complete."""
    times = []
    for _ in range(_REPEATS + 1):
        begin = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def router_seconds(router: Router, num_experts: int, group_size: int, shape: tuple[int, int, int], mesh: Mesh) -> float:
    """Seconds that the gate and the router of one layer take in evaluation, of random tokens of shape [B, L, D].

    With the router's own variables as they are at first. Experts, and the way to them, aren't part of it.
    """
    route, arguments = router_program(router, num_experts, group_size, shape, mesh)
    return seconds(route, *arguments)


def router_program(
    router: Router, num_experts: int, group_size: int, shape: tuple[int, int, int], mesh: Mesh
) -> tuple[Callable[..., jax.Array], tuple[jax.Array, jax.Array]]:
    """What `router_seconds` times, jitted, and its arguments: the tokens, and the matrix of the gate."""
    batch, length, width = shape
    groups = group_count(batch, group_size)
    params, state = router.init(num_experts)
    num_logits = router.num_logits(num_experts)

    # In a program of its own: on CPU drawing the tokens takes longer than routing them.
    def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        gate_DX = jax.random.normal(jax.random.fold_in(key, 1), (width, num_logits)) / width**0.5
        return jax.random.normal(key, shape), gate_DX

    @jax.jit
    def route(x_BLD: jax.Array, gate_DX: jax.Array) -> jax.Array:
        id_T = jnp.tile(jnp.arange(length, dtype=jnp.int32), batch // groups)
        layout = Layout(num_experts, batch // groups)

        def one(x_TD: jax.Array) -> Any:
            logits_TX = jnp.einsum("TD,DX->TX", x_TD, gate_DX, precision="highest")
            return router(params, RouterInputs(logits_TX, x_TD, id_T, gate=gate_DX, layout=layout), state, None).routing

        routing = jax.vmap(one, axis_name=GROUP_AXIS)(x_BLD.reshape(groups, -1, width))
        # All of it, so that nothing is left out.
        return sum((jnp.sum(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(routing)), jnp.zeros(()))

    laid_out = (batch_sharding(mesh), replicated(mesh))
    return route, jax.jit(draw, out_shardings=laid_out)(jax.random.key(0))

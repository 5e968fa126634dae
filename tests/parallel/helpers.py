"""Hand-made routings through `dispatch`, what float64 says of them, and an all-to-all of ragged pieces for CPUs."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from moe.layers.mlp import WEIGHT_AXES, mlp
from moe.parallel.dispatch import dispatch
from moe.parallel.mesh import MeshConfig, make_mesh
from moe.types import Assignments
from tests.oracles import routing as oracle

GROUPS, TOKENS, WIDTH, HIDDEN, EXPERTS, K = 8, 6, 4, 8, 8, 2
MESHES = {
    "one device": MeshConfig(data=1),
    "data=8": MeshConfig(data=8),
    "data=2,expert=4": MeshConfig(data=2, expert=4),
    "fsdp=2,expert=2,tensor=2": MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
    "dcn=2,fsdp=2,tensor=2": MeshConfig(dcn=2, data=1, fsdp=2, tensor=2),
}


def mesh_of(name: str) -> jax.sharding.Mesh:
    return make_mesh(MESHES[name], jax.devices()[: 1 if name == "one device" else 8])


class Case(NamedTuple):
    """Tokens, experts and choices."""

    x: np.ndarray
    weights: dict[str, np.ndarray]
    routing: Assignments

    @classmethod
    def make(cls, skew: float, seed: int = 0, groups: int = GROUPS) -> "Case":
        """Up to K different experts for each token; skew 0: uniform, 1: every token's first is the last expert.

        A seventh of the rows isn't in use, and the router made one choice more than there are rows.
        """
        rng = np.random.default_rng(seed)
        shapes = {"w_in": (WIDTH, HIDDEN), "w_gate": (WIDTH, HIDDEN), "w_out": (HIDDEN, WIDTH)}
        weights = {name: rng.normal(size=(EXPERTS, *shape)).astype(np.float32) for name, shape in shapes.items()}
        share_E = np.where(np.arange(EXPERTS) == EXPERTS - 1, 1 / EXPERTS + skew * (1 - 1 / EXPERTS), 0)
        share_E[:-1] = (1 - share_E[-1]) / (EXPERTS - 1)
        first_GT = rng.choice(EXPERTS, size=(groups, TOKENS), p=share_E)
        second_GT = (first_GT + rng.integers(1, EXPERTS, size=(groups, TOKENS))) % EXPERTS
        valid_GN = np.concatenate([np.ones((groups, TOKENS)), rng.uniform(size=(groups, TOKENS)) < 5 / 7], axis=1)
        routing = Assignments(
            token=jnp.tile(jnp.arange(TOKENS, dtype=jnp.int32), (groups, K)),
            expert=jnp.asarray(np.concatenate([first_GT, second_GT], axis=1), jnp.int32),
            weight=jnp.asarray(rng.normal(size=(groups, TOKENS * K)), jnp.float32),
            valid=jnp.asarray(valid_GN, bool),
            choices=jnp.asarray(valid_GN.sum(axis=1) + 1, jnp.int32),
        )
        return cls(rng.normal(size=(groups, TOKENS, WIDTH)).astype(np.float32), weights, routing)


class Result(NamedTuple):
    """y, seated choices per group, and the gradients of Σ readout × y in x, the combine weights and the matrices."""

    y: Any
    kept: Any
    x: Any
    combine: Any
    weights: Any


def readout(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(77).normal(size=shape).astype(np.float32)


def run(case: Case, mesh: jax.sharding.Mesh, **how: Any) -> Result:
    """`dispatch` and its gradients, not compiled."""

    def total(x: Array, combine: Array, weights: dict[str, Array]) -> tuple[Array, tuple[Array, Array]]:
        y, kept = dispatch(
            lambda weights, x, product: mlp(weights, x, "swiglu", product),
            weights,
            {name: ("expert", *WEIGHT_AXES[name]) for name in weights},
            x,
            case.routing._replace(weight=combine),
            num_experts=case.weights["w_in"].shape[0],
            mesh=mesh,
            **how,
        )
        return jnp.sum(y * readout(y.shape)), (y, kept)

    arguments = (jnp.asarray(case.x), case.routing.weight, jax.tree.map(jnp.asarray, case.weights))
    gradients, (y, kept) = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(*arguments)
    return Result(y, kept, *gradients)


def by_oracle(case: Case, capacity: int | None) -> Result:
    """Queues by a loop, every expert on every token in float64, and the gradient of that by the chain rule."""
    weights = {name: np.asarray(weight, np.float64) for name, weight in case.weights.items()}
    x, routing = np.asarray(case.x, np.float64), jax.tree.map(np.asarray, case.routing)
    result = Result(np.zeros_like(x), np.zeros(len(x), int), np.zeros_like(x), np.zeros(routing.weight.shape), {})
    result.weights.update({name: np.zeros_like(weight) for name, weight in weights.items()})
    dy = readout(x.shape).astype(np.float64)
    for g in range(len(x)):
        rows = oracle.Rows(*(leaf[g] for leaf in routing))
        kept_N = oracle.dispatch(rows, EXPERTS, TOKENS * K if capacity is None else capacity).kept_N
        result.kept[g] = kept_N.sum()
        for n in np.flatnonzero(kept_N):
            t, e, weight = rows.token[n], rows.expert[n], float(rows.weight[n])
            w_in, w_gate, w_out = (weights[name][e] for name in ("w_in", "w_gate", "w_out"))
            x_D, up_F, gate_F = x[g, t], x[g, t] @ w_in, x[g, t] @ w_gate
            sigmoid_F = oracle.sigmoid(gate_F)
            y_D = (gate_F * sigmoid_F * up_F) @ w_out
            result.y[g, t] += weight * y_D
            result.combine[g, n] = dy[g, t] @ y_D
            dhidden_F = weight * w_out @ dy[g, t]
            dup_F = dhidden_F * gate_F * sigmoid_F
            dgate_F = dhidden_F * up_F * (sigmoid_F + gate_F * sigmoid_F * (1 - sigmoid_F))
            result.x[g, t] += w_in @ dup_F + w_gate @ dgate_F
            result.weights["w_in"][e] += np.outer(x_D, dup_F)
            result.weights["w_gate"][e] += np.outer(x_D, dgate_F)
            result.weights["w_out"][e] += weight * np.outer(gate_F * sigmoid_F * up_F, dy[g, t])
    return result


def assert_same(actual: Result, expected: Result) -> None:
    """Within float32's rounding of the largest entry."""

    def one(path: tuple, a: np.ndarray, b: np.ndarray) -> None:
        error = np.max(np.abs(np.asarray(a, np.float64) - b))
        assert error <= 1e-5 * max(1.0, np.max(np.abs(b))), jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(one, actual, expected)


def emulated_ragged_all_to_all(
    operand: Array,
    output: Array,
    input_offsets: Array,
    send_sizes: Array,
    output_offsets: Array,
    recv_sizes: Array,
    *,
    axis_name: str,
) -> Array:
    """What `jax.lax.ragged_all_to_all` is documented to do, from all-gathers; NaN where the sizes contradict."""
    operands, starts, sizes, ends_up = (
        jax.lax.all_gather(a, axis_name) for a in (operand, input_offsets, send_sizes, output_offsets)
    )
    here, rows = jax.lax.axis_index(axis_name), jnp.arange(output.shape[0])
    for sender in range(operands.shape[0]):
        first, size = ends_up[sender, here], sizes[sender, here]
        row = starts[sender, here] + rows - first
        inside = (rows >= first) & (rows < first + size)
        output = jnp.where(inside[:, None], operands[sender].at[row].get(mode="fill", fill_value=jnp.nan), output)
    return jnp.where(jnp.all(recv_sizes == sizes[:, here]), output, jnp.nan)

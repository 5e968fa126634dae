"""A small MoE layer, run with its gradient in one compiled program, and its parameters as the oracle takes them."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from moe.layers.moe import Moe, MoeConfig, MoeOutput
from moe.parallel.mesh import MeshConfig, make_mesh
from moe.routers import Router
from moe.types import Assignments, Keys, Layout, PyTree, RouterInputs, Slots
from tests.oracles import routing as oracle
from tests.routers.helpers import COMPILER_OPTIONS

EXAMPLES, LENGTH, WIDTH, HIDDEN, EXPERTS, GROUP = 4, 3, 6, 5, 4, 2
GROUPS, TOKENS = EXAMPLES // GROUP, GROUP * LENGTH
CONFIG = MoeConfig(num_experts=EXPERTS, expert_width=HIDDEN, group_size=GROUP, capacity_factor=0.8)
# Weights of losses that any router may have.
ALL_LOSSES = {"balance_weight", "importance_weight", "z_weight", "load_weight", "entropy_weight", "sequence_weight"}
ONE_DEVICE = make_mesh(MeshConfig(), jax.devices()[:1])


def make_layer(router: Router, config: MoeConfig = CONFIG, seed: int = 0, activation: Any = "swiglu") -> Moe:
    """A layer whose gate prefers the first experts, so that queues overflow."""
    layer = Moe(WIDTH, config, router, activation, key=jax.random.key(seed))
    rng = np.random.default_rng(seed)
    gate = rng.normal(size=layer.w_gate.shape)
    gate[0] += np.linspace(2, -1, gate.shape[1])
    layer.w_gate[...] = jnp.asarray(gate, jnp.float32)
    return layer


def make_tokens(seed: int = 1) -> Float[np.ndarray, "B L D"]:
    x = np.random.default_rng(seed).normal(size=(EXAMPLES, LENGTH, WIDTH)).astype(np.float32)
    x[..., 0] = 1 + np.abs(x[..., 0])
    return x


def example_keys() -> Key[Array, "B"]:
    return jax.random.split(jax.random.key(7), EXAMPLES)


class Run(NamedTuple):
    """A layer's output, and the gradient of its losses + Σ readout × y in its parameters and its input."""

    output: MoeOutput
    gradient: dict[str, Any]


def readout(x: np.ndarray) -> np.ndarray:
    return np.random.default_rng(3).normal(size=x.shape).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0, compiler_options=COMPILER_OPTIONS)
def _run(graph: Any, state: PyTree, x: Array, keys: Any, mask: Any, readout_BLD: Array) -> Run:
    def total(state: PyTree, x: Array) -> tuple[Array, MoeOutput]:
        output = nnx.merge(graph, state)(x, keys, ONE_DEVICE, mask)
        return sum(output.losses.values(), jnp.sum(output.y * readout_BLD)), output

    (gradient, x_gradient), output = jax.grad(total, argnums=(0, 1), has_aux=True)(state, x)
    return Run(output, {**nnx.to_pure_dict(gradient), "x": x_gradient})


def run(layer: Moe, x: np.ndarray, keys: Keys | None = None, mask: np.ndarray | None = None) -> Run:
    graph, state = nnx.split(layer)
    mask = np.ones(EXAMPLES, bool) if mask is None else mask
    return _run(graph, state, x, keys, mask, readout(x))


class Weights(NamedTuple):
    """What the oracle layer needs, in float64."""

    x_GTD: np.ndarray
    gate_DE: np.ndarray
    experts: oracle.Experts

    @classmethod
    def of(cls, layer: Moe, x: np.ndarray) -> "Weights":
        matrices = {name: np.asarray(weight[...], np.float64) for name, weight in layer.experts.items()}
        experts = oracle.Experts(matrices["w_in"], matrices["w_out"], w_gate_EDF=matrices["w_gate"])
        gate_DE = np.asarray(layer.w_gate[...], np.float64)
        return cls(np.asarray(x, np.float64).reshape(GROUPS, TOKENS, WIDTH), gate_DE, experts)


def routed_groups(layer: Moe, x: np.ndarray, keys: Keys | None) -> list[Assignments | Slots]:
    """What the layer's own router says to each group."""
    logits_GTE = jnp.asarray(x.reshape(GROUPS, TOKENS, WIDTH) @ np.asarray(layer.w_gate[...]))
    keys_G = [None] * GROUPS if keys is None else list(keys.reshape(GROUPS, GROUP))
    params, state = layer.router.init(EXPERTS)
    ids_T, mask_T, layout = jnp.arange(TOKENS) % LENGTH, jnp.ones(TOKENS, bool), Layout(EXPERTS, GROUP)
    inputs = [
        RouterInputs(logits_TE, jnp.asarray(x_TD), ids_T, mask_T, layer.w_gate[...], layout)
        for logits_TE, x_TD in zip(logits_GTE, x.reshape(GROUPS, TOKENS, WIDTH), strict=True)
    ]
    route = jax.jit(layer.router, compiler_options=COMPILER_OPTIONS)
    return [route(params, one, state, key).routing for one, key in zip(inputs, keys_G, strict=True)]


def soft_slots_layer(weights: Weights, g: int, slots: Slots) -> np.ndarray:
    """Σ_ec combine_tec expert_e(Σ_t dispatch_tec x_t)."""
    dispatch, combine = (np.asarray(leaf, np.float64) for leaf in slots)
    x_ECD = np.einsum("tec,td->ecd", dispatch, weights.x_GTD[g])
    y_ECD = np.array(
        [[oracle.expert(weights.experts, e, x_D, oracle.silu) for x_D in x_CD] for e, x_CD in enumerate(x_ECD)]
    )
    return np.einsum("tec,ecd->td", combine, y_ECD)

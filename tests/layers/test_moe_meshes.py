"""The layer with every router, every dispatch and every mesh: value and gradient against all experts on all tokens."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array

from moe.layers.mlp import mlp
from moe.layers.moe import Moe, MoeConfig
from moe.ops.permute import capacity
from moe.routers import ROUTERS, Router
from moe.types import GROUP_AXIS, Assignments, Keys, Layout, PyTree, Routed, RouterInputs
from tests.layers.helpers import ALL_LOSSES, make_layer
from tests.oracles import routing as oracle
from tests.parallel.helpers import MESHES, mesh_of
from tests.routers.helpers import effective_weights

EXAMPLES, LENGTH, WIDTH, EXPERTS, GROUP, GROUPS = 16, 3, 6, 4, 2, 8
TOKENS = GROUP * LENGTH
# Queues overflow; rows travel in one round (`tests/parallel` has several).
FACTOR = 0.6
BASE = MoeConfig(EXPERTS, expert_width=6, group_size=GROUP, capacity_factor=FACTOR, receive_factor=4.0)
DISPATCHES = ("einsum", "capacity", "dropless")
MAIN_ROUTERS = ("softmax", "sparse_topk", "successive_halving")
# Every router on one mesh, every mesh with the main routers; all of them nightly.
SOME = [("data=2,expert=4", name) for name in ROUTERS]
SOME += [(mesh, name) for mesh in MESHES for name in MAIN_ROUTERS if mesh not in ("data=2,expert=4", "one device")]
REST = [(mesh, name) for mesh in MESHES for name in ROUTERS if (mesh, name) not in SOME]


@pytest.fixture(autouse=True)
def compile_fast() -> Iterator[None]:
    """These tests compile much and compute little."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def tokens() -> tuple[np.ndarray, np.ndarray, Keys]:
    """Input, readout, and keys."""
    rng = np.random.default_rng(1)
    x, readout = rng.normal(size=(2, EXAMPLES, LENGTH, WIDTH)).astype(np.float32)
    x[..., 0] = 1 + np.abs(x[..., 0])
    return x, readout, jax.random.split(jax.random.key(7), EXAMPLES)


def layers(router: Router) -> list[Moe]:
    """The same parameters behind each dispatch."""
    return [make_layer(router, dataclasses.replace(BASE, dispatch=name)) for name in DISPATCHES]


def run(router: Router, mesh: str) -> Any:
    """Output and gradients for each dispatch, all in one program."""
    x, readout, keys = tokens()
    graphs, states = zip(*(nnx.split(layer) for layer in layers(router)), strict=True)

    def one(graph: Any, state: PyTree, x: Array) -> Any:
        def total(state: PyTree, x: Array) -> tuple[Array, Any]:
            output = nnx.merge(graph, state)(x, keys, mesh_of(mesh))
            return sum(output.losses.values(), jnp.sum(output.y * readout)), output

        (gradient, x_gradient), output = jax.grad(total, argnums=(0, 1), has_aux=True)(state, x)
        return output, nnx.to_pure_dict(gradient), x_gradient

    return jax.jit(lambda state, x: [one(graph, state, x) for graph in graphs])(states[0], jnp.asarray(x))


class AllExperts:
    """The layer by definition: routers group by group, all experts on all tokens, the choices that found a place."""

    def __init__(self, router: Router) -> None:
        self.layer = layers(router)[0]
        self.graph, self.state = nnx.split(self.layer)
        self.x, self.readout, self.keys = tokens()
        self.routed = jax.jit(self._route)(self.state, jnp.asarray(self.x))

    def _route(self, state: PyTree, x: Array) -> Routed:
        layer: Moe = nnx.merge(self.graph, state)
        x_GTD = x.reshape(GROUPS, TOKENS, WIDTH)
        gate = layer.w_gate[...]
        ids_T, mask_T = jnp.arange(TOKENS, dtype=jnp.int32) % LENGTH, jnp.ones(TOKENS, bool)
        params, router_state = (
            jax.tree.map(lambda v: v[...], part, is_leaf=lambda v: isinstance(v, nnx.Variable))
            for part in (layer.router_params, layer.router_state)
        )

        def one(x_TD: Array, keys: Keys) -> Routed:
            logits = jnp.einsum("TD,DX->TX", x_TD, gate, precision="highest")
            inputs = RouterInputs(logits, x_TD, ids_T, mask_T, gate, Layout(EXPERTS, GROUP))
            return layer.router(params, inputs, router_state, keys)

        return jax.vmap(one, axis_name=GROUP_AXIS)(x_GTD, self.keys.reshape(GROUPS, GROUP))

    def kept(self, places: int | None) -> np.ndarray:
        """Which rows find a place, by a loop over each group's queues; soft slots have no rows."""
        if not isinstance(self.routed.routing, Assignments):
            return np.ones((GROUPS, 1), bool)
        rows = jax.tree.map(np.asarray, self.routed.routing)
        groups = [oracle.Rows(*(leaf[g] for leaf in rows)) for g in range(GROUPS)]
        return np.array([oracle.dispatch(one, EXPERTS, places or len(one.token)).kept_N for one in groups])

    def value(self, kept_GN: np.ndarray) -> np.ndarray:
        """y in float64."""
        experts = oracle.Experts(*(self._matrix(name) for name in ("w_in", "w_out")), w_gate_EDF=self._matrix("w_gate"))
        x_GTD = np.asarray(self.x, np.float64).reshape(GROUPS, TOKENS, WIDTH)
        y_GTD = np.zeros_like(x_GTD)
        for g, x_TD in enumerate(x_GTD):
            routing = jax.tree.map(lambda leaf, g=g: np.asarray(leaf[g]), self.routed.routing)
            if isinstance(routing, Assignments):
                y_GTD[g] = oracle.moe_layer(x_TD, oracle.Rows(*routing), experts, oracle.silu, kept_GN[g])
            else:
                dispatch, combine = (np.asarray(leaf, np.float64) for leaf in routing)
                for e, c in np.ndindex(dispatch.shape[1:]):
                    y_D = oracle.expert(experts, e, dispatch[:, e, c] @ x_TD, oracle.silu)
                    y_GTD[g] += np.outer(combine[:, e, c], y_D)
        return y_GTD.reshape(self.x.shape)

    def _matrix(self, name: str) -> np.ndarray:
        return np.asarray(self.layer.experts[name][...], np.float64)

    @functools.cached_property
    def gradients(self) -> Any:
        """The gradient in all parameters and the input, as a function of which rows were kept."""

        def total(state: PyTree, x: Array, kept_GN: Array) -> Array:
            layer: Moe = nnx.merge(self.graph, state)
            weights = {name: w[...] for name, w in layer.experts.items()}
            routed, x_GTD = self._route(state, x), x.reshape(GROUPS, TOKENS, WIDTH)
            routing = routed.routing
            if isinstance(routing, Assignments):
                routing = routing._replace(valid=routing.valid & kept_GN)
                weights_GTE = jax.vmap(lambda one: effective_weights(one, TOKENS, EXPERTS)[..., 0])(routing)
                x_EGD = jnp.broadcast_to(x_GTD.reshape(1, -1, WIDTH), (EXPERTS, GROUPS * TOKENS, WIDTH))
                y_EGTD = mlp(weights, x_EGD, "swiglu").reshape(EXPERTS, GROUPS, TOKENS, WIDTH)
                y_GTD = jnp.einsum("GTE,EGTD->GTD", weights_GTE, y_EGTD)
            else:
                x_EGCD = jnp.einsum("GTEC,GTD->EGCD", routing.dispatch, x_GTD)
                y_EGCD = mlp(weights, x_EGCD.reshape(EXPERTS, -1, WIDTH), "swiglu").reshape(x_EGCD.shape)
                y_GTD = jnp.einsum("GTEC,EGCD->GTD", routing.combine, y_EGCD)
            losses = [jnp.mean(loss_G) for loss_G in routed.losses.values()]
            return sum(losses, jnp.sum(y_GTD.reshape(x.shape) * self.readout))

        return jax.jit(jax.grad(total, argnums=(0, 1)))


@functools.cache
def expected(name: str) -> list[tuple[np.ndarray, Any, np.ndarray, float]]:
    """For each dispatch: y, the gradients in parameters and input, and the share of choices without a place."""
    router = with_losses(name)
    reference = AllExperts(router)
    k = EXPERTS if router.k is None else router.k
    answers = []
    for dispatch in DISPATCHES:
        kept_GN = reference.kept(None if dispatch == "dropless" else capacity(FACTOR, TOKENS, k, EXPERTS))
        gradient, x_gradient = reference.gradients(reference.state, jnp.asarray(reference.x), kept_GN)
        overflow = 0.0
        if isinstance(reference.routed.routing, Assignments):
            overflow = float(1 - kept_GN.sum() / reference.routed.routing.choices.sum())
        answers.append((reference.value(kept_GN), nnx.to_pure_dict(gradient), np.asarray(x_gradient), overflow))
    return answers


def with_losses(name: str) -> Router:
    """The router with the losses switched on whose gradients the layer has to carry."""
    router = ROUTERS[name]()
    fields = {field.name for field in dataclasses.fields(router)}
    return dataclasses.replace(router, **dict.fromkeys(ALL_LOSSES & fields, 0.3))


def check(mesh: str, name: str) -> None:
    for got, (y, gradient, x_gradient, overflow) in zip(run(with_losses(name), mesh), expected(name), strict=True):
        output, got_gradient, got_x_gradient = got
        np.testing.assert_allclose(output.y, y, rtol=1e-4, atol=2e-5)
        np.testing.assert_allclose(output.metrics["overflow"], overflow, atol=1e-6)
        jax.tree_util.tree_map_with_path(assert_close, (got_gradient, got_x_gradient), (gradient, x_gradient))


def assert_close(path: tuple, got: np.ndarray, wanted: np.ndarray) -> None:
    error = np.max(np.abs(np.asarray(got) - wanted), initial=0)
    assert error <= 2e-5 * max(1.0, np.max(np.abs(wanted), initial=0)), jax.tree_util.keystr(path)


@pytest.mark.parametrize(("mesh", "name"), SOME)
def test_every_dispatch_is_all_experts_on_all_tokens(mesh: str, name: str) -> None:
    check(mesh, name)


@pytest.mark.nightly
@pytest.mark.parametrize(("mesh", "name"), REST)
def test_every_dispatch_with_every_router_on_every_mesh(mesh: str, name: str) -> None:
    check(mesh, name)


@pytest.mark.parametrize("name", MAIN_ROUTERS)
def test_queues_were_full(name: str) -> None:
    """Or the others would say nothing about overflow."""
    einsum, queues, dropless = (overflow for *_, overflow in expected(name))
    assert einsum == queues > 0.02
    assert dropless == 0

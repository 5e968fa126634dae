"""The MoE layer, with every router, against float64 experts run one by one; and its limits, which are known layers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array

from moe import topk
from moe.layers.mlp import Mlp
from moe.ops.permute import capacity
from moe.routers import ROUTERS, Router, Softmax, SparseTopK, SuccessiveHalving
from moe.routers.base import example_noise
from moe.types import Keys, PyTree, Slots
from tests.layers.helpers import (
    CONFIG,
    EXPERTS,
    GROUP,
    HIDDEN,
    TOKENS,
    WIDTH,
    Run,
    Weights,
    example_keys,
    make_layer,
    make_tokens,
    readout,
    routed_groups,
    run,
    soft_slots_layer,
)
from tests.oracles import operators
from tests.oracles import routing as oracle
from tests.routers.helpers import ACROSS_TOKENS, BELOW_K, COMPILER_OPTIONS, WITHOUT_LOGITS

# Settings apart from the defaults, whose routing the float64 routers below can follow.
KNOWN: dict[str, Router] = {
    "softmax": Softmax(k=2, noise=2.0, importance_weight=0.3, load_weight=0.2),
    "sparse_topk": SparseTopK(k=1, strength=1.5, p=2.0, max_experts=2, balance_weight=0.3),
    "successive_halving": SuccessiveHalving(k=2, weights=topk.BoostedSoftmax(5.0), balance_weight=0.3),
}
# Every router, those unknown here by its defaults.
ALL = {name: KNOWN.get(name) or router() for name, router in ROUTERS.items()}
every_router = pytest.mark.parametrize("name", ALL)
known_router = pytest.mark.parametrize("name", KNOWN)
# Experts see mixtures of tokens behind soft slots: the layer is no mixture of experts' outputs for one token. Other
# routers leave experts out of it whatever k is.
mixture_router = pytest.mark.parametrize("name", [name for name in ALL if name not in {"soft", *BELOW_K}])
# What k = E makes of the logits, where that isn't their softmax.
ALL_EXPERTS = {"sigmoid": lambda logits_TE: oracle.sigmoid(logits_TE) / oracle.sigmoid(logits_TE).sum(1, keepdims=True)}


def with_k(router: Any, k: int) -> Router:
    """The router with k experts per token, where that is a setting."""
    return dataclasses.replace(router, k=k) if "k" in {field.name for field in dataclasses.fields(router)} else router


def route_known(router: Any, logits_TE: np.ndarray, noise_TE: np.ndarray | None) -> tuple[oracle.Rows, float]:
    """Rows and the sum of losses of a router in KNOWN, for one group."""
    if isinstance(router, Softmax):
        std = router.noise / EXPERTS
        added = None if noise_TE is None else std * noise_TE
        loss = router.importance_weight * oracle.importance_loss(logits_TE)
        if added is not None:
            loss += router.load_weight * oracle.load_loss(logits_TE, added, router.k, std)
        return oracle.softmax_router(logits_TE, router.k, added), loss
    probs_TE = oracle.softmax(logits_TE)
    if isinstance(router, SparseTopK):
        limit = None if noise_TE is None else router.max_experts
        rows = oracle.sparse_topk_router(logits_TE, router.k, router.strength, router.p, limit)
        choice_TE = oracle.sparse_topk_weights(logits_TE, router.k, router.strength, router.p) / probs_TE
    else:
        rows = oracle.successive_halving_router(logits_TE, router.k, router.weights.base)
        choice_TE = oracle.dense_weights(rows, *logits_TE.shape) > 0
    balance = EXPERTS / router.k * np.sum(choice_TE.mean(axis=0) * probs_TE.mean(axis=0))
    return rows, router.balance_weight * float(balance)


def known_layer(router: Any, weights: Weights, keys: Keys | None, num_places: int) -> tuple[np.ndarray, float, float]:
    """y [G, T, D], mean loss and overflow of the layer, group by group; overflow over all groups' choices."""
    y_GTD, losses, kept, choices = [], [], 0, 0
    for g, x_TD in enumerate(weights.x_GTD):
        noise_TE = None
        if keys is not None:
            group_keys = keys[g * GROUP : (g + 1) * GROUP]
            noise_TE = np.asarray(example_noise(group_keys, TOKENS, EXPERTS), np.float64)
        rows, loss = route_known(router, x_TD @ weights.gate_DE, noise_TE)
        kept_N = oracle.dispatch(rows, EXPERTS, num_places).kept_N
        y_GTD.append(oracle.moe_layer(x_TD, rows, weights.experts, oracle.silu, kept_N))
        losses.append(loss)
        kept, choices = kept + kept_N.sum(), choices + rows.choices
    return np.array(y_GTD), float(np.mean(losses)), 1 - kept / choices


@known_router
@pytest.mark.parametrize("training", [True, False])
def test_value_and_gradient_match_the_oracle(name: str, training: bool) -> None:
    """From the input to y, losses and overflow, with no step taken from the code; gradients by central differences."""
    router, x = KNOWN[name], make_tokens()
    layer, keys = make_layer(router), example_keys() if training else None
    got, weights = run(layer, x, keys), Weights.of(layer, x)
    num_places = capacity(0.8, TOKENS, router.k, EXPERTS) if training else TOKENS
    y_GTD, loss, overflow = known_layer(router, weights, keys, num_places)
    np.testing.assert_allclose(got.output.y.reshape(y_GTD.shape), y_GTD, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sum(got.output.losses.values()), loss, rtol=1e-5)
    np.testing.assert_allclose(got.output.metrics["overflow"], overflow, atol=1e-6)
    assert (overflow > 0) == training

    gradient = {"x": got.gradient["x"], "gate": got.gradient["w_gate"], **got.gradient["experts"]}
    rng = np.random.default_rng(5)
    for part, gradient_of_part in gradient.items():
        direction = rng.normal(size=gradient_of_part.shape)

        def total(step: np.ndarray, part: str = part, direction: np.ndarray = direction) -> float:
            moved = _moved(weights, part, step[0] * direction)
            y_GTD, loss, _ = known_layer(router, moved, keys, num_places)
            return loss + float(np.sum(y_GTD * readout(x).reshape(y_GTD.shape)))

        numerical = operators.numerical_jacobian(total, [0.0])[0]
        along = float(np.sum(direction * np.asarray(gradient_of_part, np.float64)))
        assert abs(along - numerical) < 2e-4 * np.linalg.norm(gradient_of_part), part


def _moved(weights: Weights, part: str, step: np.ndarray) -> Weights:
    if part == "x":
        return weights._replace(x_GTD=weights.x_GTD + step.reshape(weights.x_GTD.shape))
    if part == "gate":
        return weights._replace(gate_DE=weights.gate_DE + step)
    field = {"w_in": "w_in_EDF", "w_out": "w_out_EFD", "w_gate": "w_gate_EDF"}[part]
    return weights._replace(experts=weights.experts._replace(**{field: getattr(weights.experts, field) + step}))


@every_router
def test_evaluation_drops_nothing_and_keeps_examples_apart(name: str) -> None:
    """y is the mixture that the router's weights describe, and one example's y is its own."""
    x, layer = make_tokens(), make_layer(ALL[name])
    got, weights = run(layer, x), Weights.of(layer, x)
    assert got.output.metrics["overflow"] == 0
    for g, routing in enumerate(routed_groups(layer, x, None)):
        if isinstance(routing, Slots):
            expected_TD = soft_slots_layer(weights, g, routing)
        else:
            rows = oracle.Rows(*(np.asarray(leaf) for leaf in routing))
            dense_TE = oracle.dense_weights(rows, TOKENS, EXPERTS)
            expected_TD = oracle.mixture(weights.x_GTD[g], dense_TE, weights.experts, oracle.silu)
        y_TD = got.output.y[g * GROUP : (g + 1) * GROUP].reshape(TOKENS, WIDTH)
        np.testing.assert_allclose(y_TD, expected_TD, rtol=1e-4, atol=1e-5)
    if name not in ACROSS_TOKENS:
        other = make_tokens(9)
        other[1] = x[1]
        np.testing.assert_allclose(run(layer, other).output.y[1], got.output.y[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in ALL if name not in WITHOUT_LOGITS])
def test_permuting_experts_changes_nothing_observable(name: str) -> None:
    """y, losses, metrics and the gradient in x are the same; those in the permuted parameters are permuted."""
    x, layer, order = make_tokens(), make_layer(ALL[name]), np.array([2, 0, 3, 1])
    plain = run(layer, x)
    layer.w_gate[...] = layer.w_gate[...][:, order]
    for weight in layer.experts.values():
        weight[...] = weight[...][order]
    permuted = run(layer, x)
    plain.output.metrics["expert_load"] = plain.output.metrics["expert_load"][order]
    expected = plain.gradient | {
        "w_gate": plain.gradient["w_gate"][:, order],
        "experts": {name: gradient[order] for name, gradient in plain.gradient["experts"].items()},
    }
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), permuted, Run(plain.output, expected)
    )


@mixture_router
def test_one_expert_is_the_dense_network(name: str) -> None:
    """Value and gradient, in training; nothing is dropped, whatever the capacity says."""
    router = with_k(ROUTERS[name](), 1)
    layer = make_layer(router, dataclasses.replace(CONFIG, num_experts=1, capacity_factor=1.0), activation="gelu")
    dense = Mlp(WIDTH, HIDDEN, "gelu", key=jax.random.key(0))
    for matrix, weight in dense.weights.items():
        weight[...] = layer.experts[matrix][...][0]
    x = make_tokens()
    got = run(layer, x, example_keys())
    graph, state = nnx.split(dense)

    def total(state: PyTree, x: Array) -> tuple[Array, Array]:
        y = nnx.merge(graph, state)(x)
        return jnp.sum(y * readout(x)), y

    gradients = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True), compiler_options=COMPILER_OPTIONS)
    (gradient, x_gradient), y = gradients(state, jnp.asarray(x))
    np.testing.assert_allclose(got.output.y, y, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.gradient["x"], x_gradient, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.gradient["w_gate"], 0, atol=1e-6)
    for matrix, weight_gradient in nnx.to_pure_dict(gradient)["weights"].items():
        np.testing.assert_allclose(got.gradient["experts"][matrix][0], weight_gradient, rtol=1e-4, atol=1e-5)
    assert got.output.metrics["overflow"] == 0


@mixture_router
def test_all_experts_are_the_full_mixture(name: str) -> None:
    """k = E: y = Σ weight_e expert_e(x) over all experts; for most routers the weights are softmax(logits)."""
    layer, x = make_layer(with_k(ROUTERS[name](), EXPERTS)), make_tokens()
    got, weights = run(layer, x), Weights.of(layer, x)
    for g, x_TD in enumerate(weights.x_GTD):
        weights_TE = ALL_EXPERTS.get(name, oracle.softmax)(x_TD @ weights.gate_DE)
        expected = oracle.mixture(x_TD, weights_TE, weights.experts, oracle.silu)
        y_TD = got.output.y[g * GROUP : (g + 1) * GROUP].reshape(TOKENS, WIDTH)
        np.testing.assert_allclose(y_TD, expected, rtol=1e-4, atol=1e-5)
    assert got.output.metrics["experts_per_token"] == EXPERTS

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
from moe.layers.moe import Moe
from moe.ops.permute import capacity
from moe.parallel.mesh import MeshConfig, batch_sharding, make_mesh
from moe.routers import ROUTERS, Router, Softmax, SparseTopK, SuccessiveHalving
from moe.routers.base import answer, example_noise, given, no_variables, one_logit_per_expert, queue
from moe.types import Assignments, Keys, Layout, PyTree, Routed, RouterInputs, Slots
from tests.layers.helpers import (
    CONFIG,
    EXAMPLES,
    EXPERTS,
    GROUP,
    GROUPS,
    HIDDEN,
    LENGTH,
    ONE_DEVICE,
    TOKENS,
    WIDTH,
    Run,
    Weights,
    example_keys,
    make_layer,
    make_tokens,
    readout,
    run,
)
from tests.oracles import operators
from tests.oracles import routing as oracle
from tests.routers.helpers import ACROSS_TOKENS, COMPILER_OPTIONS, WITHOUT_LOGITS

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
# Experts see mixtures of tokens behind soft slots: the layer is no mixture of experts' outputs for one token.
not_soft = pytest.mark.parametrize("name", [name for name in ALL if name != "soft"])
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
    expected = plain.gradient | {
        "w_gate": plain.gradient["w_gate"][:, order],
        "experts": {name: gradient[order] for name, gradient in plain.gradient["experts"].items()},
    }
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), permuted, Run(plain.output, expected)
    )


@not_soft
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


@not_soft
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


# ---------------------------------------------------------------------------------------------------------------------
# Routers made for the test: what the layer does with their answers
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Fixed:
    """Sends every token that is not padding to expert 0, and says that it made one more choice."""

    k: int = 1
    num_logits = one_logit_per_expert
    init = no_variables

    def __call__(self, params: PyTree, inputs: RouterInputs, state: PyTree, key: Keys | None) -> Routed:
        tokens_T = jnp.arange(inputs.logits.shape[0], dtype=jnp.int32)
        choices = jnp.sum(inputs.mask, dtype=jnp.int32) + 1
        routing = Assignments(tokens_T, 0 * tokens_T, jnp.ones(tokens_T.shape), inputs.mask, choices)
        return Routed(routing, {}, {}, state)


def test_metrics_of_hand_made_queues() -> None:
    """Six tokens and seven choices per group, all to expert 0, whose ⌈.8·6/4⌉ = 2 places round up to 4 of them."""
    x, layer = make_tokens(), make_layer(Fixed())
    layer.w_gate[...] = jnp.zeros_like(layer.w_gate[...])
    output = run(layer, x, example_keys()).output
    expected = {
        "load_max_to_mean": EXPERTS,
        "dead_experts": EXPERTS - 1,
        "entropy": np.log(EXPERTS),
        "overflow": 1 - 4 / 7,
        "experts_per_token": 7 / 6,
    }
    assert set(output.metrics) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(output.metrics[name], value, rtol=1e-6, err_msg=name)
    y_GTD = np.asarray(output.y).reshape(GROUPS, TOKENS, WIDTH)
    assert (np.abs(y_GTD[:, :4]).max(axis=-1) > 0).all()
    np.testing.assert_array_equal(y_GTD[:, 4:], 0)


def test_padding_takes_no_place_and_counts_nowhere() -> None:
    """The first example of each group is padding: its three tokens get 0, and the other three all find a place."""
    x, mask = make_tokens(), np.arange(EXAMPLES) % GROUP == 1
    output = run(make_layer(Fixed()), x, example_keys(), mask).output
    np.testing.assert_array_equal(output.y[~mask], 0)
    assert (np.abs(output.y[mask]).max(axis=-1) > 0).all()
    np.testing.assert_allclose(output.metrics["overflow"], 1 / 4, rtol=1e-6)
    np.testing.assert_allclose(output.metrics["experts_per_token"], 4 / 3, rtol=1e-6)


@dataclasses.dataclass(frozen=True)
class SoftSlots:
    """Two soft slots per expert, with a parameter, a state, a loss and a metric, to be carried through the layer."""

    k: int = 2
    num_logits = one_logit_per_expert

    def init(self, num_experts: int) -> tuple[PyTree, PyTree]:
        return {"sharpness": jnp.array([1.0, 2.0])}, {"seen": jnp.zeros(num_experts)}

    def __call__(self, params: PyTree, inputs: RouterInputs, state: PyTree, key: Keys | None) -> Routed:
        scores_TEC = inputs.logits[..., None] * params["sharpness"][None, None]
        combine = jax.nn.softmax(scores_TEC, axis=(1, 2))
        mean = jnp.mean(inputs.logits)
        new_state = {"seen": state["seen"] + jnp.sum(inputs.logits, axis=0)}
        return Routed(
            Slots(jax.nn.softmax(scores_TEC, axis=0), combine), {"mean": 0.5 * mean}, {"mean": mean}, new_state
        )


def soft_slots_layer(weights: Weights, g: int, slots: Slots) -> np.ndarray:
    """Σ_ec combine_tec expert_e(Σ_t dispatch_tec x_t)."""
    dispatch, combine = (np.asarray(leaf, np.float64) for leaf in slots)
    x_ECD = np.einsum("tec,td->ecd", dispatch, weights.x_GTD[g])
    y_ECD = np.array(
        [[oracle.expert(weights.experts, e, x_D, oracle.silu) for x_D in x_CD] for e, x_CD in enumerate(x_ECD)]
    )
    return np.einsum("tec,ecd->td", combine, y_ECD)


def test_a_router_of_soft_slots_passes_through_the_layer() -> None:
    """In training, so that its two slots per expert and not the capacity count; parameter and state come along."""
    layer, x = make_layer(SoftSlots()), make_tokens()
    got, weights = run(layer, x, example_keys()), Weights.of(layer, x)
    for g, slots in enumerate(routed_groups(layer, x, None)):
        y_TD = got.output.y[g * GROUP : (g + 1) * GROUP].reshape(TOKENS, WIDTH)
        np.testing.assert_allclose(y_TD, soft_slots_layer(weights, g, slots), rtol=1e-4, atol=1e-5)
    logits_GTE = weights.x_GTD @ weights.gate_DE
    np.testing.assert_allclose(got.output.losses["mean"], 0.5 * logits_GTE.mean(), rtol=1e-5)
    np.testing.assert_allclose(got.output.metrics["mean"], logits_GTE.mean(), rtol=1e-5)
    np.testing.assert_allclose(got.output.state["seen"], logits_GTE.sum(axis=1).mean(axis=0), rtol=1e-5)
    assert got.output.metrics["overflow"] == 0
    assert (np.abs(got.gradient["router_params"]["sharpness"]) > 1e-4).all()
    np.testing.assert_array_equal(got.gradient["router_state"]["seen"], 0)


@dataclasses.dataclass(frozen=True)
class Witness:
    """Asks for 2E + 1 logits per token, and tells what it was given."""

    k: int = 1
    init = no_variables

    def num_logits(self, num_experts: int) -> int:
        return 2 * num_experts + 1

    def __call__(self, params: PyTree, inputs: RouterInputs, state: PyTree, key: Keys | None) -> Routed:
        one = given(self, inputs)
        weights_TK = jnp.ones((TOKENS, 1))
        gate_error = jnp.max(jnp.abs(one.logits - inputs.tokens @ inputs.gate))
        metrics = {
            "id_sum": jnp.sum(inputs.ids * jnp.arange(TOKENS)).astype(jnp.float32),
            "examples": jnp.float32(one.num_examples),
            "experts": jnp.float32(one.num_experts),
            "gate_error": gate_error,
            "entropy": jnp.float32(0.25),
        }
        return answer(self, queue(jnp.zeros((TOKENS, 1), jnp.int32), weights_TK, one.mask), {}, state, metrics)


def test_a_router_chooses_the_width_of_the_gate_and_sees_ids_gate_and_sizes() -> None:
    """Positions 0 1 2 0 1 2 are the ids where a model has none: Σ id·t = 0 + 1 + 4 + 0 + 4 + 10."""
    layer, x = Moe(WIDTH, CONFIG, Witness(), "gelu", key=jax.random.key(0)), jnp.asarray(make_tokens())
    assert layer.w_gate[...].shape == (WIDTH, 2 * EXPERTS + 1)
    call = jax.jit(lambda ids: layer(x, None, ONE_DEVICE, ids_BL=ids).metrics, compiler_options=COMPILER_OPTIONS)
    metrics = call(None)
    assert (metrics["id_sum"], metrics["examples"], metrics["experts"]) == (19, GROUP, EXPERTS)
    np.testing.assert_allclose(metrics["gate_error"], 0, atol=1e-5)
    assert metrics["entropy"] == 0.25
    assert call(jnp.full((EXAMPLES, LENGTH), 2, jnp.int32))["id_sum"] == 2 * 15


# ---------------------------------------------------------------------------------------------------------------------
# Groups, precision, devices
# ---------------------------------------------------------------------------------------------------------------------


def test_a_group_size_that_leaves_examples_over_is_refused() -> None:
    layer = make_layer(Softmax(), dataclasses.replace(CONFIG, group_size=3))
    with pytest.raises(
        ValueError, match=r"group_size = 3 examples doesn't divide a micro-batch of 4: choose a divisor"
    ):
        layer(jnp.asarray(make_tokens()), None, ONE_DEVICE)


@pytest.mark.parametrize(("scope", "group_size"), [("sequence", 1), ("batch", 0)])
def test_the_scope_of_the_balance_loss_is_that_of_groups_as_large(scope: str, group_size: int) -> None:
    """Without a capacity groups matter to the losses alone: groups of 1, or of all, give the same run."""
    router = Softmax(k=2, noise=0.0, load_weight=0.0, importance_weight=0.0, balance_weight=0.7)
    scoped, grouped, neither = (
        run(make_layer(router, dataclasses.replace(CONFIG, capacity_factor=0.0, **changes)), make_tokens(), keys)
        for keys in [example_keys()]
        for changes in ({"balance_scope": scope}, {"group_size": group_size}, {})
    )
    for part in ("w_gate", "x"):
        np.testing.assert_allclose(scoped.gradient[part], grouped.gradient[part], rtol=1e-4, atol=1e-5)
    balance = scoped.output.losses["balance"]
    np.testing.assert_allclose(balance, grouped.output.losses["balance"], rtol=1e-5)
    assert abs(balance - neither.output.losses["balance"]) > 1e-3


def test_group_size_zero_is_the_whole_batch() -> None:
    """One group of 12 tokens and 13 choices: ⌈.8·12/4⌉ = 3 places, rounded up to 4, for all of them together."""
    layer = make_layer(Fixed(), dataclasses.replace(CONFIG, group_size=0))
    assert run(layer, make_tokens(), example_keys()).output.metrics["overflow"] == pytest.approx(1 - 4 / 13)


@pytest.mark.parametrize("field", ["num_experts", "expert_width"])
def test_settings_out_of_range_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=rf"moe\.{field} = 0 must be at least 1"):
        dataclasses.replace(CONFIG, **{field: 0})
    with pytest.raises(ValueError, match=r"moe\.capacity_factor = -1.0 must not be negative"):
        dataclasses.replace(CONFIG, capacity_factor=-1.0)


def test_bf16_tokens_are_routed_in_float32() -> None:
    """The rows are those of the same numbers in float32, so y differs by the experts' rounding alone."""
    layer, rounded = make_layer(KNOWN["softmax"]), jnp.asarray(make_tokens(), jnp.bfloat16)
    low, full = run(layer, rounded, example_keys()), run(layer, rounded.astype(jnp.float32), example_keys())
    assert low.output.y.dtype == jnp.bfloat16
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        (low.output.losses, low.output.metrics),
        (full.output.losses, full.output.metrics),
    )
    np.testing.assert_allclose(low.output.y.astype(jnp.float32), full.output.y, rtol=0.05, atol=0.05)


def test_the_gate_multiplies_in_full_float32_on_every_device() -> None:
    """The default precision of TPUs and GPUs would round its factors: the lowered product asks for the highest."""
    layer = make_layer(Fixed())
    text = jax.jit(lambda x: layer(x, None, ONE_DEVICE)).lower(jnp.asarray(make_tokens())).as_text()
    gate = [line for line in text.splitlines() if "dot_general" in line and f"tensor<{WIDTH}x{EXPERTS}xf32>" in line]
    assert len(gate) == 1
    assert "precision = [HIGHEST, HIGHEST]" in gate[0]


def test_fewer_groups_than_devices_give_the_same_numbers() -> None:
    """Two groups on a mesh that cuts the batch into four."""
    layer, x, keys = make_layer(KNOWN["softmax"]), make_tokens(), example_keys()
    mesh = make_mesh(MeshConfig(data=2, expert=2), jax.devices()[:4])
    graph, state = nnx.split(layer)
    call = jax.jit(lambda state, x: nnx.merge(graph, state)(x, keys, mesh), compiler_options=COMPILER_OPTIONS)
    got = call(state, jax.device_put(x, batch_sharding(mesh)))
    expected = run(layer, x, keys).output
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)

"""What the MoE layer does with a router's answer: routers made for the test, groups, precision, few groups."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.layers.mlp import WEIGHT_AXES
from moe.layers.moe import Moe
from moe.parallel.mesh import MeshConfig, batch_sharding, make_mesh
from moe.routers import Softmax
from moe.routers.base import answer, given, no_variables, one_logit_per_expert, queue
from moe.types import Assignments, Keys, PyTree, Routed, RouterInputs, Slots
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
    Weights,
    example_keys,
    make_layer,
    make_tokens,
    readout,
    routed_groups,
    run,
    soft_slots_layer,
)
from tests.oracles import routing as oracle
from tests.routers.helpers import COMPILER_OPTIONS

SOFTMAX = Softmax(k=2, noise=2.0, importance_weight=0.3, load_weight=0.2)

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
        "expert_load": [1] + [0] * (EXPERTS - 1),
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 0}, r"moe\.num_experts = 0 must be at least 1"),
        ({"expert_width": 0}, r"moe\.expert_width = 0 must be at least 1"),
        ({"capacity_factor": -1.0}, r"moe\.capacity_factor = -1\.0 must be finite and not negative"),
        ({"capacity_factor": float("inf")}, r"moe\.capacity_factor = inf must be finite"),
        ({"shared_experts": -1}, r"moe\.shared_experts = -1 must be finite and not negative"),
        ({"dispatch": "einsum", "capacity_factor": 0.0}, r"'einsum' needs a moe\.capacity_factor above 0.*'dropless'"),
        ({"dispatch": "capacity", "capacity_factor": 0.0}, r"'capacity' needs a moe\.capacity_factor above 0"),
        ({"dispatch": "dropless", "evaluation_capacity_factor": 2.0}, r"no queues .* = 2\.0 .* or choose 'capacity'"),
        ({"receive_factor": 0.0}, r"moe\.receive_factor = 0\.0 must be positive"),
        ({"shared_gate": True}, r"moe\.shared_gate = True needs moe\.shared_experts of at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


# ---------------------------------------------------------------------------------------------------------------------
# Dispatch by config, shared experts
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "training", "kept"),
    [
        ({"dispatch": "einsum"}, True, 4),
        ({"dispatch": "capacity"}, True, 4),
        ({"dispatch": "auto"}, True, 4),
        ({"dispatch": "auto", "capacity_factor": 0.0}, True, 6),
        ({"dispatch": "dropless"}, True, 6),
        ({"dispatch": "capacity"}, False, 6),
        ({"dispatch": "einsum", "evaluation_capacity_factor": 0.8}, False, 4),
        ({"dispatch": "auto", "evaluation_capacity_factor": 0.8}, False, 4),
    ],
)
def test_the_config_says_when_queues_end(changes: dict[str, Any], training: bool, kept: int) -> None:
    """Six tokens and seven choices per group, all to one expert, as above."""
    layer = make_layer(Fixed(), dataclasses.replace(CONFIG, **changes))
    overflow = run(layer, make_tokens(), example_keys() if training else None).output.metrics["overflow"]
    np.testing.assert_allclose(overflow, 1 - kept / 7, rtol=1e-6)


def test_auto_drops_nothing_where_sorting_rows_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def fast(mesh: object, num_rows: int, num_experts: int) -> bool:
        seen.append((num_rows, num_experts))
        return True

    monkeypatch.setattr("moe.layers.moe.sorts_fast", fast)
    for dispatch, expected in (("auto", 1 / 7), ("capacity", 3 / 7)):
        # Settings of its own, or a program compiled for another test would do.
        layer = make_layer(Fixed(), dataclasses.replace(CONFIG, dispatch=dispatch, receive_factor=3.0))
        overflow = run(layer, make_tokens(), example_keys()).output.metrics["overflow"]
        np.testing.assert_allclose(overflow, expected, rtol=1e-6)
    assert set(seen) == {(GROUPS * TOKENS, EXPERTS)}


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("gated", [False, True])
def test_shared_experts_are_a_dense_network_beside_the_routed_ones(activation: str, gated: bool) -> None:
    """y - y without them = sigmoid(x · g) mlp(x), of three times an expert's width; the router sees no difference."""
    x = make_tokens()
    config = dataclasses.replace(CONFIG, shared_experts=3, shared_gate=gated)
    layer, without = make_layer(SOFTMAX, config, activation=activation), make_layer(SOFTMAX, activation=activation)
    got, routed = run(layer, x, example_keys()), run(without, x, example_keys())
    jax.tree.map(np.testing.assert_array_equal, got.output.metrics, routed.output.metrics)
    shared = {name: np.asarray(w[...], np.float64)[None] for name, w in layer.shared.items()}
    assert shared["w_in"].shape == (1, WIDTH, 3 * HIDDEN)
    network = oracle.Experts(shared["w_in"], shared["w_out"], w_gate_EDF=shared.get("w_gate"))
    nonlinearity = oracle.silu if activation == "swiglu" else oracle.gelu_tanh
    total = 0.0
    for index in np.ndindex(x.shape[:2]):
        x_D = x[index].astype(np.float64)
        gate = oracle.sigmoid(x_D @ shared["gate"][0])[0] if gated else 1.0
        y_D = oracle.expert(network, 0, x_D, nonlinearity)
        np.testing.assert_allclose(got.output.y[index] - routed.output.y[index], gate * y_D, rtol=1e-4, atol=1e-5)
        total += gate * (1 - gate) * x_D[0] * (y_D @ readout(x)[index])
    if gated:
        np.testing.assert_allclose(got.gradient["shared"]["gate"][0, 0], total, rtol=1e-4)


def test_shared_experts_lie_on_the_mesh_like_a_dense_network() -> None:
    layer = make_layer(SOFTMAX, dataclasses.replace(CONFIG, shared_experts=1, shared_gate=True))
    lie = {name: weight.get_metadata("axes") for name, weight in layer.shared.items()}
    assert lie == {**WEIGHT_AXES, "gate": ("embed", None)}


@pytest.mark.parametrize("dispatch", ["einsum", "capacity", "dropless"])
def test_a_token_sees_its_neighbours_only_where_queues_end(dispatch: str) -> None:
    """In training, another example of the group changes an example's output by taking its place, or not at all."""
    config = dataclasses.replace(CONFIG, dispatch=dispatch)
    layer, x, keys = (
        make_layer(dataclasses.replace(SOFTMAX, noise=0.0, load_weight=0.0), config),
        make_tokens(),
        example_keys(),
    )
    other = make_tokens(9)
    other[1::2] = x[1::2]
    difference = np.abs(run(layer, other, keys).output.y[1::2] - run(layer, x, keys).output.y[1::2]).max()
    assert (difference > 1e-3) == (dispatch != "dropless")
    assert dispatch != "dropless" or difference < 1e-6


def test_bf16_tokens_are_routed_in_float32() -> None:
    """The rows are those of the same numbers in float32, so y differs by the experts' rounding alone."""
    layer, rounded = make_layer(SOFTMAX), jnp.asarray(make_tokens(), jnp.bfloat16)
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
    layer, x, keys = make_layer(SOFTMAX), make_tokens(), example_keys()
    mesh = make_mesh(MeshConfig(data=2, expert=2), jax.devices()[:4])
    graph, state = nnx.split(layer)
    call = jax.jit(lambda state, x: nnx.merge(graph, state)(x, keys, mesh), compiler_options=COMPILER_OPTIONS)
    got = call(state, jax.device_put(x, batch_sharding(mesh)))
    expected = run(layer, x, keys).output
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)

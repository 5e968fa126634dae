"""The Soft MoE router against the float64 oracle, and the properties that are its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.routers import Soft
from moe.types import Layout, RouterInputs, Slots
from tests.oracles import mixing, operators
from tests.oracles import routing as oracle
from tests.routers.helpers import COMPILER_OPTIONS, EXPERTS, TOKENS, unbalanced_logits, with_and_without_padding

PLACES = 3
WIDTH = 4
LAYOUT = Layout(EXPERTS, num_examples=1)
# How much the tests' scalar reads of every dispatch and combine weight.
READOUT = np.random.default_rng(3).normal(size=(2, TOKENS, EXPERTS, PLACES))


@with_and_without_padding
def test_slots_and_gradient_match_the_oracle(mask_T: np.ndarray) -> None:
    logits_TX = unbalanced_logits(num_experts=EXPERTS * PLACES)

    @jax.jit
    def ask(logits_TX: jax.Array) -> tuple[jax.Array, tuple[Slots, jax.Array]]:
        inputs = RouterInputs(logits_TX, mask=jnp.asarray(mask_T), layout=LAYOUT)
        routed = Soft(slots=PLACES)({}, inputs, {}, None)
        total = jnp.sum(jnp.stack(routed.routing) * READOUT.astype(np.float32))
        return total, (routed.routing, routed.metrics["entropy"])

    (_, (slots, entropy)), gradient_TX = jax.value_and_grad(ask, has_aux=True)(jnp.asarray(logits_TX))
    dispatch_TEC, combine_TEC = mixing.soft_slots(logits_TX[mask_T], EXPERTS)
    np.testing.assert_allclose(slots.dispatch[mask_T], dispatch_TEC, rtol=1e-5)
    np.testing.assert_allclose(slots.combine[mask_T], combine_TEC, rtol=1e-5)
    np.testing.assert_array_equal(np.stack(slots)[:, ~mask_T], 0)
    np.testing.assert_allclose(entropy, oracle.mean_entropy(combine_TEC.sum(axis=2)), rtol=1e-5)

    direction_TX = np.random.default_rng(5).normal(size=logits_TX.shape)

    def total(step: np.ndarray) -> float:
        moved_TX = (logits_TX + step[0] * direction_TX)[mask_T]
        return float(np.sum(np.stack(mixing.soft_slots(moved_TX, EXPERTS)) * READOUT[:, mask_T]))

    numerical = operators.numerical_jacobian(total, [0.0])[0]
    along = float(np.sum(direction_TX * np.asarray(gradient_TX, np.float64)))
    assert abs(along - numerical) < 2e-4 * np.linalg.norm(gradient_TX)
    np.testing.assert_array_equal(np.asarray(gradient_TX)[~mask_T], 0)


def test_normalised_logits_are_scaled_cosines_and_the_scale_is_learned() -> None:
    rng = np.random.default_rng(1)
    tokens_TD, gate_DX = rng.normal(size=(TOKENS, WIDTH)), 3 * rng.normal(size=(WIDTH, EXPERTS * PLACES))
    router = Soft(slots=PLACES, normalize=True)
    np.testing.assert_array_equal(router.init(EXPERTS)[0]["scale"], 1)

    @jax.jit
    def ask(scale: jax.Array, tokens_TD: jax.Array, gate_DX: jax.Array) -> tuple[jax.Array, Slots]:
        inputs = RouterInputs(tokens_TD @ gate_DX, tokens=tokens_TD, gate=gate_DX, layout=LAYOUT)
        slots = router({"scale": scale}, inputs, {}, None).routing
        return jnp.sum(jnp.stack(slots) * READOUT.astype(np.float32)), slots

    arguments = [jnp.asarray(value, jnp.float32) for value in (2.5, tokens_TD, gate_DX)]
    (_, slots), gradients = jax.value_and_grad(ask, argnums=(0, 1, 2), has_aux=True)(*arguments)
    expected = mixing.soft_slots(mixing.cosine_logits(tokens_TD, gate_DX, 2.5), EXPERTS)
    np.testing.assert_allclose(np.stack(slots), np.stack(expected), rtol=1e-4)

    def total(step: np.ndarray) -> float:
        logits_TX = mixing.cosine_logits(tokens_TD, gate_DX, 2.5 + step[0])
        return float(np.sum(np.stack(mixing.soft_slots(logits_TX, EXPERTS)) * READOUT))

    np.testing.assert_allclose(gradients[0], operators.numerical_jacobian(total, [0.0])[0], rtol=1e-3)
    # Neither a token's length nor a gate column's changes anything.
    np.testing.assert_allclose(np.sum(gradients[1] * arguments[1], axis=1), 0, atol=1e-4)
    np.testing.assert_allclose(np.sum(gradients[2] * arguments[2], axis=0), 0, atol=1e-4)


def test_a_token_of_zeros_has_a_finite_gradient() -> None:
    router, gate_DX = Soft(normalize=True), jnp.ones((WIDTH, EXPERTS))

    def total(tokens_TD: jax.Array) -> jax.Array:
        inputs = RouterInputs(tokens_TD @ gate_DX, tokens=tokens_TD, gate=gate_DX)
        return jnp.sum(router(router.init(EXPERTS)[0], inputs, {}, None).routing.dispatch[0])

    gradient = jax.jit(jax.grad(total), compiler_options=COMPILER_OPTIONS)(jnp.zeros((TOKENS, WIDTH)))
    assert np.isfinite(gradient).all()


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"slots = 0 per expert must be at least 1"):
        Soft(slots=0)
    with pytest.raises(ValueError, match="normalize needs tokens and gate"):
        Soft(normalize=True)({"scale": jnp.float32(1)}, RouterInputs(jnp.zeros((TOKENS, EXPERTS))), {}, None)
    with pytest.raises(ValueError, match=r"wants 10 logits per token for 5 experts, not 5"):
        Soft(slots=2)({}, RouterInputs(jnp.zeros((TOKENS, EXPERTS)), layout=LAYOUT), {}, None)

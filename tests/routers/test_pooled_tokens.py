"""Successive halving over tokens against the float64 oracle, and the properties that are its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import topk
from moe.routers import SuccessiveHalving
from moe.types import RouterInputs, Slots
from tests.oracles import operators, pooling
from tests.oracles import routing as oracle
from tests.routers.helpers import EXPERTS, TOKENS, route, unbalanced_logits, with_and_without_padding

BASE = 5.0
ROUTER = SuccessiveHalving(k=2, over="tokens", weights=topk.BoostedSoftmax(BASE), z_weight=0.3)
SLOTS = 5  # ⌈12 · 2 / 5⌉
READOUT = np.random.default_rng(3).normal(size=(2, TOKENS, EXPERTS, SLOTS))


@with_and_without_padding
def test_slots_losses_and_gradient_match_the_oracle(mask_T: np.ndarray) -> None:
    """12 tokens play two rounds for 5 slots; without padding 9, which the oracle makes one round of."""
    logits_TE = unbalanced_logits()

    @jax.jit
    def ask(logits_TE: jax.Array) -> tuple[jax.Array, tuple[Slots, jax.Array]]:
        routed = ROUTER({}, RouterInputs(logits_TE, mask=jnp.asarray(mask_T)), {}, None)
        total = jnp.sum(jnp.stack(routed.routing) * READOUT.astype(np.float32)) + routed.losses["z"]
        return total, (routed.routing, routed.metrics["mass_pooled"])

    (_, (slots, pooled)), gradient_TE = jax.value_and_grad(ask, has_aux=True)(jnp.asarray(logits_TE))
    expected_TEC = pooling.halving_slots_of_experts(logits_TE[mask_T], SLOTS, BASE)
    for weights_TEC in slots:
        np.testing.assert_allclose(weights_TEC[mask_T], expected_TEC, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(weights_TEC[~mask_T], 0)
    np.testing.assert_allclose(pooled, np.mean(1 - expected_TEC.max(axis=0)), rtol=1e-4)

    direction_TE = np.random.default_rng(5).normal(size=logits_TE.shape)

    def total(step: np.ndarray) -> float:
        moved_TE = (logits_TE + step[0] * direction_TE)[mask_T]
        slots_TEC = pooling.halving_slots_of_experts(moved_TE, SLOTS, BASE)
        return float(np.sum(slots_TEC[None] * READOUT[:, mask_T])) + 0.3 * oracle.z_loss(moved_TE)

    numerical = operators.numerical_jacobian(total, [0.0])[0]
    along = float(np.sum(direction_TE * np.asarray(gradient_TE, np.float64)))
    assert abs(along - numerical) < 2e-4 * np.linalg.norm(gradient_TE)
    np.testing.assert_array_equal(np.asarray(gradient_TE)[~mask_T], 0)


@pytest.mark.parametrize("real", [0, 3])
@pytest.mark.parametrize("weights", [topk.BoostedSoftmax(), topk.CentredBoost()], ids=["boosted", "centred"])
def test_slots_that_only_padding_could_fill_stay_empty(real: int, weights: topk.PairWeights) -> None:
    router, mask_T = SuccessiveHalving(k=2, over="tokens", weights=weights), np.arange(TOKENS) < real
    routed = route(router, {}, RouterInputs(jnp.zeros((TOKENS, EXPERTS)), mask=jnp.asarray(mask_T)), {}, None)[0]
    filled_EC = np.sort(np.sum(routed.routing.dispatch, axis=0), axis=1)
    np.testing.assert_allclose(filled_EC, np.tile(np.arange(SLOTS) >= SLOTS - real, (EXPERTS, 1)), atol=1e-6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(routed))


def test_with_a_slot_for_every_token_nothing_is_pooled() -> None:
    router = SuccessiveHalving(k=EXPERTS, over="tokens")
    routed = route(router, {}, RouterInputs(jnp.asarray(unbalanced_logits())), {}, None)[0]
    assert routed.metrics["mass_pooled"] == 0
    np.testing.assert_array_equal(routed.routing.dispatch.transpose(1, 0, 2), np.eye(TOKENS)[None].repeat(EXPERTS, 0))

"""The ReLU router against the float64 oracle, and the life of its coefficient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.routers import ReLU
from moe.types import PyTree, RouterInputs
from tests.oracles import routing as oracle
from tests.oracles import sparse_gates
from tests.routers.helpers import (
    COMPILER_OPTIONS,
    EXPERTS,
    Expected,
    assert_matches_oracle,
    example_keys,
    route,
    unbalanced_logits,
    with_and_without_padding,
)

COEFFICIENT, ACTIVE = 0.3, 2.5
TRAINED = {
    "balanced, too many active": ReLU(k=2, factor=1.5),
    "plain, too few active, at most three": ReLU(k=3, factor=1.5, balanced=False, max_experts=3),
}


def state_of(coefficient: float, active: float) -> PyTree:
    return {"coefficient": jnp.float32(coefficient), "active": jnp.float32(active)}


def ask(router: ReLU, logits_TE: np.ndarray, noise_TE: np.ndarray | None) -> Expected:
    gate_TE = sparse_gates.relu_weights(logits_TE)
    rows = oracle.queue(gate_TE, gate_TE > 0, router.max_experts or EXPERTS)
    coefficient = sparse_gates.updated_coefficient(COEFFICIENT, ACTIVE, router.k, EXPERTS, router.factor)
    l1 = sparse_gates.relu_l1(logits_TE, router.k, router.balanced)
    metrics = {
        "l1": l1,
        "l1_coefficient": coefficient,
        "sparsity": np.mean(gate_TE == 0),
        "unchosen": np.mean((gate_TE == 0).all(axis=1)),
    }
    return Expected(rows, {"l1": coefficient * l1}, metrics)


@with_and_without_padding
@pytest.mark.parametrize("name", TRAINED)
def test_training_matches_the_oracle(name: str, mask_T: np.ndarray) -> None:
    logits_TE = unbalanced_logits() - 1
    expected = ask(TRAINED[name], logits_TE, np.zeros_like(logits_TE))
    assert expected.metrics["unchosen"] > 0
    assert (expected.rows.valid.sum() < expected.rows.choices) == bool(TRAINED[name].max_experts)
    assert_matches_oracle(TRAINED[name], ask, logits_TE, mask_T, example_keys(), state=state_of(COEFFICIENT, ACTIVE))


def test_the_coefficient_follows_the_experts_of_the_last_step() -> None:
    """It rises with more than k of them, falls with fewer, and stays where a mean of k has rounded."""
    router, inputs = ReLU(k=2, factor=2.0), RouterInputs(jnp.asarray(unbalanced_logits()))
    for active, expected in ((2.01, 6.0), (1.9, 1.5), (2.0, 3.0), (np.nextafter(np.float32(2), np.float32(3)), 3.0)):
        routed = route(router, {}, inputs, state_of(3.0, active), example_keys())[0]
        np.testing.assert_allclose(routed.state["coefficient"], expected, rtol=1e-6)
        np.testing.assert_allclose(routed.state["active"], np.mean(np.sum(inputs.logits > 0, axis=1)), rtol=1e-6)
    np.testing.assert_array_equal(router.init(EXPERTS)[1]["active"], 2)


def test_the_l1_loss_brings_the_experts_per_token_to_k() -> None:
    """Gradient descent on free logits that all start positive."""
    router = ReLU(k=2, coefficient=1e-3)
    start_TE = jnp.asarray(np.random.default_rng(0).uniform(0.5, 1.5, size=(40, EXPERTS)), jnp.float32)

    def step(logits_TE: jax.Array, state: PyTree) -> tuple[jax.Array, PyTree, jax.Array]:
        def loss(logits_TE: jax.Array) -> tuple[jax.Array, tuple[PyTree, jax.Array]]:
            routed = router({}, RouterInputs(logits_TE), state, example_keys())
            # What the L1 loss is weighed against: every logit is drawn back to its start.
            pull = jnp.mean(jnp.sum(jnp.square(logits_TE - start_TE), axis=1))
            return routed.losses["l1"] + 0.5 * pull, (routed.state, routed.metrics["sparsity"])

        gradient, (state, sparsity) = jax.grad(loss, has_aux=True)(logits_TE)
        return logits_TE - 2 * gradient, state, sparsity

    step = jax.jit(step, compiler_options=COMPILER_OPTIONS)
    logits_TE, state, sparsities = start_TE, router.init(EXPERTS)[1], []
    for _ in range(160):
        logits_TE, state, sparsity = step(logits_TE, state)
        sparsities.append(sparsity)
    assert sparsities[0] == 0
    np.testing.assert_allclose(np.mean(sparsities[-60:]), 1 - 2 / EXPERTS, atol=0.1)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"coefficient = 0.0 must be positive"):
        ReLU(coefficient=0.0)
    with pytest.raises(ValueError, match=r"factor = 0.5 must be at least 1"):
        ReLU(factor=0.5)
    with pytest.raises(ValueError, match=r"relu.max_experts = 1 must be 0 or at least k = 2"):
        ReLU(max_experts=1)

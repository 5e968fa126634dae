"""The Sinkhorn router against the float64 oracle, and the balance that it is for."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe.routers import Sinkhorn
from moe.routers.sinkhorn import log_plan
from moe.types import RouterInputs
from tests.oracles import routing as oracle
from tests.oracles import transport
from tests.routers.helpers import (
    EXPERTS,
    TOKENS,
    Expected,
    assert_matches_oracle,
    example_keys,
    route,
    unbalanced_logits,
    with_and_without_padding,
)

TRAINED = {
    "one choice, sigmoid": Sinkhorn(k=1, iterations=3, temperature=0.5, gate="sigmoid", z_weight=0.2),
    "two choices, softmax": Sinkhorn(k=2, iterations=5, temperature=1.5, z_weight=0.1),
}


def ask(router: Sinkhorn, logits_TE: np.ndarray, noise_TE: np.ndarray | None) -> Expected:
    """Noise marks training, though the router draws none."""
    z = oracle.z_loss(logits_TE)
    losses, metrics = {"z": router.z_weight * z}, {"z": z}
    scores_TE = logits_TE
    if noise_TE is not None:
        scores_TE = transport.sinkhorn_plan(logits_TE / router.temperature, router.iterations)
        metrics["plan_error"] = float(np.mean(np.abs(scores_TE.sum(axis=1) - 1)))
    return Expected(transport.chosen_by(scores_TE, logits_TE, router.k, router.gate), losses, metrics)


@with_and_without_padding
@pytest.mark.parametrize("name", TRAINED)
def test_training_matches_the_oracle(name: str, mask_T: np.ndarray) -> None:
    """Whose gradient passes through the weights only, as the choice has none."""
    logits_TE = unbalanced_logits()
    greedy = ask(TRAINED[name], logits_TE, None).rows
    assert (ask(TRAINED[name], logits_TE, 0 * logits_TE).rows.expert != greedy.expert).any()
    assert_matches_oracle(TRAINED[name], ask, logits_TE, mask_T, example_keys())


def test_evaluation_is_greedy() -> None:
    router = TRAINED["two choices, softmax"]
    assert_matches_oracle(router, ask, unbalanced_logits(1), np.ones(TOKENS, bool), None)


def test_training_balances_what_evaluation_does_not() -> None:
    inputs = RouterInputs(jnp.asarray(unbalanced_logits(num_tokens=200)))
    loads = []
    for keys in (None, example_keys()):
        rows = route(Sinkhorn(), {}, inputs, {}, keys)[0].routing
        loads.append(np.bincount(rows.expert, minlength=EXPERTS))
    assert loads[0].max() > 80
    assert loads[1].max() < 60


def test_the_plan_has_its_masses_even_from_scores_beyond_any_exponential() -> None:
    scores_TE = jnp.asarray(200 * unbalanced_logits(num_tokens=20))
    plan_TE = np.exp(log_plan(scores_TE, jnp.ones(20, bool), 2000))
    np.testing.assert_allclose(plan_TE.sum(axis=0), 4, rtol=1e-3)
    np.testing.assert_allclose(plan_TE.sum(axis=1), 1, atol=0.05)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"iterations = 0 must be at least 1"):
        Sinkhorn(iterations=0)
    with pytest.raises(ValueError, match=r"temperature = 0.0 must be positive"):
        Sinkhorn(temperature=0.0)

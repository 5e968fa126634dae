"""The softmax router against the float64 oracle, and the properties that are its own."""

import jax
import numpy as np
import pytest

from moe.routers import Softmax
from moe.types import RouterInputs
from tests.oracles import routing as oracle
from tests.routers.helpers import (
    EXAMPLES,
    EXPERTS,
    LENGTH,
    TOKENS,
    Expected,
    assert_matches_oracle,
    example_keys,
    readout_for,
    route,
    run,
    unbalanced_logits,
    with_and_without_padding,
)

WEIGHTS = {"importance_weight": 0.7, "balance_weight": 0.4, "z_weight": 0.05}
TRAINED = {
    "two choices": Softmax(k=2, noise=3.0, load_weight=0.3, **WEIGHTS),
    "renormalised, by priority": Softmax(
        k=3, noise=1.5, load_weight=0.6, renormalize=True, batch_priority=True, **WEIGHTS
    ),
    "one choice, by priority, no noise": Softmax(k=1, noise=0.0, load_weight=0.0, batch_priority=True, **WEIGHTS),
}


def ask(router: Softmax, logits_TE: np.ndarray, noise_TE: np.ndarray | None) -> Expected:
    std = router.noise / EXPERTS
    added_TE = None if noise_TE is None else std * noise_TE
    rows = oracle.softmax_router(logits_TE, router.k, added_TE, router.batch_priority)
    if router.renormalize:
        total_T = oracle.dense_weights(rows, *logits_TE.shape).sum(axis=1)
        rows = rows._replace(weight=rows.weight / total_T[rows.token])
    selected_TE = oracle.dense_weights(rows, *logits_TE.shape) > 0
    unweighted = {
        "importance": oracle.importance_loss(logits_TE),
        "balance": oracle.load_balancing_loss(oracle.softmax(logits_TE), selected_TE, router.k),
        "z": oracle.z_loss(logits_TE),
    }
    if added_TE is not None and router.noise:
        unweighted["load"] = oracle.load_loss(logits_TE, added_TE, router.k, std)
    weights = {name: getattr(router, f"{name}_weight") for name in unweighted}
    return Expected(rows, {name: weights[name] * value for name, value in unweighted.items()}, unweighted)


@with_and_without_padding
@pytest.mark.parametrize("name", TRAINED)
def test_training_matches_the_oracle(name: str, mask_T: np.ndarray) -> None:
    assert_matches_oracle(TRAINED[name], ask, unbalanced_logits(), mask_T, example_keys())


def test_evaluation_matches_the_oracle_without_noise_or_load_loss() -> None:
    assert_matches_oracle(TRAINED["two choices"], ask, unbalanced_logits(1), np.ones(TOKENS, bool), None)


def test_noise_is_an_examples_own() -> None:
    """An example gets the same weights in another place, with other neighbours; another key gives it other weights."""
    router, keys, logits_TE = TRAINED["two choices"], example_keys(), unbalanced_logits()
    ones_T = np.ones(TOKENS, bool)

    def weights(logits_TE: np.ndarray, keys: jax.Array) -> np.ndarray:
        got = run(router, {}, RouterInputs(logits_TE, mask=ones_T), {}, keys, readout_for(logits_TE))
        return np.asarray(got.weights).reshape(EXAMPLES, LENGTH, EXPERTS)

    before = weights(logits_TE, keys)
    elsewhere = unbalanced_logits(5)
    elsewhere[:LENGTH] = logits_TE[2 * LENGTH : 3 * LENGTH]
    moved = weights(elsewhere, keys[np.array([2, 3, 1, 0])])
    np.testing.assert_array_equal(moved[0], before[2])
    assert np.abs(weights(elsewhere, keys)[0] - before[2]).max() > 0.01


def test_the_second_choice_is_the_better_one_where_its_probability_underflows() -> None:
    """Beside a logit of 200, those of 0 and 60 both have probability 0 in float32."""
    routing = route(Softmax(k=2), {}, RouterInputs(np.array([[0.0, 200.0, 60.0]], np.float32)), {}, None)[0].routing
    np.testing.assert_array_equal(routing.expert, [1, 2])
    np.testing.assert_array_equal(routing.weight, [1, 0])


def test_settings_that_contradict_are_refused() -> None:
    with pytest.raises(ValueError, match=r"noise = -1.0 must not be negative"):
        Softmax(noise=-1.0)
    with pytest.raises(ValueError, match=r"load_weight = 0.2 needs noise > 0: set noise, or load_weight = 0"):
        Softmax(noise=0.0, load_weight=0.2)

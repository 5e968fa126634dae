"""The softmax router against the float64 oracle, and the properties that are its own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.routers import Softmax
from moe.routers.base import example_noise
from moe.types import RouterInputs
from tests.oracles import routing as oracle
from tests.oracles.token_choice import group_limited_choice
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

WEIGHTS = {"importance_weight": 0.7, "balance_weight": 0.4, "z_weight": 0.05, "entropy_weight": 0.3}
TRAINED = {
    "two choices": Softmax(k=2, noise=3.0, load_weight=0.3, **WEIGHTS),
    "renormalised, by priority": Softmax(
        k=3, noise=1.5, load_weight=0.6, renormalize=True, batch_priority=True, **WEIGHTS
    ),
    "one choice, by priority, no noise": Softmax(k=1, noise=0.0, load_weight=0.0, batch_priority=True, **WEIGHTS),
}
# For six experts: the best of three groups of two would often hold only one of the best two experts.
GROUPED = Softmax(k=2, noise=2.0, load_weight=0.3, expert_groups=3, groups_per_token=1, **WEIGHTS)


def ask(router: Softmax, logits_TE: np.ndarray, noise_TE: np.ndarray | None) -> Expected:
    std = router.noise / logits_TE.shape[1]
    added_TE = None if noise_TE is None else std * noise_TE
    if router.expert_groups > 1:
        noisy_TE = logits_TE if added_TE is None else logits_TE + added_TE
        groups = (router.expert_groups, router.groups_per_token)
        selected_TE = group_limited_choice(oracle.softmax(noisy_TE), router.k, *groups, summed=1)
        rows = oracle.queue(oracle.softmax(noisy_TE), selected_TE, router.k)
    else:
        rows = oracle.softmax_router(logits_TE, router.k, added_TE, router.batch_priority)
    if router.renormalize:
        total_T = oracle.dense_weights(rows, *logits_TE.shape).sum(axis=1)
        rows = rows._replace(weight=rows.weight / total_T[rows.token])
    selected_TE = oracle.dense_weights(rows, *logits_TE.shape) > 0
    unweighted = {
        "importance": oracle.importance_loss(logits_TE),
        "balance": oracle.load_balancing_loss(oracle.softmax(logits_TE), selected_TE, router.k),
        "z": oracle.z_loss(logits_TE),
        "entropy": oracle.mean_entropy(oracle.softmax(logits_TE)),
    }
    if added_TE is not None and router.noise:
        unweighted["load"] = oracle.load_loss(logits_TE, added_TE, router.k, std)
    weights = {name: getattr(router, f"{name}_weight") for name in unweighted}
    return Expected(rows, {name: weights[name] * value for name, value in unweighted.items()}, unweighted)


@with_and_without_padding
@pytest.mark.parametrize("name", TRAINED)
def test_training_matches_the_oracle(name: str, mask_T: np.ndarray) -> None:
    assert_matches_oracle(TRAINED[name], ask, unbalanced_logits(), mask_T, example_keys())


def test_group_limited_choice_matches_the_oracle() -> None:
    logits_TE = unbalanced_logits(num_experts=6)
    free = dataclasses.replace(GROUPED, expert_groups=1)
    chosen, unlimited = (ask(router, logits_TE, None).rows.expert for router in (GROUPED, free))
    assert (chosen != unlimited).any()  # the limit would not show otherwise
    assert_matches_oracle(GROUPED, ask, logits_TE, np.ones(TOKENS, bool), example_keys())


def test_jitter_multiplies_what_the_gate_reads() -> None:
    """Rows and losses are those of (tokens × U[1 - .3, 1 + .3]) · gate; without a key there is none."""
    router = Softmax(k=2, noise=0.0, jitter=0.3, load_weight=0.0, **WEIGHTS)
    rng, keys = np.random.default_rng(0), example_keys()
    tokens_TD, gate_DE = (rng.normal(size=shape).astype(np.float32) for shape in ((TOKENS, 7), (7, EXPERTS)))
    inputs = RouterInputs(jnp.asarray(tokens_TD @ gate_DE), tokens=jnp.asarray(tokens_TD), gate=jnp.asarray(gate_DE))
    got, weights_TE1 = route(router, {}, inputs, {}, keys)

    own_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 0)
    uniform_TD = np.asarray(example_noise(own_keys, TOKENS, 7, draw=jax.random.uniform), np.float64)
    assert uniform_TD.min() < 0.1 < 0.9 < uniform_TD.max()
    expected = ask(router, (tokens_TD * (0.7 + 0.6 * uniform_TD)) @ gate_DE.astype(np.float64), None)
    wanted_TE = oracle.dense_weights(expected.rows, TOKENS, EXPERTS)
    np.testing.assert_allclose(weights_TE1[..., 0], wanted_TE, rtol=1e-4, atol=1e-6)
    for name, loss in expected.losses.items():
        np.testing.assert_allclose(got.losses[name], loss, rtol=1e-4, err_msg=name)
    still = route(router, {}, inputs, {}, None)[1]
    assert np.abs(still[..., 0] - wanted_TE).max() > 0.01


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
    with pytest.raises(ValueError, match=r"jitter = 1.0 must lie in \[0, 1\)"):
        Softmax(jitter=1.0)
    with pytest.raises(ValueError, match=r"jitter = 0.1 .* give tokens and gate"):
        route(Softmax(jitter=0.1), {}, RouterInputs(unbalanced_logits()), {}, example_keys())
    for changes, sentence in (
        ({"expert_groups": 2, "groups_per_token": 3}, r"groups_per_token = 3 must lie in 1\.\.2"),
        ({"expert_groups": 3}, r"expert_groups = 3 must divide the 8 experts"),
        ({"expert_groups": 4, "k": 3}, r"k = 3 exceeds the 2 experts of groups_per_token = 1 among"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Softmax(**changes).init(8)
    with pytest.raises(ValueError, match=r"load_weight = 0.2 needs noise > 0: set noise, or load_weight = 0"):
        Softmax(noise=0.0, load_weight=0.2)

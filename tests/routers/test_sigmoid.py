"""The sigmoid router against the float64 oracle, and the life of its bias."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.routers import Sigmoid
from moe.routers.sigmoid import updated_bias
from moe.types import PyTree, RouterInputs
from tests.oracles import routing as oracle
from tests.oracles import token_choice
from tests.routers.helpers import (
    EXAMPLES,
    EXPERTS,
    LENGTH,
    TOKENS,
    Expected,
    assert_matches_oracle,
    example_keys,
    route,
    unbalanced_logits,
    with_and_without_padding,
)

# Against the preference of `unbalanced_logits` for the last experts, and with a load whose update counts.
BIAS_E = np.linspace(0.3, -0.3, EXPERTS).astype(np.float32)
LOAD_E = np.array([0.5, 0.1, 0.3, 0.9, 0.2], np.float32)
TRAINED = {
    "two choices": Sigmoid(k=2, bias_rate=0.05, sequence_weight=0.7),
    "three choices, scaled, not renormalised": Sigmoid(
        k=3, bias_rate=0.02, renormalize=False, routed_scaling=2.5, sequence_weight=0.4
    ),
}


def state_of(bias_E: np.ndarray, load_E: np.ndarray) -> PyTree:
    return {"bias": jnp.asarray(bias_E, jnp.float32), "load": jnp.asarray(load_E, jnp.float32)}


def ask(
    router: Sigmoid,
    logits_TE: np.ndarray,
    noise_TE: np.ndarray | None,
    *,
    mask_T: np.ndarray,
    bias_E: np.ndarray = BIAS_E,
    load_E: np.ndarray = LOAD_E,
) -> Expected:
    bias_E = token_choice.updated_bias(bias_E, load_E, router.bias_rate)
    rows = token_choice.sigmoid_router(
        logits_TE,
        router.k,
        bias_E,
        renormalize=router.renormalize,
        scaling=router.routed_scaling,
        expert_groups=router.expert_groups,
        groups_per_token=router.groups_per_token,
    )
    example_T = np.repeat(np.arange(EXAMPLES), LENGTH)[mask_T]
    sequence = token_choice.sequence_balance_loss(logits_TE, router.k, example_T)
    losses = {"sequence": router.sequence_weight * sequence}
    return Expected(rows, losses, {"sequence": sequence, "bias_spread": bias_E.max() - bias_E.min()})


@with_and_without_padding
@pytest.mark.parametrize("name", TRAINED)
def test_training_matches_the_oracle(name: str, mask_T: np.ndarray) -> None:
    """With a bias that changes the choice."""
    router, logits_TE, state = TRAINED[name], unbalanced_logits(), state_of(BIAS_E, LOAD_E)
    unbiased = token_choice.sigmoid_router(logits_TE, router.k, 0 * BIAS_E)
    assert (ask(router, logits_TE, None, mask_T=np.ones(TOKENS, bool)).rows.expert != unbiased.expert).any()
    asked = functools.partial(ask, mask_T=mask_T)
    assert_matches_oracle(router, asked, logits_TE, mask_T, example_keys(), num_examples=EXAMPLES, state=state)


def test_group_limited_choice_matches_the_oracle() -> None:
    """Two of three pairs of experts, by the sum of both."""
    router = Sigmoid(k=3, expert_groups=3, groups_per_token=2, sequence_weight=0.5)
    mask_T, zeros_E = np.ones(TOKENS, bool), np.zeros(6)
    asked = functools.partial(ask, mask_T=mask_T, bias_E=zeros_E, load_E=zeros_E)
    state = state_of(zeros_E, zeros_E)
    logits_TE = unbalanced_logits(2, num_experts=6)
    assert_matches_oracle(router, asked, logits_TE, mask_T, None, num_examples=EXAMPLES, state=state)


def test_training_applies_the_last_load_and_returns_the_next() -> None:
    """Loads .5 .1 .3 .9 .2 around .4: two experts fall, three rise. Padding counts in no load."""
    router, mask_T = TRAINED["two choices"], np.arange(TOKENS) % 5 != 1
    inputs = RouterInputs(unbalanced_logits(), mask=mask_T)
    routed = route(router, {}, inputs, state_of(BIAS_E, LOAD_E), example_keys())[0]
    np.testing.assert_allclose(routed.state["bias"] - BIAS_E, [-0.05, 0.05, 0.05, -0.05, 0.05], rtol=1e-5)
    rows = jax.tree.map(np.asarray, routed.routing)
    counts_E = oracle.load(oracle.Rows(*rows), EXPERTS)
    np.testing.assert_allclose(routed.state["load"], counts_E / mask_T.sum(), rtol=1e-6)


def test_a_balanced_load_moves_no_bias_though_means_round() -> None:
    third = np.float32(1) / 3
    load_E = jnp.asarray([third, np.nextafter(third, np.float32(1)), third, np.nextafter(third, np.float32(0))])
    np.testing.assert_array_equal(updated_bias(jnp.zeros(4), load_E, 1.0), 0)
    np.testing.assert_array_equal(updated_bias(jnp.zeros(4), load_E.at[0].add(-1e-5), 1.0), [1, -1, -1, -1])


def test_the_bias_balances_the_load_of_an_unchanging_gate() -> None:
    """Of loads between 0 and almost all tokens, none is further from the mean than a quarter of it."""
    router, logits_TE = Sigmoid(k=2, bias_rate=0.01), jnp.asarray(unbalanced_logits(num_tokens=60))
    step = jax.jit(lambda state: router({}, RouterInputs(logits_TE), state, example_keys()).state)
    state = router.init(EXPERTS)[1]
    loads = []
    for _ in range(150):
        state = step(state)
        loads.append(state["load"])
    assert np.ptp(loads[0]) > 0.4
    np.testing.assert_allclose(np.mean(loads[-20:], axis=0), 2 / EXPERTS, rtol=0.25)


def test_scores_that_underflow_keep_their_ratio() -> None:
    """sigmoid(-200) is 0 in float32; beside it -200 - log 3 has a third of the weight."""
    logits_TE = np.array([[-200.0, -200.0 - np.log(3.0), -300.0]], np.float32)
    state = Sigmoid().init(3)[1]
    rows = route(Sigmoid(k=2), {}, RouterInputs(logits_TE), state, None)[0].routing
    np.testing.assert_allclose(rows.weight, [0.75, 0.25], rtol=1e-4)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"bias_rate = -0.1 must not be negative"):
        Sigmoid(bias_rate=-0.1)
    with pytest.raises(ValueError, match=r"routed_scaling = 0.0 must be positive"):
        Sigmoid(routed_scaling=0.0)
    with pytest.raises(ValueError, match=r"expert_groups = 3 must divide the 8 experts"):
        Sigmoid(expert_groups=3).init(8)

"""Every router loss on an unbalanced case computed by hand, at balance, at its worst, and where nothing is routed."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.routers import losses

# Three tokens that prefer expert 0; then a token of padding that prefers expert 2.
PROBS_TE = jnp.array([[0.5, 0.3, 0.2], [0.7, 0.2, 0.1], [0.6, 0.1, 0.3], [0.01, 0.01, 0.98]], jnp.float32)
MASK_T = jnp.array([True, True, True, False])
# The same router, logits shifted token by token: their log-sum-exp is 1, -2, 0 and 9.
LOGITS_TE = jnp.log(PROBS_TE) + jnp.array([[1.0], [-2.0], [0.0], [9.0]])
CHOICE_TE = jnp.array([[1, 1, 0], [1, 1, 0], [1, 0, 1], [0, 1, 1]], jnp.float32)
PHI_1, PHI_3 = 0.158655253931457, 0.00134989803163009  # Φ(-1), Φ(-3), from tables

# Every loss as a function of logits alone, for what holds of all of them.
OF_LOGITS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "importance": lambda logits, mask: losses.importance(jax.nn.softmax(logits), mask),
    "load": lambda logits, mask: losses.load(logits, logits, 2, 0.3, mask),
    "balance": lambda logits, mask: losses.load_balancing(jax.nn.softmax(logits), jax.nn.softmax(-logits), 1, mask),
    "z": losses.z,
    "entropy": losses.entropy,
}


def test_importance_by_hand() -> None:
    """Mass 1.8, .6, .6: mean 1, variance (.64 + .16 + .16)/3."""
    np.testing.assert_allclose(losses.importance(PROBS_TE, MASK_T), 0.32, rtol=1e-6)


def test_load_by_hand() -> None:
    """σ=.5, k=1: thresholds 1.5 and .5 against clean logits (1, 0) and (0, 0) give Φ(-1), Φ(-3), Φ(-1), Φ(-1)."""
    logits = jnp.array([[1.0, 0.0], [0.0, 0.0], [7.0, -7.0]])
    noisy = jnp.array([[1.5, 0.0], [0.0, 0.5], [7.0, -7.0]])
    a, b = 2 * PHI_1, PHI_1 + PHI_3
    got = losses.load(logits, noisy, 1, 0.5, jnp.array([True, True, False]))
    np.testing.assert_allclose(got, ((a - b) / (a + b)) ** 2, rtol=1e-5)


def test_load_threshold_is_the_kth_noisy_logit() -> None:
    """k=2: noisy (3, 2.5, 2) has threshold 2.5; σ=1/2 gives clean (3, 1, 2) the loads Φ(1), Φ(-3), Φ(-1)."""
    got = losses.load(jnp.array([[3.0, 1.0, 2.0]]), jnp.array([[3.0, 2.5, 2.0]]), 2, 0.5, jnp.array([True]))
    loads = np.array([1 - PHI_1, PHI_3, PHI_1])
    np.testing.assert_allclose(got, loads.var() / loads.mean() ** 2, rtol=1e-5)


def test_load_balancing_by_hand() -> None:
    """f = (1, 2/3, 1/3), P = (.6, .2, .2), E/K = 3/2: 1.5 (.6 + .4/3 + .2/3) = 1.2; said to be K = 3, it is .8."""
    np.testing.assert_allclose(losses.load_balancing(PROBS_TE, CHOICE_TE, 2, MASK_T), 1.2, rtol=1e-6)
    np.testing.assert_allclose(losses.load_balancing(PROBS_TE, CHOICE_TE, 3, MASK_T), 0.8, rtol=1e-6)


def test_load_balancing_by_example_by_hand() -> None:
    """E = 3, K = 2. Two examples of two tokens, one of which is padding: (f, P) of the first (1, 1, 0), (.6, .25, .15)
    and of the second (1, 0, 1), (.6, .1, .3): 3/2 · (.85 + .9)/2. A third example, all padding, counts nowhere.
    """
    by_example = losses.load_balancing_by_example(PROBS_TE, CHOICE_TE, 2, MASK_T, 2)
    np.testing.assert_allclose(by_example, 1.5 * (0.85 + 0.9) / 2, rtol=1e-6)
    padded = [jnp.concatenate([x, x[:2]]) for x in (PROBS_TE, CHOICE_TE)]
    mask_T = jnp.concatenate([MASK_T, jnp.zeros(2, bool)])
    np.testing.assert_allclose(losses.load_balancing_by_example(*padded, 2, mask_T, 3), by_example, rtol=1e-6)


def test_load_balancing_over_groups_is_that_of_all_their_tokens() -> None:
    """Two groups of two tokens, the second with padding: 1.2, as by hand above, and with its gradient."""
    groups = [x.reshape(2, 2, *x.shape[1:]) for x in (PROBS_TE, CHOICE_TE, MASK_T)]

    def over_groups(probs: jax.Array) -> jax.Array:
        balance = jax.vmap(lambda p, c, m: losses.load_balancing(p, c, 2, m, "groups"), axis_name="groups")
        return balance(probs, *groups[1:])

    loss_G = over_groups(groups[0])
    np.testing.assert_allclose(loss_G, [1.2, 1.2], rtol=1e-6)
    gradient = jax.grad(lambda probs: jnp.mean(over_groups(probs)))(groups[0])
    whole = jax.grad(lambda probs: losses.load_balancing(probs, CHOICE_TE, 2, MASK_T))(PROBS_TE)
    np.testing.assert_allclose(gradient.reshape(4, 3), whole, rtol=1e-6)


def test_z_by_hand() -> None:
    """log-sum-exp 1, -2 and 0: (1 + 4 + 0)/3."""
    np.testing.assert_allclose(losses.z(LOGITS_TE, MASK_T), 5 / 3, rtol=1e-6)


def test_entropy_by_hand() -> None:
    """Probabilities (1/2, 1/2) and (1, 0), the last far below what float32 holds: mean entropy log(2)/2."""
    logits = jnp.array([[30.0, 30.0], [1e4, -1e4], [0.0, 3.0]])
    got = losses.entropy(logits, jnp.array([True, True, False]))
    np.testing.assert_allclose(got, math.log(2) / 2, rtol=1e-5)


def test_token_mean_by_hand() -> None:
    """Means of columns over the first and third token; of one value per token."""
    values = jnp.array([[1.0, 2.0], [jnp.inf, 9.0], [3.0, 8.0]])
    mask = jnp.array([True, False, True])
    np.testing.assert_array_equal(losses.token_mean(values, mask), [2, 5])
    np.testing.assert_array_equal(losses.token_mean(values[:, 1], mask), 5)


@pytest.mark.parametrize("name", OF_LOGITS)
def test_at_perfect_balance_values_are_known_and_gradients_finite(name: str) -> None:
    """Zero logits over E = 4: no variation, balance 1, and log 4 where the loss is about the uniform distribution."""
    logits = jnp.zeros((8, 4))
    expected = {"importance": 0.0, "load": 0.0, "balance": 1.0, "z": math.log(4) ** 2, "entropy": math.log(4)}
    value, gradient = jax.jit(jax.value_and_grad(OF_LOGITS[name]))(logits, jnp.ones(8, bool))
    np.testing.assert_allclose(value, expected[name], rtol=1e-6)
    assert np.isfinite(gradient).all()
    if name in ("importance", "load"):
        np.testing.assert_allclose(gradient, 0, atol=1e-7)


def test_at_worst() -> None:
    """One expert of four has everything: squared variation E - 1, balance E/K = 4."""
    one_hot = jnp.zeros((8, 4)).at[:, 2].set(1.0)
    ones = jnp.ones(8, bool)
    np.testing.assert_allclose(losses.importance(one_hot, ones), 3, rtol=1e-6)
    np.testing.assert_allclose(losses.load_balancing(one_hot, one_hot, 1, ones), 4, rtol=1e-6)


@pytest.mark.parametrize("name", OF_LOGITS)
def test_a_group_of_padding_costs_nothing(name: str) -> None:
    value, gradient = jax.jit(jax.value_and_grad(OF_LOGITS[name]))(LOGITS_TE, jnp.zeros(4, bool))
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


def test_weighted_multiplies_and_leaves_out_what_has_no_weight() -> None:
    class Weights:
        a_weight = 0.5
        b_weight = 0.0

    assert losses.weighted(Weights(), {"a": jnp.float32(3.0), "b": jnp.float32(7.0)}) == {"a": 1.5}

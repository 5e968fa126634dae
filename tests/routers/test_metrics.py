"""The metrics that every routing has, on queues made by hand."""

import math

import jax.numpy as jnp
import numpy as np

from moe.routers.metrics import expert_load, routing_metrics
from moe.types import Assignments, Slots


def two_groups() -> Assignments:
    """E = 4. Valid rows go to expert 0 four times, to 1 and 3 once; of the first group's 5 choices 2 were cut."""
    expert_GN = jnp.array([[0, 0, 1, 2], [0, 0, 3, 2]], jnp.int32)
    valid_GN = jnp.array([[True, True, True, False], [True, True, True, False]])
    token_GN = jnp.array([[0, 1, 2, 0], [0, 1, 2, 0]], jnp.int32)
    return Assignments(token_GN, expert_GN, jnp.ones((2, 4)), valid_GN, choices=jnp.array([5, 3], jnp.int32))


def test_metrics_by_hand() -> None:
    """Load 4, 1, 0, 1: max/mean 4/1.5, one dead expert. Kept 2 + 2 of 8 choices. 4 of 6 tokens are not padding."""
    certain, uniform = [40.0, -40.0, -40.0, -40.0], [2.0, 2.0, 2.0, 2.0]
    logits_GTE = jnp.array([[certain, uniform, uniform], [uniform, uniform, certain]])
    mask_GT = jnp.array([[True, True, True], [True, False, False]])
    got = routing_metrics(two_groups(), logits_GTE, mask_GT, jnp.array([2, 2], jnp.int32), num_experts=4)
    expected = {
        "expert_load": [4 / 6, 1 / 6, 0, 1 / 6],
        "load_max_to_mean": 4 / 1.5,
        "dead_experts": 1.0,
        "entropy": 3 / 4 * math.log(4),
        "overflow": 1 - 4 / 8,
        "experts_per_token": 8 / 4,
    }
    assert set(got) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-6, err_msg=name)


def test_a_batch_of_padding_drops_nothing() -> None:
    """No token, no choice: every metric is 0, and none is NaN; all experts are dead."""
    nobody = two_groups()._replace(valid=jnp.zeros((2, 4), bool), choices=jnp.zeros(2, jnp.int32))
    logits_GTE, mask_GT, kept_G = jnp.zeros((2, 3, 4)), jnp.zeros((2, 3), bool), jnp.zeros(2, jnp.int32)
    got = routing_metrics(nobody, logits_GTE, mask_GT, kept_G, num_experts=4)
    for name, value in got.items():
        np.testing.assert_array_equal(value, 4 if name == "dead_experts" else 0, err_msg=name)


def test_load_of_soft_slots_is_the_dispatch_weight_of_an_experts_slots() -> None:
    """Two groups, T=1, E=2, C=2: expert 0 holds 1 + 2 + 5 + 6, expert 1 holds 3 + 4 + 7 + 8."""
    dispatch_GTEC = jnp.arange(1.0, 9.0).reshape(2, 1, 2, 2)
    np.testing.assert_array_equal(expert_load(Slots(dispatch_GTEC, 0 * dispatch_GTEC), 2), [14, 22])


def test_soft_slots_reach_every_expert_of_every_token_and_drop_nothing() -> None:
    """T=3 of which one is padding, E=2, C=1."""
    weights_GTEC = jnp.ones((1, 3, 2, 1)) * jnp.array([1.0, 1.0, 0.0])[None, :, None, None]
    mask_GT = jnp.array([[True, True, False]])
    slots, kept_G = Slots(weights_GTEC, weights_GTEC), jnp.array([6], jnp.int32)
    got = routing_metrics(slots, jnp.zeros((1, 3, 2)), mask_GT, kept_G, num_experts=2)
    assert (got["overflow"], got["experts_per_token"], got["load_max_to_mean"], got["dead_experts"]) == (0, 2, 1, 0)


def test_the_entropy_of_a_gate_with_another_number_of_logits_is_left_to_the_router() -> None:
    """Five logits for four experts say nothing about a distribution over experts."""
    mask_GT, kept_G = jnp.ones((2, 3), bool), jnp.array([2, 2], jnp.int32)
    by_expert, other = (
        routing_metrics(two_groups(), jnp.zeros((2, 3, width)), mask_GT, kept_G, num_experts=4) for width in (4, 5)
    )
    assert set(by_expert) - set(other) == {"entropy"}

"""The routing oracles against unbalanced cases computed by hand."""

import math

import numpy as np
import pytest

from tests.oracles import routing
from tests.oracles.routing import Experts, Rows

# Three tokens over three experts; every token prefers expert 0.
PROBS = np.array([[0.5, 0.3, 0.2], [0.7, 0.2, 0.1], [0.6, 0.1, 0.3]])
# The same router, logits shifted token by token: their log-sum-exp is 1, -2 and 0.
SHIFTED_LOGITS = np.log(PROBS) + np.array([[1.0], [-2.0], [0.0]])
PHI_1, PHI_3 = 0.158655253931457, 0.00134989803163009  # Φ(-1), Φ(-3), from tables


def test_softmax_router_queues_first_choices_first():
    rows = routing.softmax_router(np.log(PROBS), 2)
    np.testing.assert_array_equal(rows.token, [0, 1, 2, 0, 1, 2])
    np.testing.assert_array_equal(rows.expert, [0, 0, 0, 1, 1, 2])
    np.testing.assert_allclose(rows.weight, [0.5, 0.7, 0.6, 0.3, 0.2, 0.3], rtol=1e-14)
    assert rows.valid.all()
    assert rows.choices == 6
    np.testing.assert_array_equal(routing.load(rows, 3), [3, 2, 1])
    assert routing.max_violation([3, 2, 1]) == 0.5


def test_batch_priority_queues_the_most_certain_token_first():
    rows = routing.softmax_router(np.log(PROBS), 2, batch_priority=True)
    np.testing.assert_array_equal(rows.token, [1, 2, 0, 1, 2, 0])
    np.testing.assert_array_equal(rows.expert, [0, 0, 0, 1, 2, 1])
    np.testing.assert_allclose(rows.weight, [0.7, 0.6, 0.5, 0.2, 0.3, 0.3], rtol=1e-14)


def test_noise_enters_choice_and_weight():
    rows = routing.softmax_router([[0.0, 0.0]], 1, noise_TE=[[0.0, math.log(3)]])
    assert (rows.expert[0], rows.choices) == (1, 1)
    np.testing.assert_allclose(rows.weight, [0.75], rtol=1e-15)


def test_tied_experts_are_chosen_in_order():
    rows = routing.softmax_router(np.zeros((1, 4)), 2)
    np.testing.assert_array_equal(rows.expert, [0, 1])
    np.testing.assert_array_equal(rows.weight, [0.25, 0.25])


def test_sparse_topk_router_takes_more_than_k():
    """p=2, λ=1, k=1: (1, .5) pools at τ = 1/4, mask (.75, .25, 0); (4, 0, 0) is hard, mask (1, 0, 0)."""
    logits = [[4.0, 0.0, 0.0], [0.5, -2.0, 1.0]]
    probs = routing.softmax(logits)
    rows = routing.sparse_topk_router(logits, 1, 1.0, 2.0)
    np.testing.assert_array_equal(rows.token, [0, 1, 0, 1, 0, 1])
    np.testing.assert_array_equal(rows.valid, [True, True, False, True, False, False])
    np.testing.assert_array_equal(rows.expert[rows.valid], [0, 2, 0])
    np.testing.assert_allclose(
        rows.weight[rows.valid], [probs[0, 0], 0.75 * probs[1, 2], 0.25 * probs[1, 0]], rtol=1e-14
    )
    assert rows.choices == 3
    cut = routing.sparse_topk_router(logits, 1, 1.0, 2.0, max_experts=1, batch_priority=True)
    np.testing.assert_array_equal(cut.expert, [0, 2])
    assert cut.valid.all()
    assert cut.choices == 3
    assert routing.dispatch(cut, 3, 4).overflow == pytest.approx(1 / 3)


def test_successive_halving_router_takes_the_heaviest_of_each_slot():
    """Scores .4, .9, .1, .6 pair as (.9, .1) and (.6, .4); odds 2/3, 9, 1/9, 3/2 are the unnormalised probabilities."""
    odds = np.array([2 / 3, 9, 1 / 9, 3 / 2])
    probs = odds / odds.sum()
    strong = 1 / (1 + math.exp(20**0.1 - 20**0.9))
    weak = 1 / (1 + math.exp(20**0.4 - 20**0.6))
    rows = routing.successive_halving_router([np.log(odds)], 2)
    np.testing.assert_array_equal(rows.expert, [1, 3])
    np.testing.assert_allclose(rows.weight, [strong * probs[1], weak * probs[3]], rtol=1e-13)
    slots = routing.successive_halving_slots([np.log(odds)], 2)
    np.testing.assert_allclose(slots[0], [[0, strong, 1 - strong, 0], [1 - weak, 0, 0, weak]], atol=1e-14)
    np.testing.assert_allclose(routing.mass_left_out(slots), 1 - (strong + weak) / 2, atol=1e-14)
    np.testing.assert_allclose(
        routing.successive_halving_mixture([np.log(odds)], 2),
        [np.array([1 - weak, strong, 1 - strong, weak]) * probs],
        atol=1e-14,
    )


def test_successive_halving_router_over_all_experts_is_softmax():
    rows = routing.successive_halving_router(np.log(PROBS), 3)
    np.testing.assert_allclose(routing.dense_weights(rows, 3, 3), PROBS, rtol=1e-14)


def test_importance_loss_by_hand():
    """Sums 1.8, .6, .6: mean 1, variance (.64 + .16 + .16)/3; what is added to a token's logits changes nothing."""
    assert routing.importance_loss(SHIFTED_LOGITS) == pytest.approx(0.32, rel=1e-14)
    assert routing.importance_loss(np.zeros((4, 8))) == 0


def test_load_loss_by_hand():
    """σ=.5, k=1: thresholds 1.5 and .5 against clean logits (1, 0) and (0, 0) give Φ(-1), Φ(-3), Φ(-1), Φ(-1)."""
    logits, noise = [[1.0, 0.0], [0.0, 0.0]], [[0.5, 0.0], [0.0, 0.5]]
    expected = [[PHI_1, PHI_3], [PHI_1, PHI_1]]
    np.testing.assert_allclose(routing.load_probabilities(logits, noise, 1, 0.5), expected, rtol=1e-12)
    a, b = 2 * PHI_1, PHI_1 + PHI_3
    assert routing.load_loss(logits, noise, 1, 0.5) == pytest.approx(((a - b) / (a + b)) ** 2, rel=1e-12)


def test_load_threshold_is_the_kth_noisy_logit():
    """k=2 of (3, 1, 2) with noise (0, 1.5, 0): the noisy (3, 2.5, 2) has threshold 2.5; σ=1/2."""
    got = routing.load_probabilities([[3.0, 1.0, 2.0]], [[0.0, 1.5, 0.0]], 2, 0.5)
    np.testing.assert_allclose(got, [[1 - PHI_1, PHI_3, PHI_1]], rtol=1e-12)


def test_load_balancing_loss_by_hand():
    """f = (1, 2/3, 1/3), P = (.6, .2, .2), E/K = 3/2: 1.5 (.6 + .4/3 + .2/3) = 1.2. With K=3: .8."""
    selected = [[True, True, False], [True, True, False], [True, False, True]]
    assert routing.load_balancing_loss(PROBS, selected) == pytest.approx(1.2, rel=1e-14)
    assert routing.load_balancing_loss(PROBS, selected, k=3) == pytest.approx(0.8, rel=1e-14)
    assert routing.load_balancing_loss(np.full((2, 4), 0.25), np.eye(4, dtype=bool)[:2]) == 1


def test_z_loss_by_hand():
    """log-sum-exp 1, -2 and 0: (1 + 4 + 0)/3."""
    assert routing.z_loss(SHIFTED_LOGITS) == pytest.approx(5 / 3, rel=1e-14)


def test_entropies_by_hand():
    """(1, 0) and (1/2, 1/2): mean entropy log(2)/2; their mean (3/4, 1/4)."""
    probs = [[1.0, 0.0], [0.5, 0.5]]
    assert routing.mean_entropy(probs) == pytest.approx(math.log(2) / 2)
    assert routing.entropy_of_mean(probs) == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))


@pytest.mark.parametrize(
    ("tokens", "experts", "k", "factor", "multiple_of", "expected"),
    [
        (10, 3, 2, 1.05, 4, 8),  # 7 exactly, then up to 8
        (4, 4, 1, 1.0, 4, 4),
        (4, 4, 1, 1.0, 1, 1),
        (100, 1, 1, 1.1, 1, 110),  # 1.1 * 100 is 110.00000000000001 in floating point
        (5, 3, 1, 1.0, 1, 2),
    ],
)
def test_capacity(tokens, experts, k, factor, multiple_of, expected):
    assert routing.capacity(tokens, experts, k, factor, multiple_of) == expected


def test_dispatch_fills_queues_in_row_order():
    """Expert 0 is full after two rows, the row not in use takes no place, expert 2 stays empty; 7 choices, 4 placed."""
    expert, valid = np.array([0, 0, 1, 0, 0, 1]), np.array([True, False, True, True, True, True])
    rows = Rows(np.arange(6), expert, np.ones(6), valid, choices=7)
    result = routing.dispatch(rows, num_experts=3, capacity=2)
    np.testing.assert_array_equal(result.kept_N, [True, False, True, True, False, True])
    np.testing.assert_array_equal(result.slot_N, [0, -1, 0, 1, -1, 1])
    np.testing.assert_array_equal(result.buffer_EC, [[0, 3], [2, 5], [-1, -1]])
    assert result.overflow == pytest.approx(3 / 7)


def test_moe_layer_by_hand():
    """Token 2 to expert 0 (relu(2·3 - 1)·2 + 1 = 11, weight 1/2) and expert 1 (relu(2·-1) = 0, bias -4, weight 1/4).

    Token -1 to expert 1 (relu(1)·5 - 4 = 1, weight 3). Without its second row, token 2 gets 5.5.
    """
    experts = Experts(
        w_in_EDF=np.array([[[3.0]], [[-1.0]]]),
        w_out_EFD=np.array([[[2.0]], [[5.0]]]),
        b_in_EF=np.array([[-1.0], [0.0]]),
        b_out_ED=np.array([[1.0], [-4.0]]),
    )
    x = [[2.0], [-1.0]]
    rows = Rows(
        np.array([0, 1, 0, 1]), np.array([0, 1, 1, 0]), np.array([0.5, 3, 0.25, 9]), np.array([1, 1, 1, 0], bool), 3
    )
    np.testing.assert_allclose(routing.moe_layer(x, rows, experts, routing.relu), [[4.5], [3.0]])
    kept = routing.moe_layer(x, rows, experts, routing.relu, kept_N=[True, True, False, True])
    np.testing.assert_allclose(kept, [[5.5], [3.0]])
    weights = routing.dense_weights(rows, 2, 2)
    np.testing.assert_array_equal(weights, [[0.5, 0.25], [0, 3]])
    np.testing.assert_allclose(routing.mixture(x, weights, experts, routing.relu), [[4.5], [3.0]])


def test_gated_expert_by_hand():
    """silu(x W_gate) * (x W_in) at x = 2: silu(log 3)·4·(1/2), and silu(log 3) = log(3)·3/4."""
    experts = Experts(np.array([[[2.0]]]), np.array([[[0.5]]]), w_gate_EDF=np.array([[[math.log(3) / 2]]]))
    np.testing.assert_allclose(routing.mixture([[2.0]], [[1.0]], experts, routing.silu), [[1.5 * math.log(3)]])


def test_gelu_by_hand():
    """x Φ(x) at -1 and 0; the tanh form is within 2e-4 of it, but not it."""
    np.testing.assert_allclose(routing.gelu(np.array([-1.0, 0.0])), [-PHI_1, 0], rtol=1e-12)
    difference = abs(routing.gelu_tanh(np.array(-1.0)) + PHI_1)
    assert 1e-5 < difference < 2e-4

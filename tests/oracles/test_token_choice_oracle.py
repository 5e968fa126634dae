"""The oracles of token choice against cases computed by hand."""

import math

import numpy as np
import pytest

from tests.oracles import token_choice


def test_group_limited_choice_by_hand() -> None:
    """Three pairs of experts. Best single score: the first pair (.9); best sum of two: the second (.7 + .6)."""
    scores = [[0.9, 0.1, 0.7, 0.6, 0.8, 0.2]]
    one = token_choice.group_limited_choice(scores, 2, 3, 1, summed=1)
    np.testing.assert_array_equal(one, [[1, 1, 0, 0, 0, 0]])
    two = token_choice.group_limited_choice(scores, 2, 3, 1, summed=2)
    np.testing.assert_array_equal(two, [[0, 0, 1, 1, 0, 0]])
    both = token_choice.group_limited_choice(scores, 2, 3, 2, summed=1)
    np.testing.assert_array_equal(both, [[1, 0, 0, 0, 1, 0]])


def test_sigmoid_router_by_hand() -> None:
    """Scores 3/4, 1/2, 1/4: a bias of -.6 on the first hands its place to the last; weights 1/2 and 1/4 of 3/4."""
    logits = [[math.log(3), 0.0, -math.log(3)]]
    free = token_choice.sigmoid_router(logits, 2, [0, 0, 0])
    np.testing.assert_array_equal(free.expert, [0, 1])
    np.testing.assert_allclose(free.weight, [0.6, 0.4], rtol=1e-14)
    biased = token_choice.sigmoid_router(logits, 2, [-0.6, 0, 0], scaling=3.0)
    np.testing.assert_array_equal(biased.expert, [1, 2])
    np.testing.assert_allclose(biased.weight, [2, 1], rtol=1e-14)
    raw = token_choice.sigmoid_router(logits, 2, [-0.6, 0, 0], renormalize=False)
    np.testing.assert_allclose(raw.weight, [0.5, 0.25], rtol=1e-14)


def test_sequence_balance_loss_by_hand() -> None:
    """E = 3, K = 1. First example, two tokens: f = (3, 0, 0), P = (1/2, 1/3, 1/6): 3/2. Second: 2."""
    three = math.log(3)
    logits = [[three, 0.0, -three], [three, 0.0, -three], [-three, 0.0, -40.0]]
    # The third token's scores 1/4, 1/2 and 0 give P = (1/3, 2/3, 0).
    got = token_choice.sequence_balance_loss(logits, 1, [0, 0, 1])
    assert got == pytest.approx((3 / 2 + 3 * 2 / 3) / 2, rel=1e-12)


def test_updated_bias_by_hand() -> None:
    np.testing.assert_allclose(token_choice.updated_bias([0.5, 0, -1], [1, 4, 4], 0.1), [0.6, -0.1, -1.1])
    np.testing.assert_array_equal(token_choice.updated_bias([0.5, 0], [2, 2], 0.1), [0.5, 0])

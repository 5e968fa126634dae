"""The oracles of expert choice and soft slots against cases computed by hand."""

import math

import numpy as np

from tests.oracles import mixing


def test_expert_choice_by_hand() -> None:
    """Three tokens, two experts, k = 1: two tokens each. Token 0 is taken twice, token 2 by the second expert only."""
    probs = np.array([[0.6, 0.4], [0.9, 0.1], [0.3, 0.7]])
    rows = mixing.expert_choice_router(np.log(probs), 1)
    np.testing.assert_array_equal(rows.token, [1, 2, 0, 0])
    np.testing.assert_array_equal(rows.expert, [0, 1, 0, 1])
    np.testing.assert_allclose(rows.weight, [0.9, 0.7, 0.6, 0.4], rtol=1e-14)
    assert rows.choices == 4


def test_soft_slots_by_hand() -> None:
    """Two tokens; one expert with two slots. Odds 1 : 3 down the first slot, 1 : 1 down the second."""
    dispatch, combine = mixing.soft_slots([[0.0, 0.0], [math.log(3), 0.0]], 1)
    np.testing.assert_allclose(dispatch[:, 0], [[1 / 4, 1 / 2], [3 / 4, 1 / 2]], rtol=1e-14)
    np.testing.assert_allclose(combine[:, 0], [[1 / 2, 1 / 2], [3 / 4, 1 / 4]], rtol=1e-14)


def test_cosine_logits_by_hand() -> None:
    """(3, 4) against (10, 0) and (0, -2): cosines .6 and -.8, doubled."""
    np.testing.assert_allclose(mixing.cosine_logits([[3, 4]], [[10, 0], [0, -2]], 2), [[1.2, -1.6]], rtol=1e-14)

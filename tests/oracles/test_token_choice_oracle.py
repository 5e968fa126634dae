"""The oracles of token choice against cases computed by hand."""

import numpy as np

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

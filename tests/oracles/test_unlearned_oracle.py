"""The oracles of unlearned choice against cases computed by hand."""

import math

import numpy as np

from tests.oracles import unlearned


def test_weights_are_the_softmax_of_the_chosen_logits() -> None:
    """Experts 2 and 0 of logits 0, 50, log 3: weights 3/4 and 1/4. Rows go choice by choice."""
    logits = [[0.0, 50.0, math.log(3)], [1.0, 1.0, -7.0]]
    rows = unlearned.rows_of([[2, 0], [0, 1]], logits)
    np.testing.assert_array_equal(rows.token, [0, 1, 0, 1])
    np.testing.assert_array_equal(rows.expert, [2, 0, 0, 1])
    np.testing.assert_allclose(rows.weight, [0.75, 0.5, 0.25, 0.5], rtol=1e-14)


def test_the_mixing_function_has_its_published_values() -> None:
    """MurmurHash3 x86 32 of the empty string is the finaliser of its seed: 0 for 0, 0x514E28B7 for 1."""
    assert unlearned.mixed(0) == 0
    assert unlearned.mixed(1) == 0x514E28B7


def test_a_hash_with_all_draws_zero_counts_up() -> None:
    """Block 0 of seed 0 mixes to 0: factor 1, step 1, shift 0. So id r has experts r, r + 1."""
    np.testing.assert_array_equal(unlearned.hashed_experts(range(4), 2, 4, 0), [[0, 1], [1, 2], [2, 3], [3, 0]])

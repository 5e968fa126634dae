"""The decoder's oracle against cases computed by hand."""

import math

import numpy as np

from tests.oracles import decoder


def test_a_quarter_turn_by_hand() -> None:
    """Frequencies 1 and 1/2 at position π: (1, 0, ·, ·) turns by π, (0, 1, 0, 2) pairs 1 with 2 and turns by π/2."""
    turned = decoder.rotate(np.array([[[3.0, 1.0, 4.0, 2.0]]]), [math.pi], np.array([1.0, 0.5]))
    np.testing.assert_allclose(turned, [[[-3.0, -2.0, -4.0, 1.0]]], atol=1e-14)


def test_frequencies_by_hand() -> None:
    """Theta 16, width 4: 1 and 1/4, that is 8 and 2 turns in 16π positions."""
    length = 16 * math.pi
    np.testing.assert_allclose(decoder.rope_frequencies(4, 16.0), [1, 1 / 4])
    np.testing.assert_allclose(decoder.rope_frequencies(4, 16.0, "linear", factor=2.0), [1 / 2, 1 / 8])
    llama3 = {"factor": 4.0, "low_turns": 1.0, "high_turns": 5.0, "original_length": length}
    np.testing.assert_allclose(decoder.rope_frequencies(4, 16.0, "llama3", **llama3), [1, (1 / 4 + 3 / 4 / 4) / 4])
    # 8 turns at index 0, 1/2 at index 2: halfway between them at index 1.
    yarn = {"factor": 4.0, "fast_turns": 8.0, "slow_turns": 0.5, "original_length": length}
    np.testing.assert_allclose(decoder.rope_frequencies(4, 16.0, "yarn", **yarn), [1, (1 / 2 + 1 / 2 / 4) / 4])


def test_attention_by_hand() -> None:
    """Two queries share a key; scores 0 and ln 3 give 1/4 and 3/4, and a window of 1 gives the token's own value."""
    query, key = np.full((2, 2, 1), 1.0), np.array([[[0.0]], [[math.log(3)]]])
    value = np.array([[[4.0]], [[8.0]]])
    np.testing.assert_allclose(decoder.attend(query, key, value), [[[4.0]] * 2, [[7.0]] * 2])
    np.testing.assert_allclose(decoder.attend(query, key, value, window=1), [[[4.0]] * 2, [[8.0]] * 2])
    capped = 1 / (1 + math.exp(-math.tanh(math.log(3))))
    np.testing.assert_allclose(decoder.attend(query, key, value, cap=1.0)[1], [[4 + 4 * capped]] * 2)


def test_norm_and_swiglu_by_hand() -> None:
    np.testing.assert_allclose(decoder.rms_norm([3.0, 4.0], [2.0, 1.0], 0.0), [6 / 12.5**0.5, 4 / 12.5**0.5])
    weights = {"w_gate": np.array([[math.log(3)]]), "w_in": np.array([[2.0]]), "w_out": np.array([[5.0]])}
    np.testing.assert_allclose(decoder.swiglu(np.array([[1.0]]), weights), [[math.log(3) * 3 / 4 * 2 * 5]])

"""Rotary positions and their scalings against the oracle."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from moe.ops.rope import ROPE_SCALINGS, rotate, rotation
from tests.oracles import decoder

SETTINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "linear": {"factor": 2.5},
    "llama3": {"factor": 8.0, "low_turns": 1.5, "high_turns": 3.0, "original_length": 96},
    "yarn": {"factor": 4.0, "fast_turns": 16.0, "slow_turns": 2.0, "original_length": 128},
    "yarn, exact": {"factor": 4.0, "fast_turns": 9.0, "slow_turns": 2.0, "original_length": 128, "truncate": False},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_rotation(name: str) -> None:
    kind, width, theta = name.split(",")[0], 16, 500.0
    scaling = ROPE_SCALINGS[kind](**SETTINGS[name])
    x = np.random.default_rng(0).normal(size=(2, 5, 3, width)).astype(np.float32)
    position = np.array([[0, 1, 2, 3, 4], [7, 0, 90, 1, 2]])
    cos, sin = rotation(jnp.asarray(position), width, theta, scaling)
    actual = rotate(jnp.asarray(x), cos, sin)
    frequencies = decoder.rope_frequencies(width, theta, kind, **SETTINGS[name])
    for b in range(2):
        expected = scaling.attention_factor * decoder.rotate(x[b].astype(np.float64), position[b], frequencies)
        np.testing.assert_allclose(actual[b], expected, atol=5e-5)


def test_the_attention_factor_of_yarn() -> None:
    assert ROPE_SCALINGS["yarn"](factor=4.0).attention_factor == pytest.approx(0.1 * math.log(4) + 1)
    assert ROPE_SCALINGS["yarn"](attention=1.25).attention_factor == 1.25


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rope_scaling.factor = 0.5 must be at least 1"):
        ROPE_SCALINGS["linear"](factor=0.5)
    with pytest.raises(ValueError, match=r"low_turns = 4.0 must be positive and below high_turns = 4.0"):
        ROPE_SCALINGS["llama3"](low_turns=4.0)
    with pytest.raises(ValueError, match=r"slow_turns = 0.0 must be positive and below fast_turns = 32.0"):
        ROPE_SCALINGS["yarn"](slow_turns=0.0)

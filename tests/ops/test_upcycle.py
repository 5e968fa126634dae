"""Experts made of an MLP, against NumPy written from the papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.ops.upcycle import UpcycleConfig, alter, granularity, group_columns, to_experts

RNG = np.random.default_rng(0)
LAYERS, WIDTH, HIDDEN = 2, 6, 20
W_IN, W_GATE = (RNG.normal(0.3, 2.0, (LAYERS, WIDTH, HIDDEN)).astype(np.float32) for _ in range(2))
W_OUT = RNG.normal(-0.2, 0.5, (LAYERS, HIDDEN, WIDTH)).astype(np.float32)
KEY = jax.random.key(3)


def altered(config: UpcycleConfig, name: str = "w_in", layers: tuple[int, ...] = (4, 9), seed: int = 3) -> np.ndarray:
    weights = {"w_in": W_IN, "w_gate": W_GATE, "w_out": W_OUT}[name]
    experts = to_experts(jnp.array(weights), name, num_experts=3, pieces=1)
    return np.asarray(alter(experts, name, config, jnp.array(layers), jax.random.key(seed)))


def test_copies_are_the_mlp() -> None:
    for name, weights in (("w_in", W_IN), ("w_gate", W_GATE), ("w_out", W_OUT)):
        np.testing.assert_array_equal(altered(UpcycleConfig(), name), np.stack([weights] * 3, axis=1))


def test_the_experts_of_a_virtual_group_add_up_to_the_mlp() -> None:
    pieces, num_experts = 5, 10
    w_in, w_out = (
        np.asarray(to_experts(jnp.array(weights), name, num_experts, pieces), np.float64)
        for name, weights in (("w_in", W_IN), ("w_out", W_OUT))
    )
    assert w_in.shape == (LAYERS, num_experts, WIDTH, HIDDEN // pieces)
    np.testing.assert_array_equal(w_in[:, 7], W_IN[:, :, 8:12], "expert 7 is piece 2 of the second group")
    x = RNG.normal(size=(3, WIDTH))
    for layer in range(LAYERS):
        dense = np.tanh(x @ W_IN[layer].astype(np.float64)) @ W_OUT[layer].astype(np.float64)
        outputs = [np.tanh(x @ w_in[layer, e]) @ w_out[layer, e] for e in range(num_experts)]
        # Two groups, of combine weights that together are 1, the same within each group.
        mixed = sum(0.14 * y for y in outputs[:5]) + sum(0.06 * y for y in outputs[5:])
        np.testing.assert_allclose(mixed, dense, atol=1e-6)


def test_a_group_has_one_gate_column() -> None:
    gate = jnp.arange(12.0).reshape(1, 2, 6)
    np.testing.assert_array_equal(group_columns(gate, 3)[0], [[0, 0, 0, 1, 1, 1], [6, 6, 6, 7, 7, 7]])
    np.testing.assert_array_equal(group_columns(gate, 1), gate)


def test_noise_is_relative_to_the_matrix() -> None:
    added = altered(UpcycleConfig(noise=0.1)) - W_IN[:, None]
    assert len({expert.tobytes() for expert in added.reshape(-1, WIDTH * HIDDEN)}) == 6, "each its own"
    for layer in range(LAYERS):
        # 360 draws, whose standard deviation is known to 1 / √720.
        assert np.std(added[layer]) == pytest.approx(0.1 * np.std(W_IN[layer]), rel=0.15)
    assert np.abs(np.mean(added)) < 0.05


def test_dropped_units_are_drawn_anew_from_what_they_replace() -> None:
    config = UpcycleConfig(drop=0.3)
    kept = {}
    for name, weights in (("w_in", W_IN), ("w_gate", W_GATE), ("w_out", W_OUT)):
        by_unit = np.moveaxis(altered(config, name), -2 if name == "w_out" else -1, 2)
        old = np.moveaxis(weights, -2 if name == "w_out" else -1, 1)[:, None]
        same = by_unit == old
        kept[name] = same.all(axis=-1)
        np.testing.assert_array_equal(same.any(axis=-1), kept[name], "whole units")
        for layer, expert in np.ndindex(LAYERS, 3):
            gone = ~kept[name][layer, expert]
            assert gone.sum() == 6
            drawn, replaced = by_unit[layer, expert][gone], old[layer, 0][gone]
            # 36 draws: within 4 standard errors.
            assert abs(drawn.mean() - replaced.mean()) < 4 * replaced.std() / 6
            assert 0.5 < drawn.std() / replaced.std() < 1.5
    np.testing.assert_array_equal(kept["w_in"], kept["w_gate"], "the same units of all matrices")
    np.testing.assert_array_equal(kept["w_in"], kept["w_out"])
    assert len({units.tobytes() for units in kept["w_in"].reshape(-1, HIDDEN)}) > 3, "others in every expert"


def test_draws_belong_to_key_layer_and_expert() -> None:
    config = UpcycleConfig(noise=0.5, drop=0.2)
    both = altered(config)
    np.testing.assert_array_equal(altered(config, layers=(4, 4))[0], both[0])
    assert not np.array_equal(altered(config, layers=(5, 9))[0], both[0])
    assert not np.array_equal(altered(config, seed=4), both)


def test_the_output_alone_is_scaled() -> None:
    np.testing.assert_array_equal(altered(UpcycleConfig(output_scale=2.5)), altered(UpcycleConfig()))
    scaled = altered(UpcycleConfig(output_scale=2.5), "w_out")
    np.testing.assert_allclose(scaled, 2.5 * altered(UpcycleConfig(), "w_out"), rtol=1e-6)


def test_granularity() -> None:
    assert granularity(UpcycleConfig(), hidden=20, expert_width=20, num_experts=3, k=2) == 1
    split = UpcycleConfig(method="split")
    assert granularity(split, hidden=20, expert_width=5, num_experts=8, k=4) == 4
    assert granularity(split, hidden=20, expert_width=5, num_experts=8, k=None) == 4


@pytest.mark.parametrize(
    ("method", "fields", "words"),
    [
        ("copy", {}, r"moe\.expert_width = 5 must be 20.*upcycle\.method = 'split'"),
        ("split", {"expert_width": 6}, r"moe\.expert_width = 6 must divide 20"),
        ("split", {"expert_width": 40}, r"moe\.expert_width = 40 must divide 20"),
        ("split", {"num_experts": 6}, r"moe\.num_experts = 6 must be a multiple of 4"),
        ("split", {"k": 2}, r"router\.k = 2 must be a multiple of 4"),
    ],
)
def test_what_does_not_fit(method, fields: dict[str, int], words: str) -> None:  # type: ignore[no-untyped-def]
    sizes = {"hidden": 20, "expert_width": 5, "num_experts": 8, "k": 4} | fields
    with pytest.raises(ValueError, match=words):
        granularity(UpcycleConfig(method=method), **sizes)


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"noise": -0.1}, "noise = -0.1"), ({"drop": 1.5}, "drop = 1.5"), ({"output_scale": 0.0}, "output_scale = 0.0")],
)
def test_settings_out_of_range(fields: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        UpcycleConfig(**fields)

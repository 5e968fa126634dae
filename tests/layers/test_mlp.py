"""The feed-forward network against float64, dense and stacked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.layers.mlp import Activation, Mlp, init_mlp, mlp
from tests.oracles import routing as oracle


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_stacked_experts_match_the_oracle(activation: Activation) -> None:
    """Three experts, each on four rows of its own; expert by expert, and as one dense network."""
    rng = np.random.default_rng(0)
    params = init_mlp(jax.random.key(0), 5, 7, activation, num_experts=3)
    weights = {name: param[...] for name, param in params.items()}
    assert weights["w_in"].shape == (3, 5, 7)
    assert weights["w_out"].shape == (3, 7, 5)
    experts = oracle.Experts(weights["w_in"], weights["w_out"], w_gate_EDF=weights.get("w_gate"))
    nonlinearity = oracle.silu if activation == "swiglu" else oracle.gelu_tanh
    x_EnD = rng.normal(size=(3, 4, 5)).astype(np.float32)
    got = jax.jit(mlp, static_argnums=2)(weights, jnp.asarray(x_EnD), activation)
    for e in range(3):
        expected = [oracle.expert(experts, e, x_D.astype(np.float64), nonlinearity) for x_D in x_EnD[e]]
        np.testing.assert_allclose(got[e], expected, rtol=1e-4, atol=1e-5)
    dense = Mlp(5, 7, activation, key=jax.random.key(1))
    for name, weight in dense.weights.items():
        weight[...] = weights[name][2]
    np.testing.assert_allclose(dense(jnp.asarray(x_EnD[2:])), got[2:], rtol=1e-5, atol=1e-6)


def test_parameters_have_the_variance_of_one_over_fan_in_and_differ_between_experts() -> None:
    params = init_mlp(jax.random.key(0), 64, 256, "swiglu", num_experts=2)
    for name, fan_in in (("w_in", 64), ("w_gate", 64), ("w_out", 256)):
        value = np.asarray(params[name][...])
        assert value.dtype == np.float32
        np.testing.assert_allclose(value.std(axis=(1, 2)) * fan_in**0.5, 1, rtol=0.03)
        assert np.abs(value[0] - value[1]).max() > 0.1 * value.std()
    assert np.abs(params["w_in"][...] - params["w_gate"][...]).max() > 0.01


def test_bf16_inputs_give_bf16_outputs_from_float32_parameters() -> None:
    dense = Mlp(5, 7, "gelu", key=jax.random.key(1))
    x = jax.random.normal(jax.random.key(2), (2, 3, 5))
    low = dense(x.astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), dense(x), atol=0.05)

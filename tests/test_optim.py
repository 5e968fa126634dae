"""The gradient's clipping, against the library's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe.optim import OptimizerConfig, make_optimizer


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 1e3])
def test_clipping_is_optaxs(scale: float) -> None:
    """One factor for all entries, wherever the norm lies; nothing happens to a gradient of zeros."""
    rng = np.random.default_rng(0)
    gradient = {"w": jnp.asarray(scale * rng.normal(size=(3, 4))), "bias": [jnp.asarray(scale * rng.normal(size=4))]}
    config = OptimizerConfig(clip_norm=0.5, warmup_steps=1)
    ours = make_optimizer(config, steps=10)
    (clip_state, _), reference = ours.init(gradient), optax.clip_by_global_norm(0.5)
    assert clip_state == reference.init(gradient)
    params = jax.tree.map(jnp.ones_like, gradient)
    # Adam's first moment is (1 - b1) times what it was given.
    _, state = ours.update(gradient, ours.init(params), params)
    expected, _ = reference.update(gradient, reference.init(gradient))
    jax.tree.map(
        lambda mu, wanted: np.testing.assert_allclose(mu, (1 - config.b1) * wanted, rtol=1e-5, atol=1e-12),
        state[1][0].mu,
        expected,
    )


def test_without_a_limit_nothing_is_clipped() -> None:
    gradient = {"w": 1e3 * jnp.ones((2, 2))}
    config = OptimizerConfig(clip_norm=0.0, warmup_steps=1)
    optimizer = make_optimizer(config, steps=10)
    _, state = optimizer.update(gradient, optimizer.init(gradient), gradient)
    np.testing.assert_allclose(state[0].mu["w"], (1 - config.b1) * 1e3, rtol=1e-5)

"""The weights that inspection shows are those that a model computes with."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import config as config_lib
from moe.inspection import expert_weights
from moe.models import LmConfig, Variables, make_model
from moe.parallel.mesh import make_mesh
from moe.routers.unlearned import hashed_experts
from moe.workdir import Loaded
from tests.test_step import compile_fast

__all__ = ["compile_fast"]


def load(router: str, **model: Any) -> Loaded:
    """An untrained model on digits, as `load_model` returns a trained one."""
    table = config_lib.load_file("configs/digits.py")
    table.update({"router": {"name": router}, "moe": {"num_experts": 4, "expert_width": 8}})
    table.update({"model": {"width": 16, "heads": 2, "mlp_width": 16, "patch_size": 4, **model}})
    config = config_lib.resolve(table)
    config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, group_size=1))
    built = make_model(config.model, config.moe, config.router)
    return Loaded(config, make_mesh(config.mesh), built, built.init(jax.random.key(0)))


IMAGES = np.random.default_rng(0).random((8, 8, 8, 1), np.float32)


@pytest.mark.parametrize("router", ["softmax", "sigmoid", "sparse_topk", "soft"])
def test_weights_are_of_every_token_and_layer(router: str) -> None:
    loaded = load(router)
    weights = expert_weights(loaded, IMAGES)
    assert weights.shape == (2, 8, 4, 4)
    chosen = np.sum(weights > 0, axis=-1)
    state = loaded.model.apply(loaded.variables, jnp.asarray(IMAGES), keys=None, mesh=loaded.mesh)
    np.testing.assert_allclose(chosen.mean(axis=(1, 2)), state.routers.metrics["experts_per_token"], rtol=1e-6)
    if router == "soft":
        np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)


def test_layers_stand_in_order_and_patches_row_by_row() -> None:
    # Fewer images than devices.
    weights = expert_weights(load("hash"), IMAGES[:3])
    assert weights.shape == (2, 3, 4, 4)
    expected = np.asarray(hashed_experts(jnp.arange(4), 2, 4, seed=0))
    for weights_TE in weights.reshape(-1, 4, 4):
        np.testing.assert_array_equal(np.sort(weights_TE.argsort(axis=1)[:, 2:], axis=1), np.sort(expected, axis=1))


def test_of_text_a_token_is_routed_as_in_its_document() -> None:
    model = LmConfig(width=16, depth=2, heads=2, mlp_width=8, moe_every=1, length=8)
    config = dataclasses.replace(load("softmax").config, model=model)
    built = make_model(model, config.moe, config.router)
    loaded = Loaded(config, make_mesh(config.mesh), built, built.init(jax.random.key(1)))
    tokens = np.random.default_rng(2).integers(0, 256, (3, 8)).astype(np.int32)
    weights = expert_weights(loaded, tokens)
    assert weights.shape == (2, 3, 8, 4)
    assert (np.sum(weights > 0, axis=-1) == 2).all()
    # A decoder's token doesn't see what follows.
    np.testing.assert_allclose(expert_weights(loaded, tokens[:, :5]), weights[:, :, :5], rtol=1e-4)


def test_many_examples_go_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, images = load("softmax"), np.random.default_rng(1).random((19, 8, 8, 1), np.float32)
    whole = expert_weights(loaded, images)
    monkeypatch.setattr("moe.inspection._AT_A_TIME", 8)
    np.testing.assert_allclose(expert_weights(loaded, images), whole, rtol=1e-5)


def test_the_model_is_the_same_with_its_own_state() -> None:
    loaded = load("sigmoid")
    before = expert_weights(loaded, IMAGES)
    biased = jax.tree.map(lambda leaf: leaf.at[:, 0].add(10.0), loaded.variables.router_state)
    after = expert_weights(loaded._replace(variables=Variables(loaded.variables.params, biased)), IMAGES)
    assert np.all(after[..., 0] > 0)
    assert not np.all(before[..., 0] > 0)


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="no experts"):
        expert_weights(load("softmax", moe_every=0), IMAGES)

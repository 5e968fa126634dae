"""The loop over the training step: taken apart by layers or not, the same state comes out."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

import train
from moe.checksums import checksums
from moe.config import Config
from moe.data.pipeline import DataConfig
from moe.layers.moe import MoeConfig
from moe.models import ViTConfig
from moe.optim import OptimizerConfig
from moe.parallel.mesh import MeshConfig, make_mesh
from moe.routers import Sigmoid

# Periods of two blocks after one dense block, and a router with a state.
MODEL = ViTConfig(
    width=16, depth=5, heads=2, mlp_width=16, moe_every=2, dense_layers=1, patch_size=4, scan_layers=False
)
CONFIG = Config(
    seed=3,
    steps=10,
    batch_size=8,
    model=MODEL,
    moe=MoeConfig(num_experts=4, expert_width=16, group_size=2, capacity_factor=1.0),
    router=Sigmoid(k=2),
    data=DataConfig(),
    optimizer=OptimizerConfig(warmup_steps=1, clip_norm=0.1, weight_decay=1.0),
    mesh=MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
)


def step_of(config: Config) -> tuple[train.Step, dict[str, jax.Array]]:
    mesh = make_mesh(config.mesh)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.uniform(size=(8, 8, 8, 1)).astype(np.float32),
        "label": rng.integers(0, 10, 8).astype(np.int32),
    }
    return train.make_step(config, mesh), train.to_devices(batch, ("image", "label"), mesh)


def is_apart(state: Any) -> bool:
    return any(isinstance(node, list) for node in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, list)))


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_layers_apart_take_the_same_steps(accumulation_steps: int) -> None:
    config = dataclasses.replace(CONFIG, accumulation_steps=accumulation_steps)
    step, batch = step_of(config)
    expected, taken = step.init(jax.random.key(0)), step.loop.enter(step.init(jax.random.key(0)))
    assert is_apart(taken.variables.params)
    assert is_apart(taken.opt_state)
    for _ in range(3):
        expected, known = step.train(expected, batch)
        taken, metrics = step.loop.train(taken, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), metrics, known)
    left = step.loop.leave(taken)
    assert jax.tree.structure(left) == jax.tree.structure(expected)
    # Adam divides by gradients that are almost zero; a weight that only one of them decays differs by 3e-3.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5), left, expected)


def test_the_state_is_laid_out_as_before_and_comes_back_bit_by_bit() -> None:
    step, _ = step_of(CONFIG)
    kept = jax.device_get(step.init(jax.random.key(0)))
    entered = step.loop.enter(step.init(jax.random.key(0)))
    for x, wanted in zip(*map(jax.tree.leaves, (entered, step.loop.abstract_state)), strict=True):
        assert (x.shape, x.dtype, x.sharding) == (wanted.shape, wanted.dtype, wanted.sharding)
    left = step.loop.leave(entered)
    for x, before, wanted in zip(*map(jax.tree.leaves, (left, kept, step.abstract_state)), strict=True):
        assert x.sharding.is_equivalent_to(wanted.sharding, x.ndim)
        np.testing.assert_array_equal(x, before)
    params = step.loop.leave(entered.variables.params)
    jax.tree.map(np.testing.assert_array_equal, params, kept.variables.params)


def test_a_state_that_was_entered_is_used_up() -> None:
    """There is no room for two of a large model."""
    step, _ = step_of(CONFIG)
    state = step.init(jax.random.key(0))
    step.loop.enter(state)
    assert state.variables.params["blocks"]["periods"]["blocks"][0]["attention"]["w_in"].is_deleted()


def test_a_scanned_model_stays_as_it_is() -> None:
    step, _ = step_of(dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, scan_layers=True)))
    state = step.init(jax.random.key(0))
    assert step.loop.enter(state) is state
    assert step.loop.leave(state) is state
    assert step.loop.abstract_state is step.abstract_state


def test_a_save_compiles_nothing() -> None:
    step, _ = step_of(CONFIG)
    entered = step.loop.enter(step.init(jax.random.key(0)))
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )
    jax.clear_caches()
    checksums(step.loop.leave(entered))
    step.loop.leave(entered.variables)
    assert compiled == []

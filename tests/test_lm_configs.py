"""The large language models: they are the published ones, and their training step can be traced."""

import math
from pathlib import Path
from typing import Any

import jax
import pytest

import train
from moe import config as config_lib
from moe.config import Config
from moe.models import make_model
from moe.parallel.mesh import MeshConfig, make_mesh
from moe.routers import Sigmoid

CONFIGS = Path(__file__).parents[1] / "configs"
# All parameters, as counted in the published weights; billions of all and of those that a token meets, as published
# (2409.02060, 2401.04088, 2505.09388, 2412.19437). Qwen3's 3.35 is published as 3.3.
PUBLISHED = {
    "olmoe_1b_7b": (6_919_161_856, 6.9, 1.3),
    "mixtral_8x7b": (46_702_792_704, 46.7, 12.9),
    "qwen3_30b_a3b": (30_532_122_624, 30.5, 3.3),
    "deepseek_v3_like": (None, 671, 37),
}


def load(name: str, *overrides: str) -> Config:
    table = config_lib.load_file(str(CONFIGS / f"{name}.py"))
    config_lib.override(table, overrides)
    return config_lib.resolve(table)


def count(config: Config) -> tuple[int, int]:
    """Parameters, and those of them that a token meets: of the routed experts k."""
    model = make_model(config.model, config.moe, config.router)
    params = jax.eval_shape(model.init, jax.random.key(0)).params
    total = active = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        total += leaf.size
        routed = "/experts/" in jax.tree_util.keystr(path, simple=True, separator="/")
        active += leaf.size * config.router.k // config.moe.num_experts if routed else leaf.size
    return total, active


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_model_has_the_published_parameters(name: str) -> None:
    config = load(name)
    exact, billions, active_billions = PUBLISHED[name]
    total, active = count(config)
    if exact is not None:
        assert total == exact
    assert total / 1e9 == pytest.approx(billions, rel=0.01)
    # Two digits are published, rounded or cut off; our attention adds 0.2 to the last one.
    assert active / 1e9 == pytest.approx(active_billions, rel=0.022)


def test_what_deepseek_v3_has_besides_its_attention_is_exact() -> None:
    """With latent attention in place of ours the model has the parameters of the published one, and a token as many."""
    config = load("deepseek_v3_like")
    model, width = config.model, config.model.width
    assert (model.heads, model.kv_heads, model.head_width) == (96, 8, 128)
    ours = 2 * width * 128 * (96 + 8)
    down, up = width * (1536 + 512 + 64), 1536 * 128 * 192 + 512 * 128 * 256
    latent = down + up + 128 * 128 * width + 1536 + 512
    total, active = (number + model.depth * (latent - ours) for number in count(config))
    assert total / 1e9 == pytest.approx(671.03, abs=0.01)
    assert active / 1e9 == pytest.approx(37.55, abs=0.01)
    assert isinstance(config.router, Sigmoid)


@pytest.mark.parametrize(
    ("name", "layers", "at_balance"), [("olmoe_1b_7b", 16, 1), ("mixtral_8x7b", 32, 2), ("qwen3_30b_a3b", 48, 8)]
)
def test_losses_weigh_what_they_weigh_in_print(name: str, layers: int, at_balance: int) -> None:
    """Ours add up over layers, each 1 at balance; theirs are taken over all layers and scaled otherwise."""
    config = load(name)
    coefficient = {"olmoe_1b_7b": 0.01, "mixtral_8x7b": 0.02, "qwen3_30b_a3b": 0.001}[name]
    assert config.model.depth * config.router.balance_weight == pytest.approx(coefficient * at_balance)
    assert config.moe.balance_scope == "batch"
    assert config.model.depth == layers


def fields(table: Any) -> set[str]:
    """Dotted names of all fields but those of routers, which a config needs only for the one that it has."""
    found: set[str] = set()
    for name, value in table.items():
        below = fields(value) if hasattr(value, "items") else set()
        found |= {f"{name}.{field}" for field in below} or {name}
    return {field for field in found if not field.startswith("router.")}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_field_can_be_set(name: str) -> None:
    """They have those of configs/stdlib_lm.py, so that `--config.FIELD=VALUE` finds it."""
    table, small = (config_lib.load_file(str(CONFIGS / f"{stem}.py")) for stem in (name, "stdlib_lm"))
    assert fields(table) == fields(small)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_training_step_can_be_traced(name: str) -> None:
    """Nothing is computed; on eight devices that have every axis but data."""
    config = load(name, "mesh.data=1", "mesh.fsdp=2", "mesh.expert=2", "mesh.tensor=2")
    assert config.mesh == MeshConfig(1, 2, 2, 2)
    step = train.make_step(config, make_mesh(config.mesh))
    state, metrics = jax.eval_shape(step.train, step.abstract_state, step.abstract_batch)
    assert step.abstract_batch["tokens"].shape == (config.batch_size, 4096)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), step.abstract_state
    )
    assert metrics["train"]["loss"].shape == ()
    assert metrics["moe"]["overflow"].shape == (config.model.depth - config.model.dense_layers,)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("router", ["softmax", "sigmoid", "sparse_topk", "successive_halving", "expert_choice"])
def test_any_router_serves(name: str, router: str) -> None:
    total, _ = count(load(name, f"router.name={router}"))
    assert math.isclose(total, count(load(name))[0], rel_tol=1e-3)

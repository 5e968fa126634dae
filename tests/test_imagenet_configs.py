"""The ImageNet configs: they resolve and hold the published models."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

import train
from moe import cli
from moe import config as config_lib
from moe.config import Config
from moe.data.photo import PhotoConfig
from moe.data.randaugment import RandAugment
from moe.models import make_model
from tests.data import photos

CONFIGS = Path(__file__).parents[1] / "configs"
NAMES = ["vmoe_s32_imagenet", "vmoe_b16_imagenet", "soft_moe_s16_imagenet"]
# Blocks with experts, counted from 1.
BLOCKS = {
    "vmoe_s32_imagenet": [6, 8],
    "vmoe_b16_imagenet": [2, 4, 6, 8, 10, 12],
    "soft_moe_s16_imagenet": [7, 8, 9, 10, 11, 12],
}
# Parameters in millions where the papers state them, and what they state them for: V-MoE S/32 and B/16 with 32 experts
# in every second block and the classes of JFT-300M (2106.05974, appendix); ViT S/16, on whose blocks Soft MoE stands,
# with those of JFT-4B (2308.00951).
PUBLISHED: dict[str, tuple[float, int, dict[str, int]]] = {
    "vmoe_s32_imagenet": (296.9, 32, {"num_classes": 18_291, "dense_layers": 0}),
    "vmoe_b16_imagenet": (979.0, 32, {"num_classes": 18_291}),
    "soft_moe_s16_imagenet": (33, 1, {"num_classes": 29_593, "dense_layers": 0, "moe_every": 0}),
}
OURS = {"vmoe_s32_imagenet": 56_925_160, "vmoe_b16_imagenet": 285_290_728, "soft_moe_s16_imagenet": 921_194_734}


def load(name: str) -> Config:
    return config_lib.resolve(config_lib.load_file(str(CONFIGS / f"{name}.py")))


def parameters(config: Config) -> int:
    model = make_model(config.model, config.moe, config.router)
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0)).params))


def moe_blocks(config: Config) -> list[int]:
    model = config.model
    if not model.moe_every:
        return []
    return list(range(model.dense_layers + model.moe_every, model.depth + 1, model.moe_every))


def left_out(config: Config) -> int:
    """Parameters of the published model that ours lacks: biases, the class token's second vector, scales of norms of
    queries and keys.
    """
    model, blocks = config.model, len(moe_blocks(config))
    biases = model.width  # of the patches
    biases += model.depth * 4 * model.width
    feed_forwards = model.depth - blocks + blocks * config.moe.num_experts
    biases += feed_forwards * (model.mlp_width + model.width)
    if model.pooling == "class_token":
        return biases + model.representation_width + model.width
    return biases + model.depth * 2 * (model.width // model.heads)


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_the_published_one(name: str) -> None:
    config = load(name)
    assert parameters(config) == OURS[name]
    assert moe_blocks(config) == BLOCKS[name]
    millions, experts, changes = PUBLISHED[name]
    as_published = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **changes),
        moe=dataclasses.replace(config.moe, num_experts=experts),
    )
    count = parameters(as_published) + left_out(as_published)
    assert round(count / 1e6, 0 if isinstance(millions, int) else 1) == millions


@pytest.mark.parametrize("name", NAMES)
def test_the_data_are_v_moes(name: str) -> None:
    data = load(name).data
    assert data.photo == PhotoConfig(
        min_area=0.05,
        max_ratio=4 / 3,
        flip=True,
        randaugment=RandAugment(layers=2, magnitude=10.0),
        resize=256,
        value_range=(-1.0, 1.0),
    )
    assert (data.train_split, data.test_split, data.image_size) == ("train[:99%]", "validation", 224)
    assert not data.augment


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_starts_at_one_class_in_all(name: str) -> None:
    config = load(name)
    assert config.loss == "sigmoid"
    assert config.model.num_classes * math.exp(config.model.head_bias) == pytest.approx(1)


@pytest.mark.parametrize("name", NAMES)
def test_epochs(name: str) -> None:
    config = load(name)
    assert config.steps * config.batch_size / 1_268_355 == pytest.approx(300, abs=0.01)


def test_a_small_run_from_photographs_to_accuracy(tmp_path: Path) -> None:
    """The config as it stands, but for sizes, on a set that is stored as ImageNet is."""
    small = {
        "steps": 2,
        "batch_size": 8,
        "data.name": "snapshots",
        "data.data_dir": photos.prepare(tmp_path / "photos"),
        "data.image_size": 16,
        "data.photo.resize": 20,
        "data.threads": 2,
        "model.image_size": (16, 16, 3),
        "model.patch_size": 8,
        "model.num_classes": 5,
        "model.width": 16,
        "model.depth": 4,
        "model.dense_layers": 2,
        "model.representation_width": 16,
        "model.heads": 2,
        "model.mlp_width": 16,
        "moe.expert_width": 16,
        "moe.group_size": 1,
        "optimizer.warmup_steps": 1,
        "mesh.expert": 8,
    }
    command = [f"--config={CONFIGS / 'vmoe_s32_imagenet.py'}", f"--workdir={tmp_path / 'run'}"]
    command += [f"--config.{name}={value}" for name, value in small.items()]
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        with pytest.raises(SystemExit) as exit_info:
            cli.run(train.main, command)
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
    assert not exit_info.value.code
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["step"] == 2
    assert result["test/accuracy"] * 7 == pytest.approx(round(result["test/accuracy"] * 7))  # the seven to evaluate on
    logged = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert np.isfinite(logged["train/loss"])
    assert "moe/layer_3/overflow" in logged

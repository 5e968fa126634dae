"""The meshes for slices that configs name: they fill the slice, divide the model, and leave it room."""

import math
from pathlib import Path
from typing import Any

import jax
import pytest

from configs.base import slices
from moe import config as config_lib
from moe.config import Config
from moe.layers.moe import group_count
from moe.models import make_model
from moe.parallel.mesh import BATCH_AXES, partition_spec
from moe.plan.chips import CHIPS

CONFIGS = Path(__file__).parents[1] / "configs"
# Every slice that a config has a mesh for.
PRESETS = {
    "deepseek_v3_like": "v5p-512 v5p-1024 v5p-2048",
    "mixtral_8x7b": "v5e-128 v5e-256 v5p-64 v5p-128 v6e-64 v6e-256",
    "olmoe_1b_7b": "v5e-16 v5e-64 v5e-256 v5p-8 v5p-64 v5p-128 v6e-16 v6e-64 v6e-256",
    "qwen3_30b_a3b": "v5e-128 v5e-256 v5p-32 v5p-64 v5p-128 v6e-64 v6e-256",
    "soft_moe_s16_imagenet": "v5e-8 v5e-16 v5p-8 v5p-16 v6e-8 v6e-16",
    "vmoe_b16_imagenet": "v5e-32 v5e-64 v5p-16 v5p-32 v6e-16 v6e-32",
    "vmoe_s32_imagenet": "v5e-8 v5e-16 v5p-8 v5p-16 v6e-8 v6e-16",
}


def load(name: str, preset: str = "") -> Config:
    return config_lib.resolve(config_lib.load_file(f"{CONFIGS / name}.py" + (preset and f":{preset}")))


def bytes_per_device(config: Config, sizes: dict[str, int]) -> float:
    """Of parameters, two moments and the gradient, and of its sum where micro-batches add up to it, all float32."""
    model = make_model(config.model, config.moe, config.router)
    variables = jax.eval_shape(model.init, jax.random.key(0))
    total = 0

    def add(leaf: Any, axes: tuple[str | None, ...]) -> None:
        nonlocal total
        spec = partition_spec(axes)
        for size, axis in zip(leaf.shape, spec, strict=True):
            assert axis is None or size % sizes[axis] == 0, (leaf.shape, axes)
        total += leaf.size // math.prod(sizes[axis] for axis in spec if axis is not None)

    jax.tree.map(add, variables.params, model.axes.params)
    return total * 4 * (5 if config.accumulation_steps > 1 else 4)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_fills_its_slice_and_leaves_room(name: str) -> None:
    meshes = []
    for preset in PRESETS[name].split():
        config = load(name, preset)
        kind, _, number = preset.partition("-")
        sizes = dict(vars(config.mesh))
        meshes.append(config.mesh)
        assert math.prod(sizes.values()) == int(number) // (2 if kind == "v5p" else 1), preset
        assert config.batch_size % config.accumulation_steps == 0, preset
        micro_batch = config.batch_size // config.accumulation_steps
        assert micro_batch % math.prod(sizes[axis] for axis in BATCH_AXES) == 0, preset
        assert group_count(micro_batch, config.moe.group_size) >= 1, preset
        assert config.moe.num_experts % sizes["expert"] == 0, preset
        # The rest is for activations, and for the layer whose parameters are gathered.
        assert bytes_per_device(config, sizes) < 0.65 * CHIPS[kind].usable_bytes, preset
    assert load(name).mesh in meshes


def test_an_unknown_preset_is_answered_with_those_there_are(tmp_path: Path) -> None:
    assert set(PRESETS) == {path.stem for path in CONFIGS.glob("*.py") if "MESHES" in path.read_text()}
    for preset in ("v5p-63", ""):
        message = rf"mixtral_8x7b.py has no preset '{preset}': it has {', '.join(PRESETS['mixtral_8x7b'].split())}\.$"
        with pytest.raises(ValueError, match=message):
            config_lib.load_file(f"{CONFIGS / 'mixtral_8x7b.py'}:{preset}")
    with pytest.raises(ValueError, match=r"digits.py has no preset 'v5p-64': leave out ':v5p-64', as it has none\.$"):
        config_lib.load_file(f"{CONFIGS / 'digits.py'}:v5p-64")
    with pytest.raises(ValueError, match=r"there is no config file .*none.py\.$"):
        config_lib.load_file(f"{tmp_path / 'none.py'}:v5p-64")


def test_micro_batches_are_rows_of_devices() -> None:
    mesh = {"dcn": 2, "data": 4, "fsdp": 8, "expert": 2, "tensor": 4}
    assert slices.micro_batches(1024, mesh) == 8
    assert slices.micro_batches(1024, mesh, rows=4) == 2
    for rows in (3, 16):
        with pytest.raises(ValueError, match=rf"micro-batches of {128 * rows} examples, {rows} a device, don't divide"):
            slices.micro_batches(1024, mesh, rows)


def test_a_shape_that_leaves_chips_over_is_refused() -> None:
    assert slices.meshes(v5p_16=(2, 2, 1)) == {"v5p-16": {"dcn": 1, "data": 2, "fsdp": 2, "expert": 2, "tensor": 1}}
    for shape in ((1, 8, 1), (3, 1, 1)):
        with pytest.raises(ValueError, match=rf"expert={shape[1]} .* doesn't divide the 4 chips of v5p-8"):
            slices.meshes(v5p_8=shape)

"""Meshes and batches, against a compiler that is a formula."""

import dataclasses
import math
from typing import Any

import jax
import pytest

from moe import config as config_lib
from moe.config import Config
from moe.models import make_model
from moe.parallel.mesh import MeshConfig
from moe.plan import search
from moe.plan.chips import GIB, parse_slice
from tests.plan.test_analytic import LM, variables_of

CONFIG = dataclasses.replace(
    LM,
    batch_size=32,
    model=dataclasses.replace(LM.model, kv_heads=4, mlp_width=16),
    moe=dataclasses.replace(LM.moe, expert_width=16),
)
SLICE = parse_slice("v5e:4x4")


def test_meshes_divide_everything() -> None:
    found = list(search.meshes(CONFIG, SLICE))
    assert len(found) == len(set(found))
    for mesh in found:
        assert math.prod(dataclasses.asdict(mesh).values()) == 16
        # Four experts, four heads, widths of 8 and 16, 32 rows.
        assert 4 % mesh.expert == 0
        assert 4 % mesh.tensor == 0
        assert 8 % mesh.fsdp == 0
    everything = {(d, f, e, t) for t in (1, 2, 4) for e in (1, 2, 4) for f in (1, 2, 4, 8) for d in (16 / f / e / t,)}
    assert len(found) == sum(one[0] >= 1 for one in everything)


def peak(rows: int, fixed: float = 3.0) -> dict[str, Any]:
    return {"hbm/peak_bytes": fixed + 0.5 * rows, "hbm/limit_bytes": 16.0, "fits": fixed + 0.5 * rows <= 16.0}


@pytest.mark.parametrize("batch", [16, 64, 256, 1024])
def test_the_largest_batch_is_found_by_a_few_plans(batch: int) -> None:
    asked: list[int] = []

    def measure(config: Config) -> dict[str, Any]:
        asked.append(config.batch_size)
        return peak(config.batch_size // 16)

    config = dataclasses.replace(CONFIG, batch_size=batch)
    mesh = {"dcn": 1, "data": 4, "fsdp": 2, "expert": 2, "tensor": 1}
    assert search.largest_batch(config, mesh, peak(batch // 16), measure) == 26 * 16
    assert len(asked) <= 3


def test_no_batch_may_fit() -> None:
    mesh = {"dcn": 1, "data": 4, "fsdp": 2, "expert": 2, "tensor": 1}
    config = dataclasses.replace(CONFIG, batch_size=32)
    measure = lambda one: peak(one.batch_size // 16, fixed=20.0)  # noqa: E731
    assert search.largest_batch(config, mesh, peak(2, fixed=20.0), measure) == 0


def test_the_sweep_compiles_three_and_ranks_them() -> None:
    times = iter([3.0, 1.0, 2.0])
    plans = search.sweep(
        CONFIG,
        SLICE,
        variables_of(CONFIG),
        lambda _: {"bound/step_seconds": next(times), "fits": True},
    )
    assert [plan["bound/step_seconds"] for _, plan in plans] == [1.0, 2.0, 3.0]


def test_a_batch_that_no_mesh_divides_is_named() -> None:
    config = dataclasses.replace(CONFIG, batch_size=3)
    with pytest.raises(ValueError, match="no mesh of 16 devices divides a micro-batch of 3 examples"):
        search.sweep(config, SLICE, variables_of(config), lambda _: {})


def test_the_configs_own_mesh_is_among_them() -> None:
    """However little arithmetic thinks of it."""
    variables = variables_of(CONFIG)
    ranked = sorted(search.meshes(CONFIG, SLICE), key=lambda mesh: search.rough_seconds(CONFIG, mesh, SLICE, variables))
    tried: list[MeshConfig] = []

    def measure(config: Config) -> dict[str, Any]:
        tried.append(config.mesh)
        return {"bound/step_seconds": 1.0, "fits": True}

    search.sweep(dataclasses.replace(CONFIG, mesh=ranked[-1]), SLICE, variables, measure)
    assert tried == [*ranked[:3], ranked[-1]]


def test_what_does_not_fit_is_left_out_by_arithmetic() -> None:
    """Mixtral by pieces of matrices alone: 87 GiB of state on each device of v5p, and 17 GiB of kept inputs."""
    config = config_lib.load_file("configs/mixtral_8x7b.py:v5p-128")
    config_lib.override(config, ["accumulation_steps=8"])
    mixtral = config_lib.resolve(config)
    slice_ = parse_slice("v5p:4x4x4")
    model = make_model(mixtral.model, mixtral.moe, mixtral.router)
    variables = jax.eval_shape(model.init, jax.random.key(0))
    assert search.rough_seconds(mixtral, MeshConfig(data=8, tensor=8), slice_, variables) == math.inf
    held = search.rough_bytes(mixtral, MeshConfig(data=8, tensor=8), variables) / GIB
    assert 100 < held < 143
    assert search.rough_seconds(mixtral, MeshConfig(data=1, fsdp=8, expert=8), slice_, variables) < 60

"""Meshes and batches, against a compiler that is a formula."""

import dataclasses
import math
from typing import Any

import pytest

from moe.config import Config
from moe.plan import search
from moe.plan.chips import parse_slice
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

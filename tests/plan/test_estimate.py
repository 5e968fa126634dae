"""Bounds by hand, on slices whose devices are only places."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from jax.sharding import Mesh

from moe.plan import estimate
from moe.plan.chips import parse_slice
from moe.plan.traffic import Transfer

AXES = ("data", "fsdp", "expert", "tensor")


@dataclasses.dataclass(frozen=True)
class Device:
    """Where a device is."""

    coords: tuple[int, ...]
    slice_index: int
    core: int = 0
    platform: str = "tpu"
    process_index: int = 0


def mesh_of(shape: tuple[int, ...], sizes: tuple[int, ...]) -> Mesh:
    """One slice's devices in the order of their places, laid out in a mesh of these sizes."""
    return lay([Device(place, 0) for place in itertools.product(*map(range, shape))], sizes)


def lay(devices: list[Any], sizes: tuple[int, ...]) -> Mesh:
    return Mesh(np.array(devices, object).reshape(sizes), AXES)


def test_links_are_those_of_the_dimensions_that_devices_differ_in() -> None:
    v5e, mesh = parse_slice("v5e:4x4"), mesh_of((4, 4), (1, 4, 4, 1))
    assert estimate.bandwidth(("expert",), mesh, v5e) == 2 * 50e9
    assert estimate.bandwidth(("fsdp", "expert"), mesh, v5e) == 4 * 50e9
    # Neighbours alone share one link.
    assert estimate.bandwidth(("tensor",), mesh_of((2, 2), (1, 1, 2, 2)), parse_slice("v5e:2x2")) == 50e9


def test_cores_share_a_chip_and_slices_the_network() -> None:
    tpu7x = parse_slice("tpu7x:2x2x1", count=2)
    cores = itertools.product(range(2), range(2), range(2), range(2))
    mesh = lay([Device((x, y, 0), number, core) for number, x, y, core in cores], (2, 4, 1, 2))
    assert estimate.bandwidth(("data",), mesh, tpu7x) == 100e9 / 8 / 2
    assert estimate.bandwidth(("fsdp",), mesh, tpu7x) == 2 * 100e9 / 2
    # Two cores of one chip.
    assert estimate.bandwidth(("tensor",), mesh, tpu7x) == 6 * 100e9 / 2


@pytest.mark.parametrize(("flops", "moved", "sent", "by"), [(197e12, 1.0, 1.0, "compute"), (1.0, 819e9, 1.0, "hbm")])
def test_the_longest_part_binds(flops: float, moved: float, sent: float, by: str) -> None:
    bounds = estimate.bound(
        flops,
        moved,
        [Transfer("all-reduce", ("fsdp",), 4, sent, 1.0)],
        mesh_of((4, 4), (1, 4, 4, 1)),
        parse_slice("v5e:4x4"),
    )
    assert bounds.by == by
    assert bounds.step_seconds == pytest.approx(1)


def test_transfers_add_up_along_an_axis_and_overlap_between_axes() -> None:
    sent = [
        Transfer("all-gather", ("fsdp",), 4, 100e9, 1.0),
        Transfer("reduce-scatter", ("fsdp",), 4, 200e9, 1.0),
        Transfer("all-to-all", ("expert",), 4, 100e9, 1.0),
    ]
    bounds = estimate.bound(0.0, 0.0, sent, mesh_of((4, 4), (1, 4, 4, 1)), parse_slice("v5e:4x4"))
    assert bounds.interconnect == {"fsdp": 3.0, "expert": 1.0}
    assert (bounds.by, bounds.step_seconds) == ("interconnect", 3.0)

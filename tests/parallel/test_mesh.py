"""The mesh over devices of one slice and of several."""

from typing import Any
from unittest import mock

import jax
import pytest

from moe.parallel.mesh import MESH_AXES, MeshConfig, make_mesh


def devices_of(slices: int, each: int) -> list[Any]:
    """Chips, as far as laying out a mesh looks at them; four a slice are a square."""

    def chip(number: int) -> mock.Mock:
        place = {"coords": (number % 2, number // 2 % 2, 0), "core_on_chip": 0, "process_index": number // each}
        kind = {"platform": "tpu", "device_kind": "TPU v5 lite", "slice_index": number // each}
        return mock.Mock(spec=jax.Device, id=number, **place, **kind)

    return [chip(number) for number in range(slices * each)]


def test_axes_lie_over_the_devices_in_order() -> None:
    mesh = make_mesh(MeshConfig(dcn=2, expert=2))
    assert dict(mesh.shape) == {"dcn": 2, "data": 2, "fsdp": 1, "expert": 2, "tensor": 1}
    assert tuple(mesh.shape) == MESH_AXES
    assert mesh.devices.ravel().tolist() == jax.devices()


def test_only_dcn_lies_across_slices() -> None:
    devices = devices_of(slices=2, each=4)
    grid = make_mesh(MeshConfig(dcn=2, fsdp=2), devices).devices
    assert grid.shape == (2, 2, 2, 1, 1)
    for index, one in enumerate(grid):
        assert {device.slice_index for device in one.ravel()} == {index}


@pytest.mark.parametrize("dcn", [1, 4])
def test_dcn_has_to_be_the_number_of_slices(dcn: int) -> None:
    devices = devices_of(slices=2, each=4)
    with pytest.raises(ValueError, match=rf"^the 8 devices lie in 2 slices: set mesh\.dcn = 2, not {dcn}\.$"):
        make_mesh(MeshConfig(dcn=dcn), devices)

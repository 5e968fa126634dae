"""Bounds on a step's time from what its program does and what the chips can do at most."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from moe.plan.chips import Slice
from moe.plan.traffic import Transfer


class Bounds(NamedTuple):
    """Least seconds that a step takes by each part of the machine, were it alone; `by` names the longest.

    interconnect: by mesh axes, those that a collective spans joined by "+".
    """

    compute: float
    hbm: float
    interconnect: Mapping[str, float]

    @property
    def seconds(self) -> Mapping[str, float]:
        """Of each part; interconnect is that of the slowest axes, since others may use other links meanwhile."""
        slowest = max(self.interconnect.values(), default=0.0)
        return {"compute": self.compute, "hbm": self.hbm, "interconnect": slowest}

    @property
    def by(self) -> str:
        """Which part binds."""
        return max(self.seconds, key=lambda part: self.seconds[part])

    @property
    def step_seconds(self) -> float:
        """The least that a step can take, all parts at work at once."""
        return self.seconds[self.by]


def bound(flops: float, hbm_bytes: float, transfers: list[Transfer], mesh: Mesh, slice_: Slice) -> Bounds:
    """flops, hbm_bytes, transfers: of one device."""
    chip = slice_.chip
    interconnect: dict[str, float] = {}
    for one in transfers:
        name = "+".join(one.axes)
        seconds = one.bytes / bandwidth(one.axes, mesh, slice_)
        interconnect[name] = interconnect.get(name, 0.0) + seconds
    return Bounds(flops * chip.cores / chip.flops, hbm_bytes * chip.cores / chip.hbm_bandwidth, interconnect)


def bandwidth(axes: tuple[str, ...], mesh: Mesh, slice_: Slice) -> float:
    """Bytes/s that a device can receive from those along some axes of the mesh.

    A link in each direction of every dimension of the torus along which these devices differ, two where the dimension
    goes round; over the data centre's network where they lie in different slices. Chips share their links among cores.
    """
    chip = slice_.chip
    lines = np.moveaxis(mesh.devices, [mesh.axis_names.index(axis) for axis in axes], range(len(axes)))
    one = lines.reshape(int(np.prod(lines.shape[: len(axes)])), -1)[:, 0]
    if len({getattr(device, "slice_index", 0) for device in one}) > 1:
        return chip.dcn_bandwidth / chip.cores
    coords = np.array([device.coords for device in one])
    spans = [len(set(column)) for column in coords.T]
    links = sum(2 if size > 2 else 1 for size in spans if size > 1)
    # The two cores of a chip have no link between them in the table: they are taken to have all of the chip's.
    return (links or chip.links) * chip.link_bandwidth / chip.cores

"""The mesh of devices, and the one table that maps logical axes of arrays to its axes."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe.types import PyTree

# Axes of the mesh: slices, with the data centre's network between them; replicas of everything; replicas with sharded
# parameters; experts; pieces of one matrix.
MESH_AXES = ("dcn", "data", "fsdp", "expert", "tensor")

# Examples spread over every axis on which the computation outside the experts would otherwise be repeated.
BATCH_AXES = ("dcn", "data", "fsdp", "expert")

# Logical axis of a parameter, named where the parameter is born -> mesh axis.
LOGICAL_AXES: Mapping[str, str | None] = {
    "layers": None,
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "vocab": "tensor",
    "expert": "expert",
}

Axes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Size of each mesh axis; one of them may be -1, for all devices that the others leave.

    data: copies of everything. fsdp: shards of every parameter, gathered where it is used. expert: shards of the
    experts, between which tokens travel by all-to-all. tensor: pieces of every matrix and of the heads.
    dcn: slices, of which each has a copy of everything; between them only gradients are summed.
    The batch is cut along dcn × data × fsdp × expert.
    """

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1
    dcn: int = 1


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh that `config` asks for over `devices` (all by default), neighbours in the torus where they can be.

    Raises ValueError if its sizes don't multiply to their number, or the devices lie in other slices than `dcn` says.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config, len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1 and shape[0] != slices:
        raise ValueError(f"the {len(devices)} devices lie in {slices} slices: set mesh.dcn = {slices}, not {shape[0]}.")
    if slices > 1:
        one, each = (1, *shape[1:]), (slices,) + (1,) * (len(shape) - 1)
        grid = mesh_utils.create_hybrid_device_mesh(one, each, devices, allow_split_physical_axes=True)
    elif devices[0].platform == "tpu":
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        grid = np.array(devices).reshape(shape)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def mesh_shape(config: MeshConfig, count: int) -> tuple[int, ...]:
    """Sizes of the mesh's axes over `count` devices. Raises ValueError if they don't multiply to their number."""
    sizes = dataclasses.asdict(config)
    wrong = {axis: size for axis, size in sizes.items() if size < 1 and size != -1}
    free = [axis for axis, size in sizes.items() if size == -1]
    if wrong or len(free) > 1:
        raise ValueError(f"mesh sizes {sizes} must be positive, with at most one -1 for the devices left over.")
    known = math.prod(size for size in sizes.values() if size != -1)
    if free:
        sizes[free[0]] = count // known
    if math.prod(sizes.values()) != count:
        product = " × ".join(f"{axis}={size}" for axis, size in dataclasses.asdict(config).items())
        raise ValueError(
            f"mesh {product} doesn't fill the {count} devices here: its sizes must multiply to that number."
        )
    return tuple(sizes[axis] for axis in MESH_AXES)


def batch_shards(mesh: Mesh) -> int:
    """Number of pieces that a batch is cut into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over every batch axis of the mesh."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def local_rows(mesh: Mesh, batch_size: int) -> tuple[int, ...]:
    """The rows of a batch that lie on this process's devices, in order.

    With an axis across processes along which the batch isn't cut, several have the same.
    """
    each = batch_size // batch_shards(mesh)
    return tuple(row for block in _local_blocks(mesh) for row in range(block * each, (block + 1) * each))


def to_global(local: np.ndarray, mesh: Mesh) -> jax.Array:
    """The batch of which every process has its `local_rows`, laid over all devices."""
    blocks = _local_blocks(mesh)
    each = len(local) // len(blocks)
    shape = (each * batch_shards(mesh), *local.shape[1:])

    def of(index: Any) -> np.ndarray:
        block = blocks.index((index[0].start or 0) // each)
        return local[block * each : (block + 1) * each]

    return jax.make_array_from_callback(shape, batch_sharding(mesh), of)


def _local_blocks(mesh: Mesh) -> list[int]:
    """Which of the batch's pieces, in order, lie on this process's devices."""
    here = np.vectorize(_is_here)(mesh.devices)
    return np.flatnonzero(here.reshape(batch_shards(mesh), -1).any(axis=1)).tolist()


def _is_here(device: jax.Device) -> bool:
    return device.process_index == jax.process_index()


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def constrain_batch(x: jax.Array, mesh: Mesh) -> jax.Array:
    """Tells the partitioner that the leading axis of x is the batch."""
    return jax.lax.with_sharding_constraint(x, batch_sharding(mesh))


def partition_spec(axes: Axes) -> PartitionSpec:
    """Maps logical axes to mesh axes. Raises ValueError for an unknown name, or two that share a mesh axis."""
    unknown = [axis for axis in axes if axis is not None and axis not in LOGICAL_AXES]
    if unknown:
        raise ValueError(f"logical axis {unknown[0]!r} is not one of {', '.join(LOGICAL_AXES)}.")
    mapped = [LOGICAL_AXES[axis] if axis is not None else None for axis in axes]
    used = [axis for axis in mapped if axis is not None]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {axes} map to mesh axes {mapped}: a mesh axis can be used only once.")
    return PartitionSpec(*mapped)


def param_shardings(abstract: PyTree, axes: PyTree, mesh: Mesh) -> PyTree:
    """NamedSharding of every parameter; `axes` has the tree of `abstract`, with a tuple of logical axes at each leaf.

    Raises ValueError where a mesh axis doesn't divide the dimension laid along it.
    """

    def one(path: tuple, leaf: jax.ShapeDtypeStruct, leaf_axes: Axes) -> NamedSharding:
        spec = partition_spec(leaf_axes)
        for size, mesh_axis, axis in zip(leaf.shape, spec, leaf_axes, strict=True):
            if mesh_axis is not None and size % mesh.shape[mesh_axis]:
                raise ValueError(
                    f"mesh.{mesh_axis} = {mesh.shape[mesh_axis]} doesn't divide the {size} entries of axis '{axis}' "
                    f"of parameter {jax.tree_util.keystr(path, simple=True, separator='/')}."
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, abstract, axes)

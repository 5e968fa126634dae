"""Sends tokens to experts across devices, and brings the results back."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from moe.ops.permute import from_slots, into_slots, seat
from moe.parallel.mesh import BATCH_AXES, Axes, batch_shards, partition_spec
from moe.types import Assignments, Slots

Weights = dict[str, Float[Array, "..."]]
ApplyExperts = Callable[[Weights, Float[Array, "e n D"]], Float[Array, "e n D"]]


def dispatch(
    apply_experts: ApplyExperts,
    weights: Weights,
    weight_axes: dict[str, Axes],
    x_GTD: Float[Array, "G T D"],
    routing: Assignments | Slots,
    *,
    num_experts: int,
    capacity: int,
    mesh: Mesh,
) -> tuple[Float[Array, "G T D"], Int[Array, "G"]]:
    """Runs each token through its experts and adds up what they return, by combine weight.

    apply_experts(weights, x_enD): the experts' network, on as many experts as `weights` hold along their first axis;
        linear in its last matrix, so that pieces along the tensor axis add up.
    routing: of every group; leaves have a leading axis G.
    Returns the outputs and, per group, the number of choices that found a place in a queue of `capacity`.

    Each device seats the tokens of its own groups, then an all-to-all over the expert axis trades "my groups, all
    experts" for "all groups, my experts" (GShard, 2006.16668, section 3.2); its size is fixed by the capacity. Groups
    that can't be dealt out evenly, because there are fewer than devices, are left to the partitioner.
    """
    run = partial(_dispatch_local, apply_experts, num_experts=num_experts, capacity=capacity)
    if x_GTD.shape[0] % batch_shards(mesh):
        return run(weights, x_GTD, routing)
    batch = PartitionSpec(BATCH_AXES)
    # Within an expert's matrices only the expert and tensor axes stay apart: fsdp shards are gathered at the border.
    weight_specs = {name: _without_fsdp(partition_spec(axes)) for name, axes in weight_axes.items()}
    return jax.shard_map(
        partial(run, expert_axis="expert", tensor_axis="tensor"),
        mesh=mesh,
        in_specs=(weight_specs, batch, batch),
        out_specs=(batch, batch),
    )(weights, x_GTD, routing)


def _without_fsdp(spec: PartitionSpec) -> PartitionSpec:
    return PartitionSpec(*(None if axis == "fsdp" else axis for axis in spec))


def _dispatch_local(
    apply_experts: ApplyExperts,
    weights: Weights,
    x_GTD: Float[Array, "G T D"],
    routing: Assignments | Slots,
    *,
    num_experts: int,
    capacity: int,
    expert_axis: str | None = None,
    tensor_axis: str | None = None,
) -> tuple[Float[Array, "G T D"], Int[Array, "G"]]:
    """One device's part; without axis names, the whole."""
    num_groups, num_tokens, width = x_GTD.shape
    seats, kept_G = jax.vmap(lambda one: seat(one, num_tokens, num_experts, capacity))(routing)
    x_GSD = jax.vmap(into_slots)(x_GTD, seats)
    x_GECD = x_GSD.reshape(num_groups, num_experts, -1, width)
    capacity = x_GECD.shape[2]
    if expert_axis is not None:
        x_GECD = jax.lax.all_to_all(x_GECD, expert_axis, split_axis=1, concat_axis=0, tiled=True)
    groups_here, experts_here = x_GECD.shape[:2]

    x_EnD = jnp.swapaxes(x_GECD, 0, 1).reshape(experts_here, groups_here * capacity, width)
    y_EnD = apply_experts(weights, x_EnD)
    if tensor_axis is not None:
        y_EnD = jax.lax.psum(y_EnD, tensor_axis)
    y_GECD = jnp.swapaxes(y_EnD.reshape(experts_here, groups_here, capacity, width), 0, 1)

    if expert_axis is not None:
        y_GECD = jax.lax.all_to_all(y_GECD, expert_axis, split_axis=0, concat_axis=1, tiled=True)
    y_GSD = y_GECD.reshape(num_groups, num_experts * capacity, width)
    return jax.vmap(lambda y_SD, one: from_slots(y_SD, one, num_tokens))(y_GSD, seats), kept_G

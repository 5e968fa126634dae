"""Sends tokens to experts across devices, and brings the results back."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from moe.ops.grouped_matmul import grouped_matmul
from moe.ops.permute import from_slots, group_rows, into_slots, seat, send_queues
from moe.parallel.mesh import BATCH_AXES, Axes, batch_shards, partition_spec
from moe.types import Assignments, Slots

Weights = dict[str, Float[Array, "..."]]
# (x, w) -> x times the matrix of each row's expert, in x's dtype.
Product = Callable[[Array, Array], Array]
ApplyExperts = Callable[[Weights, Float[Array, "*e n D"], Product], Float[Array, "*e n D"]]

# Rows that one product takes, at most and at least.
_BLOCK, _LEAST_BLOCK = 128, 8
# What multiplies sorted rows on a mesh of these devices.
_GROUPED_MATMUL = {"cpu": "blocks", "tpu": "megablox"}


def dispatch(
    apply_experts: ApplyExperts,
    weights: Weights,
    weight_axes: dict[str, Axes],
    x_GTD: Float[Array, "G T D"],
    routing: Assignments | Slots,
    *,
    num_experts: int,
    capacity: int | None,
    mesh: Mesh,
) -> tuple[Float[Array, "G T D"], Int[Array, "G"]]:
    """Runs each token through its experts and adds up what they return, by combine weight.

    apply_experts(weights, x, product): the experts' network on as many experts as `weights` hold along their first
        axis, with `product` for every matrix; linear in its last, so that pieces along the tensor axis add up.
    routing: of every group; leaves have a leading axis G.
    capacity: places in an expert's queue, per group. None: every choice is seated, and rows are sorted by expert, of
        all groups together, so that the work follows the choices made, however they fall.
    Returns the outputs and, per group, the number of choices that found a place.

    Each device handles the tokens of its own groups, and an all-to-all over the expert axis trades "my groups, all
    experts" for "all groups, my experts" (GShard, 2006.16668, section 3.2), of a size fixed by the capacity or, without
    one, by the rows a device may have. Groups that can't be dealt out evenly, because there are fewer than devices, are
    left to the partitioner, with queues as long as a group.
    """
    divides = x_GTD.shape[0] % batch_shards(mesh) == 0
    run: Callable[..., tuple[Array, Array]]
    product = _GROUPED_MATMUL.get(mesh.devices.flat[0].platform, "ragged_dot")
    sorts = isinstance(routing, Assignments) and capacity is None and divides
    if sorts:
        run = partial(_without_capacity, apply_experts, num_experts=num_experts, implementation=product)
    else:
        places = x_GTD.shape[1] if capacity is None else capacity
        run = partial(_with_capacity, apply_experts, num_experts=num_experts, capacity=places)
    if not divides or mesh.size == 1:
        return run(weights, x_GTD, routing)
    batch = PartitionSpec(BATCH_AXES)
    # Within an expert's matrices only the expert and tensor axes stay apart: fsdp shards are gathered at the border.
    weight_specs = {name: _without_fsdp(partition_spec(axes)) for name, axes in weight_axes.items()}
    return jax.shard_map(
        partial(run, expert_axis="expert", tensor_axis="tensor"),
        mesh=mesh,
        in_specs=(weight_specs, batch, batch),
        out_specs=(batch, batch),
        # The kernel doesn't say between which devices its results differ.
        check_vma=not (sorts and product == "megablox"),
    )(weights, x_GTD, routing)


def _without_fsdp(spec: PartitionSpec) -> PartitionSpec:
    return PartitionSpec(*(None if axis == "fsdp" else axis for axis in spec))


def _with_capacity(
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
    """One device's part, through queues of fixed length; without axis names, the whole."""
    num_groups, num_tokens, width = x_GTD.shape
    seats, kept_G = jax.vmap(lambda one: seat(one, num_tokens, num_experts, capacity))(routing)
    x_GSD = jax.vmap(into_slots)(x_GTD, seats)
    x_GECD = x_GSD.reshape(num_groups, num_experts, -1, width)
    capacity = x_GECD.shape[2]
    if expert_axis is not None:
        x_GECD = jax.lax.all_to_all(x_GECD, expert_axis, split_axis=1, concat_axis=0, tiled=True)
    groups_here, experts_here = x_GECD.shape[:2]

    x_EnD = jnp.swapaxes(x_GECD, 0, 1).reshape(experts_here, groups_here * capacity, width)
    y_EnD = apply_experts(weights, x_EnD, batched_product)
    if tensor_axis is not None:
        y_EnD = jax.lax.psum(y_EnD, tensor_axis)
    y_GECD = jnp.swapaxes(y_EnD.reshape(experts_here, groups_here, capacity, width), 0, 1)

    if expert_axis is not None:
        y_GECD = jax.lax.all_to_all(y_GECD, expert_axis, split_axis=0, concat_axis=1, tiled=True)
    y_GSD = y_GECD.reshape(num_groups, num_experts * capacity, width)
    return jax.vmap(lambda y_SD, one: from_slots(y_SD, one, num_tokens))(y_GSD, seats), kept_G


def batched_product(x: Float[Array, "*e n X"], w: Float[Array, "*e X Y"]) -> Float[Array, "*e n Y"]:
    """x w in x's dtype, sums in float32."""
    return jnp.matmul(x, w.astype(x.dtype), preferred_element_type=jnp.float32).astype(x.dtype)


def _without_capacity(
    apply_experts: ApplyExperts,
    weights: Weights,
    x_GTD: Float[Array, "G T D"],
    routing: Assignments,
    *,
    num_experts: int,
    implementation: str,
    expert_axis: str | None = None,
    tensor_axis: str | None = None,
) -> tuple[Float[Array, "G T D"], Int[Array, "G"]]:
    """One device's part, by sorting rows; without axis names, the whole."""
    num_groups, num_tokens, width = x_GTD.shape
    x_SD = x_GTD.reshape(-1, width)
    first_G1 = num_tokens * jnp.arange(num_groups, dtype=jnp.int32)[:, None]
    token_N = (first_G1 + routing.token).reshape(-1)
    expert_N, weight_N, valid_N = (a.reshape(-1) for a in (routing.expert, routing.weight, routing.valid))
    experts = partial(
        _sorted_rows_through_experts, apply_experts, weights, implementation=implementation, tensor_axis=tensor_axis
    )
    if expert_axis is None or jax.lax.axis_size(expert_axis) == 1:
        y_ND = experts(x_SD, token_N, expert_N, valid_N, num_experts)
    else:
        # Every device may want to send all of its rows to any one other.
        shards = jax.lax.axis_size(expert_axis)
        local = num_experts // shards
        sent = send_queues(expert_N // local, valid_N, shards)
        token_R, expert_R = (
            a.at[sent.source].get(mode="fill", fill_value=fill)
            for a, fill in ((token_N, x_SD.shape[0]), (expert_N % local, local))
        )
        trade = partial(jax.lax.all_to_all, axis_name=expert_axis, split_axis=0, concat_axis=0, tiled=True)
        x_RD, expert_R = trade(x_SD.at[token_R].get(mode="fill", fill_value=0)), trade(expert_R)
        y_RD = experts(x_RD, jnp.arange(len(x_RD)), jnp.minimum(expert_R, local - 1), expert_R < local, local)
        y_ND = trade(y_RD).at[sent.place].get(mode="fill", fill_value=0)
    weighted_ND = y_ND.astype(jnp.float32) * jnp.where(valid_N, weight_N, 0.0)[:, None]
    total_SD = jnp.zeros(x_SD.shape, jnp.float32).at[token_N].add(weighted_ND)
    return total_SD.astype(x_GTD.dtype).reshape(x_GTD.shape), jnp.sum(routing.valid, axis=1, dtype=jnp.int32)


def _sorted_rows_through_experts(
    apply_experts: ApplyExperts,
    weights: Weights,
    x_SD: Float[Array, "S D"],
    index_N: Int[Array, "N"],
    expert_N: Int[Array, "N"],
    valid_N: Bool[Array, "N"],
    num_experts: int,
    *,
    implementation: str,
    tensor_axis: str | None,
) -> Float[Array, "N D"]:
    """What its expert returns for each row x[index]; zeros for the rows that aren't valid."""
    block = 1
    if implementation == "megablox":
        # A quarter of what an expert may expect, down to a power of two: padding stays small beside the rows.
        quarter = max(1, expert_N.shape[0] // (4 * num_experts))
        block = min(_BLOCK, max(_LEAST_BLOCK, 1 << quarter.bit_length() - 1))
    rows = group_rows(expert_N, valid_N, num_experts, block)
    index_P = index_N.at[rows.source].get(mode="fill", fill_value=x_SD.shape[0])
    x_PD = x_SD.at[index_P].get(mode="fill", fill_value=0)
    product = partial(grouped_matmul, sizes_E=rows.sizes, block=block, implementation=implementation)
    y_PD = apply_experts(weights, x_PD, product)
    if tensor_axis is not None:
        y_PD = jax.lax.psum(y_PD, tensor_axis)
    return y_PD.at[rows.place].get(mode="fill", fill_value=0)

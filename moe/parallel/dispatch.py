"""Sends tokens to experts across devices, and brings the results back."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from moe.ops.permute import from_slots, group_rows, into_slots, seat
from moe.ops.products import BATCHED, Grouped, Product
from moe.parallel.exchange import Weights, through_experts_elsewhere, vary_like
from moe.parallel.mesh import BATCH_AXES, Axes, batch_shards, partition_spec
from moe.types import Assignments, Slots

ApplyExperts = Callable[[Weights, Float[Array, "*e n D"], Product], Float[Array, "*e n D"]]

IMPLEMENTATIONS = ("einsum", "capacity", "dropless")

# Rows that one product takes, at most and at least.
_BLOCK, _LEAST_BLOCK = 128, 8
# What multiplies sorted rows on a mesh of these devices.
_GROUPED_MATMUL = {"cpu": "blocks", "tpu": "megablox"}
# Where XLA has an all-to-all of pieces whose sizes the data decide; on v5e in slices of up to so many devices
# (libtpu refuses "limited ICI routing", which its larger slices have).
_RAGGED_ALL_TO_ALL, _MOST_ON_V5E = {"gpu", "tpu"}, 16
# Rows per expert and device from which sorted rows cost no more than queues with some room: full tiles or blocks of a
# product that runs near the speed of a dense one. Without such a product they never do.
_ROWS_FOR_SPEED = {"cpu": 256, "tpu": 512}


def sorts_fast(mesh: Mesh, num_rows: int, num_experts: int) -> bool:
    """Whether training without capacity is as fast as with one, for num_rows choices of a micro-batch on a mesh.

    On TPU from 512 rows per expert on, where padding to blocks costs an eighth at most; on CPU from 256 on, where
    sorted rows take no longer than queues with a capacity factor of 1.25 and need less memory. On GPU never, since
    `lax.ragged_dot` promises nothing there.
    """
    rows_per_expert = num_rows // batch_shards(mesh) * mesh.shape["expert"] / num_experts
    least = _ROWS_FOR_SPEED.get(_platform(mesh))
    return least is not None and rows_per_expert >= least


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
    implementation: str | None = None,
    receive_factor: float = 4.0,
) -> tuple[Float[Array, "G T D"], Int[Array, "G"]]:
    """Runs each token through its experts and adds up what they return, by combine weight.

    apply_experts(weights, x, product): the experts' network on as many experts as `weights` hold along their first
        axis, with `product` for every matrix; linear in its last, so that pieces along the tensor axis add up.
    weights, weight_axes: the experts' matrices by name, with a first axis of num_experts, and their logical axes.
    x_GTD: the tokens of every group. routing: of every group; leaves have a leading axis G. A token names an expert at
        most once.
    capacity: places in an expert's queue, per group. None: every choice is seated.
    implementation: how, not what. "einsum": one-hot tensors [T, E, C] (GShard, 2006.16668, section 3.2). "capacity":
        the same queues by index. "dropless": rows sorted by expert, of all groups together, so that the work follows
        the choices made, however they fall; it has no queues. None: dropless without a capacity, capacity with one.
        Queues without a capacity are as long as a group. Soft slots are such tensors already, whatever is named.
    receive_factor: see `moe.parallel.exchange`; for dropless on a mesh with an expert axis.
    Returns the outputs and, per group, the number of choices that found a place. Raises ValueError for an unknown
    implementation, for dropless with a capacity, and where the shapes don't fit.

    Each device handles the tokens of its own groups, and an all-to-all over the expert axis trades "my groups, all
    experts" for "all groups, my experts" (GShard), of a size that follows the tokens and not the number of experts.
    Groups that can't be dealt out evenly, because there are fewer than devices, are left to the partitioner, or
    without queues dealt out by rows.
    """
    name = _chosen(implementation, capacity)
    apply_experts = partial(_apply_pieces, apply_experts)
    if not 0 < receive_factor < math.inf:
        raise ValueError(f"receive_factor = {receive_factor} must be positive and finite.")
    _check_shapes(weights, x_GTD, routing, num_experts)
    divides = x_GTD.shape[0] % batch_shards(mesh) == 0
    # One device trades nothing: left to shard_map, its sums over one device would still copy every gradient.
    expert_axis, tensor_axis = ("expert", "tensor") if mesh.size > 1 else (None, None)
    # Within an expert's matrices only the expert and tensor axes stay apart: fsdp shards are gathered at the border.
    weight_specs = {name: _without_fsdp(partition_spec(axes)) for name, axes in weight_axes.items()}
    batch = PartitionSpec(BATCH_AXES)
    run: Callable[..., tuple[Array, Array]]
    if name == "dropless" and isinstance(routing, Assignments):
        platform = _platform(mesh)
        product = _GROUPED_MATMUL.get(platform, "ragged_dot")
        through_experts = partial(
            _rows_through_experts,
            apply_experts,
            num_experts=num_experts,
            implementation=product,
            ragged=_trades_ragged(mesh),
            receive_factor=receive_factor,
            expert_axis=expert_axis,
            tensor_axis=tensor_axis,
        )
        # The kernel doesn't say between which devices its results differ.
        check_vma = product != "megablox"
        if not divides:
            through_experts = partial(_dealt_out, through_experts, mesh=mesh, specs=weight_specs, check_vma=check_vma)
            return _without_capacity(through_experts, weights, x_GTD, routing)
        run = partial(_without_capacity, through_experts)
    else:
        places = x_GTD.shape[1] if capacity is None else capacity
        run = partial(_with_capacity, apply_experts, num_experts=num_experts, capacity=places, one_hot=name == "einsum")
        check_vma = True
        if not divides:
            return run(weights, x_GTD, routing)
        run = partial(run, expert_axis=expert_axis, tensor_axis=tensor_axis)
    if check_vma and not (name == "dropless" and mesh.size == 1):
        # Or the backward pass of a scan over layers would keep the matrices of every layer a second time. The rules of
        # grouped products don't but where matrices vary, and every array that a checkpoint keeps is read and written
        # once more, to round it.
        run = jax.checkpoint(run, policy=_not_a_copy, prevent_cse=False)
    if mesh.size == 1:
        return run(weights, x_GTD, routing)
    return jax.shard_map(
        run, mesh=mesh, in_specs=(weight_specs, batch, batch), out_specs=(batch, batch), check_vma=check_vma
    )(weights, x_GTD, routing)


def _not_a_copy(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy of `jax.checkpoint`: keep all but what is an array again, of another type or marked as varying."""
    return primitive.name not in ("pvary", "convert_element_type")


def _apply_pieces(apply_experts: ApplyExperts, weights: Weights, x: Array, product: Product) -> Array:
    """`apply_experts`, where x comes to differ along the tensor axis once, and so do its gradients add up once."""
    return apply_experts(weights, vary_like(x, next(iter(weights.values()))), product)


def _trades_ragged(mesh: Mesh) -> bool:
    is_v5e = getattr(mesh.devices.flat[0], "device_kind", "").startswith("TPU v5 lite")
    refused = is_v5e and mesh.size // mesh.shape["dcn"] > _MOST_ON_V5E
    return _platform(mesh) in _RAGGED_ALL_TO_ALL and not refused


def _platform(mesh: Mesh) -> str:
    return mesh.devices.flat[0].platform


def _chosen(implementation: str | None, capacity: int | None) -> str:
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation = {implementation!r} must be None or one of {', '.join(IMPLEMENTATIONS)}.")
    if capacity is not None and capacity < 1:
        raise ValueError(f"capacity = {capacity} places per expert must be at least 1, or None for no limit.")
    if implementation == "dropless" and capacity is not None:
        raise ValueError(f"dropless dispatch has no queues: capacity = {capacity} must be None.")
    return implementation or ("dropless" if capacity is None else "capacity")


def _check_shapes(weights: Weights, x_GTD: Array, routing: Assignments | Slots, num_experts: int) -> None:
    lead = {leaf.shape[0] for leaf in routing}
    if lead != {x_GTD.shape[0]}:
        raise ValueError(f"a routing of {sorted(lead)} groups doesn't fit tokens [G, T, D] = {list(x_GTD.shape)}.")
    if isinstance(routing, Slots) and routing.dispatch.shape[1:3] != (x_GTD.shape[1], num_experts):
        raise ValueError(
            f"slots {list(routing.dispatch.shape)} must be [G, T, E, C] for {x_GTD.shape[1]} tokens and {num_experts} "
            "experts."
        )
    wrong = {name: weight.shape[0] for name, weight in weights.items() if weight.shape[0] != num_experts}
    if wrong:
        raise ValueError(f"weights of {wrong} experts must be of num_experts = {num_experts}.")


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
    one_hot: bool,
    expert_axis: str | None = None,
    tensor_axis: str | None = None,
) -> tuple[Float[Array, "G T D"], Int[Array, "G"]]:
    """One device's part, through queues of fixed length; without axis names, the whole."""
    num_groups, num_tokens, width = x_GTD.shape
    seats, kept_G = jax.vmap(lambda one: seat(one, num_tokens, num_experts, capacity, one_hot=one_hot))(routing)
    x_GSD = jax.vmap(into_slots)(x_GTD, seats)
    x_GECD = x_GSD.reshape(num_groups, num_experts, -1, width)
    capacity = x_GECD.shape[2]
    if expert_axis is not None:
        x_GECD = jax.lax.all_to_all(x_GECD, expert_axis, split_axis=1, concat_axis=0, tiled=True)
    groups_here, experts_here = x_GECD.shape[:2]

    x_EnD = jnp.swapaxes(x_GECD, 0, 1).reshape(experts_here, groups_here * capacity, width)
    y_EnD = apply_experts(weights, x_EnD, BATCHED)
    if tensor_axis is not None:
        y_EnD = jax.lax.psum(y_EnD, tensor_axis)
    y_GECD = jnp.swapaxes(y_EnD.reshape(experts_here, groups_here, capacity, width), 0, 1)

    if expert_axis is not None:
        y_GECD = jax.lax.all_to_all(y_GECD, expert_axis, split_axis=0, concat_axis=1, tiled=True)
    y_GSD = y_GECD.reshape(num_groups, num_experts * capacity, width)
    return jax.vmap(lambda y_SD, one: from_slots(y_SD, one, num_tokens))(y_GSD, seats), kept_G


def _without_capacity(
    through_experts: Callable[..., tuple[Array, Array]],
    weights: Weights,
    x_GTD: Float[Array, "G T D"],
    routing: Assignments,
) -> tuple[Float[Array, "G T D"], Int[Array, "G"]]:
    """The rows of these groups through their experts, and added up by token."""
    num_groups, num_tokens, width = x_GTD.shape
    x_SD = x_GTD.reshape(-1, width)
    first_G1 = num_tokens * jnp.arange(num_groups, dtype=jnp.int32)[:, None]
    token_N = (first_G1 + routing.token).reshape(-1)
    expert_N, weight_N, valid_N = (a.reshape(-1) for a in (routing.expert, routing.weight, routing.valid))
    y_ND, kept_N = through_experts(weights, x_SD, token_N, expert_N, valid_N)
    weighted_ND = y_ND.astype(jnp.float32) * jnp.where(valid_N, weight_N, 0.0)[:, None]
    total_SD = jnp.zeros(x_SD.shape, jnp.float32).at[token_N].add(weighted_ND)
    kept_G = jnp.sum(kept_N.reshape(num_groups, -1), axis=1, dtype=jnp.int32)
    return total_SD.astype(x_GTD.dtype).reshape(x_GTD.shape), kept_G


def _dealt_out(
    through_experts: Callable[..., tuple[Array, Array]],
    weights: Weights,
    x_SD: Float[Array, "S D"],
    token_N: Int[Array, "N"],
    expert_N: Int[Array, "N"],
    valid_N: Bool[Array, "N"],
    *,
    mesh: Mesh,
    specs: dict[str, PartitionSpec],
    check_vma: bool,
) -> tuple[Float[Array, "N D"], Bool[Array, "N"]]:
    """`through_experts` with an equal share of the rows on every device, whatever groups they are of."""
    num_rows = token_N.shape[0]
    padding = (0, -num_rows % batch_shards(mesh))
    token_R, expert_R, valid_R = (jnp.pad(a, padding) for a in (token_N, expert_N, valid_N))
    batch = PartitionSpec(BATCH_AXES)

    def share(weights: Weights, x_RD: Array, expert_R: Array, valid_R: Array) -> tuple[Array, Array]:
        return through_experts(weights, x_RD, jnp.arange(x_RD.shape[0], dtype=jnp.int32), expert_R, valid_R)

    y_RD, kept_R = jax.shard_map(
        share, mesh=mesh, in_specs=(specs, batch, batch, batch), out_specs=(batch, batch), check_vma=check_vma
    )(weights, x_SD[token_R], expert_R, valid_R)
    return y_RD[:num_rows], kept_R[:num_rows]


def _rows_through_experts(
    apply_experts: ApplyExperts,
    weights: Weights,
    x_SD: Float[Array, "S D"],
    token_N: Int[Array, "N"],
    expert_N: Int[Array, "N"],
    valid_N: Bool[Array, "N"],
    *,
    num_experts: int,
    implementation: str,
    ragged: bool,
    receive_factor: float,
    expert_axis: str | None,
    tensor_axis: str | None,
) -> tuple[Float[Array, "N D"], Bool[Array, "N"]]:
    """What its expert returns for each row x[token] of one device, and which rows were seated.

    In shard_map, unless there is but one device and the axes have no names.
    """
    # Once for all rounds: what the rows' devices add to a matrix's gradient is summed where the matrix came to vary.
    weights = {name: vary_like(weight, x_SD) for name, weight in weights.items()}
    experts = partial(
        _sorted_rows_through_experts, apply_experts, implementation=implementation, tensor_axis=tensor_axis
    )
    if expert_axis is None or jax.lax.axis_size(expert_axis) == 1:
        return experts(weights, x_SD, token_N, expert_N, valid_N, num_experts), valid_N
    return through_experts_elsewhere(
        experts,
        weights,
        x_SD,
        token_N,
        expert_N,
        valid_N,
        num_experts=num_experts,
        axis_name=expert_axis,
        receive_factor=receive_factor,
        ragged=ragged,
    )


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
    y_PD = apply_experts(weights, x_PD, Grouped(rows.sizes, block, implementation))
    if tensor_axis is not None:
        y_PD = jax.lax.psum(y_PD, tensor_axis)
    return y_PD.at[rows.place].get(mode="fill", fill_value=0)

"""Rows of tokens travel to the devices that hold their experts and back, a bounded number at a time."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe.ops.permute import group_rows, places, send_queues
from moe.parallel.mesh import BATCH_AXES

# (x_SD, index_N, expert_N, valid_N, number of experts) -> what its expert returns for each row x[index].
Experts = Callable[[Array, Array, Array, Array, int], Array]


class Rounds(NamedTuple):
    """How N rows travel in turn.

    most: as many rounds as any routing needs. run: what experts return for the rows of a round, zeros for others
    [N, D]. round_N: in which a row travels.
    """

    most: int
    run: Callable[[Array], Array]
    round_N: Int[Array, "N"]


def through_experts_elsewhere(
    experts: Experts,
    x_SD: Float[Array, "S D"],
    token_N: Int[Array, "N"],
    expert_N: Int[Array, "N"],
    valid_N: Bool[Array, "N"],
    *,
    num_experts: int,
    axis_name: str,
    receive_factor: float,
    ragged: bool,
) -> tuple[Float[Array, "N D"], Bool[Array, "N"]]:
    """What its expert returns for each row x[token], and which rows got there; in shard_map, over the experts' axis.

    A device makes room for ⌈receive_factor · N⌉ rows, where N is an even share of them. What finds none travels in a
    further round, if any device needs one: none is dropped, time follows the skew, memory doesn't (later rounds are
    computed again in the backward pass). `ragged`: the rows alone travel, one after the other; otherwise each sender
    has an equal part of the room, all of which is sent. A token goes to an expert at most once, so that S · E / shards
    places are always enough for a sender.
    """
    rounds = (_ragged if ragged else _fixed)(
        experts,
        x_SD,
        token_N,
        expert_N,
        valid_N,
        num_experts // jax.lax.axis_size(axis_name),
        axis_name,
        receive_factor,
    )
    y_ND = rounds.run(jnp.int32(0))
    if rounds.most > 1:
        # The same on all devices, since all of them take part in what the gradient of a round sums up.
        needed = jax.lax.pmax(jnp.max(jnp.where(valid_N, rounds.round_N, 0)), BATCH_AXES)
        nothing_ND = vary_like(jnp.zeros_like(y_ND), y_ND)

        @jax.checkpoint
        def round_if_needed(index: Array) -> Array:
            return jax.lax.cond(index <= needed, rounds.run, lambda _: nothing_ND, index)

        further = jnp.arange(1, rounds.most, dtype=jnp.int32)
        y_ND, _ = jax.lax.scan(lambda total, index: (total + round_if_needed(index), None), y_ND, further)
    return y_ND, valid_N & (rounds.round_N < rounds.most)


def _fixed(
    experts: Experts,
    x_SD: Array,
    token_N: Array,
    expert_N: Array,
    valid_N: Array,
    local: int,
    axis_name: str,
    receive_factor: float,
) -> Rounds:
    """Every sender has `room` places at every device, and sends all of them."""
    shards, num_rows = jax.lax.axis_size(axis_name), expert_N.shape[0]
    most = min(num_rows, x_SD.shape[0] * local)
    room = min(most, math.ceil(receive_factor * num_rows / shards))
    shard_N = expert_N // local
    place_N = places(shard_N, valid_N, shards)

    def run(index: Array) -> Array:
        sent = send_queues(shard_N, place_N - index * room, valid_N, shards, room)
        token_R, expert_R = (
            a.at[sent.source].get(mode="fill", fill_value=fill)
            for a, fill in ((token_N, x_SD.shape[0]), (expert_N % local, local))
        )
        x_RD = _all_to_all(x_SD.at[token_R].get(mode="fill", fill_value=0), axis_name)
        expert_R = _all_to_all(expert_R, axis_name)
        y_RD = experts(x_RD, jnp.arange(len(x_RD)), jnp.minimum(expert_R, local - 1), expert_R < local, local)
        return _all_to_all(y_RD, axis_name).at[sent.place].get(mode="fill", fill_value=0)

    return Rounds(-(-most // room), run, place_N // room)


def _ragged(
    experts: Experts,
    x_SD: Array,
    token_N: Array,
    expert_N: Array,
    valid_N: Array,
    local: int,
    axis_name: str,
    receive_factor: float,
) -> Rounds:
    """The rows for a device queue up there by sender, each sender's by expert; `room` of them travel in each round."""
    shards, num_rows = jax.lax.axis_size(axis_name), expert_N.shape[0]
    most = shards * min(num_rows, x_SD.shape[0] * local)
    room = min(most, math.ceil(receive_factor * num_rows))
    here = jax.lax.axis_index(axis_name)
    rows = group_rows(expert_N, valid_N, shards * local, 1)
    sizes_SL = rows.sizes.reshape(shards, local)
    # Of the queue here, by sender and expert; and of every sender's rows for every device.
    ends = jnp.cumsum(_all_to_all(sizes_SL, axis_name).reshape(-1))
    sizes = jax.lax.all_gather(jnp.sum(sizes_SL, axis=1), axis_name)
    sorted_at, queued_at = (jnp.cumsum(sizes, axis=axis) - sizes for axis in (1, 0))
    shard_N = jnp.minimum(expert_N // local, shards - 1)
    place_N = queued_at[here, shard_N] + rows.place - sorted_at[here, shard_N]

    def run(index: Array) -> Array:
        first = index * room
        start, stop = (jnp.clip(at - first, 0, room) for at in (queued_at, queued_at + sizes))
        begin = jnp.clip(sorted_at + first + start - queued_at, sorted_at, sorted_at + sizes)
        there = Route(begin, start, stop - start)
        # Rows of other rounds are left out, so that what comes back in their place, gradients too, is left out as well.
        now_N = valid_N & (place_N // room == index)
        token_P = jnp.where(now_N, token_N, x_SD.shape[0]).at[rows.source].get(mode="fill", fill_value=x_SD.shape[0])
        x_PD = x_SD.at[token_P].get(mode="fill", fill_value=0)
        x_RD = trade_rows(x_PD, there, len(x_PD), room, axis_name)
        in_queue_R = first + jnp.arange(room, dtype=jnp.int32)
        expert_R = jnp.searchsorted(ends, in_queue_R, side="right").astype(jnp.int32) % local
        y_RD = experts(x_RD, jnp.arange(room), expert_R, in_queue_R < ends[-1], local)
        y_PD = trade_rows(y_RD, there.back(), room, len(x_PD), axis_name)
        return y_PD.at[jnp.where(now_N, rows.place, len(x_PD))].get(mode="fill", fill_value=0)

    return Rounds(-(-most // room), run, place_N // room)


class Route(NamedTuple):
    """sizes[i, j] rows of device i from row begin[i, j] on become rows of device j from start[i, j] on."""

    begin: Int[Array, "S S"]
    start: Int[Array, "S S"]
    sizes: Int[Array, "S S"]

    def back(self) -> "Route":
        """The way back."""
        return Route(self.start.T, self.begin.T, self.sizes.T)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def trade_rows(
    x_RD: Float[Array, "R D"], route: Route, num_rows: int, num_traded: int, axis_name: str
) -> Float[Array, "_ D"]:
    """`num_traded` rows, of which those named by the route come from the x [num_rows, D] of devices along the axis.

    The others are of no meaning, also in the gradient of x: use neither.
    """
    here = jax.lax.axis_index(axis_name)
    # Zeros would be written first, row by row.
    out = vary_like(jax.lax.empty((num_traded, x_RD.shape[1]), x_RD.dtype), x_RD)
    return jax.lax.ragged_all_to_all(
        x_RD,
        out,
        route.begin[here],
        route.sizes[here],
        route.start[here],
        route.sizes[:, here],
        axis_name=axis_name,
    )


def _trade_forward(x_RD: Array, route: Route, num_rows: int, num_traded: int, axis_name: str) -> tuple[Array, Route]:
    return trade_rows(x_RD, route, num_rows, num_traded, axis_name), route


def _trade_backward(num_rows: int, num_traded: int, axis_name: str, route: Route, dy: Array) -> tuple[Array, None]:
    return trade_rows(dy, route.back(), num_traded, num_rows, axis_name), None


trade_rows.defvjp(_trade_forward, _trade_backward)


def _all_to_all(x: Array, axis_name: str) -> Array:
    return jax.lax.all_to_all(x, axis_name, split_axis=0, concat_axis=0, tiled=True)


def vary_like(x: Array, like: Array) -> Array:
    """x marked as differing between the devices that `like` differs between (in shard_map)."""
    missing = jax.typeof(like).manual_axis_type.varying - jax.typeof(x).manual_axis_type.varying
    return jax.lax.pcast(x, tuple(missing), to="varying") if missing else x

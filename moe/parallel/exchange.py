"""Rows of tokens travel to the devices that hold their experts and back, a bounded number at a time."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe.ops.permute import group_rows, places, send_queues
from moe.parallel.mesh import BATCH_AXES
from moe.types import PyTree

Weights = dict[str, Float[Array, "..."]]
# (weights, x_SD, index_N, expert_N, valid_N, number of experts) -> what its expert returns for each row x[index].
Experts = Callable[[Weights, Array, Array, Array, Array, int], Array]
# What a round is differentiated in: the experts' weights, and the tokens.
Inputs = tuple[Weights, Float[Array, "S D"]]


class Rounds(NamedTuple):
    """How N rows travel in turn.

    most: as many rounds as any routing needs. run: (inputs, rows, index) -> what experts return for the rows of one
    round, zeros for others [N, D]. rows: the integers that it needs. round_N: in which a row travels.
    """

    most: int
    run: Callable[[Inputs, Any, Array], Array]
    rows: Any
    round_N: Int[Array, "N"]


def through_experts_elsewhere(
    experts: Experts,
    weights: Weights,
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
    local = num_experts // jax.lax.axis_size(axis_name)
    plan = _ragged if ragged else _fixed
    rounds = plan(experts, token_N, expert_N, valid_N, x_SD.shape[0], local, axis_name, receive_factor)
    y_ND = rounds.run((weights, x_SD), rounds.rows, jnp.int32(0))
    if rounds.most > 1:
        # The same on all devices, since all of them take part in what the gradient of a round sums up.
        needed = jax.lax.pmax(jnp.max(jnp.where(valid_N, rounds.round_N, 0)), BATCH_AXES)
        y_ND = add_rounds(rounds.run, rounds.most, (weights, x_SD), rounds.rows, needed, y_ND)
    return y_ND, valid_N & (rounds.round_N < rounds.most)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def add_rounds(
    run: Callable[[Inputs, Any, Array], Array], most: int, inputs: Inputs, rows: Any, needed: Array, y_ND: Array
) -> Array:
    """y and what the rounds from 1 to `needed` return. Nothing of them is kept for the backward pass.

    A rule of its own, since a policy of `jax.checkpoint` around it would hold inside a checkpoint in it as well.
    """
    return _sum_if_needed(lambda index: run(inputs, rows, index), most, needed, y_ND)


def _add_forward(
    run: Callable[[Inputs, Any, Array], Array], most: int, inputs: Inputs, rows: Any, needed: Array, y_ND: Array
) -> tuple[Array, tuple[Inputs, Any, Array]]:
    return add_rounds(run, most, inputs, rows, needed, y_ND), (inputs, rows, needed)


def _add_backward(
    run: Callable[[Inputs, Any, Array], Array], most: int, saved: tuple[Inputs, Any, Array], dy_ND: Array
) -> tuple[Inputs, None, None, Array]:
    inputs, rows, needed = saved

    def gradient(index: Array) -> Inputs:
        return jax.vjp(lambda inputs: run(inputs, rows, index), inputs)[1](dy_ND)[0]

    nothing = jax.tree.map(lambda x: vary_like(jnp.zeros_like(x), x), inputs)
    return _sum_if_needed(gradient, most, needed, nothing), None, None, dy_ND


add_rounds.defvjp(_add_forward, _add_backward)


def _sum_if_needed(term: Callable[[Array], PyTree], most: int, needed: Array, total: PyTree) -> PyTree:
    """total and the terms of the rounds from 1 to `needed`."""

    def add(total: PyTree, index: Array) -> tuple[PyTree, None]:
        def add_term(total: PyTree) -> PyTree:
            return jax.tree.map(jnp.add, total, term(index))

        return jax.lax.cond(index <= needed, add_term, lambda total: total, total), None

    return jax.lax.scan(add, total, jnp.arange(1, most, dtype=jnp.int32))[0]


class Senders(NamedTuple):
    """token, expert, valid: of each row. place: in its sender's queue for the expert's device."""

    token: Int[Array, "N"]
    expert: Int[Array, "N"]
    valid: Bool[Array, "N"]
    place: Int[Array, "N"]


def _fixed(
    experts: Experts,
    token_N: Array,
    expert_N: Array,
    valid_N: Array,
    num_tokens: int,
    local: int,
    axis_name: str,
    receive_factor: float,
) -> Rounds:
    """Every sender has `room` places at every device, and sends all of them."""
    shards, num_rows = jax.lax.axis_size(axis_name), expert_N.shape[0]
    most = min(num_rows, num_tokens * local)
    room = min(most, math.ceil(receive_factor * num_rows / shards))
    place_N = places(expert_N // local, valid_N, shards)

    def run(inputs: Inputs, rows: Senders, index: Array) -> Array:
        weights, x_SD = inputs
        sent = send_queues(rows.expert // local, rows.place - index * room, rows.valid, shards, room)
        token_R, expert_R = (
            a.at[sent.source].get(mode="fill", fill_value=fill)
            for a, fill in ((rows.token, num_tokens), (rows.expert % local, local))
        )
        x_RD = _all_to_all(x_SD.at[token_R].get(mode="fill", fill_value=0), axis_name)
        expert_R = _all_to_all(expert_R, axis_name)
        all_R = jnp.arange(len(x_RD), dtype=jnp.int32)
        y_RD = experts(weights, x_RD, all_R, jnp.minimum(expert_R, local - 1), expert_R < local, local)
        return _all_to_all(y_RD, axis_name).at[sent.place].get(mode="fill", fill_value=0)

    return Rounds(-(-most // room), run, Senders(token_N, expert_N, valid_N, place_N), place_N // room)


class Route(NamedTuple):
    """sizes[i, j] rows of device i from row begin[i, j] on become rows of device j from start[i, j] on."""

    begin: Int[Array, "S S"]
    start: Int[Array, "S S"]
    sizes: Int[Array, "S S"]

    def within(self, first: Array, last: Array) -> "Route":
        """What of it ends in places from `first` up to `last`, counted from `first`."""
        begin = jnp.clip(self.begin + first - self.start, self.begin, self.begin + self.sizes)
        start, stop = (jnp.clip(at, first, last) - first for at in (self.start, self.start + self.sizes))
        return Route(begin, start, stop - start)

    def back(self) -> "Route":
        """The way back."""
        return Route(self.start.T, self.begin.T, self.sizes.T)


class Queued(NamedTuple):
    """token: of each row. place: sorted by expert, N for rows that aren't valid. round: in which it travels.

    ends: in the queue of this device, of every sender's rows for every expert here. route: of all rows, to their places
    in the queues.
    """

    token: Int[Array, "N"]
    place: Int[Array, "N"]
    round: Int[Array, "N"]
    ends: Int[Array, "_"]
    route: Route


def _ragged(
    experts: Experts,
    token_N: Array,
    expert_N: Array,
    valid_N: Array,
    num_tokens: int,
    local: int,
    axis_name: str,
    receive_factor: float,
) -> Rounds:
    """The rows for a device queue up there by sender, each sender's by expert; `room` of them travel in each round."""
    shards, num_rows = jax.lax.axis_size(axis_name), expert_N.shape[0]
    most = shards * min(num_rows, num_tokens * local)
    room = min(most, math.ceil(receive_factor * num_rows))
    here = jax.lax.axis_index(axis_name)
    grouped = group_rows(expert_N, valid_N, shards * local, 1)
    sizes_SL = grouped.sizes.reshape(shards, local)
    ends = jnp.cumsum(_all_to_all(sizes_SL, axis_name).reshape(-1))
    # Of every device's rows for every other.
    sizes = jax.lax.all_gather(jnp.sum(sizes_SL, axis=1), axis_name)
    sorted_at, queued_at = (jnp.cumsum(sizes, axis=axis) - sizes for axis in (1, 0))
    shard_N = expert_N // local
    queued_N = queued_at[here, shard_N] + grouped.place - sorted_at[here, shard_N]

    def run(inputs: Inputs, rows: Queued, index: Array) -> Array:
        weights, x_SD = inputs
        first, last = index * room, (index + 1) * room
        there = rows.route.within(first, last)
        # Rows of other rounds are left out, so that what comes back in their place, gradients too, is left out as well.
        place_N = jnp.where(rows.round == index, rows.place, num_rows)
        token_P = jnp.full(num_rows, num_tokens, jnp.int32).at[place_N].set(rows.token, mode="drop")
        x_RD = trade_rows(x_SD.at[token_P].get(mode="fill", fill_value=0), there, num_rows, room, axis_name)
        queued_R = first + jnp.arange(room, dtype=jnp.int32)
        expert_R = jnp.searchsorted(rows.ends, queued_R, side="right").astype(jnp.int32) % local
        y_RD = experts(weights, x_RD, queued_R - first, expert_R, queued_R < rows.ends[-1], local)
        y_PD = trade_rows(y_RD, there.back(), room, num_rows, axis_name)
        return y_PD.at[place_N].get(mode="fill", fill_value=0)

    rows = Queued(token_N, grouped.place, queued_N // room, ends, Route(sorted_at, queued_at, sizes))
    return Rounds(-(-most // room), run, rows, rows.round)


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

"""Rows of tokens travel to the devices that hold their experts and back, a bounded number at a time."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe.ops.permute import places, send_queues
from moe.parallel.mesh import BATCH_AXES

# (x_SD, index_N, expert_N, valid_N, number of experts) -> what its expert returns for each row x[index].
Experts = Callable[[Array, Array, Array, Array, int], Array]


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

    A device makes room for ⌈receive_factor · N⌉ rows, an equal part for each sender, where N is an even share of the
    rows. What finds none travels in a further round, if any device needs one: none is dropped, time follows the skew,
    memory doesn't (later rounds are computed again in the backward pass). `ragged`: the rows alone are sent; otherwise
    all places are. A token goes to an expert at most once, so that S · E / shards places are always enough.
    """
    shards = jax.lax.axis_size(axis_name)
    local = num_experts // shards
    num_rows = expert_N.shape[0]
    most = min(num_rows, x_SD.shape[0] * local)
    room = min(most, math.ceil(receive_factor * num_rows / shards))
    rounds = -(-most // room)
    shard_N = expert_N // local
    place_N = places(shard_N, valid_N, shards)

    def one_round(index: Array) -> Array:
        sent = send_queues(shard_N, place_N - index * room, valid_N, shards, room)
        token_R, expert_R = (
            a.at[sent.source].get(mode="fill", fill_value=fill)
            for a, fill in ((token_N, x_SD.shape[0]), (expert_N % local, local))
        )
        received = _all_to_all(sent.sizes, axis_name)
        expert_R = _all_to_all(expert_R, axis_name)
        x_RD = x_SD.at[token_R].get(mode="fill", fill_value=0)
        x_RD = trade_rows(x_RD, sent.sizes, received, axis_name, ragged)
        y_RD = experts(x_RD, jnp.arange(len(x_RD)), jnp.minimum(expert_R, local - 1), expert_R < local, local)
        y_RD = trade_rows(y_RD, received, sent.sizes, axis_name, ragged)
        return y_RD.at[sent.place].get(mode="fill", fill_value=0)

    y_ND = one_round(jnp.int32(0))
    if rounds > 1:
        # The same on all devices, since all of them take part in what the gradient of a round sums up.
        needed = jax.lax.pmax(jnp.max(jnp.where(valid_N, place_N // room, 0)), BATCH_AXES)
        nothing_ND = vary_like(jnp.zeros_like(y_ND), y_ND)

        @jax.checkpoint
        def round_if_needed(index: Array) -> Array:
            return jax.lax.cond(index <= needed, one_round, lambda _: nothing_ND, index)

        further = jnp.arange(1, rounds, dtype=jnp.int32)
        y_ND, _ = jax.lax.scan(lambda total, index: (total + round_if_needed(index), None), y_ND, further)
    return y_ND, valid_N & (place_N < rounds * room)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def trade_rows(
    x_RD: Float[Array, "R D"], sent: Int[Array, "P"], received: Int[Array, "P"], axis_name: str, ragged: bool
) -> Float[Array, "R D"]:
    """Piece i of x goes to device i of the axis, where it becomes piece j, j being the index of this device.

    Of the P pieces of equal length, the first sent[i] rows count, and come to received[j] there; the rest are zeros.
    """
    if not ragged:
        return _all_to_all(x_RD, axis_name)
    pieces = sent.shape[0]
    room = x_RD.shape[0] // pieces
    starts = room * jnp.arange(pieces, dtype=jnp.int32)
    here = jnp.full(pieces, room * jax.lax.axis_index(axis_name), jnp.int32)
    zeros_RD = vary_like(jnp.zeros_like(x_RD), x_RD)
    return jax.lax.ragged_all_to_all(x_RD, zeros_RD, starts, sent, here, received, axis_name=axis_name)


def _trade_forward(
    x_RD: Array, sent: Array, received: Array, axis_name: str, ragged: bool
) -> tuple[Array, tuple[Array, Array]]:
    return trade_rows(x_RD, sent, received, axis_name, ragged), (sent, received)


def _trade_backward(axis_name: str, ragged: bool, sizes: tuple[Array, Array], dy: Array) -> tuple[Array, None, None]:
    sent, received = sizes
    return trade_rows(dy, received, sent, axis_name, ragged), None, None


trade_rows.defvjp(_trade_forward, _trade_backward)


def _all_to_all(x: Array, axis_name: str) -> Array:
    return jax.lax.all_to_all(x, axis_name, split_axis=0, concat_axis=0, tiled=True)


def vary_like(x: Array, like: Array) -> Array:
    """x marked as differing between the devices that `like` differs between (in shard_map)."""
    missing = jax.typeof(like).manual_axis_type.varying - jax.typeof(x).manual_axis_type.varying
    return jax.lax.pcast(x, tuple(missing), to="varying") if missing else x

"""Moves tokens into expert slots and back, by index, without a [T, E, C] tensor."""

import math
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe.types import Assignments, Slots


class Queues(NamedTuple):
    """Who sits in each of the S = E*C slots; slot e*C + c is place c of expert e.

    token: index of the token, T where the slot is empty. weight: its combine weight, 0 where empty.
    """

    token: Int[Array, "S"]
    weight: Float[Array, "S"]


def capacity(factor: float, num_tokens: int, k: int, num_experts: int) -> int:
    """Slots per expert: ⌈factor·T·k/E⌉ rounded up to a multiple of 4 (V-MoE), and never more than T.

    T = num_tokens of a group, E = num_experts. Raises ValueError unless 0 < factor < ∞.
    """
    if not 0 < factor < math.inf:
        raise ValueError(f"capacity_factor = {factor} must be positive and finite.")
    exact = math.ceil(Fraction(str(factor)) * num_tokens * k / num_experts)
    return min(-(-exact // 4) * 4, num_tokens)


def places(expert_N: Int[Array, "N"], valid_N: Bool[Array, "N"], num_experts: int) -> Int[Array, "N"]:
    """Place of each row in its expert's queue, counted over the valid rows before it."""
    asks_NE = jax.nn.one_hot(expert_N, num_experts, dtype=bool) & valid_N[:, None]
    before_NE = jnp.cumsum(asks_NE, axis=0, dtype=jnp.int32) - asks_NE
    return jnp.take_along_axis(before_NE, expert_N[:, None], axis=1)[:, 0]


def fill_queues(
    assignments: Assignments, num_tokens: int, num_experts: int, num_places: int
) -> tuple[Queues, Int[Array, ""]]:
    """Seats the rows in order; a row that comes to a queue of `num_places` already seated overflows.

    Also returns the number of rows that found a place.
    """
    num_rows = assignments.token.shape[0]
    num_slots = num_experts * num_places
    place_N = places(assignments.expert, assignments.valid, num_experts)
    seated_N = assignments.valid & (place_N < num_places)
    slot_N = jnp.where(seated_N, assignments.expert * num_places + place_N, num_slots)
    row_S = jnp.full(num_slots, num_rows, jnp.int32).at[slot_N].set(jnp.arange(num_rows, dtype=jnp.int32), mode="drop")
    queues = Queues(
        token=assignments.token.at[row_S].get(mode="fill", fill_value=num_tokens),
        weight=assignments.weight.at[row_S].get(mode="fill", fill_value=0.0),
    )
    return queues, jnp.sum(seated_N, dtype=jnp.int32)


class Grouped(NamedTuple):
    """N rows sorted by expert into P places; each expert's part is padded to whole blocks.

    source: the row in each place, N where it is padding. place: the place of each row, P where it isn't valid.
    sizes: places of each expert, multiples of the block. Places past the last expert's are padding.
    """

    source: Int[Array, "P"]
    place: Int[Array, "N"]
    sizes: Int[Array, "E"]


def most_blocks(num_rows: int, num_groups: int, block: int) -> int:
    """How many blocks of `block` rows hold `num_rows` rows in groups, none of two groups, at the worst split."""
    nonempty = min(num_groups, num_rows)
    return (num_rows - nonempty) // block + nonempty


def group_rows(expert_N: Int[Array, "N"], valid_N: Bool[Array, "N"], num_experts: int, block: int) -> Grouped:
    """Sorts the valid rows by expert, in their order, into P places, `block` times `most_blocks`."""
    num_rows = expert_N.shape[0]
    num_places = most_blocks(num_rows, num_experts, block) * block
    count_E = jnp.sum(jax.nn.one_hot(expert_N, num_experts, dtype=jnp.int32) * valid_N[:, None], axis=0)
    sizes_E = -(-count_E // block) * block
    start_E = jnp.cumsum(sizes_E) - sizes_E
    place_N = jnp.where(valid_N, start_E[expert_N] + places(expert_N, valid_N, num_experts), num_places)
    rows = jnp.arange(num_rows, dtype=jnp.int32)
    source_P = jnp.full(num_places, num_rows, jnp.int32).at[place_N].set(rows, mode="drop")
    return Grouped(source_P, place_N, sizes_E)


def send_queues(
    shard_N: Int[Array, "N"], place_N: Int[Array, "N"], valid_N: Bool[Array, "N"], num_shards: int, num_places: int
) -> Grouped:
    """Puts the valid rows into their `places` of `num_places` at each shard, as an all-to-all wants them.

    Rows with another place are left out. Unlike in `group_rows`, sizes are those of the rows, from each shard's first
    place on; rows past them are padding.
    """
    num_rows, num_slots = shard_N.shape[0], num_shards * num_places
    seated_N = valid_N & (place_N >= 0) & (place_N < num_places)
    slot_N = jnp.where(seated_N, shard_N * num_places + place_N, num_slots)
    rows = jnp.arange(num_rows, dtype=jnp.int32)
    source_P = jnp.full(num_slots, num_rows, jnp.int32).at[slot_N].set(rows, mode="drop")
    sizes = jnp.sum(jax.nn.one_hot(shard_N, num_shards, dtype=jnp.int32) * seated_N[:, None], axis=0)
    return Grouped(source_P, slot_N, sizes)


def one_hot_slots(
    assignments: Assignments, num_tokens: int, num_experts: int, num_places: int
) -> tuple[Slots, Int[Array, ""]]:
    """The queues of `fill_queues` as the tensors of GShard (2006.16668, section 3.2), and how many rows they hold.

    dispatch: 1 where a token sits in a slot. combine: its weight there.
    """
    place_N = places(assignments.expert, assignments.valid, num_experts)
    seated_N = assignments.valid & (place_N < num_places)
    zeros_TEC = jnp.zeros((num_tokens, num_experts, num_places), jnp.float32)
    slot_N = zeros_TEC.at[assignments.token, assignments.expert, jnp.where(seated_N, place_N, num_places)]
    return Slots(slot_N.set(1.0, mode="drop"), slot_N.set(assignments.weight, mode="drop")), jnp.sum(
        seated_N, dtype=jnp.int32
    )


def seat(
    routing: Assignments | Slots, num_tokens: int, num_experts: int, num_places: int, *, one_hot: bool = False
) -> tuple[Queues | Slots, Int[Array, ""]]:
    """The slots of one group, and how many choices found a place; soft slots are seats already, and drop nothing.

    one_hot: as tensors [T, E, C], not as indices.
    """
    if isinstance(routing, Slots):
        return routing, jnp.int32(num_tokens * num_experts)
    fill = one_hot_slots if one_hot else fill_queues
    return fill(routing, num_tokens, num_experts, num_places)


def into_slots(x_TD: Float[Array, "T D"], seats: Queues | Slots) -> Float[Array, "S D"]:
    """What each slot holds: its token, zeros where it is empty; for soft slots the dispatch-weighted sum of tokens."""
    if isinstance(seats, Slots):
        dispatch_TS = seats.dispatch.reshape(x_TD.shape[0], -1)
        return jnp.einsum("TS,TD->SD", dispatch_TS, x_TD.astype(jnp.float32)).astype(x_TD.dtype)
    return x_TD.at[seats.token].get(mode="fill", fill_value=0)


def from_slots(y_SD: Float[Array, "S D"], seats: Queues | Slots, num_tokens: int) -> Float[Array, "T D"]:
    """Adds up each token's slots by combine weight, in float32; a token without a slot gets zeros."""
    y_f32_SD = y_SD.astype(jnp.float32)
    if isinstance(seats, Slots):
        total_TD = jnp.einsum("TS,SD->TD", seats.combine.reshape(num_tokens, -1), y_f32_SD)
    else:
        zeros_TD = jnp.zeros((num_tokens, y_SD.shape[-1]), jnp.float32)
        total_TD = zeros_TD.at[seats.token].add(y_f32_SD * seats.weight[:, None], mode="drop")
    return total_TD.astype(y_SD.dtype)

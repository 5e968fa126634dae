"""Queues of routers that give tokens a number of experts that depends on data."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe.routers.base import best, queue
from moe.types import Assignments


def most_experts(max_experts: int, num_experts: int, *, training: bool) -> int:
    """Rows per token: all E in evaluation and where `max_experts` is 0, else no more than it."""
    return min(max_experts, num_experts) if training and max_experts else num_experts


def check_max_experts(name: str, max_experts: int, k: int) -> None:
    """Raises ValueError unless max_experts is 0 or at least k."""
    if max_experts and max_experts < k:
        raise ValueError(f"router.{name}.max_experts = {max_experts} must be 0 or at least k = {k}.")


def queue_of_tokens(
    weight_TE: Float[Array, "T E"], wanted_TE: Bool[Array, "T E"], mask_T: Bool[Array, "T"], most: int
) -> Assignments:
    """Each token's `most` heaviest experts of those it wants, in the order of `queue`; padding wants none."""
    wanted_TE = wanted_TE & mask_T[:, None]
    expert_TK = best(_rank(weight_TE, wanted_TE), most)
    return queue(
        expert_TK,
        weight_TK=jnp.take_along_axis(weight_TE, expert_TK, axis=-1),
        mask_T=mask_T,
        wanted_TK=jnp.take_along_axis(wanted_TE, expert_TK, axis=-1),
        choices=jnp.sum(wanted_TE),
    )


def queue_of_experts(
    weight_TE: Float[Array, "T E"], wanted_TE: Bool[Array, "T E"], mask_T: Bool[Array, "T"], most: int
) -> Assignments:
    """Each expert's `most` heaviest tokens of those that it wants; all experts' first tokens, then their second."""
    wanted_TE = wanted_TE & mask_T[:, None]
    token_EC = best(_rank(weight_TE, wanted_TE).T, most)
    num_experts = weight_TE.shape[1]
    return Assignments(
        token=token_EC.T.reshape(-1).astype(jnp.int32),
        expert=jnp.tile(jnp.arange(num_experts, dtype=jnp.int32), most),
        weight=jnp.take_along_axis(weight_TE.T, token_EC, axis=-1).T.reshape(-1),
        valid=jnp.take_along_axis(wanted_TE.T, token_EC, axis=-1).T.reshape(-1),
        choices=jnp.sum(wanted_TE, dtype=jnp.int32),
    )


def _rank(weight_TE: Float[Array, "T E"], wanted_TE: Bool[Array, "T E"]) -> Float[Array, "T E"]:
    # A weight may underflow to 0: what is wanted still ranks before what isn't.
    return jnp.where(wanted_TE, jax.lax.stop_gradient(weight_TE), -1.0)

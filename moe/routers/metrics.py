"""What a routing did, measured the same way for every router, over all groups of a batch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe.routers.losses import entropy
from moe.types import Assignments, Metrics, Slots


def expert_load(routing: Assignments | Slots, num_experts: int) -> Float[Array, "E"]:
    """Number of rows that ask for each expert, before capacity, over all groups (leading axes).

    For soft slots, the dispatch weight that lies in each expert's slots.
    """
    if isinstance(routing, Slots):
        return jnp.sum(routing.dispatch, axis=(0, 1, 3))
    # A one-hot sum, not a scatter: the groups may lie on several devices.
    asked = jax.nn.one_hot(routing.expert, num_experts, dtype=bool) & routing.valid[..., None]
    return jnp.sum(asked, axis=tuple(range(asked.ndim - 1)), dtype=jnp.float32)


def routing_metrics(
    routing: Assignments | Slots,
    logits_GTX: Float[Array, "G T X"],
    mask_GT: Bool[Array, "G T"],
    kept_G: Int[Array, "G"],
    num_experts: int,
) -> Metrics:
    """The metrics that every router has, over the batch: scalars, and one vector.

    expert_load: [E], the share of each expert in the rows that ask for one (`expert_load`); they sum to 1.
    load_max_to_mean: largest expert load over the mean load; 1 at balance, E when one expert has everything.
    dead_experts: experts that no token asked for.
    entropy: mean over tokens of the entropy of softmax(logits), in nats; log E at uniform, 0 when collapsed. Only
        where there is a logit per expert: other routers return an entropy over experts among their own metrics.
    overflow: fraction of the router's choices that were dropped, by `max_experts` or capacity; `kept_G` were not.
    experts_per_token: choices per token.
    """
    load_E = expert_load(routing, num_experts)
    tiny = jnp.finfo(jnp.float32).tiny
    tokens = jnp.sum(mask_GT, dtype=jnp.float32)
    if isinstance(routing, Slots):  # every token reads every expert, and none is dropped
        choices = kept = tokens * num_experts
    else:
        choices, kept = (jnp.sum(counts_G).astype(jnp.float32) for counts_G in (routing.choices, kept_G))
    metrics = {
        "expert_load": load_E / jnp.maximum(jnp.sum(load_E), tiny),
        "load_max_to_mean": jnp.max(load_E) / jnp.maximum(jnp.mean(load_E), tiny),
        "dead_experts": jnp.sum(load_E == 0, dtype=jnp.float32),
        "overflow": (choices - kept) / jnp.maximum(choices, 1),
        "experts_per_token": choices / jnp.maximum(tokens, 1),
    }
    if logits_GTX.shape[-1] == num_experts:
        metrics["entropy"] = entropy(logits_GTX.reshape(-1, num_experts), mask_GT.reshape(-1))
    return metrics

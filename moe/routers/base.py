"""What every router is, and the small steps that several of them share."""

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe.types import Assignments, Keys, PyTree, Routed, RouterInputs


@runtime_checkable
class Router(Protocol):
    """A pure map from the logits of one group of T tokens to a routing.

    `router(params, inputs, state, key)` returns `Routed`. A router is a frozen dataclass of its settings; what it
    learns is in `params`, what it adapts outside the gradient is in `state`, both made by `init`.

    key: one key per example of the group, T being a multiple of their number, so that noise belongs to an example and
        not to its place on a mesh. None means evaluation: no noise, no change of state, and no limit on the experts
        per token.
    state: every group and every micro-batch of a step starts from the same state, and the step keeps the mean of the
        states they return. A router whose rule isn't linear (the sign update of an expert bias) therefore returns
        its statistic in the state and applies the rule to it at the start of the next step.
    Losses come back weighted, metrics unweighted; both are means over the group's tokens that are not padding.
    """

    @property
    def k(self) -> int:
        """Experts per token (for routers that vary it: at least, or on average; each says which)."""
        ...

    def init(self, num_experts: int) -> tuple[PyTree, PyTree]:
        """Parameters and state of a fresh router; empty dicts where it has none."""
        ...

    def __call__(self, params: PyTree, inputs: RouterInputs, state: PyTree, key: Keys | None) -> Routed: ...


def check_k(k: int, num_experts: int) -> None:
    """Raises ValueError unless 1 <= k <= num_experts."""
    if not 1 <= k <= num_experts:
        raise ValueError(f"router.k = {k} experts per token must lie in 1..{num_experts}, the number of experts.")


def example_noise(key: Keys, num_tokens: int, num_experts: int) -> Float[Array, "T E"]:
    """Standard normal noise for T tokens of `key.size` examples; each example's noise depends on its own key only."""
    per_example = (num_tokens // key.size, num_experts)
    return jax.vmap(lambda one: jax.random.normal(one, per_example))(key).reshape(num_tokens, num_experts)


def token_mask(inputs: RouterInputs) -> Bool[Array, "T"]:
    """True for the tokens to route; all of them where the inputs mark no padding."""
    if inputs.mask is None:
        return jnp.ones(inputs.logits.shape[0], bool)
    return inputs.mask


def queue(
    expert_TK: Int[Array, "T K"],
    weight_TK: Float[Array, "T K"],
    valid_TK: Bool[Array, "T K"],
    priority_T: Float[Array, "T"] | None = None,
    choices: Int[Array, ""] | None = None,
) -> Assignments:
    """Lines up each token's choices, best first, into the queue order of V-MoE (2106.05974, section 3).

    All first choices stand before all second choices. Among equals tokens stand in their own order, or by decreasing
    `priority_T` (batch priority routing). `choices` defaults to the number of valid rows.
    """
    num_tokens, num_choices = expert_TK.shape
    order_T = jnp.arange(num_tokens) if priority_T is None else jnp.argsort(-priority_T)
    return Assignments(
        token=jnp.tile(order_T.astype(jnp.int32), num_choices),
        expert=expert_TK[order_T].T.reshape(-1).astype(jnp.int32),
        weight=weight_TK[order_T].T.reshape(-1),
        valid=valid_TK[order_T].T.reshape(-1),
        choices=jnp.sum(valid_TK, dtype=jnp.int32) if choices is None else choices.astype(jnp.int32),
    )

"""Expert choice: each expert takes tokens, instead of each token experts (Zhou et al. 2022, arXiv 2202.09368)."""

import dataclasses

import jax
import jax.numpy as jnp

from moe.routers import losses
from moe.routers.base import answer, best, given, no_variables, one_logit_per_expert
from moe.types import Assignments, Keys, PyTree, Routed, RouterInputs


@dataclasses.dataclass(frozen=True)
class ExpertChoice:
    """Every expert takes its ⌈T·k/E⌉ tokens of highest softmax(logits) over experts, weighted by that probability.

    2202.09368, section 3.2. Loads are equal by construction, so there is no loss for balance; a token may have any
    number of experts, none included. The metric `unchosen` is the share of tokens that have none. A token's experts
    depend on the other tokens of its group, later ones included: not for autoregressive models.

    k: experts per token, on average (the paper's capacity factor).
    z_weight: weight of the z loss.
    """

    k: int = 2
    z_weight: float = 0.0

    num_logits = one_logit_per_expert
    init = no_variables

    def __call__(self, params: PyTree, inputs: RouterInputs, state: PyTree, key: Keys | None) -> Routed:
        """Routes one group; see `moe.routers.base.Router`."""
        one = given(self, inputs)
        num_tokens, num_experts = one.logits.shape
        most = -(-num_tokens * self.k // num_experts)
        # By logarithm, which keeps the order of tokens whose probabilities underflow. Padding comes last.
        preference_TE = jnp.where(one.mask[:, None], jax.nn.log_softmax(one.logits), -jnp.inf)
        token_EC = best(preference_TE.T, most)
        weight_EC = jnp.take_along_axis(jax.nn.softmax(one.logits).T, token_EC, axis=-1)
        # Padding makes the group smaller, and with it what an expert takes: never more than the tokens there are.
        taken = -(-jnp.sum(one.mask, dtype=jnp.int32) * self.k // num_experts)
        valid_EC = jnp.broadcast_to(jnp.arange(most)[None] < taken, token_EC.shape)

        routing = Assignments(
            token=token_EC.T.reshape(-1),
            expert=jnp.tile(jnp.arange(num_experts, dtype=jnp.int32), most),
            weight=weight_EC.T.reshape(-1),
            valid=valid_EC.T.reshape(-1),
            choices=taken * num_experts,
        )
        chosen_T = jnp.zeros(num_tokens, bool).at[routing.token].max(routing.valid)
        unchosen = losses.token_mean(1.0 - chosen_T, one.mask)
        return answer(self, routing, {"z": losses.z(one.logits, one.mask)}, state, {"unchosen": unchosen})

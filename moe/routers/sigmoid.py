"""Sigmoid token choice balanced by a bias instead of a loss, the router of DeepSeek-V3 (arXiv 2412.19437)."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe.routers import losses
from moe.routers.base import (
    answer,
    best,
    best_in_groups,
    check_expert_groups,
    check_k,
    given,
    multi_hot,
    one_logit_per_expert,
    queue,
)
from moe.types import Keys, PyTree, Routed, RouterInputs


@dataclasses.dataclass(frozen=True)
class Sigmoid:
    """Each token takes the k experts of highest sigmoid(logit) + bias, weighted by their sigmoids without the bias.

    DeepSeek-V3 (2412.19437) section 2.1.2, eq. 12-20. The bias is state (Wang et al. 2024, 2408.15664, algorithm 1):
    after every step it rises by `bias_rate` for the experts below the mean load and falls for those above. The state
    holds the load of the last step beside it, and the rise happens when the next step begins, on the load of the whole
    batch. The metric `bias_spread` is the largest bias minus the smallest.

    k: experts per token, exactly.
    bias_rate: γ of the update; 0 switches it off.
    renormalize: divide a token's combine weights by their sum.
    routed_scaling: what all combine weights are multiplied by (DeepSeek-V3: 2.5, beside a shared expert of weight 1).
    expert_groups, groups_per_token: the experts stand in so many groups of neighbours, and a token chooses within the
        groups whose best two experts have the highest sum (DeepSeek-V3: 8 and 4). Equal: no limit.
    sequence_weight: weight of the sequence-wise balance loss (eq. 17-20), the mean over examples of E/K Σ_e f_e P_e:
        f_e the share of tokens with e among their k highest sigmoids, P_e the mean of sigmoid / Σ sigmoids; 1 at
        balance.
    """

    k: int = 2
    bias_rate: float = 1e-3
    renormalize: bool = True
    routed_scaling: float = 1.0
    expert_groups: int = 1
    groups_per_token: int = 1
    sequence_weight: float = 1e-4

    num_logits = one_logit_per_expert

    def __post_init__(self) -> None:
        if self.bias_rate < 0:
            raise ValueError(f"router.sigmoid.bias_rate = {self.bias_rate} must not be negative.")
        if self.routed_scaling <= 0:
            raise ValueError(f"router.sigmoid.routed_scaling = {self.routed_scaling} must be positive.")

    def init(self, num_experts: int) -> tuple[PyTree, PyTree]:
        """No parameters besides the gate; a bias of zero, and a load that changes nothing."""
        check_k(self.k, num_experts)
        check_expert_groups(self.k, num_experts, self.expert_groups, self.groups_per_token)
        zeros_E = jnp.zeros(num_experts, jnp.float32)
        return {}, {"bias": zeros_E, "load": zeros_E}

    def __call__(self, params: PyTree, inputs: RouterInputs, state: PyTree, key: Keys | None) -> Routed:
        """Routes one group; see `moe.routers.base.Router`."""
        one = given(self, inputs)
        bias_E = updated_bias(state["bias"], state["load"], self.bias_rate)
        scores_TE = jax.nn.sigmoid(one.logits)
        expert_TK = best_in_groups(
            scores_TE + bias_E[None], self.k, self.expert_groups, self.groups_per_token, summed=2
        )
        # In logarithms, as sigmoids that all underflow have no ratio.
        log_weight_TK = jnp.take_along_axis(jax.nn.log_sigmoid(one.logits), expert_TK, axis=-1)
        weight_TK = jax.nn.softmax(log_weight_TK) if self.renormalize else jnp.exp(log_weight_TK)
        routing = queue(expert_TK, self.routed_scaling * weight_TK, one.mask)

        preferred_TE = multi_hot(best(scores_TE, self.k), one.num_experts)
        probs_TE = jax.nn.softmax(jax.nn.log_sigmoid(one.logits))
        unweighted = {
            "sequence": losses.load_balancing_by_example(probs_TE, preferred_TE, self.k, one.mask, one.num_examples)
        }
        if key is not None:
            state = {"bias": bias_E, "load": losses.token_mean(multi_hot(expert_TK, one.num_experts), one.mask)}
        return answer(self, routing, unweighted, state, {"bias_spread": jnp.max(bias_E) - jnp.min(bias_E)})


def updated_bias(bias_E: Float[Array, "E"], load_E: Float[Array, "E"], rate: float) -> Float[Array, "E"]:
    """2408.15664, algorithm 1: bias + rate · sign(mean load - load)."""
    mean = jnp.mean(load_E)
    violation_E = mean - load_E
    # A mean over groups rounds, on another mesh otherwise: so far off is balance.
    balanced_E = jnp.abs(violation_E) <= 8 * jnp.finfo(jnp.float32).eps * mean
    return bias_E + rate * jnp.where(balanced_E, 0.0, jnp.sign(violation_E))

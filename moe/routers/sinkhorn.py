"""Balanced assignment by Sinkhorn's iterations: S-BASE (Clark et al. 2022, arXiv 2202.01169), after BASE layers."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe.routers import losses
from moe.routers.base import answer, best, given, no_variables, one_logit_per_expert, queue
from moe.types import Keys, Metrics, PyTree, Routed, RouterInputs


@dataclasses.dataclass(frozen=True)
class Sinkhorn:
    """In training a token takes the k experts of highest mass in a transport plan that loads all experts equally.

    BASE (Lewis et al. 2021, arXiv 2103.16716, section 3.1) solves the linear assignment of tokens to experts; S-BASE
    (2202.01169, section 3.2.1) its entropic relaxation: the plan closest to softmax(logits / temperature) whose tokens
    all have mass 1 and whose experts all have T/E. The plan only chooses: the combine weights come from the logits, and
    no gradient passes through the iterations. In evaluation a token takes its k highest logits, whatever others take.

    The choice is balanced as far as the plan is sharp: tokens with equal logits all go to the same experts.

    k: experts per token, exactly.
    iterations: pairs of normalisations, over experts and over tokens, in the logarithm.
    temperature: of the plan; a lower one is sharper and converges more slowly.
    gate: the combine weights, "softmax" of the logits, or their "sigmoid" (BASE, eq. 2).
    z_weight: weight of the z loss. There is none for balance.

    The metric plan_error, in training, is the mean over tokens of |mass - 1|, which converged iterations bring to 0.
    """

    k: int = 1
    iterations: int = 16
    temperature: float = 1.0
    gate: Literal["softmax", "sigmoid"] = "softmax"
    z_weight: float = 0.0

    num_logits = one_logit_per_expert
    init = no_variables

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"router.sinkhorn.iterations = {self.iterations} must be at least 1.")
        if self.temperature <= 0:
            raise ValueError(f"router.sinkhorn.temperature = {self.temperature} must be positive.")

    def __call__(self, params: PyTree, inputs: RouterInputs, state: PyTree, key: Keys | None) -> Routed:
        """Routes one group; see `moe.routers.base.Router`."""
        one = given(self, inputs)
        scores_TE = one.logits
        metrics: Metrics = {}
        if key is not None:
            scores_TE = log_plan(jax.lax.stop_gradient(one.logits) / self.temperature, one.mask, self.iterations)
            mass_T = jnp.sum(jnp.exp(scores_TE), axis=1)
            metrics["plan_error"] = losses.token_mean(jnp.abs(mass_T - 1), one.mask)
        expert_TK = best(scores_TE, self.k)
        gate_TE = jax.nn.sigmoid(one.logits) if self.gate == "sigmoid" else jax.nn.softmax(one.logits)
        routing = queue(expert_TK, jnp.take_along_axis(gate_TE, expert_TK, axis=-1), one.mask)
        return answer(self, routing, {"z": losses.z(one.logits, one.mask)}, state, metrics)


def log_plan(scores_TE: Float[Array, "T E"], mask_T: Bool[Array, "T"], iterations: int) -> Float[Array, "T E"]:
    """log of diag(a) exp(scores) diag(b), with a and b such that tokens have mass 1 and experts T/E.

    Tokens without padding count. Each iteration fits the tokens, then the experts, whose masses are exact in the end.
    """
    num_experts = scores_TE.shape[1]
    log_share = jnp.log(jnp.maximum(jnp.sum(mask_T), 1) / num_experts)

    def fit(_: Any, offsets: tuple[Array, Array]) -> tuple[Array, Array]:
        offset_T = -jax.nn.logsumexp(scores_TE + offsets[1][None], axis=1)
        # A large number and not infinity, as a group may be padding alone.
        column_TE = jnp.where(mask_T[:, None], scores_TE + offset_T[:, None], -1e30)
        return offset_T, log_share - jax.nn.logsumexp(column_TE, axis=0)

    start = jnp.zeros(len(scores_TE), jnp.float32), jnp.zeros(num_experts, jnp.float32)
    offset_T, offset_E = jax.lax.fori_loop(0, iterations, fit, start)
    return (scores_TE + offset_E[None]) + offset_T[:, None]

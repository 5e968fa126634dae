"""Softmax token choice, the router of V-MoE (Riquelme et al. 2021, arXiv 2106.05974)."""

import dataclasses

import jax
import jax.numpy as jnp

from moe.routers import losses
from moe.routers.base import (
    answer,
    best,
    example_noise,
    given,
    multi_hot,
    no_variables,
    one_logit_per_expert,
    queue,
    token_choice_losses,
)
from moe.types import Keys, PyTree, Routed, RouterInputs


@dataclasses.dataclass(frozen=True)
class Softmax:
    """Each token takes the k most probable experts of softmax(logits + noise), weighted by their probabilities.

    k: experts per token, exactly.
    noise: in training the logits get normal noise of standard deviation noise / E.
    renormalize: divide a token's combine weights by their sum (V-MoE doesn't).
    batch_priority: within a rank of choice, tokens queue by decreasing top probability instead of position.
    importance_weight, load_weight, balance_weight, z_weight: weights of the losses of the same names. The load loss is
        a statement about the noise, so it exists in training only and needs noise > 0.
    """

    k: int = 2
    noise: float = 1.0
    renormalize: bool = False
    batch_priority: bool = False
    importance_weight: float = 0.005
    load_weight: float = 0.005
    balance_weight: float = 0.0
    z_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.noise < 0:
            raise ValueError(f"router.softmax.noise = {self.noise} must not be negative.")
        if self.load_weight and not self.noise:
            raise ValueError(
                f"router.softmax.load_weight = {self.load_weight} needs noise > 0: set noise, or load_weight = 0."
            )

    num_logits = one_logit_per_expert
    init = no_variables

    def __call__(self, params: PyTree, inputs: RouterInputs, state: PyTree, key: Keys | None) -> Routed:
        """Routes one group; see `moe.routers.base.Router`."""
        one = given(self, inputs)
        logits_TE, num_experts = one.logits, one.num_experts
        noise_std = self.noise / num_experts
        noisy_TE = logits_TE
        if key is not None and self.noise:
            noisy_TE = logits_TE + noise_std * example_noise(key, *logits_TE.shape)

        # Choosing by logit keeps the order of experts whose probabilities underflow.
        expert_TK = best(noisy_TE, self.k)
        weight_TK = jnp.take_along_axis(jax.nn.softmax(noisy_TE), expert_TK, axis=-1)
        priority_T = jax.lax.stop_gradient(weight_TK[:, 0]) if self.batch_priority else None
        if self.renormalize:
            weight_TK = weight_TK / jnp.sum(weight_TK, axis=-1, keepdims=True)
        routing = queue(expert_TK, weight_TK, one.mask, priority_T=priority_T)

        chosen_TE = multi_hot(expert_TK, num_experts)
        unweighted = token_choice_losses(one, jax.nn.softmax(logits_TE), chosen_TE, self.k)
        if key is not None and self.noise:
            unweighted["load"] = losses.load(logits_TE, noisy_TE, self.k, noise_std, one.mask)
        return answer(self, routing, unweighted, state)

"""Softmax token choice, the router of V-MoE (Riquelme et al. 2021, arXiv 2106.05974)."""

import dataclasses

import jax
import jax.numpy as jnp

from moe.routers import losses
from moe.routers.base import check_k, example_noise, queue, token_mask
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

    def init(self, num_experts: int) -> tuple[PyTree, PyTree]:
        """No parameters of its own and no state."""
        check_k(self.k, num_experts)
        return {}, {}

    def __call__(self, params: PyTree, inputs: RouterInputs, state: PyTree, key: Keys | None) -> Routed:
        """Routes one group; see `moe.routers.base.Router`."""
        logits_TE = inputs.logits.astype(jnp.float32)
        num_experts = logits_TE.shape[-1]
        check_k(self.k, num_experts)
        mask_T = token_mask(inputs)
        noise_std = self.noise / num_experts
        noisy_TE = logits_TE
        if key is not None and self.noise:
            noisy_TE = logits_TE + noise_std * example_noise(key, *logits_TE.shape)

        # Choosing by logit keeps the order of experts whose probabilities underflow.
        expert_TK = jax.lax.top_k(jax.lax.stop_gradient(noisy_TE), self.k)[1]
        weight_TK = jnp.take_along_axis(jax.nn.softmax(noisy_TE), expert_TK, axis=-1)
        priority_T = jax.lax.stop_gradient(weight_TK[:, 0]) if self.batch_priority else None
        if self.renormalize:
            weight_TK = weight_TK / jnp.sum(weight_TK, axis=-1, keepdims=True)
        routing = queue(
            expert_TK,
            weight_TK,
            valid_TK=jnp.broadcast_to(mask_T[:, None], expert_TK.shape),
            priority_T=priority_T,
        )

        clean_TE = jax.nn.softmax(logits_TE)
        chosen_TE = jnp.sum(jax.nn.one_hot(expert_TK, num_experts), axis=1)
        unweighted = {
            "importance": losses.importance(clean_TE, mask_T),
            "balance": losses.load_balancing(clean_TE, chosen_TE, self.k, mask_T),
            "z": losses.z(logits_TE, mask_T),
        }
        if key is not None and self.noise:
            unweighted["load"] = losses.load(logits_TE, noisy_TE, self.k, noise_std, mask_T)
        return Routed(routing, losses.weighted(self, unweighted), unweighted, state)

"""Softmax token choice: V-MoE by default, with the variants of Switch Transformer, Mixtral and DeepSeek-V2."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe.routers import losses
from moe.routers.base import (
    answer,
    best_in_groups,
    check_expert_groups,
    check_k,
    example_noise,
    given,
    multi_hot,
    one_logit_per_expert,
    queue,
    token_choice_losses,
)
from moe.types import Keys, PyTree, Routed, RouterInputs


@dataclasses.dataclass(frozen=True)
class Softmax:
    """Each token takes the k most probable experts of softmax(logits + noise), weighted by their probabilities.

    Riquelme et al. 2021 (V-MoE, arXiv 2106.05974), section 2.

    k: experts per token, exactly.
    noise: in training the logits get normal noise of standard deviation noise / E (V-MoE).
    jitter: in training every entry of what the gate reads is multiplied by a draw from U[1 - jitter, 1 + jitter]
        (Switch Transformer, 2101.03961, table 11). Losses see these logits too, but not the noise.
    renormalize: softmax after top-k instead of before: over the k chosen logits only (Mixtral, 2401.04088), which is
        to divide a token's combine weights by their sum. For k = 1 the weight is then 1, and has no gradient.
    batch_priority: within a rank of choice, tokens queue by decreasing top probability instead of position (V-MoE).
    expert_groups, groups_per_token: the experts stand in so many groups of neighbours, and a token chooses within the
        groups that hold its most probable experts (DeepSeek-V2, 2405.04434, section 2.2.2). Equal: no limit.
    importance_weight, load_weight, balance_weight, z_weight, entropy_weight: weights of the losses of the same names.
        The load loss is a statement about the noise, so it exists in training only and needs noise > 0.
    """

    k: int = 2
    noise: float = 1.0
    jitter: float = 0.0
    renormalize: bool = False
    batch_priority: bool = False
    expert_groups: int = 1
    groups_per_token: int = 1
    importance_weight: float = 0.005
    load_weight: float = 0.005
    balance_weight: float = 0.0
    z_weight: float = 0.0
    entropy_weight: float = 0.0

    num_logits = one_logit_per_expert

    def __post_init__(self) -> None:
        if self.noise < 0:
            raise ValueError(f"router.softmax.noise = {self.noise} must not be negative.")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"router.softmax.jitter = {self.jitter} must lie in [0, 1).")
        if self.load_weight and not self.noise:
            raise ValueError(
                f"router.softmax.load_weight = {self.load_weight} needs noise > 0: set noise, or load_weight = 0."
            )

    def init(self, num_experts: int) -> tuple[PyTree, PyTree]:
        """No parameters besides the gate, and no state."""
        check_k(self.k, num_experts)
        check_expert_groups(self.k, num_experts, self.expert_groups, self.groups_per_token)
        return {}, {}

    def __call__(self, params: PyTree, inputs: RouterInputs, state: PyTree, key: Keys | None) -> Routed:
        """Routes one group; see `moe.routers.base.Router`."""
        one = given(self, inputs)
        if key is not None and self.jitter:
            one = one._replace(logits=self._jittered_logits(inputs, key))
        noise_std = self.noise / one.num_experts
        noisy_TE = one.logits
        if key is not None and self.noise:
            noisy_TE = one.logits + noise_std * example_noise(key, *one.logits.shape)

        # Choosing by logit keeps the order of experts whose probabilities underflow.
        expert_TK = best_in_groups(noisy_TE, self.k, self.expert_groups, self.groups_per_token, summed=1)
        weight_TK = jnp.take_along_axis(jax.nn.softmax(noisy_TE), expert_TK, axis=-1)
        priority_T = jax.lax.stop_gradient(weight_TK[:, 0]) if self.batch_priority else None
        if self.renormalize:
            weight_TK = jax.nn.softmax(jnp.take_along_axis(noisy_TE, expert_TK, axis=-1))
        routing = queue(expert_TK, weight_TK, one.mask, priority_T=priority_T)

        chosen_TE = multi_hot(expert_TK, one.num_experts)
        unweighted = token_choice_losses(one, jax.nn.softmax(one.logits), chosen_TE, self.k)
        unweighted["entropy"] = losses.entropy(one.logits, one.mask)
        if key is not None and self.noise:
            unweighted["load"] = losses.load(one.logits, noisy_TE, self.k, noise_std, one.mask)
        return answer(self, routing, unweighted, state)

    def _jittered_logits(self, inputs: RouterInputs, key: Keys) -> Float[Array, "T E"]:
        if inputs.tokens is None or inputs.gate is None:
            raise ValueError(
                f"router.softmax.jitter = {self.jitter} multiplies what the gate reads: give tokens and gate in "
                "RouterInputs, or set jitter = 0."
            )
        draw = functools.partial(jax.random.uniform, minval=1 - self.jitter, maxval=1 + self.jitter)
        # Another key than that of the noise.
        factor_TD = example_noise(jax.vmap(jax.random.fold_in, (0, None))(key, 0), *inputs.tokens.shape, draw=draw)
        return jnp.einsum("TD,DE->TE", inputs.tokens * factor_TD, inputs.gate, precision="highest")

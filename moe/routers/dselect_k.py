"""DSelect-k: k selectors of experts by smooth binary codes (Hazimeh et al. 2021, arXiv 2106.03760)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moe.routers import losses
from moe.routers.base import answer, given, no_variables
from moe.routers.variable import check_max_experts, most_experts, queue_of_tokens
from moe.types import Keys, PyTree, Routed, RouterInputs


@dataclasses.dataclass(frozen=True)
class DSelectK:
    """k selectors per token, each a binary code of ⌈log2 E⌉ smooth bits; experts with a positive weight are dispatched.

    2106.03760, section 3, in its form per example. A bit is S(logit), S the cubic smooth step: exactly 0 below
    -γ/2 and exactly 1 above γ/2, where it has no gradient. The weight of expert e in a selector is the product of the
    bits that spell e, S or 1 - S, and a token's combine weights are the selectors' mixture under a softmax of
    k more logits. With all bits decided a token has at most k experts; until then up to E.

    k: selectors; experts per token, at most, once the bits are decided.
    width: γ of the smooth step, in units of the logits.
    max_experts: in training, the most experts that a token may have, its heaviest; the rest counts as overflow. 0 is E.
    selector_entropy_weight: of the mean over tokens of the sum over selectors of -Σ r log r,
        which drives bits to decide.
    reach_weight: of the loss `reach`, the mean over tokens of the sum over selectors of 1 / Σ_e r_e - 1, less the
        constant: where E isn't a power of two, some codes spell no expert, and a selector's weights lack
        their share. Floored at a reach of 1 %, below which the loss has no gradient. 0 where E is a power of two.
    importance_weight: of the squared variation of the combine weights that experts receive.

    The gate computes k · ⌈log2 E⌉ logits of bits, selector by selector, and k of the mixture. The metric `entropy` is
    of a token's combine weights over experts, divided by their sum; unreached, the share of tokens without an expert.
    """

    k: int = 2
    width: float = 2.0
    max_experts: int = 0
    selector_entropy_weight: float = 0.01
    reach_weight: float = 1e-3
    importance_weight: float = 0.0

    init = no_variables

    def __post_init__(self) -> None:
        if self.width <= 0:
            raise ValueError(f"router.dselect_k.width = {self.width} must be positive.")
        check_max_experts("dselect_k", self.max_experts, self.k)

    def num_logits(self, num_experts: int) -> int:
        """k codes, and k logits of their mixture."""
        return self.k * (num_bits(num_experts) + 1)

    def __call__(self, params: PyTree, inputs: RouterInputs, state: PyTree, key: Keys | None) -> Routed:
        """Routes one group; see `moe.routers.base.Router`."""
        one = given(self, inputs)
        selector_TKE, mixture_TK = self._selectors(one.logits, one.num_experts)
        weight_TE = jnp.sum(mixture_TK[:, :, None] * selector_TKE, axis=1)
        wanted_TE = weight_TE > 0
        most = most_experts(self.max_experts, one.num_experts, training=key is not None)
        routing = queue_of_tokens(weight_TE, wanted_TE, one.mask, most)

        reach_TK = jnp.maximum(jnp.sum(selector_TKE, axis=-1), 0.01)
        unweighted = {
            "selector_entropy": losses.token_mean(jnp.sum(_entr(selector_TKE), axis=(1, 2)), one.mask),
            "reach": losses.token_mean(jnp.sum(1 / reach_TK - 1, axis=1), one.mask),
            "importance": losses.importance(weight_TE, one.mask),
        }
        share_TE = weight_TE / jnp.maximum(jnp.sum(weight_TE, axis=1, keepdims=True), jnp.finfo(jnp.float32).tiny)
        unreached_T = ~jnp.any(wanted_TE, axis=-1)
        metrics = {
            "entropy": losses.token_mean(jnp.sum(_entr(share_TE), axis=1), one.mask),
            "unreached": losses.token_mean(unreached_T.astype(jnp.float32), one.mask),
        }
        return answer(self, routing, unweighted, state, metrics)

    def _selectors(
        self, logits_TX: Float[Array, "T X"], num_experts: int
    ) -> tuple[Float[Array, "T K E"], Float[Array, "T K"]]:
        """Each selector's weights of experts, and the weights of the selectors."""
        num_tokens, bits = len(logits_TX), num_bits(num_experts)
        split = self.k * bits
        bit_TKm = smooth_step(logits_TX[:, :split].reshape(num_tokens, self.k, bits), self.width)
        # Expert e is spelled by the binary digits of e, lowest first.
        spelled_Em = (np.arange(num_experts)[:, None] >> np.arange(bits)[None]) & 1 == 1
        factor_TKEm = jnp.where(spelled_Em[None, None], bit_TKm[:, :, None], 1 - bit_TKm[:, :, None])
        return _product(factor_TKEm), jax.nn.softmax(logits_TX[:, split:])


def num_bits(num_experts: int) -> int:
    """⌈log2 E⌉."""
    return (num_experts - 1).bit_length()


def smooth_step(x: Float[Array, "..."], width: float) -> Float[Array, "..."]:
    """2106.03760, section 3: 0 up to -width/2, 1 from width/2 on, -2 t³ + 3/2 t + 1/2 between, with t = x / width."""
    t = jnp.clip(x / width, -0.5, 0.5)
    # Exact at both ends, where the cubic would round.
    return jnp.where(t <= -0.5, 0.0, jnp.where(t >= 0.5, 1.0, (1.5 - 2 * t * t) * t + 0.5))


def _product(factor_TKEm: Float[Array, "T K E m"]) -> Float[Array, "T K E"]:
    """Over the bits, one by one: the gradient of a product over an axis divides by its factors."""
    product_TKE = jnp.ones(factor_TKEm.shape[:-1], jnp.float32)
    for bit in range(factor_TKEm.shape[-1]):
        product_TKE = product_TKE * factor_TKEm[..., bit]
    return product_TKE


def _entr(p: Float[Array, "..."]) -> Float[Array, "..."]:
    """-p log p with a finite gradient at 0, where it is taken as constant."""
    positive = p > 0
    return jnp.where(positive, -p * jnp.log(jnp.where(positive, p, 1.0)), 0.0)

"""Successive halving over the experts of a token, with the operator of Pietruszka et al. 2020 (arXiv 2010.15552)."""

import dataclasses

import jax
import jax.numpy as jnp

from moe import topk
from moe.routers import losses
from moe.routers.base import check_k, queue, token_mask
from moe.types import Keys, PyTree, Routed, RouterInputs


@dataclasses.dataclass(frozen=True)
class SuccessiveHalving:
    """A tournament over the experts fills k slots with sharp mixtures; each slot dispatches to its heaviest expert.

    Scores are sigmoid(logits). Every expert lands in exactly one slot, so a token's k experts are distinct. Combine
    weight = weight of the expert in its slot × softmax probability. The metric `mass_left_out` is the share of the
    slots' weight that lies on the experts not dispatched to.

    k: experts per token, exactly.
    base: b of the released pair weights softmax(b^score_i, b^score_j).
    balance_weight, importance_weight, z_weight: weights of the losses of the same names.
    """

    k: int = 2
    base: float = 20.0
    balance_weight: float = 0.01
    importance_weight: float = 0.0
    z_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.base <= 1:
            raise ValueError(f"router.successive_halving.base = {self.base} must exceed 1.")

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

        slots_TKE = topk.successive_halving_matrix(
            jax.nn.sigmoid(logits_TE), self.k, weights=topk.BoostedSoftmax(base=self.base)
        )
        probs_TE = jax.nn.softmax(logits_TE)
        expert_TK = jnp.argmax(slots_TKE, axis=-1)
        slot_weight_TK = jnp.max(slots_TKE, axis=-1)
        weight_TK = slot_weight_TK * jnp.take_along_axis(probs_TE, expert_TK, axis=-1)
        # Slots come in no order of merit: the heaviest choice of a token queues first.
        order_TK = jnp.argsort(-jax.lax.stop_gradient(weight_TK), axis=-1)
        expert_TK, weight_TK = (jnp.take_along_axis(a, order_TK, axis=-1) for a in (expert_TK, weight_TK))
        routing = queue(expert_TK, weight_TK, valid_TK=jnp.broadcast_to(mask_T[:, None], expert_TK.shape))

        chosen_TE = jnp.sum(jax.nn.one_hot(expert_TK, num_experts), axis=1)
        unweighted = {
            "balance": losses.load_balancing(probs_TE, chosen_TE, self.k, mask_T),
            "importance": losses.importance(probs_TE, mask_T),
            "z": losses.z(logits_TE, mask_T),
        }
        left_out = 1 - losses.token_mean(jnp.mean(slot_weight_TK, axis=-1), mask_T)
        return Routed(routing, losses.weighted(self, unweighted), {**unweighted, "mass_left_out": left_out}, state)

"""Successive halving over the experts of a token, with the operator of Pietruszka et al. 2020 (arXiv 2010.15552)."""

import dataclasses

import jax
import jax.numpy as jnp

from moe import topk
from moe.routers import losses
from moe.routers.base import (
    answer,
    given,
    multi_hot,
    no_variables,
    one_logit_per_expert,
    queue,
    token_choice_losses,
)
from moe.types import Keys, PyTree, Routed, RouterInputs


@dataclasses.dataclass(frozen=True)
class SuccessiveHalving:
    """A tournament over the experts fills k slots with sharp mixtures; each slot dispatches to its heaviest expert.

    Scores are sigmoid(logits). Every expert lands in exactly one slot, so a token's k experts are distinct. Combine
    weight = weight of the expert in its slot × softmax probability. The metric `mass_left_out` is the share of the
    slots' weight that lies on the experts not dispatched to.

    k: experts per token, exactly.
    weights: how the two experts of a pair share a slot, one of `topk.PAIR_WEIGHTS`; by default the released weights
        softmax(20^score_i, 20^score_j).
    balance_weight, importance_weight, z_weight: weights of the losses of the same names.
    """

    k: int = 2
    weights: topk.PairWeights = topk.BoostedSoftmax(base=20.0)
    balance_weight: float = 0.01
    importance_weight: float = 0.0
    z_weight: float = 0.0

    num_logits = one_logit_per_expert
    init = no_variables

    def __call__(self, params: PyTree, inputs: RouterInputs, state: PyTree, key: Keys | None) -> Routed:
        """Routes one group; see `moe.routers.base.Router`."""
        one = given(self, inputs)

        slots_TKE = topk.successive_halving_matrix(jax.nn.sigmoid(one.logits), self.k, weights=self.weights)
        probs_TE = jax.nn.softmax(one.logits)
        expert_TK = jnp.argmax(slots_TKE, axis=-1)
        slot_weight_TK = jnp.max(slots_TKE, axis=-1)
        weight_TK = slot_weight_TK * jnp.take_along_axis(probs_TE, expert_TK, axis=-1)
        # Slots come in no order of merit: the heaviest choice of a token queues first.
        order_TK = jnp.argsort(-jax.lax.stop_gradient(weight_TK), axis=-1)
        expert_TK, weight_TK = (jnp.take_along_axis(a, order_TK, axis=-1) for a in (expert_TK, weight_TK))
        routing = queue(expert_TK, weight_TK, one.mask)

        unweighted = token_choice_losses(one, probs_TE, multi_hot(expert_TK, one.num_experts), self.k)
        left_out = 1 - losses.token_mean(jnp.mean(slot_weight_TK, axis=-1), one.mask)
        return answer(self, routing, unweighted, state, {"mass_left_out": left_out})

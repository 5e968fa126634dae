"""Successive halving over the experts of a token or the tokens of an expert (Pietruszka et al. 2020, 2010.15552)."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe import topk
from moe.routers import losses
from moe.routers.base import (
    Given,
    answer,
    given,
    multi_hot,
    no_variables,
    one_logit_per_expert,
    queue,
    token_choice_losses,
)
from moe.types import Assignments, Keys, Losses, Metrics, PyTree, Routed, RouterInputs, Slots


@dataclasses.dataclass(frozen=True)
class SuccessiveHalving:
    """Tournaments, by scores sigmoid(logits), that fill slots with sharp mixtures of neighbours in rank (2010.15552).

    over = "experts": the experts of a token play for k slots, and each slot dispatches to its heaviest expert. Every
        expert lands in exactly one slot, so a token's k experts are distinct. Combine weight = weight of the expert in
        its slot × softmax probability. The metric `mass_left_out` is the share of the slots' weight that lies on the
        experts not dispatched to.
    over = "tokens": the group's tokens play for the ⌈T·k/E⌉ slots of each expert, which works on their mixtures, as
        the paper pools a sequence; outputs return by the transpose of the same row-stochastic matrix. Every token
        lands in exactly one slot of every expert. Padding loses against everything and has no weight; slots that only
        it could fill stay empty. Loads are equal, so of the losses only z exists. The metric `mass_pooled` is the
        share of the slots' weight that isn't on their heaviest token. Not for autoregressive models.

    k: experts per token, exactly; over tokens, slots per token times E.
    weights: how the two candidates of a pair share a slot, one of `topk.PAIR_WEIGHTS`; by default the released weights
        softmax(20^score_i, 20^score_j).
    balance_weight, importance_weight, z_weight: weights of the losses of the same names.
    """

    k: int = 2
    over: Literal["experts", "tokens"] = "experts"
    weights: topk.PairWeights = topk.BoostedSoftmax(base=20.0)
    balance_weight: float = 0.01
    importance_weight: float = 0.0
    z_weight: float = 0.0

    num_logits = one_logit_per_expert
    init = no_variables

    def __call__(self, params: PyTree, inputs: RouterInputs, state: PyTree, key: Keys | None) -> Routed:
        """Routes one group; see `moe.routers.base.Router`."""
        one = given(self, inputs)
        routing, unweighted, metrics = self._over_tokens(one) if self.over == "tokens" else self._over_experts(one)
        return answer(self, routing, unweighted, state, metrics)

    def _over_experts(self, one: Given) -> tuple[Assignments, Losses, Metrics]:
        slots_TKE = topk.successive_halving_matrix(jax.nn.sigmoid(one.logits), self.k, weights=self.weights)
        probs_TE = jax.nn.softmax(one.logits)
        expert_TK = jnp.argmax(slots_TKE, axis=-1)
        slot_weight_TK = jnp.max(slots_TKE, axis=-1)
        weight_TK = slot_weight_TK * jnp.take_along_axis(probs_TE, expert_TK, axis=-1)
        # Slots come in no order of merit: the heaviest choice of a token queues first.
        order_TK = jnp.argsort(-jax.lax.stop_gradient(weight_TK), axis=-1)
        expert_TK, weight_TK = (jnp.take_along_axis(a, order_TK, axis=-1) for a in (expert_TK, weight_TK))

        unweighted = token_choice_losses(one, probs_TE, multi_hot(expert_TK, one.num_experts), self.k)
        left_out = 1 - losses.token_mean(jnp.mean(slot_weight_TK, axis=-1), one.mask)
        return queue(expert_TK, weight_TK, one.mask), unweighted, {"mass_left_out": left_out}

    def _over_tokens(self, one: Given) -> tuple[Slots, Losses, Metrics]:
        num_tokens, num_experts = one.logits.shape
        num_slots = -(-num_tokens * self.k // num_experts)
        # Below every sigmoid, by which `_PaddingLoses` knows padding.
        scores_TE = jnp.where(one.mask[:, None], jax.nn.sigmoid(one.logits), -1.0)
        slots_ECT = topk.successive_halving_matrix(scores_TE.T, num_slots, weights=_PaddingLoses(self.weights))
        slots_TEC = jnp.where(one.mask[:, None, None], slots_ECT.transpose(2, 0, 1), 0.0)

        filled = jnp.maximum(jnp.sum(slots_TEC), 1.0)
        pooled = 1 - jnp.sum(jnp.max(slots_TEC, axis=0)) / filled
        z = losses.z(one.logits, one.mask)
        return Slots(slots_TEC, slots_TEC), {"z": z}, {"mass_pooled": pooled}


@dataclasses.dataclass(frozen=True)
class _PaddingLoses:
    """`weights`, except that a negative score has no share against any other."""

    weights: topk.PairWeights

    def shares(
        self, strong: Float[Array, "*b m"], weak: Float[Array, "*b m"], this_round: topk.Round
    ) -> tuple[Float[Array, "*b m"], Float[Array, "*b m"]]:
        share, rest = self.weights.shares(jnp.maximum(strong, 0.0), jnp.maximum(weak, 0.0), this_round)
        return jnp.where(weak < 0, 1.0, share), jnp.where(weak < 0, 0.0, rest)

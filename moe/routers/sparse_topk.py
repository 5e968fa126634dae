"""Sparse p-norm top-k, with the operator of Sander et al. 2023 (arXiv 2302.01425) as the router's choice of experts."""

import dataclasses

import jax
import jax.numpy as jnp

from moe import isotonic, topk
from moe.routers import losses
from moe.routers.base import (
    answer,
    best,
    given,
    no_variables,
    one_logit_per_expert,
    queue,
    token_choice_losses,
)
from moe.types import Keys, PyTree, Routed, RouterInputs


@dataclasses.dataclass(frozen=True)
class SparseTopK:
    """Combine weights mask(logits) × softmax(logits), with the differentiable p-norm mask; dispatch where mask > 0.

    The mask sums to k and has exact zeros, but a token may have more than k experts (at least k, at most E).

    k: sum of the mask; experts per token, at least.
    strength: λ of the regulariser; small is close to hard top-k, large spreads the mask.
    p: exponent of the regulariser, in (1, 2].
    solver: of the isotonic problem; any of `moe.isotonic.SOLVERS`.
    max_experts: in training, the most experts that a token may have, its heaviest; the rest counts as overflow. 0 is E.
    balance_weight, importance_weight, z_weight: weights of the losses; load is measured on the mask.
    """

    k: int = 2
    strength: float = 1.0
    p: float = 4 / 3
    solver: isotonic.Solver = isotonic.Threshold()
    max_experts: int = 0
    balance_weight: float = 0.01
    importance_weight: float = 0.0
    z_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.strength <= 0:
            raise ValueError(f"router.sparse_topk.strength = {self.strength} must be positive.")
        if not 1 < self.p <= 2:
            raise ValueError(f"router.sparse_topk.p = {self.p} must lie in (1, 2].")
        if self.max_experts and self.max_experts < self.k:
            raise ValueError(f"router.sparse_topk.max_experts = {self.max_experts} must be 0 or at least k = {self.k}.")

    num_logits = one_logit_per_expert
    init = no_variables

    def __call__(self, params: PyTree, inputs: RouterInputs, state: PyTree, key: Keys | None) -> Routed:
        """Routes one group; see `moe.routers.base.Router`."""
        one = given(self, inputs)
        logits_TE, num_experts = one.logits, one.num_experts

        mask_TE = topk.mask(logits_TE, self.k, strength=self.strength, p=self.p, solver=self.solver)
        probs_TE = jax.nn.softmax(logits_TE)
        wanted_TE = (mask_TE > 0) & one.mask[:, None]
        limit = num_experts if key is None or not self.max_experts else min(self.max_experts, num_experts)
        # A mask may underflow against the softmax: the choice itself ranks before its weight.
        rank_TE = jnp.where(wanted_TE, mask_TE * probs_TE, -1.0)
        expert_TK = best(rank_TE, limit)
        routing = queue(
            expert_TK,
            weight_TK=jnp.take_along_axis(mask_TE * probs_TE, expert_TK, axis=-1),
            mask_T=one.mask,
            wanted_TK=jnp.take_along_axis(wanted_TE, expert_TK, axis=-1),
            choices=jnp.sum(wanted_TE),
        )

        unweighted = token_choice_losses(one, probs_TE, mask_TE, self.k)
        unweighted["importance"] = losses.importance(mask_TE, one.mask)
        hard_T = jnp.all((mask_TE == 0) | (mask_TE == 1), axis=-1)
        hard_share = losses.token_mean(hard_T.astype(jnp.float32), one.mask)
        return answer(self, routing, unweighted, state, {"hard_mask_share": hard_share})

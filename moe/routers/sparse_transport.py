"""Sparsity-constrained optimal transport (Liu, Puigcerver and Blondel 2023, arXiv 2209.15466) of tokens to experts."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from moe import topk
from moe.routers import losses
from moe.routers.base import answer, given, no_variables, one_logit_per_expert
from moe.types import Assignments, Keys, PyTree, Routed, RouterInputs

# Below every score, also where logits are large; not infinity, whose differences are no numbers.
_LAST = float(np.finfo(np.float32).min)


class Columns(NamedTuple):
    """A plan by expert, tokens in descending order of score: which, and with what mass; 0 is no match."""

    token: Int[Array, "E C"]
    mass: Float[Array, "E C"]


@dataclasses.dataclass(frozen=True)
class SparseTransport:
    """Tokens go to experts by a transport plan in which every expert has mass T/E, on at most ⌈T·k/E⌉ tokens.

    The plan maximises Σ plan · log softmax(logits) - γ/2 Σ plan², where a token's masses sum to 1 (2209.15466, whose
    columns are the experts, whose nonzeros per column are the capacity, and whose regulariser this is: the quadratic
    with a cardinality constraint). Solved as in the paper in the semi-dual, which is convex: a dual variable per token
    is added to its scores, and an expert's column is then the Euclidean projection of its ⌈T·k/E⌉ highest scores, over
    γ, onto the simplex of mass T/E. The semi-dual's gradient in a token's variable is what its masses lack of 1;
    `iterations` steps of Nesterov's method start from 0. Experts' masses are exact all the time.

    Combine weight = plan × softmax(logits), dispatch where plan > 0. The gradient takes the dual variables as constants
    (Danskin's theorem: exact for the value of the transport; for the plan it leaves out how the variables follow the
    logits), and passes through the projections. Evaluation solves the same problem: a token's experts depend on its
    group, so it isn't for autoregressive models. T is the group's tokens without padding.

    k: experts per token, on average at most; a token may have any number, none included.
    strength: γ; a smaller one makes the plan harder and needs more iterations.
    iterations: steps on the dual variables, of γ/E each, which is safe as a token stands in at most E columns.
    z_weight: weight of the z loss. There is none for balance.

    Metrics: plan_error, the mean over tokens of |mass - 1|; unchosen, the share of tokens without an expert.
    """

    k: int = 2
    strength: float = 1.0
    iterations: int = 20
    z_weight: float = 0.0

    num_logits = one_logit_per_expert
    init = no_variables

    def __post_init__(self) -> None:
        if self.strength <= 0:
            raise ValueError(f"router.sparse_transport.strength = {self.strength} must be positive.")
        if self.iterations < 1:
            raise ValueError(f"router.sparse_transport.iterations = {self.iterations} must be at least 1.")

    def __call__(self, params: PyTree, inputs: RouterInputs, state: PyTree, key: Keys | None) -> Routed:
        """Routes one group; see `moe.routers.base.Router`."""
        one = given(self, inputs)
        scores_TE = jax.nn.log_softmax(one.logits)
        dual_T = dual_variables(
            jax.lax.stop_gradient(scores_TE), one.mask, k=self.k, strength=self.strength, iterations=self.iterations
        )
        plan = columns(scores_TE + dual_T[:, None], one.mask, self.k, self.strength)
        prob_EC = jnp.take_along_axis(jax.nn.softmax(one.logits).T, plan.token, axis=1)
        matched_EC = plan.mass > 0
        routing = Assignments(
            token=plan.token.T.reshape(-1),
            expert=jnp.tile(jnp.arange(one.num_experts, dtype=jnp.int32), plan.token.shape[1]),
            weight=(plan.mass * prob_EC).T.reshape(-1),
            valid=matched_EC.T.reshape(-1),
            choices=jnp.sum(matched_EC, dtype=jnp.int32),
        )
        mass_T = token_masses(plan, len(scores_TE))
        metrics = {
            "plan_error": losses.token_mean(jnp.abs(mass_T - 1), one.mask),
            "unchosen": losses.token_mean((mass_T == 0).astype(jnp.float32), one.mask),
        }
        return answer(self, routing, {"z": losses.z(one.logits, one.mask)}, state, metrics)


def columns(scores_TE: Float[Array, "T E"], mask_T: Bool[Array, "T"], k: int, strength: float) -> Columns:
    """Each expert's argmax of Σ mass · score - strength/2 Σ mass², masses of T/E in all, on at most ⌈T·k/E⌉ tokens.

    2209.15466: the projection of the highest scores / strength onto the simplex. T counts tokens without padding.
    """
    num_tokens, num_experts = scores_TE.shape
    tokens = jnp.sum(mask_T, dtype=jnp.int32)
    scores_ET = jnp.where(mask_T[None], scores_TE.T, _LAST)
    top_EC, token_EC = jax.lax.top_k(scores_ET, -(-num_tokens * k // num_experts))
    rank_C = jnp.arange(1, top_EC.shape[1] + 1)
    within_C = rank_C <= -(-tokens * k // num_experts)

    # A constant cancels in the projection; without the best score no sum is of large numbers.
    z_EC = jnp.where(within_C[None], (top_EC - top_EC[:, :1]) / strength, 0.0)
    fixed_EC = jax.lax.stop_gradient(z_EC)
    mass = tokens / num_experts
    # In descending order the support is a prefix.
    support_EC = (mass + rank_C[None] * fixed_EC > jnp.cumsum(fixed_EC, axis=1)) & within_C[None]
    size_E1 = jnp.sum(support_EC, axis=1, keepdims=True, dtype=jnp.float32)
    excess_E1 = jnp.sum(jnp.where(support_EC, z_EC, 0.0), axis=1, keepdims=True) - mass
    threshold_E1 = excess_E1 / jnp.maximum(size_E1, 1.0)
    return Columns(token_EC, jnp.where(support_EC, jnp.maximum(z_EC - threshold_E1, 0.0), 0.0))


def token_masses(plan: Columns, num_tokens: int) -> Float[Array, "T"]:
    """The mass of each token, over all experts."""
    return jnp.zeros(num_tokens, jnp.float32).at[plan.token.reshape(-1)].add(plan.mass.reshape(-1))


def unsorted_masses(
    scores_TE: Float[Array, "T E"], mask_T: Bool[Array, "T"], k: int, strength: float
) -> Float[Array, "T"]:
    """`token_masses` of `columns`, up to rounding, at a small part of the cost: nothing is sorted. No gradient.

    The threshold of a projection is that of the entries above it; from all entries on, those that prove to lie below
    the threshold drop out until none does (Michelot 1986), which takes a few passes.
    """
    num_experts = scores_TE.shape[1]
    tokens = jnp.sum(mask_T, dtype=jnp.int32)
    scores_TE = jnp.where(mask_T[:, None], scores_TE, _LAST)
    most = jnp.maximum(-(-tokens * k // num_experts), 1)
    chosen_TE = (topk.hard_mask(scores_TE, most, axis=0) > 0) & mask_T[:, None]
    best_1E = jnp.max(scores_TE, axis=0, keepdims=True)
    z_TE = jnp.where(chosen_TE, (scores_TE - best_1E) / strength, 0.0)

    def threshold(support_TE: Array) -> Array:
        size_1E = jnp.sum(support_TE, axis=0, keepdims=True, dtype=jnp.float32)
        excess_1E = jnp.sum(jnp.where(support_TE, z_TE, 0.0), axis=0, keepdims=True) - tokens / num_experts
        return excess_1E / jnp.maximum(size_1E, 1.0)

    def drop(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        left_TE = carry[0] & (z_TE > threshold(carry[0]))
        return left_TE, jnp.any(left_TE != carry[0])

    support_TE, _ = jax.lax.while_loop(lambda carry: carry[1], drop, (chosen_TE, jnp.any(chosen_TE)))
    mass_TE = jnp.where(support_TE, jnp.maximum(z_TE - threshold(support_TE), 0.0), 0.0)
    return jnp.sum(mass_TE, axis=1)


def dual_variables(
    scores_TE: Float[Array, "T E"], mask_T: Bool[Array, "T"], *, k: int, strength: float, iterations: int
) -> Float[Array, "T"]:
    """The tokens' variables after so many steps of Nesterov's method on the semi-dual; 0 for padding."""
    num_tokens, num_experts = scores_TE.shape

    def step(_: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        previous_T, ahead_T, t = carry
        lack_T = 1 - unsorted_masses(scores_TE + ahead_T[:, None], mask_T, k, strength)
        dual_T = ahead_T + (strength / num_experts) * jnp.where(mask_T, lack_T, 0.0)
        next_t = 0.5 * (1 + jnp.sqrt(1 + 4 * t * t))
        return dual_T, dual_T + (t - 1) / next_t * (dual_T - previous_T), next_t

    zeros_T = jnp.zeros(num_tokens, jnp.float32)
    return jax.lax.fori_loop(0, iterations, step, (zeros_T, zeros_T, jnp.float32(1)))[0]

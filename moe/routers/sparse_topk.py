"""Sparse p-norm top-k: the operators of Sander et al. 2023 (arXiv 2302.01425) as the choice of experts or tokens."""

import dataclasses
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe import isotonic, topk
from moe.routers import losses
from moe.routers.base import Given, answer, check_k, given, one_logit_per_expert, token_choice_losses
from moe.routers.variable import check_max_experts, most_experts, queue_of_experts, queue_of_tokens
from moe.types import Keys, PyTree, Routed, RouterInputs


class Composed(NamedTuple):
    """share: the mask, in [0, 1], which sums to k; pairs with share > 0 are dispatched.

    weight: the combine weight. counted: what the importance loss counts.
    """

    share: Float[Array, "T E"]
    weight: Float[Array, "T E"]
    counted: Float[Array, "T E"]


@dataclasses.dataclass(frozen=True)
class SparseTopK:
    """Dispatch where a differentiable sparse top-k operator of the logits is positive, with exact zeros elsewhere.

    Operators: 2302.01425, eq. 5. The paper's release holds no router; the compositions are this project's. A token has
    at least k experts (at most E); with choice = "expert", k on average and at least.

    composition: what the combine weights are.
        "mask_softmax": mask(logits) × softmax(logits).
        "mask": mask(logits), which sums to k. Where it is hard (all 0 or 1) the token sends the gate no gradient.
        "magnitude": the operator that keeps the largest values, of the gate: a value that is kept in full is the
        gate's. Fewer than k experts where fewer gates are positive. Gates are smaller than logits: so should λ be.
    gate: of the magnitude, "softmax" or "relu" of the logits.
    choice: "token": the operator goes along the experts of a token. "expert": along the tokens of an expert, with
        ⌈T·k/E⌉ in place of k for the group's T tokens without padding, and log softmax(logits), by which tokens are
        comparable (Zhou et al. 2022, 2202.09368), in the mask's argument. Not for autoregressive models.
    k: sum of the mask; experts per token, at least.
    strength: λ of the regulariser; small is close to hard top-k, large spreads the mask.
    schedule: of λ. "constant"; "geometric", from `strength` to `strength_end` in `strength_steps` steps of training,
        which the state counts; "learned", a parameter per layer that starts at `strength`, as its logarithm.
    p: exponent of the regulariser, in (1, 2].
    solver: of the isotonic problem; any of `moe.isotonic.SOLVERS`. Choice by experts needs one for a traced k.
    max_experts: in training, the most experts that a token may have, its heaviest; the rest counts as overflow. With
        choice = "expert", on average: an expert has at most ⌈T·max_experts/E⌉ tokens, padding included. 0 is E.
    balance_weight, importance_weight, z_weight: weights of the losses. Load is measured on the mask, in "magnitude" on
        the operator's own, without gradient. Importance counts the mask, in "magnitude" the combine weights.

    Metrics: hard_mask_share, tokens whose shares are all 0 or 1; no_gradient_share, tokens whose combine weights don't
    depend on the gate: those, in "mask", and those without an expert elsewhere; strength.
    """

    k: int = 2
    composition: Literal["mask_softmax", "mask", "magnitude"] = "mask_softmax"
    gate: Literal["softmax", "relu"] = "softmax"
    choice: Literal["token", "expert"] = "token"
    strength: float = 1.0
    schedule: Literal["constant", "geometric", "learned"] = "constant"
    strength_end: float = 0.1
    strength_steps: int = 1000
    p: float = 4 / 3
    solver: isotonic.Solver = isotonic.Threshold()
    max_experts: int = 0
    balance_weight: float = 0.01
    importance_weight: float = 0.0
    z_weight: float = 0.0

    def __post_init__(self) -> None:
        for name in ("strength", "strength_end"):
            if getattr(self, name) <= 0:
                raise ValueError(f"router.sparse_topk.{name} = {getattr(self, name)} must be positive.")
        if self.strength_steps < 1:
            raise ValueError(f"router.sparse_topk.strength_steps = {self.strength_steps} must be at least 1.")
        if not 1 < self.p <= 2:
            raise ValueError(f"router.sparse_topk.p = {self.p} must lie in (1, 2].")
        check_max_experts("sparse_topk", self.max_experts, self.k)
        if self.choice == "expert" and not isinstance(self.solver, isotonic.Threshold):
            raise ValueError(
                "router.sparse_topk.choice = 'expert' lets padding change k, which only the solver 'threshold' allows."
            )

    num_logits = one_logit_per_expert

    def init(self, num_experts: int) -> tuple[PyTree, PyTree]:
        """The logarithm of a learned strength; the step of a scheduled one."""
        check_k(self.k, num_experts)
        params = {"log_strength": jnp.log(jnp.float32(self.strength))} if self.schedule == "learned" else {}
        return params, {"step": jnp.zeros((), jnp.float32)} if self.schedule == "geometric" else {}

    def __call__(self, params: PyTree, inputs: RouterInputs, state: PyTree, key: Keys | None) -> Routed:
        """Routes one group; see `moe.routers.base.Router`."""
        one = given(self, inputs)
        num_tokens, num_experts = one.logits.shape
        strength = self._strength(params, state)
        composed = self._by_experts(one, strength) if self.choice == "expert" else self._by_tokens(one, strength)

        wanted_TE = composed.share > 0
        most = most_experts(self.max_experts, num_experts, training=key is not None)
        if self.choice == "expert":
            routing = queue_of_experts(composed.weight, wanted_TE, one.mask, -(-num_tokens * most // num_experts))
        else:
            routing = queue_of_tokens(composed.weight, wanted_TE, one.mask, most)

        unweighted = token_choice_losses(one, jax.nn.softmax(one.logits), composed.share, self.k)
        unweighted["importance"] = losses.importance(composed.counted, one.mask)
        hard_T = jnp.all((composed.share == 0) | (composed.share == 1), axis=-1)
        fixed_T = hard_T if self.composition == "mask" else ~jnp.any(wanted_TE, axis=-1)
        metrics = {
            "hard_mask_share": losses.token_mean(hard_T.astype(jnp.float32), one.mask),
            "no_gradient_share": losses.token_mean(fixed_T.astype(jnp.float32), one.mask),
            "strength": strength,
        }
        if key is not None and self.schedule == "geometric":
            state = {"step": state["step"] + 1}
        return answer(self, routing, unweighted, state, metrics)

    def _strength(self, params: PyTree, state: PyTree) -> Float[Array, ""]:
        if self.schedule == "learned":
            return jnp.exp(params["log_strength"])
        if self.schedule == "geometric":
            done = jnp.minimum(state["step"] / self.strength_steps, 1.0)
            return self.strength * jnp.power(jnp.float32(self.strength_end / self.strength), done)
        return jnp.float32(self.strength)

    def _by_tokens(self, one: Given, strength: Float[Array, ""]) -> Composed:
        return self._compose(one.logits, one.logits, self.k, strength, axis=1)

    def _by_experts(self, one: Given, strength: Float[Array, ""]) -> Composed:
        tokens = jnp.sum(one.mask, dtype=jnp.int32)
        # A group of padding alone has no token to choose, though an operator has to choose one.
        k = jnp.maximum(-(-tokens * self.k // one.num_experts), 1)
        padding_T1 = ~one.mask[:, None]
        logits_TE = jnp.where(padding_T1, 0.0, one.logits)
        preference_TE = jnp.where(padding_T1, -jnp.inf, jax.nn.log_softmax(logits_TE))
        composed = self._compose(logits_TE, preference_TE, k, strength, axis=0)
        return Composed(*(jnp.where(padding_T1, 0.0, values_TE) for values_TE in composed))

    def _compose(
        self,
        logits_TE: Float[Array, "T E"],
        preference_TE: Float[Array, "T E"],
        k: int | Int[Array, ""],
        strength: Float[Array, ""],
        axis: int,
    ) -> Composed:
        """The composition, its mask of `preference_TE`; whose minus infinity stands for padding."""
        if self.composition == "magnitude":
            gate_TE = jax.nn.relu(logits_TE) if self.gate == "relu" else jax.nn.softmax(logits_TE)
            gate_TE = jnp.where(preference_TE == -jnp.inf, 0.0, gate_TE)
            magnitude = partial(topk.magnitude, k=k, strength=strength, p=self.p, solver=self.solver, axis=axis)
            weight_TE = magnitude(gate_TE)
            fixed_TE = jax.lax.stop_gradient(gate_TE)
            shrunk_TE = magnitude(fixed_TE, rescale=False)
            full_TE = (jax.lax.stop_gradient(weight_TE) == fixed_TE) & (fixed_TE > 0)
            return Composed(_shares(shrunk_TE, full_TE, k, axis), weight_TE, weight_TE)
        mask_TE = topk.mask(preference_TE, k, strength=strength, p=self.p, solver=self.solver, axis=axis)
        if self.composition == "mask":
            return Composed(mask_TE, mask_TE, mask_TE)
        return Composed(mask_TE, mask_TE * jax.nn.softmax(logits_TE), mask_TE)


def _shares(
    shrunk_TE: Float[Array, "T E"], full_TE: Bool[Array, "T E"], k: int | Int[Array, ""], axis: int
) -> Float[Array, "T E"]:
    """The mask behind the magnitude operator: 1 where a value is kept in full, proportional elsewhere, k in all.

    The operator without rescaling returns mask × v, and v is one threshold for all that are not kept in full.
    """
    partial_TE = jnp.where(full_TE, 0.0, shrunk_TE)
    left = k - jnp.sum(full_TE, axis=axis, keepdims=True, dtype=jnp.float32)
    total = jnp.sum(partial_TE, axis=axis, keepdims=True)
    return jnp.where(full_TE, 1.0, partial_TE / jnp.where(total > 0, total, 1.0) * left)

"""Soft MoE: experts work on mixtures of tokens (Puigcerver et al. 2023, arXiv 2308.00951)."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe.routers import losses
from moe.routers.base import answer, given
from moe.types import Keys, PyTree, Routed, RouterInputs, Slots


@dataclasses.dataclass(frozen=True)
class Soft:
    """Each of E·P slots holds a convex combination of the group's tokens; each token reads one of the slots' outputs.

    2308.00951, section 2.1: one logit per token and slot; dispatch is their softmax over tokens, combine their softmax
    over slots. Nothing is dropped, nothing is discrete. The paper mixes the tokens of one image: moe.group_size = 1;
    a larger group mixes its images. Its cost per token is that of E·P/T experts. The metric `entropy` is of a token's
    combine weights, added up by expert.

    slots: P, per expert.
    normalize: logits are the cosines of token and gate times a learned scale (section 2.3), for wide models.
    """

    slots: int = 1
    normalize: bool = False

    @property
    def k(self) -> None:
        """Every token has all experts."""

    def __post_init__(self) -> None:
        if self.slots < 1:
            raise ValueError(f"router.soft.slots = {self.slots} per expert must be at least 1.")

    def num_logits(self, num_experts: int) -> int:
        """One per slot; those of an expert stand together."""
        return num_experts * self.slots

    def init(self, num_experts: int) -> tuple[PyTree, PyTree]:
        """The scale of normalised logits, 1 at first; no state."""
        return ({"scale": jnp.ones((), jnp.float32)} if self.normalize else {}), {}

    def __call__(self, params: PyTree, inputs: RouterInputs, state: PyTree, key: Keys | None) -> Routed:
        """Routes one group; see `moe.routers.base.Router`."""
        one = given(self, inputs)
        logits_TX = params["scale"] * _cosines(inputs) if self.normalize else one.logits
        logits_TX = jnp.where(one.mask[:, None], logits_TX, jnp.finfo(jnp.float32).min)
        shape = (-1, one.num_experts, self.slots)
        # A group of padding alone would still dispatch something.
        dispatch_TX = jnp.where(one.mask[:, None], jax.nn.softmax(logits_TX, axis=0), 0.0)
        combine_TX = jnp.where(one.mask[:, None], jax.nn.softmax(logits_TX, axis=1), 0.0)
        routing = Slots(dispatch_TX.reshape(shape), combine_TX.reshape(shape))

        entropy_T = jnp.sum(jax.scipy.special.entr(jnp.sum(routing.combine, axis=-1)), axis=-1)
        return answer(self, routing, {}, state, {"entropy": losses.token_mean(entropy_T, one.mask)})


def _cosines(inputs: RouterInputs) -> Float[Array, "T X"]:
    if inputs.tokens is None or inputs.gate is None:
        raise ValueError("router.soft.normalize needs tokens and gate in RouterInputs: give them, or switch it off.")
    square_T = jnp.sum(jnp.square(inputs.tokens.astype(jnp.float32)), axis=1)
    square_X = jnp.sum(jnp.square(inputs.gate), axis=0)
    # The paper's small number, here within the root, where the gradient at a zero vector stays finite.
    return inputs.logits * jax.lax.rsqrt(square_T + 1e-12)[:, None] * jax.lax.rsqrt(square_X + 1e-12)[None]

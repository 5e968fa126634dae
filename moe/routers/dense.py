"""All experts for every token: the mixture that sparse routers approximate (Jacobs et al. 1991; Eigen et al. 2013)."""

import dataclasses

import jax
import jax.numpy as jnp

from moe.routers import losses
from moe.routers.base import answer, best, given, one_logit_per_expert, queue
from moe.types import Keys, PyTree, Routed, RouterInputs


@dataclasses.dataclass(frozen=True)
class Dense:
    """Every token takes every expert, weighted by softmax(logits) (arXiv 1312.4314, eq. 1). Costs E experts per token.

    z_weight: weight of the z loss.
    """

    z_weight: float = 0.0

    num_logits = one_logit_per_expert

    @property
    def k(self) -> None:
        """Every token has all experts."""

    def init(self, num_experts: int) -> tuple[PyTree, PyTree]:
        """No parameters besides the gate, and no state."""
        return {}, {}

    def __call__(self, params: PyTree, inputs: RouterInputs, state: PyTree, key: Keys | None) -> Routed:
        """Routes one group; see `moe.routers.base.Router`."""
        one = given(self, inputs)
        # Best first, as a capacity below T cuts the last.
        expert_TE = best(one.logits, one.num_experts)
        weight_TE = jnp.take_along_axis(jax.nn.softmax(one.logits), expert_TE, axis=-1)
        return answer(self, queue(expert_TE, weight_TE, one.mask), {"z": losses.z(one.logits, one.mask)}, state)

"""ReLU routing: sparse by an L1 loss whose coefficient follows a target (ReMoE, Wang et al. 2024, arXiv 2412.14711)."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe.routers import losses
from moe.routers.base import check_k, given, one_logit_per_expert
from moe.routers.variable import check_max_experts, most_experts, queue_of_tokens
from moe.types import Keys, PyTree, Routed, RouterInputs


@dataclasses.dataclass(frozen=True)
class ReLU:
    """Every expert with a positive logit is active, with relu(logit) as its combine weight: continuous everywhere.

    2412.14711, section 3. A token may have any number of experts, none included. The L1 loss on the gate
    brings the mean to k: its coefficient is multiplied by `factor` after a step with more than k experts per token on
    average, that is with a sparsity below 1 - k/E, and divided by it after one with fewer. The coefficient is
    state, one per layer, where the paper has one for all layers. The state holds the experts per token of the last
    step beside it, and the multiplication happens when the next step begins, on those of the whole batch.

    k: experts per token, on average, once the coefficient has found its level.
    coefficient: λ_0, at the start; `factor` is the paper's α.
    balanced: weigh each expert's L1 by its share of the load over the mean share, E/(k T) times its active tokens,
        which also balances the load; the shares have no gradient.
    max_experts: in training, the most experts that a token may have, its heaviest; the rest counts as overflow. 0 is E.

    The loss `l1` is coefficient × the mean over tokens of Σ_e share_e · relu(logit_e). Metrics: l1 without the
    coefficient; l1_coefficient; sparsity, 1 - active experts / E; unchosen, the share of tokens without an expert.
    """

    k: int = 2
    coefficient: float = 1e-8
    factor: float = 1.2
    balanced: bool = True
    max_experts: int = 0

    num_logits = one_logit_per_expert

    def __post_init__(self) -> None:
        if self.coefficient <= 0:
            raise ValueError(f"router.relu.coefficient = {self.coefficient} must be positive.")
        if self.factor < 1:
            raise ValueError(f"router.relu.factor = {self.factor} must be at least 1 (1 keeps the coefficient).")
        check_max_experts("relu", self.max_experts, self.k)

    def init(self, num_experts: int) -> tuple[PyTree, PyTree]:
        """No parameters besides the gate; the first coefficient, and a number of experts that changes nothing."""
        check_k(self.k, num_experts)
        return {}, {"coefficient": jnp.float32(self.coefficient), "active": jnp.float32(self.k)}

    def __call__(self, params: PyTree, inputs: RouterInputs, state: PyTree, key: Keys | None) -> Routed:
        """Routes one group; see `moe.routers.base.Router`."""
        one = given(self, inputs)
        coefficient = updated_coefficient(state["coefficient"], state["active"], self.k, self.factor)
        gate_TE = jax.nn.relu(one.logits)
        active_TE = gate_TE > 0
        most = most_experts(self.max_experts, one.num_experts, training=key is not None)
        routing = queue_of_tokens(gate_TE, active_TE, one.mask, most)

        active_E = losses.token_mean(active_TE.astype(jnp.float32), one.mask)
        share_E = active_E * (one.num_experts / self.k) if self.balanced else jnp.ones_like(active_E)
        l1 = losses.token_mean(jnp.sum(share_E[None] * gate_TE, axis=-1), one.mask)
        unchosen_T = ~jnp.any(active_TE, axis=-1)
        metrics = {
            "l1": l1,
            "l1_coefficient": coefficient,
            "sparsity": losses.token_mean(jnp.mean(1.0 - active_TE, axis=-1), one.mask),
            "unchosen": losses.token_mean(unchosen_T.astype(jnp.float32), one.mask),
        }
        if key is not None:
            state = {"coefficient": coefficient, "active": jnp.sum(active_E)}
        return Routed(routing, {"l1": coefficient * l1}, metrics, state)


def updated_coefficient(
    coefficient: Float[Array, ""], active: Float[Array, ""], k: int, factor: float
) -> Float[Array, ""]:
    """2412.14711, section 3: coefficient · factor^sign(active - k), as the target sparsity is 1 - k/E.

    Not beyond the range of float32, which a gate that never meets its target would leave.
    """
    # A mean over groups rounds, on another mesh otherwise: so far off is the target.
    met = jnp.abs(active - k) <= 8 * jnp.finfo(jnp.float32).eps * k
    direction = jnp.where(met, 0.0, jnp.sign(active - k))
    return jnp.clip(coefficient * jnp.power(jnp.float32(factor), direction), 1e-30, 1e30)

"""The mixture-of-experts layer: router, dispatch, experts, combine."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from moe.layers.mlp import WEIGHT_AXES, Activation, init_mlp, mlp
from moe.layers.param import RouterState, matrix
from moe.ops.permute import capacity
from moe.parallel.dispatch import dispatch
from moe.parallel.mesh import Axes
from moe.routers.base import Router
from moe.routers.metrics import routing_metrics
from moe.types import GROUP_AXIS, BalanceScope, Keys, Layout, Losses, Metrics, PyTree, Routed, RouterInputs


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """Settings of every MoE layer of a model.

    num_experts: E. expert_width: F, hidden width of one expert.
    group_size: examples routed together; capacity, priority and losses are per group. 0: the whole micro-batch.
    capacity_factor: in training an expert has ⌈factor·T·k/E⌉ slots per group of T tokens, rounded up to a multiple of
        4. 0: nothing is dropped, and the work follows the choices made.
    evaluation_capacity_factor: the same for evaluation, whose default 0 drops nothing.
    balance_scope: over which tokens routers with a balance loss ask for balance: each sequence (example), each group,
        or the batch, that is all groups of a micro-batch, on whatever devices they are. Under gradient accumulation
        "batch" is the mean of its micro-batches' losses; the other two don't see accumulation.
    """

    num_experts: int = 8
    expert_width: int = 128
    group_size: int = 8
    capacity_factor: float = 1.05
    evaluation_capacity_factor: float = 0.0
    balance_scope: BalanceScope = "group"

    def __post_init__(self) -> None:
        for name in ("num_experts", "expert_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"moe.{name} = {getattr(self, name)} must be at least 1.")
        for name in ("group_size", "capacity_factor", "evaluation_capacity_factor"):
            if getattr(self, name) < 0:
                raise ValueError(f"moe.{name} = {getattr(self, name)} must not be negative.")


class MoeOutput(NamedTuple):
    """What an MoE layer returns: losses are weighted means over groups, metrics are scalars of this layer."""

    y: Float[Array, "B L D"]
    losses: Losses
    metrics: Metrics
    state: PyTree


class Moe(nnx.Module):
    """E experts behind a router, in place of a block's feed-forward network."""

    def __init__(
        self, width: int, config: MoeConfig, router: Router, activation: Activation, *, key: jax.Array
    ) -> None:
        self.config = config
        self.router = router
        self.activation = activation
        key_gate, key_experts = jax.random.split(key)
        num_logits = router.num_logits(config.num_experts)
        self.w_gate = matrix(key_gate, (width, num_logits), ("embed", None), fan_in=width)
        self.experts = nnx.Dict(init_mlp(key_experts, width, config.expert_width, activation, config.num_experts))
        params, state = router.init(config.num_experts)
        self.router_params = nnx.data(jax.tree.map(lambda v: nnx.Param(v, axes=(None,) * v.ndim), params))
        self.router_state = nnx.data(jax.tree.map(lambda v: RouterState(v, axes=(None,) * v.ndim), state))

    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        keys: Key[Array, "B"] | None,
        mesh: Mesh,
        mask: Bool[Array, "B"] | Bool[Array, "B L"] | None = None,
        ids_BL: Int[Array, "B L"] | None = None,
    ) -> MoeOutput:
        """Routes the examples in groups.

        keys: one per example in training, None in evaluation. mask: False marks padding, whole examples or tokens.
        ids_BL: token ids, for routers that look at them; where a model has none, positions stand in.
        Raises ValueError where the group size doesn't divide the batch.
        """
        num_examples, length, width = x_BLD.shape
        groups = group_count(num_examples, self.config.group_size)
        x_GTD = x_BLD.reshape(groups, -1, width)
        num_tokens = x_GTD.shape[1]
        mask = jnp.ones(num_examples, bool) if mask is None else mask
        mask_BL = mask[:, None] if mask.ndim == 1 else mask
        mask_GT = jnp.broadcast_to(mask_BL, (num_examples, length)).reshape(groups, num_tokens)

        # Float32 throughout: by default TPUs and GPUs round the factors of a float32 product.
        logits_GTX = jnp.einsum("GTD,DX->GTX", x_GTD.astype(jnp.float32), self.w_gate[...], precision="highest")
        if ids_BL is None:
            ids_BL = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (num_examples, length))
        inputs = RouterInputs(
            logits_GTX,
            tokens=x_GTD,
            ids=ids_BL.reshape(groups, num_tokens),
            mask=mask_GT,
            layout=Layout(self.config.num_experts, num_examples // groups, self.config.balance_scope),
        )
        params, state = (jax.tree.map(_value, part, is_leaf=_is_variable) for part in self._router_variables())
        group_keys = None if keys is None else keys.reshape(groups, -1)

        def route(group: RouterInputs, keys: Keys | None) -> Routed:
            return self.router(params, group._replace(gate=self.w_gate[...]), state, keys)

        routed = jax.vmap(route, axis_name=GROUP_AXIS)(inputs, group_keys)

        weight_axes: dict[str, Axes] = {name: ("expert", *WEIGHT_AXES[name]) for name in self.experts}
        y_GTD, kept_G = dispatch(
            lambda weights, x, product: mlp(weights, x, self.activation, product),
            {name: w[...] for name, w in self.experts.items()},
            weight_axes,
            x_GTD,
            routed.routing,
            num_experts=self.config.num_experts,
            capacity=self._capacity(num_tokens, training=keys is not None),
            mesh=mesh,
        )
        metrics = {name: jnp.mean(value) for name, value in routed.metrics.items()}
        # A router that knows better than its gate what a metric is has the last word.
        metrics = routing_metrics(routed.routing, logits_GTX, mask_GT, kept_G, self.config.num_experts) | metrics
        return MoeOutput(
            y=y_GTD.reshape(x_BLD.shape),
            losses={name: jnp.mean(value) for name, value in routed.losses.items()},
            metrics=jax.lax.stop_gradient(metrics),
            state=jax.tree.map(lambda leaf: jax.lax.stop_gradient(jnp.mean(leaf, axis=0)), routed.state),
        )

    def _router_variables(self) -> tuple[PyTree, PyTree]:
        return self.router_params, self.router_state

    def _capacity(self, num_tokens: int, *, training: bool) -> int | None:
        factor = self.config.capacity_factor if training else self.config.evaluation_capacity_factor
        if not factor:
            return None
        k = self.config.num_experts if self.router.k is None else self.router.k
        return capacity(factor, num_tokens, k, self.config.num_experts)


def group_count(num_examples: int, group_size: int) -> int:
    """Number of groups of `group_size` examples; 1 for a size of 0. Raises ValueError if some would be left over."""
    if group_size == 0:
        return 1
    if num_examples % group_size:
        raise ValueError(
            f"moe.group_size = {group_size} examples doesn't divide a micro-batch of {num_examples}: choose a divisor, "
            "or 0 for the whole micro-batch."
        )
    return num_examples // group_size


def _is_variable(node: object) -> bool:
    return isinstance(node, nnx.Variable)


def _value(variable: nnx.Variable) -> Array:
    return variable[...]

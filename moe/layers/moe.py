"""The mixture-of-experts layer: router, dispatch, experts, combine."""

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from moe.layers.mlp import WEIGHT_AXES, Activation, init_mlp, mlp
from moe.layers.param import RouterState, matrix
from moe.ops.permute import capacity
from moe.parallel.dispatch import dispatch, sorts_fast
from moe.parallel.mesh import Axes
from moe.routers.base import Router
from moe.routers.metrics import routing_metrics
from moe.types import (
    GROUP_AXIS,
    BalanceScope,
    Keys,
    Layout,
    Look,
    Losses,
    Metrics,
    Observed,
    PyTree,
    Routed,
    RouterInputs,
)


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """Settings of every MoE layer of a model.

    num_experts: E. expert_width: F, hidden width of one expert.
    group_size: examples routed together; capacity, priority and losses are per group. 0: the whole micro-batch.
    dispatch: how tokens get to experts in training, see `moe.parallel.dispatch`. "einsum" and "capacity" through queues
        of `capacity_factor`; "dropless" without (the factor isn't used). "auto": dropless where that is as fast (see
        `sorts_fast`) or the factor is 0, capacity otherwise.
    capacity_factor: in training an expert has ⌈factor·T·k/E⌉ slots per group of T tokens, rounded up to a multiple of
        4; later choices are dropped. 0: nothing is.
    evaluation_capacity_factor: the same for evaluation, which drops nothing by default: at 0 it is always dropless.
    receive_factor: rows that a device of the expert axis makes room for at a time without queues, over an even share of
        them; more than that take another round, none is dropped. As large as the expert axis: never more than one.
    balance_scope: over which tokens routers with a balance loss ask for balance: each sequence (example), each group,
        or the batch, that is all groups of a micro-batch, on whatever devices they are. Under gradient accumulation
        "batch" is the mean of its micro-batches' losses; the other two don't see it.
    shared_experts: experts that every token has besides those its router chooses, unweighted (DeepSeekMoE, 2401.06066,
        section 3.2), as one MLP of as many times the width. shared_gate: weight their output by sigmoid(x · g), with a
        learned g (Qwen2-MoE, 2407.10671).
    """

    num_experts: int = 8
    expert_width: int = 128
    group_size: int = 8
    dispatch: Literal["auto", "einsum", "capacity", "dropless"] = "auto"
    capacity_factor: float = 1.05
    evaluation_capacity_factor: float = 0.0
    receive_factor: float = 4.0
    balance_scope: BalanceScope = "group"
    shared_experts: int = 0
    shared_gate: bool = False

    def __post_init__(self) -> None:
        for name in ("num_experts", "expert_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"moe.{name} = {getattr(self, name)} must be at least 1.")
        for name in ("group_size", "capacity_factor", "evaluation_capacity_factor", "shared_experts"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"moe.{name} = {getattr(self, name)} must be finite and not negative.")
        if self.dispatch in ("einsum", "capacity") and self.capacity_factor == 0:
            raise ValueError(
                f"moe.dispatch = '{self.dispatch}' needs a moe.capacity_factor above 0, not {self.capacity_factor}: to "
                "drop nothing, choose 'dropless'."
            )
        if self.dispatch == "dropless" and self.evaluation_capacity_factor > 0:
            raise ValueError(
                f"moe.dispatch = 'dropless' has no queues to give moe.evaluation_capacity_factor = "
                f"{self.evaluation_capacity_factor} to: set that to 0, or choose 'capacity'."
            )
        if not 0 < self.receive_factor < math.inf:
            raise ValueError(f"moe.receive_factor = {self.receive_factor} must be positive and finite.")
        if self.shared_gate and self.shared_experts == 0:
            raise ValueError("moe.shared_gate = True needs moe.shared_experts of at least 1, not 0.")


class MoeOutput(NamedTuple):
    """What an MoE layer returns.

    y: for every token the sum of its experts' outputs by combine weight, and of the shared experts'.
    losses: the router's, weighted, means over groups; to be added to the training loss. metrics: those of
    `routing_metrics`, of this layer.
    state: the router's after this step, for the next one.
    observed: what `look` made of the routing; None without one.
    """

    y: Float[Array, "B L D"]
    losses: Losses
    metrics: Metrics
    state: PyTree
    observed: PyTree = None


class Moe(nnx.Module):
    """E experts behind a router, in place of a block's feed-forward network.

    width: D, of the tokens. router: any of `moe.routers`, which gets logits in float32 from the layer's own gate.
    activation: of the experts, "gelu" or "swiglu". key: of the initial weights.
    Raises ValueError where the router can't choose among so few experts.
    """

    def __init__(
        self, width: int, config: MoeConfig, router: Router, activation: Activation, *, key: jax.Array
    ) -> None:
        self.config = config
        self.router = router
        self.activation = activation
        key_gate, key_experts = jax.random.split(key)
        # First of all, since it says whether k experts are to be had.
        params, state = router.init(config.num_experts)
        num_logits = router.num_logits(config.num_experts)
        self.w_gate = matrix(key_gate, (width, num_logits), ("embed", None), fan_in=width)
        self.experts = nnx.Dict(init_mlp(key_experts, width, config.expert_width, activation, config.num_experts))
        self.shared = nnx.Dict(self._init_shared(width, key))
        self.router_params = nnx.data(jax.tree.map(lambda v: nnx.Param(v, axes=(None,) * v.ndim), params))
        self.router_state = nnx.data(jax.tree.map(lambda v: RouterState(v, axes=(None,) * v.ndim), state))

    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        keys: Key[Array, "B"] | None,
        mesh: Mesh,
        mask: Bool[Array, "B"] | Bool[Array, "B L"] | None = None,
        ids_BL: Int[Array, "B L"] | None = None,
        look: Look | None = None,
    ) -> MoeOutput:
        """Routes the examples in groups.

        keys: one per example in training, None in evaluation. mask: False marks padding, whole examples or tokens.
        ids_BL: token ids, for routers that look at them; where a model has none, positions stand in.
        look: what to make of the routing, see `MoeOutput.observed`.
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

        implementation, places = self._places(num_tokens, groups, mesh, training=keys is not None)
        weight_axes: dict[str, Axes] = {name: ("expert", *WEIGHT_AXES[name]) for name in self.experts}
        y_GTD, kept_G = dispatch(
            lambda weights, x, product: mlp(weights, x, self.activation, product),
            {name: w[...] for name, w in self.experts.items()},
            weight_axes,
            x_GTD,
            routed.routing,
            num_experts=self.config.num_experts,
            capacity=places,
            mesh=mesh,
            implementation=implementation,
            receive_factor=self.config.receive_factor,
        )
        y_BLD = y_GTD.reshape(x_BLD.shape)
        if self.shared:
            y_BLD = y_BLD + self._shared_experts(x_BLD)
        metrics = {name: jnp.mean(value, axis=0) for name, value in routed.metrics.items()}
        # A router that knows better than its gate what a metric is has the last word.
        metrics = routing_metrics(routed.routing, logits_GTX, mask_GT, kept_G, self.config.num_experts) | metrics
        return MoeOutput(
            y=y_BLD,
            losses={name: jnp.mean(value) for name, value in routed.losses.items()},
            metrics=jax.lax.stop_gradient(metrics),
            state=jax.tree.map(lambda leaf: jax.lax.stop_gradient(jnp.mean(leaf, axis=0)), routed.state),
            observed=None if look is None else look(Observed(routed.routing, logits_GTX, mask_GT, kept_G)),
        )

    def _router_variables(self) -> tuple[PyTree, PyTree]:
        return self.router_params, self.router_state

    def _init_shared(self, width: int, key: jax.Array) -> dict[str, nnx.Param[jax.Array]]:
        """The weights of the shared experts; none where there are no such experts."""
        if not self.config.shared_experts:
            return {}
        key_mlp, key_gate = jax.random.split(jax.random.fold_in(key, 2))
        hidden = self.config.shared_experts * self.config.expert_width
        params = init_mlp(key_mlp, width, hidden, self.activation)
        if self.config.shared_gate:
            params["gate"] = matrix(key_gate, (width, 1), ("embed", None), fan_in=width)
        return params

    def _shared_experts(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """What the shared experts add to each token."""
        weights = {name: w[...] for name, w in self.shared.items()}
        y_BLD = mlp(weights, x_BLD.reshape(-1, x_BLD.shape[-1]), self.activation).reshape(x_BLD.shape)
        if "gate" not in weights:
            return y_BLD
        logits_BL1 = jnp.einsum("BLD,DX->BLX", x_BLD.astype(jnp.float32), weights["gate"], precision="highest")
        return (jax.nn.sigmoid(logits_BL1) * y_BLD).astype(x_BLD.dtype)

    def _places(self, num_tokens: int, groups: int, mesh: Mesh, *, training: bool) -> tuple[str, int | None]:
        """How rows get to experts, and the places in each expert's queue."""
        config = self.config
        k = config.num_experts if self.router.k is None else self.router.k
        factor = config.capacity_factor if training else config.evaluation_capacity_factor
        fast = config.dispatch == "auto" and training and sorts_fast(mesh, groups * num_tokens * k, config.num_experts)
        if config.dispatch == "dropless" or factor == 0 or fast:
            return "dropless", None
        implementation = "einsum" if config.dispatch == "einsum" else "capacity"
        return implementation, capacity(factor, num_tokens, k, config.num_experts)


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

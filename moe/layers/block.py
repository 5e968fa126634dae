"""Pre-norm transformer blocks, and the period of blocks that a model stacks and scans."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Key

from moe.layers.attention import Attention
from moe.layers.mlp import Activation, Mlp
from moe.layers.moe import Moe, MoeConfig, MoeOutput
from moe.layers.param import axes, stack
from moe.parallel.mesh import constrain_batch
from moe.routers.base import Router
from moe.types import Losses, Metrics, PyTree


@dataclasses.dataclass(frozen=True)
class BlocksConfig:
    """A stack of transformer blocks.

    width: D. depth: number of blocks. heads: attention heads. mlp_width: F of the dense blocks.
    moe_every: every n-th block has experts instead of an MLP (the last of each period of n); 0: none has.
    dense_layers: so many blocks at the beginning have no experts, and the periods start after them.
    scan_layers: compile one period and loop over it; otherwise unroll. The parameters are the same, stacked.
    remat: what the backward pass computes again: "none"; "full", everything in a period; "dots", all but products with
        weights.
    dtype: of activations; parameters, routers and sums are float32.
    """

    width: int = 64
    depth: int = 4
    heads: int = 4
    mlp_width: int = 128
    moe_every: int = 2
    dense_layers: int = 0
    activation: Activation = "gelu"
    scan_layers: bool = True
    remat: Literal["none", "full", "dots"] = "none"
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads", "mlp_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} = {getattr(self, name)} must be at least 1.")
        if not 0 <= self.dense_layers < self.depth:
            raise ValueError(
                f"model.dense_layers = {self.dense_layers} must lie between 0 and model.depth - 1 = {self.depth - 1}."
            )
        if self.moe_every < 0 or (self.moe_every and (self.depth - self.dense_layers) % self.moe_every):
            raise ValueError(
                f"model.moe_every = {self.moe_every} must divide model.depth - model.dense_layers = {self.depth} - "
                f"{self.dense_layers}, or be 0 for no experts."
            )

    @property
    def num_periods(self) -> int:
        """How often the period of blocks repeats, after the dense blocks at the beginning."""
        return (self.depth - self.dense_layers) // (self.moe_every or 1)


class RouterOutputs(NamedTuple):
    """What the routers of a model return, each leaf with a leading axis over its MoE layers, first layer first."""

    losses: Losses
    metrics: Metrics
    state: PyTree


class Block(nnx.Module):
    """x + attention(norm(x)), then x + f(norm(x)), f an MLP or a mixture of experts."""

    def __init__(
        self, config: BlocksConfig, moe: MoeConfig, router: Router, *, has_experts: bool, key: jax.Array
    ) -> None:
        key_attention, key_f, key_norm = jax.random.split(key, 3)
        self.attention_norm = layer_norm(config, key_norm)
        self.attention = Attention(config.width, config.heads, key=key_attention)
        self.f_norm = layer_norm(config, key_norm)
        self.f: Moe | Mlp
        if has_experts:
            self.f = Moe(config.width, moe, router, config.activation, key=key_f)
        else:
            self.f = Mlp(config.width, config.mlp_width, config.activation, key=key_f)

    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        keys: Key[Array, "B"] | None,
        mesh: Mesh,
        mask: Bool[Array, "B"] | None,
    ) -> tuple[Float[Array, "B L D"], MoeOutput | None]:
        """The block's output, and its MoE layer's where it has one."""
        x_BLD = constrain_batch(x_BLD + self.attention(self.attention_norm(x_BLD)), mesh)
        normed_BLD = self.f_norm(x_BLD)
        if isinstance(self.f, Mlp):
            return constrain_batch(x_BLD + self.f(normed_BLD), mesh), None
        output = self.f(normed_BLD, keys, mesh, mask)
        return constrain_batch(x_BLD + output.y, mesh), output


class Period(nnx.Module):
    """The blocks that repeat: `moe_every` of them, experts in the last."""

    def __init__(self, config: BlocksConfig, moe: MoeConfig, router: Router, *, key: jax.Array) -> None:
        count = config.moe_every or 1
        self.blocks = nnx.List(
            Block(
                config,
                moe,
                router,
                has_experts=bool(config.moe_every) and index == count - 1,
                key=jax.random.fold_in(key, index),
            )
            for index in range(count)
        )

    def __call__(
        self, x: Float[Array, "B L D"], keys: Key[Array, "B"] | None, mesh: Mesh, mask: Bool[Array, "B"] | None
    ) -> tuple[Float[Array, "B L D"], RouterOutputs]:
        """The last block's output, and what the router returned."""
        routers = RouterOutputs({}, {}, {})
        for block in self.blocks:
            x, output = block(x, keys, mesh, mask)
            if output is not None:
                routers = RouterOutputs(output.losses, output.metrics, output.state)
        return x, routers


class Blocks(nnx.Module):
    """All blocks of a model: periods stacked along a first axis of every parameter, run by one scan.

    Dense blocks at the beginning are a stack of their own, `leading`, which is there only if there are any.
    """

    def __init__(self, config: BlocksConfig, moe: MoeConfig, router: Router, *, key: jax.Array) -> None:
        self.config = config
        if config.dense_layers:
            dense = dataclasses.replace(config, depth=config.dense_layers, dense_layers=0, moe_every=0)
            keys = jax.random.split(jax.random.fold_in(key, 1), config.dense_layers)
            self.leading = stack(lambda one: Period(dense, moe, router, key=one), keys)
        self.periods = stack(
            lambda one: Period(config, moe, router, key=one), jax.random.split(key, config.num_periods)
        )

    def __call__(
        self,
        x: Float[Array, "B L D"],
        keys: Key[Array, "B"] | None,
        mesh: Mesh,
        mask: Bool[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B L D"], RouterOutputs]:
        """Runs the blocks in order; see `Moe` for keys and mask."""
        if self.config.dense_layers:
            x, _ = self._run(self.leading, self.config.dense_layers, x, None, mesh, mask)
        return self._run(self.periods, self.config.num_periods, x, keys, mesh, mask)

    def _run(
        self,
        periods: Any,
        count: int,
        x: Float[Array, "B L D"],
        keys: Key[Array, "B"] | None,
        mesh: Mesh,
        mask: Bool[Array, "B"] | None,
    ) -> tuple[Float[Array, "B L D"], RouterOutputs]:
        """Runs a stack of `count` periods."""
        graph, state = nnx.split(periods)

        def step(x: Array, scanned: tuple[PyTree, Array]) -> tuple[Array, RouterOutputs]:
            period_state, index = scanned
            period: Period = nnx.merge(graph, period_state)
            layer_keys = None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, index)
            return period(x, layer_keys, mesh, mask)

        if self.config.remat != "none":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if self.config.remat == "dots" else None
            step = jax.checkpoint(step, policy=policy, prevent_cse=not self.config.scan_layers)
        unroll = 1 if self.config.scan_layers else count
        return jax.lax.scan(step, x, (state, jnp.arange(count)), unroll=unroll)


def layer_norm(config: BlocksConfig, key: jax.Array) -> nnx.LayerNorm:
    """LayerNorm over the width, its statistics in float32."""
    return nnx.LayerNorm(
        config.width,
        dtype=jnp.dtype(config.dtype),
        scale_metadata=axes(None),
        bias_metadata=axes(None),
        rngs=nnx.Rngs(key),
    )

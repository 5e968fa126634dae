"""Pre-norm transformer blocks, and the period of blocks that a model stacks and scans."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Key

from moe.layers.attention import Attention, AttentionConfig, Cache, Context
from moe.layers.mlp import Activation, Mlp
from moe.layers.moe import Moe, MoeConfig, MoeOutput
from moe.layers.norm import make_norm
from moe.layers.param import stack
from moe.parallel.mesh import constrain_batch
from moe.routers.base import Router
from moe.types import Look, Losses, Metrics, PyTree


@dataclasses.dataclass(frozen=True)
class BlocksConfig:
    """A stack of transformer blocks.

    width: D. depth: number of blocks. heads: attention heads. mlp_width: F of the dense blocks.
    moe_every: every n-th block has experts instead of an MLP (the last of each period of n); 0: none has.
    dense_layers: so many blocks at the beginning have no experts, and the periods start after them.
    scan_layers: compile one period and loop over it; otherwise unroll. The parameters are the same, stacked.
    remat: what the backward pass computes again: "none"; "full", everything in a period; "dots", all but products with
        weights.
    activation: of dense blocks and experts alike, "gelu" or "swiglu".
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

    @property
    def attention(self) -> AttentionConfig:
        """Heads as wide as they fill the width together. Raises ValueError where they can't."""
        if self.width % self.heads:
            raise ValueError(f"model.heads = {self.heads} must divide model.width = {self.width}.")
        return AttentionConfig(self.heads, self.heads, self.width // self.heads)

    @property
    def rms_eps(self) -> float:
        """The ε of RMSNorm; 0: the norms are LayerNorms."""
        return 0.0


class RouterOutputs(NamedTuple):
    """What the routers of a model return, each leaf with a leading axis over its MoE layers, first layer first.

    losses, metrics, state: as in `moe.layers.moe.MoeOutput`.
    observed: what `look` made of each layer's routing; None without one.
    """

    losses: Losses
    metrics: Metrics
    state: PyTree
    observed: PyTree = None


class BlocksOutput(NamedTuple):
    """What a stack of N blocks returns.

    x: the last block's output. routers: what the routers return. rms: the root mean square of each block's output,
    which is finite where the output is. caches: with caches those, with these tokens; otherwise None.
    """

    x: Float[Array, "B L D"]
    routers: RouterOutputs
    rms: Float[Array, "N"]
    caches: Any


# Of the dense blocks at the beginning, and of the blocks of a period; each leaf stacked over them.
Caches = tuple[list[Cache] | None, list[Cache] | None]


def stacked_blocks(config: BlocksConfig, path: tuple[str, ...]) -> tuple[range, tuple[str, ...]] | None:
    """Which blocks share the array at `path` of a model's variables, in its order, and the path within a block.

    None for what stands around the blocks.
    """
    match path:
        case ("blocks", "leading", "blocks", _, *rest):
            return range(config.dense_layers), tuple(rest)
        case ("blocks", "periods", "blocks", number, *rest):
            return range(config.dense_layers + int(number), config.depth, config.moe_every or 1), tuple(rest)
    return None


class Block(nnx.Module):
    """x + attention(norm(x)), then x + f(norm(x)), f an MLP or a mixture of experts."""

    def __init__(
        self, config: BlocksConfig, moe: MoeConfig, router: Router, *, has_experts: bool, key: jax.Array
    ) -> None:
        key_attention, key_f, key_norm = jax.random.split(key, 3)
        self.attention_norm = make_norm(config.width, config.dtype, config.rms_eps, key_norm)
        self.attention = Attention(config.width, config.attention, key=key_attention)
        self.f_norm = make_norm(config.width, config.dtype, config.rms_eps, key_norm)
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
        context: Context | None,
        cache: Cache | None,
        look: Look | None,
    ) -> tuple[Float[Array, "B L D"], MoeOutput | None, Cache | None]:
        """The block's output, its MoE layer's where it has one, and the cache with these tokens."""
        attended_BLD, cache = self.attention(self.attention_norm(x_BLD), mesh, context, cache)
        x_BLD = constrain_batch(x_BLD + attended_BLD, mesh)
        normed_BLD = self.f_norm(x_BLD)
        if isinstance(self.f, Mlp):
            return constrain_batch(x_BLD + self.f(normed_BLD), mesh), None, cache
        if context is None:
            output = self.f(normed_BLD, keys, mesh, mask, look=look)
        else:
            output = self.f(normed_BLD, keys, mesh, context.mask_BL, context.ids_BL, look)
        return constrain_batch(x_BLD + output.y, mesh), output, cache


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
        self,
        x: Float[Array, "B L D"],
        keys: Key[Array, "B"] | None,
        mesh: Mesh,
        mask: Bool[Array, "B"] | None,
        context: Context | None,
        caches: list[Cache] | None,
        look: Look | None,
    ) -> BlocksOutput:
        """Runs the blocks in order; `rms` is still the mean square of each example, [blocks, B]."""
        routers = RouterOutputs({}, {}, {})
        updated: list[Cache] = []
        squares: list[Array] = []
        for index, block in enumerate(self.blocks):
            x, output, cache = block(x, keys, mesh, mask, context, None if caches is None else caches[index], look)
            if cache is not None:
                updated.append(cache)
            if output is not None:
                routers = RouterOutputs(output.losses, output.metrics, output.state, output.observed)
            squares.append(jnp.mean(jnp.square(jax.lax.stop_gradient(x).astype(jnp.float32)), axis=(1, 2)))
        return BlocksOutput(x, routers, jnp.stack(squares), None if caches is None else updated)


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
        context: Context | None = None,
        caches: Caches | None = None,
        look: Look | None = None,
    ) -> BlocksOutput:
        """Runs the blocks in order; see `Moe` for keys, mask and look."""
        leading, periods = caches or (None, None)
        squares: list[Array] = []
        if self.config.dense_layers:
            first = self._run(self.leading, self.config.dense_layers, x, None, mesh, mask, context, leading, look)
            x, leading = first.x, first.caches
            squares.append(first.rms)
        last = self._run(self.periods, self.config.num_periods, x, keys, mesh, mask, context, periods, look)
        # One sum over the devices for all blocks together.
        rms = jnp.sqrt(jnp.mean(jnp.concatenate([*squares, last.rms]), axis=1))
        return last._replace(rms=rms, caches=None if caches is None else (leading, last.caches))

    def make_caches(self, batch: int, length: int) -> Caches:
        """Empty caches for sequences of up to `length` tokens."""
        config = self.config.attention
        dtype = jnp.dtype(self.config.dtype)

        def empty(periods: int, blocks: int) -> list[Cache]:
            shape = (periods, batch, length, config.kv_heads, config.head_width)
            return [Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(blocks)]

        leading = empty(self.config.dense_layers, 1) if self.config.dense_layers else None
        return leading, empty(self.config.num_periods, self.config.moe_every or 1)

    def _run(
        self,
        periods: Any,
        count: int,
        x: Float[Array, "B L D"],
        keys: Key[Array, "B"] | None,
        mesh: Mesh,
        mask: Bool[Array, "B"] | None,
        context: Context | None,
        caches: list[Cache] | None,
        look: Look | None,
    ) -> BlocksOutput:
        """Runs a stack of `count` periods; `rms` as `Period` gives it."""
        graph, state = nnx.split(periods)

        def step(x: Array, scanned: tuple[PyTree, Array, PyTree]) -> tuple[Array, tuple[RouterOutputs, Array, PyTree]]:
            period_state, index, cache = scanned
            period: Period = nnx.merge(graph, period_state)
            layer_keys = None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, index)
            output = period(x, layer_keys, mesh, mask, context, cache, look)
            return output.x, (output.routers, output.rms, output.caches)

        if self.config.remat != "none":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if self.config.remat == "dots" else None
            step = jax.checkpoint(step, policy=policy, prevent_cse=not self.config.scan_layers)
        unroll = 1 if self.config.scan_layers else count
        x, (routers, squares, caches) = jax.lax.scan(step, x, (state, jnp.arange(count), caches), unroll=unroll)
        return BlocksOutput(x, routers, squares.reshape(-1, x.shape[0]), caches)

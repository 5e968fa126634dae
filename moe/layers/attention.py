"""Multi-head self-attention: of all tokens with each other, or of each with those before it."""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from moe.layers.norm import RmsNorm
from moe.layers.param import matrix
from moe.ops.attention import Places, attention
from moe.ops.rope import rotate
from moe.ops.splash import fits_splash, splash_attention
from moe.parallel.mesh import BATCH_AXES, batch_shards

QkNorm = Literal["none", "head", "all"]
AttentionBias = Literal["none", "qkv", "all"]


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Settings of an attention layer.

    heads: of queries. kv_heads: of keys and values, each shared by heads / kv_heads neighbouring queries (2305.13245).
    window: tokens that a token sees, itself included; 0: all. cap: of the scores, see `moe.ops.attention`; 0: none.
    qk_norm: RMSNorm of queries and keys, in each "head" (Qwen3) or over "all" of them (OLMoE).
    bias: of queries, keys and values, and with "all" of the output as well.
    """

    heads: int
    kv_heads: int
    head_width: int
    window: int = 0
    cap: float = 0.0
    qk_norm: QkNorm = "none"
    bias: AttentionBias = "none"
    norm_eps: float = 1e-6


class Context(NamedTuple):
    """What a decoder's blocks know of their tokens besides the representations.

    ids: token ids. places: which document a token is in, and where. cos, sin: its rotation, see `moe.ops.rope`.
    mask: False marks padding.
    """

    ids_BL: Int[Array, "B L"]
    places: Places
    cos_BLd: Float[Array, "B L d"]
    sin_BLd: Float[Array, "B L d"]
    mask_BL: Bool[Array, "B L"]


class Cache(NamedTuple):
    """Keys and values of the tokens so far, each at the index of its position; S is the most there can be."""

    key_BSKd: Float[Array, "*n B S K d"]
    value_BSKd: Float[Array, "*n B S K d"]


class Attention(nnx.Module):
    """Multi-head self-attention (1706.03762): bidirectional without a context, causal with rotary positions with one.

    w_in [D, K, (H/K + 2) d]: for each key-value head its queries, its key, its value, so that heads can be cut along
    the tensor axis. w_out [H, d, D].
    """

    def __init__(self, width: int, config: AttentionConfig, *, key: jax.Array) -> None:
        self.config = config
        heads, kv_heads, head_width = config.heads, config.kv_heads, config.head_width
        joint = (heads // kv_heads + 2) * head_width
        key_in, key_out = jax.random.split(key)
        self.w_in = matrix(key_in, (width, kv_heads, joint), ("embed", "heads", None), fan_in=width)
        self.w_out = matrix(key_out, (heads, head_width, width), ("heads", None, "embed"), fan_in=heads * head_width)
        if config.bias != "none":
            self.bias_in = nnx.Param(jnp.zeros((kv_heads, joint)), axes=("heads", None))
        if config.bias == "all":
            self.bias_out = nnx.Param(jnp.zeros(width), axes=(None,))
        if config.qk_norm == "head":
            self.query_norm, self.key_norm = (RmsNorm((head_width,), (None,), config.norm_eps) for _ in range(2))
        elif config.qk_norm == "all":
            self.query_norm, self.key_norm = (
                RmsNorm((n, head_width), ("heads", None), config.norm_eps) for n in (heads, kv_heads)
            )

    def __call__(
        self, x: Float[Array, "B L D"], mesh: Mesh, context: Context | None = None, cache: Cache | None = None
    ) -> tuple[Float[Array, "B L D"], Cache | None]:
        """Attends among the L tokens of each example, or with a cache among these and those that it holds."""
        query, key, value = self._project(x)
        if context is None:
            mixed = jax.nn.dot_product_attention(query, key, value)
        else:
            query, key = (rotate(one, context.cos_BLd, context.sin_BLd) for one in (query, key))
            keys = context.places
            if cache is not None:
                rows = jnp.arange(x.shape[0])[:, None]
                cache = Cache(*(c.at[rows, keys.position].set(n) for c, n in zip(cache, (key, value), strict=True)))
                key, value = cache
                # An index is a position, so what lies there from other prompts or padding is masked as yet to come.
                keys = Places(jnp.broadcast_to(jnp.arange(key.shape[1])[None], key.shape[:2]))
            mixed = self._attend(query, key, value, context.places, keys, mesh, aligned=cache is None)
        y = jnp.einsum("BLHd,HdD->BLD", mixed, self.w_out[...].astype(x.dtype))
        if self.config.bias == "all":
            y += self.bias_out[...].astype(x.dtype)[None, None]
        return y, cache

    def _attend(
        self,
        query: Float[Array, "B L H d"],
        key: Float[Array, "B S K d"],
        value: Float[Array, "B S K d"],
        queries: Places,
        keys: Places,
        mesh: Mesh,
        *,
        aligned: bool,
    ) -> Float[Array, "B L H d"]:
        """See `moe.ops.attention`; a kernel on TPU, where the tokens of every row are keys and queries alike."""
        window, cap = self.config.window, self.config.cap
        platform = mesh.devices.flat[0].platform
        whole_rows = query.shape[0] % batch_shards(mesh) == 0 and fits_splash(query.shape[1])
        if platform != "tpu" or not aligned or not whole_rows:
            return attention(
                query, key, value, queries, keys, window=window, cap=cap, aligned=aligned, platform=platform
            )

        def run(query: Array, key: Array, value: Array, segment: Array | None) -> Array:
            return splash_attention(query, key, value, segment, window=window, cap=cap)

        if mesh.size == 1:
            return run(query, key, value, queries.segment)
        # The partitioner can't cut a kernel.
        rows, heads = PartitionSpec(BATCH_AXES), PartitionSpec(BATCH_AXES, None, "tensor")
        return jax.shard_map(run, mesh=mesh, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)(
            query, key, value, queries.segment
        )

    def _project(
        self, x: Float[Array, "B L D"]
    ) -> tuple[Float[Array, "B L H d"], Float[Array, "B L K d"], Float[Array, "B L K d"]]:
        """Queries, keys and values, normalised but not turned."""
        width = self.config.head_width
        projected = jnp.einsum("BLD,DHd->BLHd", x, self.w_in[...].astype(x.dtype))
        if self.config.bias != "none":
            projected += self.bias_in[...].astype(x.dtype)[None, None]
        query, key, value = jnp.split(
            projected, [projected.shape[-1] - 2 * width, projected.shape[-1] - width], axis=-1
        )
        query = query.reshape(*x.shape[:2], self.config.heads, width)
        if self.config.qk_norm != "none":
            query, key = self.query_norm(query), self.key_norm(key)
        return query, key, value

"""Causal attention as JAX's Pallas kernel for TPUs, whose scores never leave the chip."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Float, Int

# Queries and keys that a step of the kernel takes, at most and at least.
_MOST, _LEAST = 512, 128


def fits_splash(length: int) -> bool:
    """Whether the kernel takes sequences of so many tokens: whole tiles of them."""
    return length % _LEAST == 0


def splash_attention(
    query_BLHd: Float[Array, "B L H d"],
    key_BLKd: Float[Array, "B L K d"],
    value_BLKd: Float[Array, "B L K d"],
    segment_BL: Int[Array, "B L"] | None,
    *,
    window: int = 0,
    cap: float = 0.0,
    interpret: bool = False,
) -> Float[Array, "B L H d"]:
    """softmax(q k / √d) v over tokens of the same segment that don't stand after the query, see `moe.ops.attention`.

    For tokens in the order of their positions, a row at a time; scores and softmax are float32, products in the inputs'
    type. Blocks of keys that no query sees are left out (2205.14135, FlashAttention, without them). On the device that
    it is called for: in shard_map where there are several. interpret: run it anywhere, slowly.
    Raises ValueError for a length that `fits_splash` refuses.
    """
    length, heads, width = query_BLHd.shape[1:]
    if not fits_splash(length):
        raise ValueError(f"the kernel takes sequences of a multiple of {_LEAST} tokens, not of {length}.")
    block = next(size for size in (_MOST, _MOST // 2, _LEAST) if length % size == 0)
    shape = (length, length)
    mask = splash.LocalMask(shape, (window - 1, 0), 0) if window else splash.CausalMask(shape)
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        attn_logits_soft_cap=cap or None,
        interpret=interpret,
    )

    def row(query_HLd: Array, key_KLd: Array, value_KLd: Array, segment_L: Array | None) -> Array:
        segments = None if segment_L is None else splash.SegmentIds(segment_L, segment_L)
        return kernel(query_HLd, key_KLd, value_KLd, segments)

    scaled = (query_BLHd.astype(jnp.float32) * width**-0.5).astype(query_BLHd.dtype)
    query_BHLd, key_BKLd, value_BKLd = (jnp.swapaxes(one, 1, 2) for one in (scaled, key_BLKd, value_BLKd))
    mixed_BHLd = jax.vmap(row)(query_BHLd, key_BKLd, value_BKLd, segment_BL)
    return jnp.swapaxes(mixed_BHLd, 1, 2).astype(query_BLHd.dtype)

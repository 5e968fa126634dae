"""Causal attention between tokens that know their document and their position in it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Queries that one product takes, at least, and the products that a sequence is cut into, at most.
_BLOCK, _BLOCKS = 128, 8


class Places(NamedTuple):
    """Where tokens stand. position: in their document, from 0. segment: which document of the row; None: all in one."""

    position: Int[Array, "B L"]
    segment: Int[Array, "B L"] | None = None


def attention(
    query_BLHd: Float[Array, "B L H d"],
    key_BSKd: Float[Array, "B S K d"],
    value_BSKd: Float[Array, "B S K d"],
    queries: Places,
    keys: Places,
    *,
    window: int = 0,
    cap: float = 0.0,
    aligned: bool = False,
    platform: str = "cpu",
) -> Float[Array, "B L H d"]:
    """softmax(q k / √d) v over the keys of the same document that don't stand after the query.

    Grouped queries (2305.13245): H is a multiple of K, and H / K neighbouring queries share a key. window: only the
    last so many tokens, itself included; 0: all. cap: scores become cap · tanh(score / cap), before the mask; 0: don't.
    aligned: queries and keys are the same tokens in the same order, so that no key counts beyond a query's own index.
    Scores and softmax are float32; a token that sees nobody (padding) gets some finite mean.

    On CPU queries go in blocks, each against the keys that can count for it: with L = 256 and 64 channels forward and
    backward take .8 of the time of `jax.nn.dot_product_attention`, which runs elsewhere. For training on TPU there is
    `moe.ops.splash`.
    """
    if platform != "cpu" and not cap:
        mask_BLS = _visible(queries, keys, window)
        return jax.nn.dot_product_attention(query_BLHd, key_BSKd, value_BSKd, mask=mask_BLS[:, None])
    length = query_BLHd.shape[1]
    size = max(_BLOCK, -(-length // _BLOCKS)) if aligned else length
    blocks = []
    for start in range(0, length, size):
        end = min(start + size, length)
        own = slice(start, end)
        seen = slice(max(0, start - window + 1) if window else 0, end) if aligned else slice(None)
        mask_BLS = _visible(_part(queries, own), _part(keys, seen), window)
        blocks.append(_attend(query_BLHd[:, own], key_BSKd[:, seen], value_BSKd[:, seen], mask_BLS, cap))
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)


def _visible(queries: Places, keys: Places, window: int) -> Bool[Array, "B L S"]:
    """Which keys count for which query."""
    distance_BLS = queries.position[:, :, None] - keys.position[:, None]
    mask_BLS = distance_BLS >= 0
    if window:
        mask_BLS &= distance_BLS < window
    if queries.segment is not None and keys.segment is not None:
        mask_BLS &= queries.segment[:, :, None] == keys.segment[:, None]
    return mask_BLS


def _part(places: Places, rows: slice) -> Places:
    return Places(places.position[:, rows], None if places.segment is None else places.segment[:, rows])


def _attend(
    query_BLHd: Float[Array, "B L H d"],
    key_BSKd: Float[Array, "B S K d"],
    value_BSKd: Float[Array, "B S K d"],
    mask_BLS: Bool[Array, "B L S"],
    cap: float,
) -> Float[Array, "B L H d"]:
    width = query_BLHd.shape[-1]
    query_BLKgd = query_BLHd.reshape(*query_BLHd.shape[:2], key_BSKd.shape[2], -1, width)
    f32 = jnp.float32
    score_BKgLS = jnp.einsum("BLKgd,BSKd->BKgLS", query_BLKgd, key_BSKd, preferred_element_type=f32) * width**-0.5
    if cap:
        score_BKgLS = cap * jnp.tanh(score_BKgLS / cap)
    score_BKgLS = jnp.where(mask_BLS[:, None, None], score_BKgLS, jnp.finfo(f32).min)
    weight_BKgLS = jax.nn.softmax(score_BKgLS, axis=-1).astype(value_BSKd.dtype)
    mixed = jnp.einsum("BKgLS,BSKd->BLKgd", weight_BKgLS, value_BSKd, preferred_element_type=f32)
    return mixed.reshape(query_BLHd.shape).astype(query_BLHd.dtype)

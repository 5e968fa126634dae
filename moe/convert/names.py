"""Which tensors of a Hugging Face model make up each of our arrays, and how."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from moe.convert.settings import PROJECTIONS, Architecture, Settings
from moe.layers.attention import AttentionConfig
from moe.layers.block import stacked_blocks
from moe.models import make_model

Shape = tuple[int, ...]


class Piece(NamedTuple):
    """A part of one of our arrays, `array[at]`, and the tensors that it is made of.

    layer: number of the block, or -1 and depth for what stands before and after the blocks.
    pack(tensors) -> part; unpack(part) -> tensors: only moves of entries.
    """

    layer: int
    at: Shape
    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    pack: Callable[[Sequence[np.ndarray]], np.ndarray]
    unpack: Callable[[np.ndarray], Sequence[np.ndarray]]


class Leaf(NamedTuple):
    """One of our arrays: where it stands in the tree of parameters, its shape, and its parts, which cover it."""

    path: tuple[str, ...]
    shape: Shape
    pieces: list[Piece]


def make_leaves(settings: Settings, architecture: Architecture) -> list[Leaf]:
    """All arrays of the model."""
    model = make_model(settings.model, settings.moe, settings.router)
    params = jax.eval_shape(model.init, jax.random.key(0)).params
    leaves = []
    for keys, array in jax.tree_util.tree_leaves_with_path(params):
        path = tuple(str(key.key) for key in keys)
        leaves.append(Leaf(path, array.shape, list(_pieces(path, array.shape, settings, architecture))))
    return leaves


def _pieces(path: tuple[str, ...], shape: Shape, settings: Settings, one: Architecture) -> Iterator[Piece]:
    model = settings.model
    if stacked := stacked_blocks(model, path):
        layers, rest = stacked
        for period, layer in enumerate(layers):
            yield from _block_pieces(layer, (period,), rest, shape[1:], model.attention, one)
        return
    match path:
        case ("embedding",):
            yield _as_is(-1, (), "model.embed_tokens.weight", shape, shape)
        case ("norm", "scale"):
            yield _as_is(model.depth, (), "model.norm.weight", shape, shape)
        case ("head",):
            yield _transposed(model.depth, (), "lm_head.weight", shape)
        case _:
            raise ValueError(f"Hugging Face's {one.class_name} has no {'.'.join(path)}.")


def _block_pieces(
    layer: int, at: Shape, path: tuple[str, ...], shape: Shape, attention: AttentionConfig, one: Architecture
) -> Iterator[Piece]:
    prefix = f"model.layers.{layer}."
    match path:
        case ("attention_norm", "scale"):
            yield _as_is(layer, at, f"{prefix}input_layernorm.weight", shape, shape)
        case ("f_norm", "scale"):
            yield _as_is(layer, at, f"{prefix}post_attention_layernorm.weight", shape, shape)
        case ("attention", "w_in"):
            yield _query_key_value(layer, at, f"{prefix}self_attn.", "weight", shape[0], attention)
        case ("attention", "bias_in"):
            yield _query_key_value(layer, at, f"{prefix}self_attn.", "bias", 0, attention)
        case ("attention", "w_out"):
            yield _transposed(layer, at, f"{prefix}self_attn.o_proj.weight", shape)
        case ("attention", "bias_out"):
            yield _as_is(layer, at, f"{prefix}self_attn.o_proj.bias", shape, shape)
        case ("attention", "query_norm" | "key_norm" as norm, "scale"):
            name = f"{prefix}self_attn.{norm[0]}_norm.weight"
            yield _as_is(layer, at, name, shape, (math.prod(shape),))
        case ("f", "w_gate"):
            yield _transposed(layer, at, f"{prefix}{one.block}.gate.weight", shape)
        case ("f", "experts", matrix):
            for expert in range(shape[0]):
                name = f"{prefix}{one.block}.experts.{expert}.{one.expert[matrix]}.weight"
                yield _transposed(layer, (*at, expert), name, shape[1:])
        case ("f", "weights", matrix):
            yield _transposed(layer, at, f"{prefix}mlp.{PROJECTIONS[matrix]}.weight", shape)
        case _:
            raise ValueError(f"Hugging Face's {one.class_name} has no {'.'.join(path)} in its blocks.")


def _as_is(layer: int, at: Shape, name: str, ours: Shape, theirs: Shape) -> Piece:
    def pack(tensors: Sequence[np.ndarray]) -> np.ndarray:
        return tensors[0].reshape(ours)

    def unpack(part: np.ndarray) -> Sequence[np.ndarray]:
        return [part.reshape(theirs)]

    return Piece(layer, at, (name,), (theirs,), pack, unpack)


def _transposed(layer: int, at: Shape, name: str, ours: Shape) -> Piece:
    """Theirs is [out, in]; ours [*in, out]."""
    inputs, outputs = math.prod(ours[:-1]), ours[-1]

    def pack(tensors: Sequence[np.ndarray]) -> np.ndarray:
        return tensors[0].T.reshape(ours)

    def unpack(part: np.ndarray) -> Sequence[np.ndarray]:
        return [part.reshape(inputs, outputs).T]

    return Piece(layer, at, (name,), ((outputs, inputs),), pack, unpack)


def _query_key_value(layer: int, at: Shape, prefix: str, what: str, width: int, attention: AttentionConfig) -> Piece:
    """Theirs are [heads · d, D] for queries, keys and values, biases [heads · d]; ours see `Attention`."""
    kv_heads, head_width = attention.kv_heads, attention.head_width
    rows = [attention.heads * head_width, kv_heads * head_width, kv_heads * head_width]
    last = (width,) if width else ()

    def pack(tensors: Sequence[np.ndarray]) -> np.ndarray:
        joint = np.concatenate([tensor.reshape(kv_heads, -1, *last) for tensor in tensors], axis=1)
        return np.moveaxis(joint, -1, 0) if width else joint

    def unpack(part: np.ndarray) -> Sequence[np.ndarray]:
        joint = np.moveaxis(part, 0, -1) if width else part
        split = np.split(joint, [joint.shape[1] - 2 * head_width, joint.shape[1] - head_width], axis=1)
        return [one.reshape(-1, *last) for one in split]

    names = tuple(f"{prefix}{letter}_proj.{what}" for letter in "qkv")
    return Piece(layer, at, names, tuple((count, *last) for count in rows), pack, unpack)

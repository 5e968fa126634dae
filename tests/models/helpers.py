"""A small language model with every setting off its default, and a batch of packed documents."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from moe.layers.moe import MoeConfig
from moe.models import LmConfig, Variables, make_model
from moe.ops.rope import Llama3
from moe.parallel.mesh import MeshConfig, make_mesh
from moe.routers import Softmax

VOCABULARY, LENGTH, BATCH = 23, 9, 8
PLAIN = LmConfig(
    vocab_size=VOCABULARY, length=LENGTH, width=8, depth=2, heads=4, mlp_width=12, moe_every=1, scan_layers=False
)
# Two dense blocks, then a period of two.
ODD = dataclasses.replace(
    PLAIN,
    depth=4,
    moe_every=2,
    dense_layers=2,
    kv_heads=2,
    head_width=6,
    window=3,
    attention_cap=2.0,
    rope_theta=100.0,
    rope_scaling=Llama3(factor=4.0, low_turns=0.05, high_turns=1.0, original_length=32),
    qk_norm="head",
    attention_bias="all",
    norm_eps=1e-3,
    tied_head=True,
    logit_cap=3.0,
    z_weight=0.1,
    loss_chunk=4,
    scan_layers=True,
)
OLMOE = dataclasses.replace(PLAIN, qk_norm="all", kv_heads=2, attention_bias="qkv", moe_every=0)
MOE = MoeConfig(num_experts=4, expert_width=10, group_size=2, capacity_factor=0.0, shared_experts=1, shared_gate=True)
ROUTER = Softmax(k=2, noise=0.0, importance_weight=0.0, load_weight=0.0)
ONE_DEVICE = make_mesh(MeshConfig(), jax.devices()[:1])


@functools.cache
def make_variables(config: LmConfig, seed: int = 0) -> Variables:
    """Fresh variables, with scales and biases drawn as well."""
    variables = make_model(config, MOE, ROUTER).init(jax.random.key(seed))
    rng = np.random.default_rng(seed)

    def one(path: tuple, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        drawn = name == "scale" or name.startswith("bias")
        return leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32) if drawn else leaf

    return Variables(jax.tree_util.tree_map_with_path(one, variables.params), variables.router_state)


def make_batch(seed: int = 0, batch: int = BATCH) -> dict[str, np.ndarray]:
    """Rows of up to three documents and some padding, that differ in how many targets count: many, few, and none."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCABULARY, (batch, LENGTH + 1)).astype(np.int32)
    segment, position = np.zeros((2, batch, LENGTH), np.int32)
    for b in range(batch):
        ends = np.sort(rng.choice(np.arange(1, LENGTH + 1), 3, replace=False))
        for number, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True), start=1):
            segment[b, start:end], position[b, start:end] = number, np.arange(end - start)
    following = np.pad(segment[:, 1:], ((0, 0), (0, 1)))
    loss_mask = (segment > 0) & (following == segment)
    loss_mask[1] = False
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment": segment,
        "position": position,
        "loss_mask": loss_mask,
    }


def as_float64(tree: Any) -> Any:
    """The tree as the oracle takes it."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)

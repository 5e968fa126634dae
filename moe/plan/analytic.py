"""What a model needs, by its parameters and shapes: what a compiled program is held against."""

import math
from typing import Any

import jax

from moe.config import Config
from moe.models import LmConfig, Variables
from moe.routers import Soft

# Parameters that are looked up or added, not multiplied with.
_NOT_MATRICES = ("scale", "position", "embedding")


def tokens_per_step(config: Config) -> int:
    """Tokens that enter the blocks in a step."""
    return config.batch_size * _length(config)


def active_flops(config: Config, abstract: Variables) -> float:
    """FLOPs of a step's matrix products, forward and twice that backward, without recomputation, on all devices."""
    return 3.0 * tokens_per_step(config) * forward_flops(config, abstract, experts_per_token(config))


def forward_flops(config: Config, abstract: Variables, experts: float) -> float:
    """FLOPs of a token's matrix products, forward, with so many routed experts.

    2 for each parameter of a matrix and token; of routed experts the share k / E (shared experts whole); attention's
    two products with the keys that a token sees. This is how MFU is usually counted (PaLM, 2204.02311, appendix B):
    no softmax, no norm, of routing the gate alone. In `active_flops` routers whose experts per token vary count k.
    """
    per_token = sum(
        _matrix_flops(tuple(str(key.key) for key in path), leaf.shape, config, experts)
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract.params)
    )
    attention = config.model.attention
    seen = _keys_seen(config)
    scores = config.model.depth * 2 * 2 * attention.heads * attention.head_width * seen
    return per_token + scores


def parameter_counts(config: Config, abstract: Variables) -> dict[str, int]:
    """ "all" parameters; those that are "active" for a token; those of all routed "experts"."""
    counts = {"all": 0, "active": 0, "experts": 0}
    share = experts_per_token(config) / config.moe.num_experts
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract.params):
        size = math.prod(leaf.shape)
        is_expert = _is_routed(tuple(str(key.key) for key in path))
        counts["all"] += size
        counts["experts"] += size if is_expert else 0
        counts["active"] += round(size * share) if is_expert else size
    return counts


def experts_per_token(config: Config) -> float:
    """Experts that a token costs: k, or what E · P slots cost the tokens of a group."""
    if config.router.k is not None:
        return float(config.router.k)
    if isinstance(config.router, Soft):
        group = config.moe.group_size or config.batch_size // config.accumulation_steps
        return config.moe.num_experts * config.router.slots / (group * _length(config))
    return float(config.moe.num_experts)


def _is_routed(path: tuple[str, ...]) -> bool:
    return "experts" in path


def _matrix_flops(path: tuple[str, ...], shape: tuple[int, ...], config: Config, experts: float) -> float:
    """Of one token, forward."""
    name = path[-1]
    is_tied_head = name == "embedding" and getattr(config.model, "tied_head", False)
    if (name in _NOT_MATRICES and not is_tied_head) or name.startswith("bias") or "router_params" in path:
        return 0.0
    flops = 2.0 * math.prod(shape)
    if _is_routed(path):
        return flops * experts / config.moe.num_experts
    # An image has one head for all of its tokens.
    return flops / _length(config) if path[0] == "head" and not isinstance(config.model, LmConfig) else flops


def _length(config: Config) -> int:
    """Tokens of an example."""
    where: Any = config.data if isinstance(config.model, LmConfig) else config.model
    return where.length


def _keys_seen(config: Config) -> float:
    """Keys that a token attends to, on average over an example that is one document."""
    length = _length(config)
    if not isinstance(config.model, LmConfig):
        return float(length)
    window = min(config.model.window or length, length)
    return window * (window + 1) / 2 / length + (length - window) * window / length


def device_bytes(tree: Any) -> int:
    """Bytes of a tree of ShapeDtypeStructs on each device that their shardings name."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

"""A decoder language model in float64 NumPy, by loops over tokens and heads, in evaluation.

Written from RoFormer (2104.09864), grouped-query attention (2305.13245), RMSNorm (1910.07467), SwiGLU (2002.05202) and
the compositions that this project defines (`AttentionConfig`, README). A row's documents are handled one by one, so no
mask exists. Weights are a model's own parameters as nested dicts; letters as in `moe.types`.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from moe.models import LmConfig
from tests.oracles import routing


def rms_norm(x: ArrayLike, scale: ArrayLike, eps: float) -> np.ndarray:
    """x / √(mean x² + eps) · scale, over as many of the last axes as `scale` has."""
    x, scale = np.asarray(x, np.float64), np.asarray(scale, np.float64)
    axes = tuple(range(x.ndim - scale.ndim, x.ndim))
    return x / np.sqrt((x**2).mean(axis=axes, keepdims=True) + eps) * scale


def rope_frequencies(width: int, theta: float, name: str = "none", **settings: float) -> np.ndarray:
    """Radians per position of each pair: theta^(-2i/width), stretched as Position Interpolation, Llama 3.1 or YaRN do.

    llama3: below low_turns turns in original_length divided by factor, above high_turns kept, between them a mixture
    that is linear in the turns. yarn: the same from fast_turns to slow_turns, linear in the pair's index.
    """
    pairs = width // 2
    plain = np.array([theta ** (-2 * i / width) for i in range(pairs)])
    if name == "none":
        return plain
    if name == "linear":
        return plain / settings["factor"]
    factor, length = settings["factor"], settings["original_length"]
    if name == "llama3":
        turns = length * plain / (2 * math.pi)
        share = np.interp(turns, [settings["low_turns"], settings["high_turns"]], [0.0, 1.0])
    else:
        # Where theta^(-2i/width) makes so many turns.
        ends = [
            width / 2 * math.log(length / (turns * 2 * math.pi), theta)
            for turns in (settings["fast_turns"], settings["slow_turns"])
        ]
        if settings.get("truncate", True):
            ends = [math.floor(ends[0]), math.ceil(ends[1])]
        share = np.interp(np.arange(pairs), [max(ends[0], 0), min(ends[1], width - 1)], [1.0, 0.0])
    return share * plain + (1 - share) * plain / factor


def rotate(x_LHd: np.ndarray, position_L: ArrayLike, frequencies: np.ndarray) -> np.ndarray:
    """Entries (i, i + d/2) as one complex number, times e^(j · position · frequency i)."""
    half = x_LHd.shape[-1] // 2
    numbers = x_LHd[..., :half] + 1j * x_LHd[..., half:]
    angles = np.asarray(position_L, np.float64)[:, None] * frequencies
    turned = numbers * np.exp(1j * angles)[:, None]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def attend(
    query_LHd: np.ndarray, key_LKd: np.ndarray, value_LKd: np.ndarray, window: int = 0, cap: float = 0.0
) -> np.ndarray:
    """Causal attention of one document; query head h reads key-value head ⌊h K / H⌋."""
    length, heads, width = query_LHd.shape
    out = np.zeros_like(query_LHd)
    for i in range(length):
        seen = range(max(0, i - window + 1) if window else 0, i + 1)
        for h in range(heads):
            k = h * key_LKd.shape[1] // heads
            scores = np.array([query_LHd[i, h] @ key_LKd[j, k] / math.sqrt(width) for j in seen])
            if cap:
                scores = cap * np.tanh(scores / cap)
            out[i, h] = routing.softmax(scores) @ value_LKd[list(seen), k]
    return out


def attention(x_LD: np.ndarray, weights: dict[str, Any], config: LmConfig, frequencies: np.ndarray) -> np.ndarray:
    """The attention layer of one document."""
    settings = config.attention
    heads, kv_heads, width = settings.heads, settings.kv_heads, settings.head_width
    joint = np.einsum("ld,dkj->lkj", x_LD, weights["w_in"])
    if settings.bias != "none":
        joint = joint + weights["bias_in"]
    group = heads // kv_heads
    query = joint[..., : group * width].reshape(len(x_LD), heads, width)
    key, value = joint[..., group * width : -width], joint[..., -width:]
    if settings.qk_norm != "none":
        query = rms_norm(query, weights["query_norm"]["scale"], settings.norm_eps)
        key = rms_norm(key, weights["key_norm"]["scale"], settings.norm_eps)
    position = np.arange(len(x_LD))
    stretch = config.rope_scaling.attention_factor
    query, key = (stretch * rotate(one, position, frequencies) for one in (query, key))
    mixed = attend(query, key, value, settings.window, settings.cap)
    y = np.einsum("lhd,hdm->lm", mixed, weights["w_out"])
    return y + weights["bias_out"] if settings.bias == "all" else y


def swiglu(x: np.ndarray, weights: dict[str, np.ndarray]) -> np.ndarray:
    """(silu(x w_gate) · x w_in) w_out."""
    gate = x @ weights["w_gate"]
    return (gate * routing.sigmoid(gate) * (x @ weights["w_in"])) @ weights["w_out"]


def experts(x_LD: np.ndarray, weights: dict[str, Any], k: int) -> np.ndarray:
    """Each token's k experts of highest softmax, weighted by it, and the shared ones behind their gate."""
    probs = routing.softmax(x_LD @ weights["w_gate"])
    y = np.zeros_like(x_LD)
    for t, x in enumerate(x_LD):
        for e in np.argsort(-probs[t], kind="stable")[:k]:
            y[t] += probs[t, e] * swiglu(x, {name: w[e] for name, w in weights["experts"].items()})
    if shared := weights.get("shared"):
        y += routing.sigmoid(x_LD @ shared["gate"]) * swiglu(x_LD, shared)
    return y


def document_logits(
    tokens_L: np.ndarray, params: dict[str, Any], config: LmConfig, k: int, frequencies: np.ndarray
) -> np.ndarray:
    """Logits [L, V] of one document; `params` is the model's tree in float64."""
    x = params["embedding"][tokens_L]
    blocks = params["blocks"]
    stacks = [(blocks["leading"], config.dense_layers)] if config.dense_layers else []
    for stack, count in [*stacks, (blocks["periods"], config.num_periods)]:
        for index in range(count):
            for _, block in sorted(stack["blocks"].items()):
                one = _layer(block, index)
                normed = rms_norm(x, one["attention_norm"]["scale"], config.norm_eps)
                x = x + attention(normed, one["attention"], config, frequencies)
                normed = rms_norm(x, one["f_norm"]["scale"], config.norm_eps)
                f = one["f"]
                x = x + (experts(normed, f, k) if "experts" in f else swiglu(normed, f["weights"]))
    x = rms_norm(x, params["norm"]["scale"], config.norm_eps)
    logits = x @ (params["embedding"].T if config.tied_head else params["head"])
    return config.logit_cap * np.tanh(logits / config.logit_cap) if config.logit_cap else logits


def token_loss(logits_V: np.ndarray, target: int, label_smoothing: float = 0.0) -> float:
    """Cross-entropy in nats of a target smoothed over the vocabulary."""
    log_probs = np.log(routing.softmax(logits_V))
    return float(-(1 - label_smoothing) * log_probs[target] - label_smoothing * log_probs.mean())


def _layer(tree: Any, index: int) -> Any:
    return {name: _layer(leaf, index) for name, leaf in tree.items()} if isinstance(tree, dict) else tree[index]

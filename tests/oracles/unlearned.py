"""Routers that choose without learning to: by hash, at random, or everything; in float64 NumPy, by loops.

Conventions as in `tests.oracles.routing`.
"""

import math

import numpy as np
from jaxtyping import Int
from numpy.typing import ArrayLike

from tests.oracles import operators
from tests.oracles.routing import Rows, softmax


def rows_of(expert_TK: ArrayLike, logits_TE: ArrayLike) -> Rows:
    """Rows of the given experts, choice by choice; a token weighs them by the softmax of their logits alone."""
    expert_TK, logits_TE = np.asarray(expert_TK), np.asarray(logits_TE, np.float64)
    num_tokens, k = expert_TK.shape
    weight_TK = np.array([softmax(logits_E[expert_K]) for logits_E, expert_K in zip(logits_TE, expert_TK, strict=True)])
    return Rows(
        token=np.tile(np.arange(num_tokens), k),
        expert=expert_TK.T.reshape(-1),
        weight=weight_TK.T.reshape(-1),
        valid=np.ones(num_tokens * k, bool),
        choices=num_tokens * k,
    )


def mixed(x: int) -> int:
    """The finaliser of MurmurHash3 (A. Appleby, public domain), on 32 bits."""
    x ^= x >> 16
    x = x * 0x85EBCA6B % 2**32
    x ^= x >> 13
    x = x * 0xC2B2AE35 % 2**32
    return x ^ x >> 16


def hashed_experts(ids: ArrayLike, k: int, num_experts: int, seed: int) -> Int[np.ndarray, "T K"]:
    """The project's balanced hash (after arXiv 2106.04426): see `moe.routers.unlearned.hashed_experts`."""
    coprime = [n for n in range(1, num_experts + 1) if math.gcd(n, num_experts) == 1]
    experts = []
    for token_id in np.asarray(ids).tolist():
        block, place = divmod(token_id, num_experts)
        bits = mixed((block + seed * 0x9E3779B9) % 2**32)
        factor = coprime[bits % 1024 % len(coprime)]
        step = coprime[bits // 1024 % 1024 % len(coprime)]
        shift = bits // 1024**2 % num_experts
        experts.append([(factor * place + step * choice + shift) % num_experts for choice in range(k)])
    return np.array(experts)


def highest(noise_TE: ArrayLike, k: int) -> Int[np.ndarray, "T K"]:
    """The experts of each token's k highest draws, in that order."""
    return np.array([operators.top_indices(noise_E, k) for noise_E in np.asarray(noise_TE)])

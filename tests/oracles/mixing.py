"""Routers in which the tokens of a group meet: expert choice and soft slots, in float64 NumPy, by loops.

Written from the papers cited at each function; conventions as in `tests.oracles.routing`.
"""

import math

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from tests.oracles import operators
from tests.oracles.routing import Rows, softmax


def expert_choice_router(logits_TE: ArrayLike, k: int) -> Rows:
    """Expert choice (arXiv 2202.09368, section 3.2): each expert's ⌈T k / E⌉ tokens of highest softmax(logits)_te.

    Rows: every expert's best token, then every expert's second, and so on.
    """
    probs_TE = softmax(logits_TE)
    num_tokens, num_experts = probs_TE.shape
    taken = math.ceil(num_tokens * k / num_experts)
    tokens_EC = [operators.top_indices(probs_TE[:, e], taken) for e in range(num_experts)]
    pairs = [(int(tokens_EC[e][rank]), e) for rank in range(taken) for e in range(num_experts)]
    token, expert = (np.array(column) for column in zip(*pairs, strict=True))
    return Rows(token, expert, probs_TE[token, expert], np.ones(len(pairs), bool), len(pairs))


def soft_slots(logits_TX: ArrayLike, num_experts: int) -> tuple[Float[np.ndarray, "T E C"], Float[np.ndarray, "T E C"]]:
    """Soft MoE (arXiv 2308.00951, section 2.1): dispatch = softmax over tokens, combine = softmax over all slots."""
    logits_TX = np.asarray(logits_TX, np.float64)
    dispatch_TX, combine_TX = softmax(logits_TX.T).T, softmax(logits_TX)
    shape = (len(logits_TX), num_experts, -1)
    return dispatch_TX.reshape(shape), combine_TX.reshape(shape)


def cosine_logits(tokens_TD: ArrayLike, gate_DX: ArrayLike, scale: float) -> Float[np.ndarray, "T X"]:
    """Soft MoE, section 2.3: scale times the cosine of every token and every column of the gate."""
    tokens_TD, gate_DX = np.asarray(tokens_TD, np.float64), np.asarray(gate_DX, np.float64)
    lengths = np.outer(np.linalg.norm(tokens_TD, axis=1), np.linalg.norm(gate_DX, axis=0))
    return scale * (tokens_TD @ gate_DX) / lengths

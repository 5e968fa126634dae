"""Routers whose combine weights have exact zeros of their own, in float64 NumPy, by loops.

Written from the papers cited at each function and from the compositions that this project defines (README, names).
Conventions as in `tests.oracles.routing`: no padding, ties to the lower index, float64 on entry.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from tests.oracles import operators
from tests.oracles.routing import Rows, queue, softmax


class Sparse(NamedTuple):
    """share: the operator's mask, which decides what is dispatched. weight: the combine weights."""

    share_TE: Float[np.ndarray, "T E"]
    weight_TE: Float[np.ndarray, "T E"]


def magnitude_mask(x: ArrayLike, k: int, strength: float, p: float) -> Float[np.ndarray, "n"]:
    """The mask within top-k in magnitude (arXiv 2302.01425) of x >= 0: y / v, which sums to k; 0 where x is 0.

    v is the isotonic solution, y = ((x - v)/λ)^(q-1) what the operator returns without rescaling; with it, y + x - v.
    """
    x = np.asarray(x, np.float64)
    y = operators.magnitude(x, k, strength, p, rescale=False)
    v = x - (operators.magnitude(x, k, strength, p) - y)
    return np.divide(y, v, out=np.zeros_like(y), where=y > 0)


def sparse_topk(
    logits_TE: ArrayLike, k: int, strength: float, p: float, composition: str, gate: str = "softmax"
) -> Sparse:
    """Token choice: "mask", "mask_softmax" of the logits, or "magnitude" of their gate, along the experts."""
    logits_TE = np.asarray(logits_TE, np.float64)
    return _composed(logits_TE, logits_TE, k, strength, p, composition, gate)


def sparse_topk_of_experts(
    logits_TE: ArrayLike, k: int, strength: float, p: float, composition: str, gate: str = "softmax"
) -> Sparse:
    """Expert choice: along the tokens, ⌈T k / E⌉ of them; masks are of the log-probabilities of a token's experts."""
    logits_TE = np.asarray(logits_TE, np.float64)
    taken = math.ceil(len(logits_TE) * k / logits_TE.shape[1])
    top_T1 = logits_TE.max(axis=1, keepdims=True)
    preference_TE = logits_TE - top_T1 - np.log(np.exp(logits_TE - top_T1).sum(axis=1, keepdims=True))
    return _composed(logits_TE, preference_TE, taken, strength, p, composition, gate, along_tokens=True)


def _composed(
    logits_TE: np.ndarray,
    preference_TE: np.ndarray,
    k: int,
    strength: float,
    p: float,
    composition: str,
    gate: str,
    along_tokens: bool = False,
) -> Sparse:
    gate_TE = np.maximum(logits_TE, 0.0) if gate == "relu" else softmax(logits_TE)
    argument_TE = gate_TE if composition == "magnitude" else preference_TE
    rows = argument_TE.T if along_tokens else argument_TE
    operator = magnitude_mask if composition == "magnitude" else operators.mask
    share_TE = np.array([operator(row, k, strength, p) for row in rows])
    weight_TE = share_TE
    if composition == "magnitude":
        weight_TE = np.array([operators.magnitude(row, k, strength, p) for row in rows])
    if along_tokens:
        share_TE, weight_TE = share_TE.T, weight_TE.T
    return Sparse(share_TE, weight_TE * gate_TE if composition == "mask_softmax" else weight_TE)


def queue_of_experts(weight_TE: ArrayLike, selected_TE: ArrayLike, most: int) -> Rows:
    """Rows in use only: each expert's `most` heaviest selected tokens, all first tokens before all second ones."""
    by_token = queue(np.asarray(weight_TE).T, np.asarray(selected_TE).T, most)
    used = by_token.valid
    return Rows(by_token.expert[used], by_token.token[used], by_token.weight[used], used[used], by_token.choices)


def relu_weights(logits_TE: ArrayLike) -> Float[np.ndarray, "T E"]:
    """ReMoE (arXiv 2412.14711, section 3): relu(logits), whose zeros are the experts that a token doesn't have."""
    return np.maximum(np.asarray(logits_TE, np.float64), 0.0)


def relu_l1(logits_TE: ArrayLike, k: int, balanced: bool) -> float:
    """ReMoE, section 3, plain or load-balanced, for one layer: 1/T Σ_t Σ_e f_e relu(logit_te).

    f_e is 1, or E/(k T) times the number of tokens with a positive logit for e.
    """
    gate_TE = relu_weights(logits_TE)
    num_tokens, num_experts = gate_TE.shape
    total = 0.0
    for e in range(num_experts):
        f = num_experts / (k * num_tokens) * sum(gate_TE[:, e] > 0) if balanced else 1.0
        total += f * sum(gate_TE[:, e])
    return float(total / num_tokens)


def updated_coefficient(coefficient: float, active: float, k: int, num_experts: int, factor: float) -> float:
    """ReMoE, section 3: λ α^sign((1 - k/E) - S), where S = 1 - active / E is the sparsity."""
    difference = (1.0 - k / num_experts) - (1.0 - active / num_experts)
    return coefficient * factor ** float(np.sign(difference))


def smooth_step(x: float, width: float) -> float:
    """DSelect-k (arXiv 2106.03760, section 3): 0 below -γ/2, 1 above γ/2, -2 x³/γ³ + 3/2 x/γ + 1/2 between."""
    if abs(x) >= width / 2:
        return float(x > 0)
    return -2.0 / width**3 * x**3 + 1.5 / width * x + 0.5


def dselect_k_selectors(
    logits_TX: ArrayLike, k: int, num_experts: int, width: float
) -> tuple[Float[np.ndarray, "T K E"], Float[np.ndarray, "T K"]]:
    """DSelect-k (arXiv 2106.03760, section 3), per example: selectors' weights of experts, and the selectors' weights.

    The first k · ⌈log2 E⌉ logits are the selectors' bits, the bit of 2^0 first; the last k those of the mixture.
    """
    logits_TX = np.asarray(logits_TX, np.float64)
    bits = math.ceil(math.log2(num_experts))
    selectors_TKE = np.ones((len(logits_TX), k, num_experts))
    for t, logits_X in enumerate(logits_TX):
        for selector in range(k):
            for e in range(num_experts):
                for bit in range(bits):
                    step = smooth_step(logits_X[selector * bits + bit], width)
                    selectors_TKE[t, selector, e] *= step if e // 2**bit % 2 else 1.0 - step
    return selectors_TKE, softmax(logits_TX[:, k * bits :])

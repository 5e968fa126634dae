"""Routers, losses, dispatch and the MoE layer in float64 NumPy, by loops, for one group of T tokens.

Written from the papers cited at each function and from the compositions that this project defines (README, names). A
group with padding is, here, the group without it: pass the real tokens only. Letters as in `moe.types`; numbers are
converted to float64 on entry. Ties go to the lower index everywhere: experts of a token, and tokens in a queue.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike

from tests.oracles import operators

Activation = Callable[[np.ndarray], np.ndarray]


class Rows(NamedTuple):
    """Choices in queue order, as `moe.types.Assignments`: row n sends `token[n]` to `expert[n]` where `valid[n]`.

    choices: how many the router made before `max_experts` cut any.
    """

    token: Int[np.ndarray, "N"]
    expert: Int[np.ndarray, "N"]
    weight: Float[np.ndarray, "N"]
    valid: Bool[np.ndarray, "N"]
    choices: int


def softmax(logits: ArrayLike) -> Float[np.ndarray, "... E"]:
    """exp(l_e) / Σ exp(l), over the last axis."""
    logits = np.asarray(logits, np.float64)
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def sigmoid(x: ArrayLike) -> Float[np.ndarray, "..."]:
    """1 / (1 + e^-x), as (1 + tanh(x/2)) / 2, which cannot overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * np.asarray(x, np.float64)))


def normal_cdf(x: float) -> float:
    """Φ(x), the standard Gaussian's distribution function."""
    return 0.5 * math.erfc(-x / math.sqrt(2.0))


# ---------------------------------------------------------------------------------------------------------------------
# Queues
# ---------------------------------------------------------------------------------------------------------------------


def queue(
    weights_TE: ArrayLike,
    selected_TE: ArrayLike,
    max_experts: int,
    priority_T: ArrayLike | None = None,
) -> Rows:
    """Rows in queue order from combine weights and the choices made: T * max_experts of them, rank by rank.

    A token's choices are ranked by combine weight, descending. All first choices queue before all second ones, and so
    on (V-MoE, arXiv 2106.05974, section 4); within a rank, tokens by `priority_T`, descending, or as they come. A
    token's choices beyond `max_experts` are cut, and counted in `choices`. Rows not in use carry expert 0, weight 0.
    """
    weights_TE, selected_TE = np.asarray(weights_TE, np.float64), np.asarray(selected_TE, bool)
    T = len(weights_TE)
    token_order = np.arange(T) if priority_T is None else operators.top_indices(priority_T, T)
    ranked = [
        [e for e in operators.top_indices(weights_TE[t], weights_TE.shape[1]) if selected_TE[t, e]] for t in range(T)
    ]
    rows = []
    for rank in range(max_experts):
        for t in token_order:
            used = rank < len(ranked[t])
            e = ranked[t][rank] if used else 0
            rows.append((t, e, weights_TE[t, e] if used else 0.0, used))
    token, expert, weight, valid = (np.array(column) for column in zip(*rows, strict=True))
    return Rows(token, expert, weight, valid, int(selected_TE.sum()))


def dense_weights(rows: Rows, num_tokens: int, num_experts: int) -> Float[np.ndarray, "T E"]:
    """The combine weight of every token and expert, 0 where no row in use joins them."""
    weights_TE = np.zeros((num_tokens, num_experts))
    for t, e, weight, valid in zip(rows.token, rows.expert, rows.weight, rows.valid, strict=True):
        if valid:
            weights_TE[t, e] += weight
    return weights_TE


def load(rows: Rows, num_experts: int) -> Int[np.ndarray, "E"]:
    """How many rows in use name each expert, before any capacity."""
    return np.array(
        [sum(int(v and e == i) for e, v in zip(rows.expert, rows.valid, strict=True)) for i in range(num_experts)]
    )


def max_violation(load_E: ArrayLike) -> float:
    """Largest load / mean load - 1 (arXiv 2408.15664); 0 at balance."""
    load_E = np.asarray(load_E, np.float64)
    return float(load_E.max() / load_E.mean() - 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Routers
# ---------------------------------------------------------------------------------------------------------------------


def softmax_router(
    logits_TE: ArrayLike, k: int, noise_TE: ArrayLike | None = None, batch_priority: bool = False
) -> Rows:
    """V-MoE (arXiv 2106.05974, section 2): top-k of softmax(logits + noise), combine weights not renormalised.

    Noise is N(0, 1/E²) in training and enters the weights as well as the choice. Batch priority queues tokens by their
    largest (noisy) probability.
    """
    logits_TE = np.asarray(logits_TE, np.float64)
    probs_TE = softmax(logits_TE if noise_TE is None else logits_TE + np.asarray(noise_TE, np.float64))
    selected_TE = np.array([operators.hard_mask(probs_T, k) for probs_T in probs_TE])
    return queue(probs_TE, selected_TE, k, probs_TE.max(axis=1) if batch_priority else None)


def sparse_topk_weights(logits_TE: ArrayLike, k: int, strength: float, p: float) -> Float[np.ndarray, "T E"]:
    """mask × softmax(logits), the mask of `operators.mask` on the logits: exact zeros, at least k nonzeros a token."""
    logits_TE = np.asarray(logits_TE, np.float64)
    mask_TE = np.array([operators.mask(logits_E, k, strength, p) for logits_E in logits_TE])
    return mask_TE * softmax(logits_TE)


def sparse_topk_router(
    logits_TE: ArrayLike,
    k: int,
    strength: float,
    p: float,
    max_experts: int | None = None,
    batch_priority: bool = False,
) -> Rows:
    """Dispatch where the p-norm mask (arXiv 2302.01425) is positive; combine weight mask × softmax(logits).

    `max_experts` (all E unless given) keeps a token's heaviest choices. Batch priority goes by the largest probability.
    """
    weights_TE = sparse_topk_weights(logits_TE, k, strength, p)
    priority_T = softmax(logits_TE).max(axis=1) if batch_priority else None
    return queue(weights_TE, weights_TE > 0, max_experts or weights_TE.shape[1], priority_T)


def successive_halving_slots(logits_TE: ArrayLike, k: int, base: float = 20.0) -> Float[np.ndarray, "T k E"]:
    """Each token's row-stochastic matrix of slots over experts: `operators.successive_halving` of sigmoid(logits)."""
    scores_TE = sigmoid(logits_TE)
    identity = np.eye(scores_TE.shape[1])
    return np.array([operators.successive_halving(identity, scores_E, k, base=base)[2] for scores_E in scores_TE])


def successive_halving_mixture(logits_TE: ArrayLike, k: int, base: float = 20.0) -> Float[np.ndarray, "T E"]:
    """The all-experts form: slot weight × softmax probability for every expert (each stands in exactly one slot)."""
    return successive_halving_slots(logits_TE, k, base).sum(axis=1) * softmax(logits_TE)


def successive_halving_router(logits_TE: ArrayLike, k: int, base: float = 20.0, batch_priority: bool = False) -> Rows:
    """Successive halving (arXiv 2010.15552) over a token's experts: each of k slots dispatches its heaviest expert.

    Combine weight = slot weight × softmax probability, so the result is `successive_halving_mixture` with the lighter
    experts of each slot left out. Batch priority goes by the largest probability.
    """
    slots_TkE, probs_TE = successive_halving_slots(logits_TE, k, base), softmax(logits_TE)
    selected_TE = np.zeros(probs_TE.shape, bool)
    for t, slots_kE in enumerate(slots_TkE):
        selected_TE[t, slots_kE.argmax(axis=1)] = True
    weights_TE = np.where(selected_TE, slots_TkE.sum(axis=1) * probs_TE, 0.0)
    return queue(weights_TE, selected_TE, k, probs_TE.max(axis=1) if batch_priority else None)


def mass_left_out(slots_TkE: ArrayLike) -> float:
    """Share of the slots' weight that is not on their heaviest experts: mean over tokens and slots of 1 - max."""
    return float(np.mean(1.0 - np.asarray(slots_TkE, np.float64).max(axis=2)))


# ---------------------------------------------------------------------------------------------------------------------
# Losses, unweighted
# ---------------------------------------------------------------------------------------------------------------------


def squared_variation(values_E: ArrayLike) -> float:
    """(std / mean)², as the population variance over the squared mean, whose gradient exists at perfect balance."""
    values_E = np.asarray(values_E, np.float64)
    return float(np.mean((values_E - values_E.mean()) ** 2) / values_E.mean() ** 2)


def importance_loss(logits_TE: ArrayLike) -> float:
    """`squared_variation` of Σ_t softmax(logits)_te, without noise (V-MoE, appendix A.2); 0 at balance."""
    return squared_variation(softmax(logits_TE).sum(axis=0))


def load_probabilities(logits_TE: ArrayLike, noise_TE: ArrayLike, k: int, noise_std: float) -> Float[np.ndarray, "T E"]:
    """Probability that an expert is above the token's threshold when its own noise alone is drawn again.

    p_te = 1 - Φ((η_t - logits_te) / σ), the clean logits against η_t, the k-th largest entry of logits + noise (V-MoE,
    appendix A.2). That entry may be the expert's own: V-MoE's released code takes the k-th largest of all entries,
    where Shazeer et al. (arXiv 1701.06538, eq. 8) leave the expert itself out.
    """
    logits_TE, noise_TE = np.asarray(logits_TE, np.float64), np.asarray(noise_TE, np.float64)
    probabilities_TE = np.empty_like(logits_TE)
    for t, logits_E in enumerate(logits_TE):
        threshold = np.sort(logits_E + noise_TE[t])[-k]
        for e, logit in enumerate(logits_E):
            probabilities_TE[t, e] = normal_cdf((logit - threshold) / noise_std)
    return probabilities_TE


def load_loss(logits_TE: ArrayLike, noise_TE: ArrayLike, k: int, noise_std: float) -> float:
    """`squared_variation` of Σ_t `load_probabilities` (V-MoE, appendix A.2); 0 at balance. Undefined without noise."""
    return squared_variation(load_probabilities(logits_TE, noise_TE, k, noise_std).sum(axis=0))


def load_balancing_loss(probs_TE: ArrayLike, selected_TE: ArrayLike, k: float | None = None) -> float:
    """Switch Transformer (arXiv 2101.03961) eq. 4, divided by K: E/K Σ_e f_e P_e; 1 at balance, and at uniform probs.

    f_e: the share of tokens that select expert e (all of their choices, so that Σ f = K); P_e: the mean probability.
    K is the mean number of experts per token unless given.
    """
    probs_TE, selected_TE = np.asarray(probs_TE, np.float64), np.asarray(selected_TE, bool)
    f_E, P_E = selected_TE.mean(axis=0), probs_TE.mean(axis=0)
    return float(len(f_E) / (f_E.sum() if k is None else k) * np.sum(f_E * P_E))


def z_loss(logits_TE: ArrayLike) -> float:
    """ST-MoE (arXiv 2202.08906) eq. 5: the mean over tokens of (log Σ_e exp(logits_te))²."""
    logits_TE = np.asarray(logits_TE, np.float64)
    top_T = logits_TE.max(axis=1)
    return float(np.mean((top_T + np.log(np.exp(logits_TE - top_T[:, None]).sum(axis=1))) ** 2))


def entropy(probs: ArrayLike) -> float:
    """-Σ p log p in nats, with 0 log 0 = 0."""
    return -sum(p * math.log(p) for p in np.asarray(probs, np.float64).tolist() if p > 0)


def mean_entropy(probs_TE: ArrayLike) -> float:
    """Mean over tokens of the entropy of a token's distribution over experts: low when routers are decided."""
    return float(np.mean([entropy(probs_E) for probs_E in np.asarray(probs_TE, np.float64)]))


def entropy_of_mean(probs_TE: ArrayLike) -> float:
    """Entropy of the distribution averaged over tokens: log E at balance."""
    return entropy(np.asarray(probs_TE, np.float64).mean(axis=0))


# ---------------------------------------------------------------------------------------------------------------------
# Dispatch and the layer
# ---------------------------------------------------------------------------------------------------------------------


class Dispatched(NamedTuple):
    """kept_N: the row found a place. slot_N: its place in its expert's buffer, -1 if none.

    buffer_EC: the row that holds each place, -1 if none. overflow: share of the router's choices that found no place.
    """

    kept_N: Bool[np.ndarray, "N"]
    slot_N: Int[np.ndarray, "N"]
    buffer_EC: Int[np.ndarray, "E C"]
    overflow: float


def capacity(num_tokens: int, num_experts: int, k: int, factor: float, multiple_of: int = 4) -> int:
    """⌈factor T K / E⌉ (Switch, with K), rounded up to a multiple (V-MoE: 4). The factor is what its decimal says."""
    exact = math.ceil(Fraction(str(factor)) * num_tokens * k / num_experts)
    return -(-exact // multiple_of) * multiple_of


def dispatch(rows: Rows, num_experts: int, capacity: int) -> Dispatched:
    """Fill every expert's queue in row order up to `capacity`; rows not in use take no place."""
    kept_N, slot_N = np.zeros(len(rows.token), bool), np.full(len(rows.token), -1)
    buffer_EC = np.full((num_experts, capacity), -1)
    length = [0] * num_experts
    for n, (e, valid) in enumerate(zip(rows.expert, rows.valid, strict=True)):
        if valid and length[e] < capacity:
            kept_N[n], slot_N[n], buffer_EC[e, length[e]] = True, length[e], n
            length[e] += 1
    overflow = 1.0 - int(kept_N.sum()) / rows.choices if rows.choices else 0.0
    return Dispatched(kept_N, slot_N, buffer_EC, overflow)


def relu(x: np.ndarray) -> np.ndarray:
    """max(x, 0)."""
    return np.maximum(x, 0.0)


def silu(x: np.ndarray) -> np.ndarray:
    """x sigmoid(x)."""
    return x * sigmoid(x)


def gelu(x: np.ndarray) -> np.ndarray:
    """x Φ(x), the exact form."""
    return x * np.vectorize(normal_cdf, otypes=[np.float64])(x)


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """The tanh approximation of `gelu` (arXiv 1606.08415), which is `jax.nn.gelu`'s default."""
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


class Experts(NamedTuple):
    """Stacked expert parameters. b_in, b_out: optional biases. w_gate: with it, the hidden layer is gated (SwiGLU)."""

    w_in_EDF: np.ndarray
    w_out_EFD: np.ndarray
    b_in_EF: np.ndarray | None = None
    b_out_ED: np.ndarray | None = None
    w_gate_EDF: np.ndarray | None = None


def expert(experts: Experts, e: int, x_D: Float[np.ndarray, "D"], activation: Activation) -> Float[np.ndarray, "D"]:
    """Expert e on one token: h W_out + b_out, h = act(x W_in + b_in), or gated act(x W_gate) * (x W_in + b_in)."""
    hidden_F = x_D @ np.asarray(experts.w_in_EDF, np.float64)[e]
    if experts.b_in_EF is not None:
        hidden_F = hidden_F + np.asarray(experts.b_in_EF, np.float64)[e]
    if experts.w_gate_EDF is None:
        hidden_F = activation(hidden_F)
    else:
        hidden_F = activation(x_D @ np.asarray(experts.w_gate_EDF, np.float64)[e]) * hidden_F
    y_D = hidden_F @ np.asarray(experts.w_out_EFD, np.float64)[e]
    return y_D if experts.b_out_ED is None else y_D + np.asarray(experts.b_out_ED, np.float64)[e]


def moe_layer(
    x_TD: ArrayLike, rows: Rows, experts: Experts, activation: Activation, kept_N: ArrayLike | None = None
) -> Float[np.ndarray, "T D"]:
    """y_t = Σ over rows in use of token t (and kept, where `kept_N` is given) of weight × expert(x_t)."""
    x_TD = np.asarray(x_TD, np.float64)
    y_TD = np.zeros_like(x_TD)
    used_N = rows.valid if kept_N is None else rows.valid & np.asarray(kept_N, bool)
    for n in np.flatnonzero(used_N):
        t = rows.token[n]
        y_TD[t] += rows.weight[n] * expert(experts, rows.expert[n], x_TD[t], activation)
    return y_TD


def mixture(
    x_TD: ArrayLike, weights_TE: ArrayLike, experts: Experts, activation: Activation
) -> Float[np.ndarray, "T D"]:
    """y_t = Σ_e weights_te × expert_e(x_t) over all experts: what every sparse layer is an approximation of."""
    x_TD, weights_TE = np.asarray(x_TD, np.float64), np.asarray(weights_TE, np.float64)
    y_TD = np.zeros_like(x_TD)
    for t, weights_E in enumerate(weights_TE):
        for e, weight in enumerate(weights_E):
            y_TD[t] += weight * expert(experts, e, x_TD[t], activation)
    return y_TD

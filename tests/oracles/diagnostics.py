"""Routing diagnostics in float64 by loops over tokens, from their definitions in `moe.evaluation.routing.measure`."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def measures(
    chosen_TE: np.ndarray,
    weight_TE: np.ndarray,
    logits_TE: np.ndarray | None,
    k: int | None,
    attributes: Mapping[str, Sequence[int]],
) -> dict[str, Any]:
    """Of tokens none of which is padding, without queues.

    logits_TE: None where the gate has no logit per expert; k: None: all, with more or less weight.
    """
    num_tokens, num_experts = chosen_TE.shape
    taken = [[e for e in range(num_experts) if chosen_TE[t, e]] for t in range(num_tokens)]
    count = [[weight_TE[t, e] if k is None else float(e in taken[t]) for e in range(num_experts)]
             for t in range(num_tokens)]  # fmt: skip
    loads = [sum(e in some for some in taken) for e in range(num_experts)]
    mean = sum(loads) / num_experts
    result: dict[str, Any] = {
        "load": [load / sum(loads) for load in loads],
        "load_cv": math.sqrt(sum((load - mean) ** 2 for load in loads) / num_experts) / mean,
        "max_violation": max(loads) / mean - 1,
        "dead_experts": sum(load == 0 for load in loads),
        "experts_per_token": sum(map(len, taken)) / num_tokens,
        "rows_per_token": sum(map(len, taken)) / num_tokens,
        "experts_per_token_histogram": [
            sum(len(some) == n for some in taken) / num_tokens for n in range(num_experts + 1)
        ],
        "mutual_information": {name: information(count, values) for name, values in attributes.items()},
        "weight_similarity": cosines(weight_TE.T),
        "choice_similarity": cosines(np.array(count).T),
        "entropy": sum(map(entropy, softmax(logits_TE) if logits_TE is not None else normalised(weight_TE)))
        / num_tokens,
    }
    if logits_TE is not None and k is not None:
        best = [sorted(range(num_experts), key=lambda e: (-row[e], e))[:k] for row in logits_TE]
        pairs = [(set(a), set(b)) for a, b in zip(taken, best, strict=True)]
        result["topk_same"] = sum(a == b for a, b in pairs) / num_tokens
        result["topk_jaccard"] = sum(len(a & b) / len(a | b) for a, b in pairs) / num_tokens
        outside = sum(weight_TE[t, e] for t in range(num_tokens) for e in range(num_experts) if e not in best[t])
        result["weight_outside_topk"] = outside / weight_TE.sum()
    return result


def information(count: Sequence[Sequence[float]], values: Sequence[int]) -> float:
    """Σ p(v, e) log(p(v, e) / (p(v) p(e)))."""
    joint: Counter = Counter()
    for row, value in zip(count, values, strict=True):
        for expert, much in enumerate(row):
            joint[value, expert] += much
    total = sum(joint.values())
    by_value: Counter = Counter()
    by_expert: Counter = Counter()
    for (value, expert), much in joint.items():
        by_value[value] += much
        by_expert[expert] += much
    return sum(
        much / total * math.log(much * total / (by_value[value] * by_expert[expert]))
        for (value, expert), much in joint.items()
        if much
    )


def cosines(rows: np.ndarray) -> list[list[float]]:
    """Of every two rows; 0 beside a row of zeros."""
    norms = [math.sqrt(sum(x * x for x in row)) for row in rows]
    return [
        [float(a @ b) / (na * nb) if na and nb else 0.0 for b, nb in zip(rows, norms, strict=True)]
        for a, na in zip(rows, norms, strict=True)
    ]


def entropy(p: Sequence[float]) -> float:
    """-Σ p log p."""
    return -sum(x * math.log(x) for x in p if x > 0)


def softmax(logits_TE: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    return normalised(np.exp(logits_TE - logits_TE.max(axis=1, keepdims=True)))


def normalised(weight_TE: np.ndarray) -> np.ndarray:
    """Rows over their sums; zeros stay."""
    total_T1 = weight_TE.sum(axis=1, keepdims=True)
    return weight_TE / np.where(total_T1 > 0, total_T1, 1.0)

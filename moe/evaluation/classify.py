"""Measures of a classifier over a whole set."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from moe.data.pipeline import Batch
from moe.evaluation.measures import Predictions, summarize, unit_rows
from moe.types import PyTree


def evaluate(
    predict: Callable[[PyTree, dict[str, Any]], Float[Array, "B V"]], params: PyTree, batches: Iterable[Batch]
) -> dict[str, float]:
    """{"accuracy", "loss", "top5_accuracy", "ece"} over the examples that `mask` keeps, and their intervals.

    And "skipped", unless it is 0: how many examples are left out because they can't be used. `measures.measures` and
    `measures.summarize` define the others.

    Probabilities are softmax(logits), also of a model that was trained with a sigmoid for each class. loss is their
    cross-entropy in nats, without label smoothing or router losses; it is added up in float64, so that the result does
    not depend on how the examples are batched.

    predict(params, batch): the logits [B, V] of a batch, which also has label and mask. batches: of the whole set,
    once. Raises ValueError if the set is empty.
    """
    rows, skipped = [], 0.0
    for batch in batches:
        keep_B = batch["mask"]
        rows.append(unit_rows(_predictions(np.asarray(predict(params, batch), np.float64), batch["label"]))[keep_B])
        skipped += np.sum(batch.get("skipped", False))
    if not sum(map(len, rows)):
        raise ValueError("the evaluation set is empty: nothing was measured.")
    found = summarize(np.concatenate(rows), is_text=False)
    return found | ({"skipped": float(skipped)} if skipped else {})


def _predictions(logits_BV: Float[np.ndarray, "B V"], label_B: np.ndarray) -> Predictions:
    """One of each image. Among equal logits the lower class comes first."""
    shifted_BV = logits_BV - logits_BV.max(axis=1, keepdims=True)
    log_probs_BV = shifted_BV - np.log(np.exp(shifted_BV).sum(axis=1, keepdims=True))
    label_B1 = label_B[:, None]
    own_B1 = np.take_along_axis(logits_BV, label_B1, axis=1)
    is_lower_BV = np.arange(logits_BV.shape[1])[None] < label_B1
    before_B1 = ((logits_BV > own_B1) | ((logits_BV == own_B1) & is_lower_BV)).sum(axis=1, keepdims=True)
    return Predictions(
        nll=-np.take_along_axis(log_probs_BV, label_B1, axis=1),
        correct=logits_BV.argmax(axis=1, keepdims=True) == label_B1,
        top5=before_B1 < 5,
        confidence=np.exp(log_probs_BV.max(axis=1, keepdims=True)),
        size=np.zeros_like(label_B1),
        keep=np.ones_like(label_B1, bool),
    )

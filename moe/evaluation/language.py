"""Measures of a language model over a whole set."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from moe.evaluation.measures import Predictions, summarize, unit_rows
from moe.ops.vocabulary import Scores
from moe.types import PyTree


def evaluate(
    predict: Callable[[PyTree, dict[str, Any]], Scores], variables: PyTree, batches: Iterable[dict[str, Any]]
) -> dict[str, float]:
    """{"accuracy", "loss", "bits_per_byte", "perplexity", "top5_accuracy", "ece"} over the targets that count.

    Those are the targets that `mask` and `loss_mask` keep; `measures.measures` defines the measures. Their intervals
    take documents for independent, not tokens. All are added up in float64. Raises ValueError if there are no such
    targets.
    """
    rows, documents = [], []
    for batch in batches:
        scores = predict(variables, batch)
        keep_BL = batch["loss_mask"] & batch["mask"][:, None]
        nll, correct, top5, confidence = (np.asarray(part) for part in scores)
        rows.append(unit_rows(Predictions(nll, correct, top5, confidence, batch["target_bytes"], keep_BL)))
        # A row is a window of one document.
        documents.append(np.stack([batch["source"], batch["document"].max(axis=1)], axis=1))
    all_rows = np.concatenate(rows) if rows else np.zeros((0, 5))
    counts = all_rows[:, 0] > 0
    if not counts.any() or not all_rows[:, 4].any():
        raise ValueError("the evaluation set is empty: nothing was measured.")
    _, unit = np.unique(np.concatenate(documents)[counts], axis=0, return_inverse=True)
    units = np.zeros((unit.max() + 1, all_rows.shape[1]))
    np.add.at(units, unit, all_rows[counts])
    return summarize(units, is_text=True)

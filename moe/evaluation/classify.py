"""Accuracy and loss of a classifier over a whole set."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from moe.data.pipeline import Batch
from moe.types import PyTree


def evaluate(
    predict: Callable[[PyTree, dict[str, Any]], Float[Array, "B V"]], params: PyTree, batches: Iterable[Batch]
) -> dict[str, float]:
    """{"accuracy", "loss"}: means over the examples that `mask` keeps.

    And "skipped", unless it is 0: how many examples are left out because they can't be used.

    loss is the cross-entropy in nats, without label smoothing or router losses; it is added up in float64, so that the
    result does not depend on how the examples are batched. predict(params, batch): the logits [B, V] of a batch, which
    also has label and mask. batches: of the whole set, once. Raises ValueError if the set is empty.
    """
    correct = loss = count = skipped = 0.0
    for batch in batches:
        logits_BV = np.asarray(predict(params, batch), np.float64)
        mask_B, label_B = batch["mask"], batch["label"]
        shifted_BV = logits_BV - logits_BV.max(axis=1, keepdims=True)
        log_probs_BV = shifted_BV - np.log(np.exp(shifted_BV).sum(axis=1, keepdims=True))
        loss += -log_probs_BV[np.arange(len(label_B)), label_B][mask_B].sum()
        correct += (logits_BV.argmax(axis=1) == label_B)[mask_B].sum()
        count += mask_B.sum()
        skipped += np.sum(batch.get("skipped", False))
    if not count:
        raise ValueError("the evaluation set is empty: nothing was measured.")
    measures = {"accuracy": float(correct / count), "loss": float(loss / count)}
    return measures | ({"skipped": float(skipped)} if skipped else {})

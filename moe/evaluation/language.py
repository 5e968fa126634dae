"""Loss, bits per byte, perplexity and accuracy of a language model over a whole set."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from moe.ops.vocabulary import Scores
from moe.types import PyTree


def evaluate(
    predict: Callable[[PyTree, dict[str, Any]], Scores], variables: PyTree, batches: Iterable[dict[str, Any]]
) -> dict[str, float]:
    """{"accuracy", "loss", "bits_per_byte", "perplexity"} over the targets that `mask` and `loss_mask` keep.

    loss: mean cross-entropy of a token, in nats. bits_per_byte: the sum of all in bits over the bytes that the targets
    stand for, so that tokenizers compare; perplexity: exp(loss). All are added up in float64. Raises ValueError if
    there are no such targets.
    """
    correct = nll = tokens = size = 0.0
    for batch in batches:
        scores = predict(variables, batch)
        keep_BL = batch["loss_mask"] & batch["mask"][:, None]
        nll += np.asarray(scores.nll, np.float64)[keep_BL].sum()
        correct += np.asarray(scores.correct)[keep_BL].sum()
        tokens += keep_BL.sum()
        size += batch["target_bytes"][keep_BL].sum(dtype=np.float64)
    if not tokens or not size:
        raise ValueError("the evaluation set is empty: nothing was measured.")
    loss = float(nll / tokens)
    return {
        "accuracy": float(correct / tokens),
        "loss": loss,
        "bits_per_byte": float(nll / np.log(2) / size),
        "perplexity": float(np.exp(loss)),
    }

"""Measures of predictions as ratios of sums over independent units of a set, with bootstrap intervals.

A unit is an image or a document. Its row holds sums over its predictions: how many there are, nats of loss, right
answers, answers among the best five, bytes that they stand for, and by confidence how far answers miss it.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

# Bins of confidence in [0, 1].
BINS = 15
RESAMPLES = 1000
# Entries of the table of counts that is held at a time.
_COUNTS = 2**22


class Predictions(NamedTuple):
    """Of each of n units its P predictions, of which `keep` counts.

    nll: -log p(answer), in nats. correct, top5: whether the answer is the likeliest, or among the likeliest five.
    confidence: the highest probability; NaN, of a model that has diverged, means that nothing is the likeliest and
    neither of these holds. size: bytes of the answer, where these are text.
    """

    nll: Float[np.ndarray, "n P"]
    correct: Bool[np.ndarray, "n P"]
    top5: Bool[np.ndarray, "n P"]
    confidence: Float[np.ndarray, "n P"]
    size: Int[np.ndarray, "n P"]
    keep: Bool[np.ndarray, "n P"]


def unit_rows(predictions: Predictions) -> Float[np.ndarray, "n M"]:
    """The rows of the units, in float64: [count, nll, correct, top5, bytes, correct - confidence in each bin].

    Bins are ((m - 1) / 15, m / 15], as in Guo et al. 2017 (1706.04599), section 2.
    """
    keep, has_order = predictions.keep, ~np.isnan(predictions.confidence)
    confidence = np.where(keep, np.asarray(predictions.confidence, np.float64), 0.0)
    correct, top5 = predictions.correct & has_order, predictions.top5 & has_order
    missed = np.where(keep, correct - confidence, 0.0)
    place = np.clip(np.ceil(np.nan_to_num(confidence) * BINS).astype(int) - 1, 0, BINS - 1)
    parts = (np.ones_like(keep), predictions.nll, correct, top5, predictions.size)
    sums = [np.where(keep, np.asarray(part, np.float64), 0.0).sum(axis=1) for part in parts]
    return np.stack(sums + [np.where(place == m, missed, 0.0).sum(axis=1) for m in range(BINS)], axis=1)


def measures(sums_RM: Float[np.ndarray, "R M"], *, is_text: bool) -> dict[str, Float[np.ndarray, "R"]]:
    """The measures of rows of sums.

    accuracy, top5_accuracy: shares of the predictions whose answer is the likeliest, or among the likeliest five.
    loss: mean cross-entropy, in nats. bits_per_byte (of text): all bits over the bytes that the answers stand for, so
        that tokenizers compare. perplexity (of text): exp(loss).
    ece: expected calibration error, Σ_m |right answers - confidence in bin m| / predictions (1706.04599, eq. 3).
    """
    count, nll, correct, top5, size = sums_RM.T[:5]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        loss = nll / count
        text = {"bits_per_byte": nll / np.log(2) / size, "perplexity": np.exp(loss)} if is_text else {}
        return {
            "accuracy": correct / count,
            "loss": loss,
            **text,
            "top5_accuracy": top5 / count,
            "ece": np.abs(sums_RM[:, 5:]).sum(axis=1) / count,
        }


def summarize(rows_NM: Float[np.ndarray, "N M"], *, is_text: bool, seed: int = 0) -> dict[str, float]:
    """`measures` of all units together, and of each measure NAME_low and NAME_high where there are two units or more.

    They are the 2.5 % and 97.5 % quantiles over 1 000 resamples of as many units, drawn with replacement (percentile
    bootstrap; Efron and Tibshirani 1993, chapter 13): what another set of this size would give, the model being the
    same. With fewer than some twenty units they are too narrow; of ece they lie too high, as resampling adds its own
    error to every bin. The same seed gives the same draws on any machine.
    """
    sums_1M = rows_NM.sum(axis=0, keepdims=True)
    whole = {name: float(value[0]) for name, value in measures(sums_1M, is_text=is_text).items()}
    if len(rows_NM) < 2:
        return whole
    drawn = measures(_resampled(rows_NM, seed), is_text=is_text)
    ends = {name: np.quantile(values, [0.025, 0.975]) for name, values in drawn.items()}
    return whole | {f"{name}_{end}": float(ends[name][i]) for name in whole for i, end in enumerate(("low", "high"))}


def _resampled(rows_NM: Float[np.ndarray, "N M"], seed: int) -> Float[np.ndarray, "R M"]:
    """The sums of each resample. By raw bits, which no version of NumPy changes."""
    units = len(rows_NM)
    bits = np.random.Philox(seed)
    sums = []
    for start in range(0, RESAMPLES, each := max(1, _COUNTS // units)):
        here = min(each, RESAMPLES - start)
        unit = (bits.random_raw(here * units) >> np.uint64(32)) * np.uint64(units) >> np.uint64(32)
        cell = unit.astype(np.int64) + np.repeat(np.arange(here) * units, units)
        sums.append(np.bincount(cell, minlength=here * units).reshape(here, units) @ rows_NM)
    return np.concatenate(sums)

"""Measures against loops in float64 and by hand; bootstrap intervals against the theory of means."""

from typing import Any

import numpy as np
import pytest

from moe.evaluation import classify
from moe.evaluation.measures import BINS, RESAMPLES, Predictions, measures, summarize, unit_rows

CLASSES = 7


def batches_of(logits: np.ndarray, labels: np.ndarray, size: int) -> list[dict[str, Any]]:
    """Batches of so many rows, the last one filled up with rows that the mask leaves out."""
    batches = []
    for start in range(0, len(labels), size):
        place = np.arange(start, start + size)
        mask = place < len(labels)
        place = np.minimum(place, len(labels) - 1)
        batches.append({"logits": np.where(mask[:, None], logits[place], 9.0), "label": labels[place], "mask": mask})
    return batches


def run(logits: np.ndarray, labels: np.ndarray, size: int) -> dict[str, float]:
    return classify.evaluate(lambda _, batch: batch["logits"], None, batches_of(logits, labels, size))


def make_logits(count: int = 53) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    logits = (3 * rng.normal(size=(count, CLASSES))).astype(np.float32)
    logits[:2] = 0.5  # ties
    return logits, rng.integers(0, CLASSES, count).astype(np.int32)


def by_loops(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    right, top5, loss = 0, 0, 0.0
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(BINS)]
    for row, label in zip(logits.astype(np.float64), labels, strict=True):
        order = sorted(range(CLASSES), key=lambda c: (-row[c], c))
        p = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        right += order[0] == label
        top5 += label in order[:5]
        loss -= np.log(p[label])
        bins[next(m for m in range(BINS) if p.max() <= (m + 1) / BINS)].append((p.max(), order[0] == label))
    gaps = [len(b) * abs(np.mean([hit for _, hit in b]) - np.mean([conf for conf, _ in b])) for b in bins if b]
    count = len(labels)
    return {"accuracy": right / count, "loss": loss / count, "top5_accuracy": top5 / count, "ece": sum(gaps) / count}


@pytest.mark.parametrize("size", [53, 8, 1])
def test_measures_of_images_are_those_of_loops_however_they_are_batched(size: int) -> None:
    logits, labels = make_logits()
    actual, expected = run(logits, labels, size), by_loops(logits, labels)
    assert {name: actual[name] for name in expected} == pytest.approx(expected, rel=1e-9)
    assert actual == pytest.approx(run(logits, labels, 20), rel=1e-12)
    assert actual["ece"] > 0.01


def test_calibration_by_hand() -> None:
    """Confidences on the edges of bins belong to the lower bin: of 1/15 the first, of 3/15 the third."""
    confidence = np.array([[1 / 15, 2 / 15 + 1e-9, 3 / 15, 1.0]])
    correct = np.array([[True, False, True, True]])
    ones = np.ones((1, 4))
    rows = unit_rows(Predictions(ones, correct, correct, confidence, ones.astype(int), np.ones((1, 4), bool)))
    assert rows[0, 5] == pytest.approx(14 / 15)
    assert rows[0, 7] == pytest.approx(1 - 5 / 15)
    assert rows[0, -1] == 0
    expected = (14 / 15 + abs(1 - 5 / 15)) / 4
    assert measures(rows, is_text=False)["ece"].item() == pytest.approx(expected)


def test_intervals_hold_the_measure_and_are_as_wide_as_means_of_so_many_units_vary() -> None:
    logits, labels = make_logits(400)
    found = run(logits, labels, 64)
    for name in ("accuracy", "loss", "top5_accuracy"):
        assert found[f"{name}_low"] <= found[name] <= found[f"{name}_high"]
    log_probs = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    nll = -log_probs[np.arange(400), labels]
    width = 2 * 1.96 * nll.std() / np.sqrt(400)
    assert found["loss_high"] - found["loss_low"] == pytest.approx(width, rel=0.1)
    share = found["accuracy"]
    width = 2 * 1.96 * np.sqrt(share * (1 - share) / 400)
    assert found["accuracy_high"] - found["accuracy_low"] == pytest.approx(width, rel=0.1)


def test_intervals_are_the_same_in_every_run() -> None:
    """By the first draw, too: raw bits of Philox with key 0, which NumPy promises to keep."""
    rows = np.zeros((3, 20))
    rows[:, 0], rows[:, 1] = 1, [0.0, 1.0, 10.0]
    first = summarize(rows, is_text=False)
    assert first == summarize(rows, is_text=False)
    bits = np.random.Philox(0).random_raw(3 * RESAMPLES).reshape(RESAMPLES, 3)
    drawn = np.array([[0.0, 1.0, 10.0][int(bit) >> 32 and (int(bit) >> 32) * 3 >> 32] for bit in bits.ravel()])
    expected = np.quantile(drawn.reshape(RESAMPLES, 3).mean(axis=1), [0.025, 0.975])
    assert [first["loss_low"], first["loss_high"]] == pytest.approx(expected.tolist())


def test_units_that_are_large_count_as_one() -> None:
    """Two documents, one of 9 tokens with 9 nats: the interval goes from one document alone to the other."""
    rows = np.zeros((2, 20))
    rows[:, 0], rows[:, 1], rows[:, 4] = [9, 1], [9, 5], [9, 1]
    found = summarize(rows, is_text=True)
    assert found["loss"] == 14 / 10
    assert (found["loss_low"], found["loss_high"]) == (1, 5)
    assert found["bits_per_byte_high"] == pytest.approx(5 / np.log(2))
    assert found["perplexity_low"] == pytest.approx(np.e)


def test_a_single_unit_has_no_interval_and_none_is_an_error() -> None:
    logits, labels = make_logits(1)
    assert set(run(logits, labels, 4)) == {"accuracy", "loss", "top5_accuracy", "ece"}
    with pytest.raises(ValueError, match="the evaluation set is empty"):
        run(logits[:0], labels[:0], 4)


def test_a_model_that_has_diverged_is_measured_without_a_warning() -> None:
    logits, labels = make_logits()
    found = run(np.full_like(logits, np.nan), labels, 8)
    assert np.isnan(found["loss"])
    # What is not in any order has no likeliest answers, and no label is among them.
    assert found["accuracy"] == found["top5_accuracy"] == 0
    assert np.isnan(found["ece"])
    assert np.isnan(found["loss_low"])

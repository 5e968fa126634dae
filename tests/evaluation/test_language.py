"""Measures of text: which targets count, and that documents are the units, however they are cut and batched."""

from typing import Any

import numpy as np
import pytest

from moe.evaluation import language
from moe.evaluation.measures import summarize
from moe.ops.vocabulary import Scores

# By source and document, the nats of its targets; the first takes two windows of three.
TEXTS = {(0, 0): [1.0, 2.0, 3.0, 4.0], (0, 1): [9.0], (1, 0): [0.5, 0.5]}
LENGTH = 3


def make_windows() -> list[dict[str, Any]]:
    """A window of each text's targets at a time; what fills it up has other nats, and counts nowhere."""
    windows = []
    for (source, document), nats in TEXTS.items():
        for start in range(0, len(nats), LENGTH):
            some = nats[start : start + LENGTH]
            is_target = np.arange(LENGTH) < len(some)
            nll = np.array(some + [77.0] * (LENGTH - len(some)))
            windows.append(
                {
                    "nll": nll,
                    "loss_mask": is_target,
                    "target_bytes": np.where(is_target, 2, 0),
                    "source": source,
                    "document": np.where(is_target, document, -1),
                    "mask": True,
                }
            )
    return windows


def make_batches(size: int) -> list[dict[str, Any]]:
    """Batches of so many windows; rows that fill up the last are no targets, whatever `loss_mask` says."""
    windows = make_windows()
    filler = windows[0] | {"mask": False, "source": -1, "document": np.full(LENGTH, -1)}
    batches = []
    for start in range(0, len(windows), size):
        rows = windows[start : start + size]
        rows += [filler] * (size - len(rows))
        batches.append({name: np.stack([row[name] for row in rows]) for name in rows[0]})
    return batches


def predict(_: Any, batch: dict[str, Any]) -> Scores:
    """A target of at most 1 nat is the likeliest, of at most 3 among the likeliest five; all confidences are .5."""
    nll = batch["nll"]
    return Scores(nll, nll <= 1, nll <= 3, np.full_like(nll, 0.5))  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 3, 4, 5])
def test_measures_by_hand_however_they_are_batched(size: int) -> None:
    found = language.evaluate(predict, None, make_batches(size))
    assert found["loss"] == pytest.approx(20 / 7)
    assert found["perplexity"] == pytest.approx(np.exp(20 / 7))
    assert found["bits_per_byte"] == pytest.approx(20 / np.log(2) / 14)
    assert found["accuracy"] == pytest.approx(3 / 7)
    assert found["top5_accuracy"] == pytest.approx(5 / 7)
    assert found["ece"] == pytest.approx(abs(3 - 3.5) / 7)


def test_a_document_is_one_unit_across_windows_and_another_in_every_source() -> None:
    found = language.evaluate(predict, None, make_batches(2))
    rows = np.zeros((len(TEXTS), 20))
    rows[:, 0], rows[:, 1] = [len(nats) for nats in TEXTS.values()], [sum(nats) for nats in TEXTS.values()]
    rows[:, 4] = 2 * rows[:, 0]
    expected = summarize(rows, is_text=True)
    for name in ("loss_low", "loss_high", "bits_per_byte_low", "perplexity_high"):
        assert found[name] == pytest.approx(expected[name]), name
    assert found["loss_low"] == 0.5
    assert found["loss_high"] == 9


def test_a_set_without_targets_is_an_error() -> None:
    for batches in ([], [batch | {"mask": np.zeros_like(batch["mask"])} for batch in make_batches(2)]):
        with pytest.raises(ValueError, match="the evaluation set is empty"):
            language.evaluate(predict, None, batches)

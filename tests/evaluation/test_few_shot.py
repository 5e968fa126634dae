"""The few-shot probe against ridge regression solved directly in float64, its draws, and the choice of l2."""

from typing import Any

import numpy as np
import pytest

from moe.evaluation.few_shot import L2, Examples, collect, draw_shots, probe, right

CLASSES = 3


def make_examples(count: int, width: int, seed: int, spread: float = 1.5) -> Examples:
    """Gaussian clouds around a point for each class, with features of very different scale."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(9).normal(size=(CLASSES, width))
    label = np.arange(count) % CLASSES
    features = centres[label] + spread * rng.normal(size=(count, width))
    return Examples(5 + features * np.logspace(-2, 2, width), label)


def ridge(shown: Examples, asked: Examples, l2: float) -> float:
    """Minimises |XW - Y|² + l2 |W|², by its augmented least-squares problem."""
    mean, std = shown.features.mean(axis=0), shown.features.std(axis=0) + 1e-5
    x, new = (np.column_stack([(f - mean) / std, np.full(len(f), 100.0)]) for f in (shown.features, asked.features))
    y = np.where(shown.label[:, None] == np.arange(CLASSES), 1.0, -1.0)
    rows = np.vstack([x, np.sqrt(l2) * np.eye(x.shape[1])])
    weights = np.linalg.lstsq(rows, np.vstack([y, np.zeros((x.shape[1], CLASSES))]), rcond=None)[0]
    return float(np.mean((new @ weights).argmax(axis=1) == asked.label))


@pytest.mark.parametrize(("count", "width"), [(30, 6), (9, 20)], ids=["more examples", "more features"])
def test_the_probe_is_ridge_regression(count: int, width: int) -> None:
    shown, asked = make_examples(count, width, 0), make_examples(300, width, 1)
    l2 = (0.25, 8.0, 2.0**12)
    expected = [ridge(shown, asked, one) for one in l2]
    assert right(shown, asked, CLASSES, l2).mean(axis=1).tolist() == pytest.approx(expected, abs=1 / 300 + 1e-9)
    assert 1 / 3 < expected[0] < 1


def test_shots_are_as_many_of_each_class_and_differ_between_draws() -> None:
    label = np.array([0] * 10 + [1] * 5 + [2] * 20)
    draws = [draw_shots(label, CLASSES, 4, draw) for draw in (0, 1, 0)]
    for is_shot in draws:
        assert np.bincount(label[is_shot]).tolist() == [4, 4, 4]
    assert (draws[0] == draws[2]).all()
    assert (draws[0] != draws[1]).any()


def share(shown: Examples, asked: Examples, l2: float, half: int) -> float:
    """Of the classes of even (0) or odd (1) number."""
    return float(right(shown, asked, CLASSES, [l2])[0, asked.label % 2 == half].mean())


def test_a_class_s_l2_is_chosen_on_what_is_held_out_of_other_classes_and_never_on_the_test_set() -> None:
    train, test = make_examples(90, 12, 0), make_examples(200, 12, 1)
    found = probe(train, test, CLASSES, shots=(2, 5), draws=2)
    nonsense = test._replace(label=(test.label + 1) % CLASSES)
    other = probe(train, nonsense, CLASSES, shots=(2, 5), draws=2)
    for shots in ("2", "5"):
        ours: Any = found[shots]
        theirs: Any = other[shots]
        assert ours["l2"] == theirs["l2"]
        assert ours["held_out_accuracy"] == theirs["held_out_accuracy"]
        masks = [draw_shots(train.label, CLASSES, int(shots), draw) for draw in range(2)]
        pairs = [
            (Examples(train.features[m], train.label[m]), Examples(train.features[~m], train.label[~m])) for m in masks
        ]
        hits = [0.0, 0.0]
        for half in (0, 1):
            l2, by_l2 = ours["l2"][half], {l2: np.mean([share(*pair, l2, 1 - half) for pair in pairs]) for l2 in L2}
            assert by_l2[l2] == max(by_l2.values()) == pytest.approx(ours["held_out_accuracy"][half])
            of_half = np.mean(test.label % 2 == half)
            hits = [hit + of_half * share(pair[0], test, l2, half) for hit, pair in zip(hits, pairs, strict=True)]
        assert ours["accuracies"] == pytest.approx(hits)
        assert ours["standard_error"] == pytest.approx(np.std(ours["accuracies"], ddof=1) / np.sqrt(2))


def test_shots_that_a_class_does_not_have_are_none_and_none_at_all_is_an_error() -> None:
    train, test = make_examples(15, 4, 0), make_examples(30, 4, 1)
    found = probe(train, test, CLASSES)
    assert found["1"] is not None
    assert [found[shots] for shots in ("5", "10", "25")] == [None] * 3
    with pytest.raises(ValueError, match="a class has 1 training examples"):
        probe(make_examples(3, 4, 0), test, CLASSES)
    with pytest.raises(ValueError, match="there is one class"):
        probe(train._replace(label=0 * train.label), test, 1)


def test_collecting_stops_when_every_class_has_enough_and_leaves_padding_out() -> None:
    labels = [[0, 1, 1, 1], [2, 1, 0, 2], [0, 0, 0, 0]]
    batches = [{"label": np.array(row), "mask": np.array([True, True, True, row != labels[1]])} for row in labels]
    seen: list[int] = []

    def features(_: Any, batch: Any) -> np.ndarray:
        seen.append(len(seen))
        return np.column_stack([batch["label"], np.full(4, len(seen))])

    found = collect(features, None, batches, CLASSES, most=1)
    assert found.label.tolist() == [0, 1, 2]
    assert found.features.tolist() == [[0, 1], [1, 1], [2, 2]]
    assert seen == [0, 1]
    assert len(collect(features, None, batches, CLASSES).label) == 11

"""Few-shot linear probe of frozen features, as ViT (2010.11929, section 4.1) and V-MoE (2106.05974) report it.

Regularised least squares from the features to 1 for the class and -1 for the others. Features are standardised by those
of the shots, and a constant feature of 100 stands for the bias, so that it is hardly regularised. So far it is what
V-MoE's code does. That takes the regularisation of best rank on the test images, on average over several data sets;
here no class has a say in its own: it is chosen on images of other classes, of the training split and no shots. All
classes are in every probe, since what suits few shots depends on how many classes there are.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from moe.data.pipeline import Batch, DataConfig, inspect_data, make_eval_batches
from moe.parallel import hosts
from moe.types import PyTree

SHOTS = (1, 5, 10, 25)
L2 = tuple(2.0**power for power in range(-10, 21))
DRAWS = 3
# Examples of each class that shots and held-out examples are drawn from.
POOL = 100
_BIAS = 100.0


class Examples(NamedTuple):
    """features: what the model's head sees of each example. label: its class."""

    features: Float[np.ndarray, "N D"]
    label: Int[np.ndarray, "N"]


class Probe:
    """The probe of one data set: shots from its training split, measured on its test split."""

    def __init__(self, data: DataConfig, name: str, image_size: Sequence[int], batch_size: int) -> None:
        """data: the run's. name: of another set that is read likewise; "": the same.

        Raises ValueError where there is no such set, or its images have another size than the model sees.
        """
        self._data, self._batch_size = dataclasses.replace(data, name=name or data.name), batch_size
        info = inspect_data(self._data)
        self._classes = info.classes
        if info.image_shape != tuple(image_size):
            raise ValueError(
                f"data set {self._data.name} has images of {info.image_shape}, and the model sees {tuple(image_size)}: "
                "choose another set for --few-shot."
            )

    def run(self, features: Callable[[PyTree, Batch], Any], variables: PyTree) -> dict[str, Any]:
        """ "shots": see `probe`; what it was made on; says which numbers of shots can't be had."""
        data = self._data
        splits = (data.train_split, POOL), (data.test_split, None)
        train, test = (
            collect(features, variables, make_eval_batches(data, split, self._batch_size), self._classes, limit)
            for split, limit in splits
        )
        shots = probe(train, test, self._classes)
        for count in (count for count, found in shots.items() if found is None):
            hosts.say(f"few-shot: {count} shots can't be had, as a class of {data.name} has no more examples")
        return {"data": data.name, "pool": len(train.label), "test_examples": len(test.label), "shots": shots}


def collect(
    features: Callable[[PyTree, Batch], Any],
    variables: PyTree,
    batches: Iterable[Batch],
    num_classes: int,
    most: int | None = None,
) -> Examples:
    """The examples that the mask keeps, in order; the first `most` of each class, and then no more batches are read."""
    parts, counts_V = [], np.zeros(num_classes, int)
    for batch in batches:
        keep_B = batch["mask"].copy()
        for row in np.flatnonzero(keep_B):
            counts_V[batch["label"][row]] += 1
            keep_B[row] = most is None or counts_V[batch["label"][row]] <= most
        if keep_B.any():
            parts.append(Examples(np.asarray(features(variables, batch), np.float64)[keep_B], batch["label"][keep_B]))
        if most is not None and counts_V.min() >= most:
            break
    if not parts:
        raise ValueError("the split is empty: there is nothing to probe.")
    return Examples(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def probe(
    train: Examples, test: Examples, num_classes: int, shots: Sequence[int] = SHOTS, draws: int = DRAWS
) -> dict[str, dict[str, Any] | None]:
    """For each number of shots the accuracy on `test`; None where a class has not more examples than that.

    Shots are drawn `draws` times, as many of each class, and the rest of `train` is held out. l2: of 2^-10 to 2^20, for
    the classes of even and of odd number, the one of highest accuracy on what is held out of the other half of the
    classes, on average over the draws; of equal ones the largest. Where the two differ, no single classifier has the
    accuracy. accuracy: mean over the draws of `accuracies`, with its standard_error. held_out_accuracy: that by which
    l2 was chosen. Raises ValueError where no number of shots can be had, or there is one class.
    """
    if num_classes < 2:
        raise ValueError("there is one class: no other is left to choose the regularisation on.")
    fewest = int(np.bincount(train.label, minlength=num_classes).min())
    if fewest <= min(shots):
        raise ValueError(
            f"a class has {fewest} training examples: {min(shots)} shots and one to be held out need {min(shots) + 1}."
        )
    result: dict[str, dict[str, Any] | None] = {}
    for count in shots:
        result[str(count)] = _probe(train, test, num_classes, count, draws) if fewest > count else None
    return result


def _probe(train: Examples, test: Examples, num_classes: int, count: int, draws: int) -> dict[str, Any]:
    held_out: list[np.ndarray] = []  # [R, 2]: of each half of the classes
    tested: list[np.ndarray] = []
    for draw in range(draws):
        is_shot_N = draw_shots(train.label, num_classes, count, draw)
        shown, rest = (Examples(train.features[rows], train.label[rows]) for rows in (is_shot_N, ~is_shot_N))
        right_RN = right(shown, rest, num_classes)
        held_out.append(np.stack([right_RN[:, rest.label % 2 == half].mean(axis=1) for half in (0, 1)], axis=1))
        tested.append(right(shown, test, num_classes))
    means = np.mean(held_out, axis=0)
    best = [int(np.flatnonzero(column == column.max())[-1]) for column in means.T]
    # Each half is tested with what was chosen on the other.
    chosen_M = np.array(best[::-1])[test.label % 2]
    accuracies = [float(one[chosen_M, np.arange(len(chosen_M))].mean()) for one in tested]
    return {
        "accuracy": float(np.mean(accuracies)),
        "standard_error": float(np.std(accuracies, ddof=1) / np.sqrt(draws)) if draws > 1 else None,
        "accuracies": accuracies,
        "held_out_accuracy": [float(means[index, half]) for half, index in enumerate(best)][::-1],
        "l2": [L2[index] for index in best[::-1]],
    }


def draw_shots(label_N: Int[np.ndarray, "N"], num_classes: int, count: int, draw: int) -> np.ndarray:
    """True for `count` examples of each class, by raw bits, which no version of NumPy changes."""
    order = np.argsort(np.random.Philox(draw).random_raw(len(label_N)), kind="stable")
    is_shot_N = np.zeros(len(label_N), bool)
    for label in range(num_classes):
        is_shot_N[order[label_N[order] == label][:count]] = True
    return is_shot_N


def right(shown: Examples, asked: Examples, num_classes: int, l2: Sequence[float] = L2) -> Bool[np.ndarray, "R M"]:
    """Of each regularisation, and each of `asked`, whether the highest score is its class's.

    The weights are (XᵀX + l2 I)⁻¹ XᵀY or, with fewer examples than features, the same as Xᵀ (XXᵀ + l2 I)⁻¹ Y.
    """
    mean_D, std_D = shown.features.mean(axis=0), shown.features.std(axis=0) + 1e-5

    def ready(features: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D_1"]:
        return np.pad((features - mean_D) / std_D, ((0, 0), (0, 1)), constant_values=_BIAS)

    x_ND, asked_MD = ready(shown.features), ready(asked.features)
    y_NV = 2.0 * np.eye(num_classes)[shown.label] - 1.0
    is_wide = x_ND.shape[0] < x_ND.shape[1]
    eigenvalues, vectors = np.linalg.eigh(x_ND @ x_ND.T if is_wide else x_ND.T @ x_ND)
    target = vectors.T @ (y_NV if is_wide else x_ND.T @ y_NV)
    left = asked_MD @ x_ND.T @ vectors if is_wide else asked_MD @ vectors
    # Rounding makes the smallest eigenvalues negative.
    scale = np.maximum(eigenvalues, 0.0)
    return np.array([(left @ (target / (scale + one)[:, None])).argmax(axis=1) == asked.label for one in l2])

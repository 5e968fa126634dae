"""Scikit-learn's handwritten digits as a tfds data set: 1 797 real scans that need no download."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from moe.data.generated import GeneratedInfo

_TRAIN_EXAMPLES = 1437

_DESCRIPTION = """\
1 797 handwritten digits: 32x32 bitmaps, reduced to 8x8 by counting the ink in blocks of 4x4, so that pixels are whole
numbers from 0 to 16. The copy that scikit-learn ships, in its order: the first 1 437 train, the last 360 test."""

_CITATION = """\
@article{alpaydin1998cascading,
  title={Cascading classifiers},
  author={Alpaydin, Ethem and Kaynak, Cenk},
  journal={Kybernetika},
  volume={34}, number={4}, pages={369--374}, year={1998}
}"""


class Digits(tfds.core.GeneratorBasedBuilder):
    """Features: image, uint8 [8, 8, 1] with values 0..16 (`pixel_max` in the metadata); label, 0..9.

    Splits: train, scans 0 to 1 436; test, scans 1 437 to 1 796, in scikit-learn's order (not shuffled on disk), so that
    the index of an example names its scan. Source: Alpaydin and Kaynak, Cascading classifiers, Kybernetika 34(4), 1998.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}  # noqa: RUF012, the base class declares it so

    def _info(self) -> tfds.core.DatasetInfo:
        return GeneratedInfo(
            builder=self,
            description=_DESCRIPTION,
            homepage="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
            citation=_CITATION,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(pixel_max=16),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager  # nothing to download
        from sklearn import datasets  # here, because only whoever writes the set needs it

        scans = datasets.load_digits()
        images = scans.images.astype(np.uint8)[..., None]
        labels = scans.target
        return {
            "train": self._generate_examples(images[:_TRAIN_EXAMPLES], labels[:_TRAIN_EXAMPLES]),
            "test": self._generate_examples(images[_TRAIN_EXAMPLES:], labels[_TRAIN_EXAMPLES:]),
        }

    def _generate_examples(self, images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield index, {"image": image, "label": int(label)}

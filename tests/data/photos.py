"""A tiny set of photographs in tfds's own format, for the tests of the image pipeline."""

import io
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

SIZES = [(40, 30), (30, 40), (64, 64), (200, 150), (33, 47), (90, 45), (150, 200)]  # width, height


def jpeg(index: int, mode: str = "RGB", **options: object) -> bytes:
    """A smooth picture, so that JPEG changes it little; width and height in turns from SIZES."""
    width, height = SIZES[index % len(SIZES)]
    coarse = np.random.default_rng(index).integers(0, 256, (6, 6, 3), np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)
    file = io.BytesIO()
    image.save(file, "JPEG", **({"quality": 95} | options))
    return file.getvalue()


class Snapshots(tfds.core.GeneratorBasedBuilder):
    """21 pictures to train on, 7 to evaluate on, in several files each; features as those of imagenet2012."""

    VERSION = tfds.core.Version("5.1.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=5),
            "file_name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0, 21), "validation": self._generate_examples(100, 107)}

    def _generate_examples(self, first, last):
        for index in range(first, last):
            yield index, {"image": io.BytesIO(jpeg(index)), "label": index % 5, "file_name": f"{index}.JPEG"}


def prepare(folder: Path) -> str:
    config = tfds.download.DownloadConfig(num_shards=3)
    Snapshots(data_dir=str(folder), file_format="array_record").download_and_prepare(download_config=config)
    return str(folder)

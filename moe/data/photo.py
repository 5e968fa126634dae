"""Photographs stored as JPEG: decoded with Pillow, cut out at random to train on and at the centre to evaluate.

What happens to an image in training depends on the seed and on its position in the sequence of training examples, and
on nothing else, as in `moe.data.augment`. Nothing here needs TensorFlow.
"""

import dataclasses
import io
import math
from collections.abc import Callable

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Float, Int, UInt8
from PIL import Image

from moe.data import randaugment
from moe.data.augment import DRAWS as AUGMENT_DRAWS
from moe.data.augment import uniform
from moe.data.randaugment import RandAugment
from moe.data.records import Corrupt, ImageRecords, Rows, Split, check_features

_CROP_DRAWS = 5  # ratio, height, top, left, flip


@dataclasses.dataclass(frozen=True)
class PhotoConfig:
    """How photographs become images of `data.image_size`; sets that are stored as plain arrays don't see it.

    min_area: the least share of a photograph that a training crop covers; 0: the central crop of evaluation instead.
    max_ratio: a training crop's width over its height lies between 1 / max_ratio and max_ratio.
    flip: whether every second training image, on average, is mirrored left to right.
    randaugment: what else is done to training images, after crop and flip.
    resize: pixels of the shorter side before the central crop; 0: those of the crop, which then is as large as can be.
    value_range: what black and white become.
    """

    min_area: float = 0.0
    max_ratio: float = 4 / 3
    flip: bool = False
    randaugment: RandAugment = RandAugment()
    resize: int = 0
    value_range: tuple[float, ...] = (0.0, 1.0)

    def __post_init__(self) -> None:
        """Raises ValueError for a number out of range."""
        if not 0 <= self.min_area <= 1:
            raise ValueError(f"data.photo.min_area is {self.min_area}: it must lie between 0 and 1")
        if not 1 <= self.max_ratio < math.inf:
            raise ValueError(f"data.photo.max_ratio is {self.max_ratio}: it must be at least 1")
        if self.resize < 0:
            raise ValueError(f"data.photo.resize is {self.resize}: it must be at least 0")
        if len(self.value_range) != 2 or not self.value_range[0] < self.value_range[1]:
            raise ValueError(f"data.photo.value_range is {self.value_range}: give the lower end and the upper")


def is_encoded(builder: tfds.core.DatasetBuilder) -> bool:
    """Whether the set stores its images as JPEG or PNG."""
    features = builder.info.features
    return "image" in features and isinstance(features["image"], tfds.features.Image)


class PhotoSplit(Split):
    """One split of an image classification set that stores JPEG or PNG, whose examples can be read in any order."""

    def __init__(
        self,
        builder: tfds.core.DatasetBuilder,
        split: str,
        size: int,
        config: PhotoConfig,
        in_memory: bool = False,
        corrupt: Corrupt = "stop",
    ) -> None:
        """Opens `split` of a prepared set.

        Args:
            builder: the set.
            split: name of a split, or a slice of one in tfds's notation.
            size: height and width of the images.
            config: crops and augmentation.
            in_memory: whether to read all of it now and hold it, still encoded.
            corrupt: what to do about examples that can't be used.

        Raises:
            ValueError: as `moe.data.source.ImageSplit`; or the shorter side is resized to less than the crop.
            OSError: as `read`, where it is read now.
        """
        if 0 < config.resize < size:
            raise ValueError(
                f"data.photo.resize is {config.resize}, but crops of data.image_size {size} are cut from it: choose at "
                f"least {size}, or 0"
            )
        check_features(builder)
        channels = 1 if builder.info.features["image"].shape[-1] == 1 else 3
        decoders = {"image": tfds.decode.SkipDecoding()}
        self._records = ImageRecords(builder, split, (size, size, channels), corrupt, decoders)
        self._size = size
        self._config = config
        self._mode = "L" if channels == 1 else "RGB"
        if in_memory:
            self._records.hold(_as_stored)

    def read(self, index: Int[np.ndarray, "B"]) -> Rows:
        """The central crops, float32 in `value_range`, and labels of the examples at these places.

        Rows of examples that are skipped are blank. Raises OSError for an example that can't be used and is not to be
        skipped.
        """

        def one(row: int, data: bytes) -> Image.Image:
            return central_crop(data, self._size, self._config.resize, self._mode)

        return self._read(index, one, replace=False)

    def read_train(self, index: Int[np.ndarray, "B"], positions: Int[np.ndarray, "B"], seed: int) -> Rows:
        """The examples at these places as training sees them at these positions of its sequence.

        An example that is skipped is replaced by the next one, and that is cut out as this one would have been. Else as
        `read`.
        """
        config = self._config
        layers = config.randaugment.layers
        count = _CROP_DRAWS + layers * randaugment.DRAWS
        # What `moe.data.augment` draws for the same position comes first.
        draws = uniform(seed, positions, AUGMENT_DRAWS + count)[:, AUGMENT_DRAWS:]

        def one(row: int, data: bytes) -> Image.Image:
            mine = draws[row]
            if config.min_area:
                image = random_crop(data, self._size, mine[:4], config.min_area, config.max_ratio, self._mode)
            else:
                image = central_crop(data, self._size, config.resize, self._mode)
            if config.flip and mine[4] < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            operations = mine[_CROP_DRAWS:].reshape(layers, randaugment.DRAWS)
            return randaugment.randaugment(image, operations, config.randaugment.magnitude)

        return self._read(index, one, replace=True)

    def _read(self, index: np.ndarray, one: Callable[[int, bytes], Image.Image], replace: bool) -> Rows:
        def pixels(row: int, data: bytes) -> UInt8[np.ndarray, "h w c"]:
            return np.asarray(one(row, data)).reshape(self._size, self._size, -1)

        rows = self._records.read(index, pixels, replace)
        low, high = self._config.value_range
        scaled = np.multiply(rows.images, np.float32((high - low) / 255), dtype=np.float32)
        scaled += np.float32(low)
        return rows._replace(images=scaled)


def _as_stored(data: bytes) -> bytes:
    return data


def central_crop(data: bytes, size: int, resize: int = 0, mode: str = "RGB") -> Image.Image:
    """The central square of `size`, after the shorter side has been brought to `resize` (0: to `size`) linearly."""
    image = _with_mode(_open(data), mode)
    shorter = min(image.size)
    width, height = (round(side * (resize or size) / shorter) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def random_crop(
    data: bytes, size: int, draws: Float[np.ndarray, "4"], min_area: float, max_ratio: float, mode: str = "RGB"
) -> Image.Image:
    """The part that `sample_box` chooses, resampled linearly to a square of `size`, averaging where it shrinks.

    At the part's edges the filter sees the pixels beyond them. Where the part is at least twice, four or eight times as
    large as the square, only so much of the JPEG's detail is decoded.
    """
    image = _open(data)
    whole = image.size
    left, top, width, height = sample_box(draws, whole[0], whole[1], min_area, max_ratio)
    # Decodes at 1/2, 1/4 or 1/8 where that is at least this large.
    image.draft(mode, (math.ceil(whole[0] * size / width), math.ceil(whole[1] * size / height)))
    scale = round(whole[0] / image.size[0])
    box = (left / scale, top / scale, (left + width) / scale, (top + height) / scale)
    return _with_mode(image, mode).resize((size, size), Image.Resampling.BILINEAR, box=box)


def sample_box(
    draws: Float[np.ndarray, "4"], width: int, height: int, min_area: float, max_ratio: float
) -> tuple[int, int, int, int]:
    """A random part of a photograph in whole pixels: left, top, width, height.

    Width over height is uniform in [1 / max_ratio, max_ratio]; given that, the height is uniform between the one that
    makes the area the share `min_area` and the largest that fits, and so is the place. The crop of Inception (Szegedy
    et al. 2015, 1409.4842), in the form of TensorFlow's sample_distorted_bounding_box, which V-MoE uses; unlike there,
    where even the largest that fits is too small (very long photographs), that one is taken, not the whole.
    """
    ratio = 1 / max_ratio + (max_ratio - 1 / max_ratio) * float(draws[0])
    largest = max(1, min(height, int(width / ratio)))
    least = min(largest, max(1, math.ceil(math.sqrt(min_area * width * height / ratio))))
    part_height = least + int((largest - least + 1) * float(draws[1]))
    part_width = max(1, min(width, round(part_height * ratio)))
    top = int((height - part_height + 1) * float(draws[2]))
    left = int((width - part_width + 1) * float(draws[3]))
    return left, top, part_width, part_height


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def _with_mode(image: Image.Image, mode: str) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)

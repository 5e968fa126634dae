"""From the name of a data set to one split of it, prepared on disk and read at random."""

import contextlib
import functools
import io
import json
import math
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Float32, Int
from tensorflow_datasets.core import read_only_builder

from moe.data.digits import Digits
from moe.data.records import Corrupt, ImageRecords, Rows, Split, check_features
from moe.data.stdlib import Stdlib

# Sets that this package can write by itself; any other has to be prepared before with tfds's own tools.
BUILDERS: Mapping[str, type[tfds.core.GeneratorBasedBuilder]] = {"digits": Digits, "stdlib": Stdlib}


def resolve_data_dir(data_dir: str = "") -> str:
    """The folder of all data sets: `data_dir`; if empty, $TFDS_DATA_DIR; if unset, `data` in the current folder."""
    return os.path.expanduser(data_dir or os.environ.get("TFDS_DATA_DIR", "") or "data")


def prepare(name: str, data_dir: str) -> None:
    """Writes the set `name` of `BUILDERS` under `data_dir`, unless it is there.

    Any number of processes, on any hosts that share the folder, may do so at once: each writes a folder of its own
    inside `data_dir` and renames it into place; the first one wins and the others discard theirs.

    Raises:
        OSError: the folder cannot be written.
    """
    target = pathlib.Path(BUILDERS[name](data_dir=data_dir).data_dir)
    if target.is_dir():
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        private = tempfile.mkdtemp(prefix=f".{name}-", dir=data_dir)
    except OSError as error:
        raise OSError(
            f"cannot write data set {name!r} under {data_dir} ({error.strerror}): set TFDS_DATA_DIR or "
            "data.data_dir to a folder that you may write to"
        ) from error
    try:
        # tfds prints progress bars and a banner, even for a set that takes a second.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            BUILDERS[name](data_dir=private, file_format="array_record").download_and_prepare()
        try:
            (private / target.relative_to(data_dir)).rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(private, ignore_errors=True)


def open_builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    """The builder of a set that is prepared under `data_dir`; the sets of `BUILDERS` are prepared first.

    `name` is as tfds writes it, "name", "name/config" or "name:version". Other sets are read from their files alone, so
    that neither the code that wrote them nor TensorFlow is needed.

    Raises:
        ValueError: no such set is prepared there, or it wants code of its own.
        OSError: a set of `BUILDERS` cannot be written there.
    """
    if name in BUILDERS:
        prepare(name, data_dir)
        return BUILDERS[name](data_dir=data_dir)
    for path in pathlib.Path(data_dir, re.split("[/:]", name)[0]).rglob("features.json"):
        _check_classes(path)
    try:
        return read_only_builder.builder_from_files(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(
            f"data set {name!r} is neither built in ({', '.join(BUILDERS)}) nor prepared under {data_dir}: correct "
            f"data.name or data.data_dir, or prepare it with `tfds build {name} --data_dir={data_dir} "
            "--file_format=array_record` where TensorFlow is installed"
        ) from error


def _check_classes(path: pathlib.Path) -> None:
    """Raises ValueError where features are of classes that aren't tfds's own, whose modules it would import."""
    try:
        parts = [json.loads(path.read_text())]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): prepare the data set again") from None
    for part in parts:  # which grows
        if isinstance(part, list):
            parts += part
        if not isinstance(part, dict):
            continue
        parts += part.values()
        for name in map(part.get, ("pythonClassName", "python_class_name", "type")):
            if isinstance(name, str) and "." in name and not name.startswith("tensorflow_datasets."):
                raise ValueError(f"{path} asks for {name}, which isn't of tfds: data sets are read without other code")


class ImageSplit(Split):
    """One split of an image classification set, prepared on disk, whose examples can be read in any order.

    Pixels are divided by the largest value that the set knows (`pixel_max` of its metadata, else the largest of an
    integer dtype, else 1); an image of another size is cropped to its central square and resized.
    """

    def __init__(
        self,
        builder: tfds.core.DatasetBuilder,
        split: str,
        size: int,
        in_memory: bool = False,
        corrupt: Corrupt = "stop",
    ) -> None:
        """Opens `split` of a prepared set.

        Args:
            builder: the set.
            split: name of a split, or a slice of one in tfds's notation, such as "train[:90%]".
            size: height and width of the images.
            in_memory: whether to decode all of it now and hold it.
            corrupt: what to do about examples that can't be used.

        Raises:
            ValueError: the split is unknown or empty, the set lacks images or labels, or is stored for reading in order
                only.
            OSError: as `read`, where it is read now.
        """
        check_features(builder)
        self._size = size
        self._pixel_max = _pixel_max(builder.info)
        stored = builder.info.features["image"].shape
        shape = () if None in stored[2:] else (size, size, math.prod(stored[2:]))
        self._records = ImageRecords(builder, split, shape, corrupt)
        if not shape:
            self._records.shape = self._records.read(np.zeros(1, np.int32), self._decode, replace=True).images.shape[1:]
        self._make: Callable[[int, Any], np.ndarray] = self._decode
        if in_memory:
            self._records.hold(functools.partial(self._decode, 0))
            self._make = _as_held

    def read(self, index: Int[np.ndarray, "B"]) -> Rows:
        """The images, float32 in [0, 1], and labels of the examples at these places of the split.

        Rows of examples that are skipped are blank. Raises OSError for an example that can't be used and is not to be
        skipped.
        """
        return self._scaled(self._records.read(index, self._make))

    def read_train(self, index: Int[np.ndarray, "B"], positions: Int[np.ndarray, "B"], seed: int) -> Rows:
        """As `read`, but an example that is skipped is replaced by the next; neither positions nor seed matter."""
        del positions, seed
        return self._scaled(self._records.read(index, self._make, replace=True))

    def _scaled(self, rows: Rows) -> Rows:
        return rows._replace(images=rows.images / self._pixel_max)

    def _decode(self, row: int, image: Any) -> Float32[np.ndarray, "h w c"]:
        del row
        return resize(_with_channels(image), self._size)


def _as_held(row: int, image: np.ndarray) -> np.ndarray:
    del row
    return image


def _with_channels(image: np.ndarray) -> Float32[np.ndarray, "h w c"]:
    """The image as float32; tfds stores some grey images without a dimension for channels."""
    return np.asarray(image, np.float32).reshape(*image.shape[:2], -1)


def _pixel_max(info: tfds.core.DatasetInfo) -> np.float32:
    dtype = np.dtype(info.features["image"].np_dtype)
    largest = np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1
    return np.float32((info.metadata or {}).get("pixel_max", largest))


def resize(image: Float32[np.ndarray, "h w c"], size: int) -> Float32[np.ndarray, "{size} {size} c"]:
    """The central square of `image`, resampled linearly to `size`, with the filter widened when the image shrinks.

    The filter is a triangle whose half-width is max(1, source pixels per target pixel), and whose weights sum to one at
    the border too. An image of that size comes back as it is.
    """
    height, width, channels = image.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[top : top + side, left : left + side]
    if side == size:
        return square
    weights = _triangle_weights(side, size)
    rows = (weights @ square.reshape(side, side * channels)).reshape(size, side, channels)
    return np.ascontiguousarray(np.tensordot(weights, rows, axes=(1, 1)).transpose(1, 0, 2))


@functools.lru_cache(maxsize=4096)  # photographs come in many sizes, each needs a small matrix
def _triangle_weights(source: int, target: int) -> Float32[np.ndarray, "{target} {source}"]:
    ratio = source / target
    centres = (np.arange(target) + 0.5) * ratio - 0.5
    distances = np.abs(np.arange(source) - centres[:, None])
    weights = np.maximum(0.0, 1.0 - distances / max(ratio, 1.0))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)

"""Batches of images and labels, for training without end and for one pass of evaluation, read with Grain.

A batch is a dict of NumPy arrays: image, float32 [B, h, w, c] in [0, 1], or in the range that `photo` gives; label,
int32 [B]; index, int32 [B], the place of the example in its split; in evaluation also mask, bool [B], False for rows
that only fill up the last batch.

Where `corrupt` is "skip", there is also skipped, bool [B]: in training, rows whose example can't be used, and that have
the next one of the split that can, and its index; in evaluation, rows that are blank instead, and whose mask is False.
Which those are depends on the set alone, so batches remain the same on any number of hosts.

Which examples make up a batch, on any number of hosts, `moe.data.batches` says.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence

import grain
import numpy as np

from moe.data.augment import Augment, augment
from moe.data.batches import Batch, HostBatches, Share, TrainIterator, check_seed, read_ahead
from moe.data.photo import PhotoConfig, PhotoSplit, is_encoded
from moe.data.records import Corrupt
from moe.data.source import ImageSplit, open_builder, resolve_data_dir


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which data set, and how it is read.

    name: a set of `moe.data.source.BUILDERS`, or any tfds image classification set that is prepared in `data_dir`.
    data_dir: folder of all data sets; empty for $TFDS_DATA_DIR, or `data` in the current folder where that is unset.
    train_split: the split to train on, or a slice of it in tfds's notation: "train[:99%]".
    test_split: the split to evaluate on, likewise.
    image_size: height and width of the images as the model sees them, in pixels.
    shuffle: whether each epoch of training has an order of its own; otherwise it has that of the files.
    in_memory: whether to decode a split once and hold it in memory; right for sets that are small.
    threads: threads that read and decode batches ahead; 0 reads each batch when it is asked for.
    workers: processes that do so instead, each with so many threads; right where decoding keeps Python busy.
    prefetch: batches to hold ready, in each process.
    corrupt: what to do about an example that can't be read or decoded, whose image has not the set's shape, or whose
        label is none of its classes: "stop" with an error that names file and place, or "skip", name and count it.
    augment: how training images are moved at random.
    photo: how photographs that are stored as JPEG are cut out, and changed in training.
    """

    name: str = "digits"
    data_dir: str = ""
    train_split: str = "train"
    test_split: str = "test"
    image_size: int = 8
    shuffle: bool = True
    in_memory: bool = False
    threads: int = 1
    workers: int = 0
    prefetch: int = 2
    corrupt: Corrupt = "stop"
    augment: Augment = dataclasses.field(default_factory=Augment)
    photo: PhotoConfig = PhotoConfig()

    def __post_init__(self) -> None:
        """Raises ValueError for a number out of range."""
        for name, least in (("image_size", 1), ("threads", 0), ("workers", 0), ("prefetch", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"data.{name} is {getattr(self, name)}: it must be at least {least}")


@dataclasses.dataclass(frozen=True)
class DataInfo:
    """What a model and a schedule need to know of a data set.

    classes: number of labels. image_shape: height, width and channels of an image as the model sees it.
    train_examples: size of the training split. splits: size of every split of the set.
    """

    classes: int
    image_shape: tuple[int, int, int]
    train_examples: int
    splits: Mapping[str, int]


def inspect_data(config: DataConfig) -> DataInfo:
    """The number of classes, the shape of an image and the sizes of the splits; errors as `make_train_iterator`."""
    builder = open_builder(config.name, resolve_data_dir(config.data_dir))
    train = _open_split(dataclasses.replace(config, in_memory=False), config.train_split)
    classes = getattr(builder.info.features["label"], "num_classes", None)
    if classes is None:
        raise ValueError(
            f"data set {builder.info.full_name} doesn't say how many classes it has: prepare it with labels that are a "
            "tfds ClassLabel"
        )
    height, width, channels = train.shape
    return DataInfo(
        classes=classes,
        image_shape=(height, width, channels),
        train_examples=len(train),
        splits={name: split.num_examples for name, split in builder.info.splits.items()},
    )


def check_labels(config: DataConfig) -> tuple[str, ...]:
    """Looks at labels of both splits, as `ImageRecords.check`; says, in a sentence per split, what is skipped there.

    Raises ValueError as `make_train_iterator`, and OSError if an example can't be used and is not to be skipped, or
    none can be used.
    """
    splits = dict.fromkeys((config.train_split, config.test_split))
    found = [_open_split(dataclasses.replace(config, in_memory=False), split).check() for split in splits]
    return tuple(filter(None, found))


def make_train_iterator(
    config: DataConfig,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    rows: Sequence[int] | None = None,
) -> TrainIterator:
    """This host's rows of every batch of the training sequence (see above), without end.

    Args:
        config: the data set.
        batch_size: examples in a batch, of all hosts together.
        seed: determines order and augmentation.
        process_index: which host this is, from 0.
        process_count: how many hosts share every batch.
        rows: of every batch that this host reads, instead of an equal part of it.

    Raises:
        ValueError: the set is unknown or not prepared, the split is unknown or empty, the seed is out of range, or the
            hosts cannot share the batch equally.
        OSError: the set cannot be written; or, from the iterator, an example can't be used and is not to be skipped.
    """
    check_seed(seed)
    share = Share.of(batch_size, process_index, process_count, rows)
    split = _open_split(config, config.train_split)
    indices = grain.MapDataset.range(len(split))
    if config.shuffle:
        indices = indices.seed(seed).shuffle()
    read = functools.partial(_read_train, split=split, config=config, seed=seed)
    return TrainIterator(indices.repeat(), share, read, config)


def make_eval_batches(
    config: DataConfig,
    split: str,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    rows: Sequence[int] | None = None,
) -> Iterable[Batch]:
    """This host's rows of the batches that hold every example of `split` once, in order; iterate as often as needed.

    The last batch is filled up to `batch_size` with rows whose mask is False, image and label 0, and index -1, so all
    hosts get the same number of batches. Arguments and errors are those of `make_train_iterator`.
    """
    share = Share.of(batch_size, process_index, process_count, rows)
    examples = _open_split(config, split)
    sequence = grain.MapDataset.range(len(examples)).repeat()
    batches = HostBatches(sequence, share, first=0)[: -(-len(examples) // batch_size)]
    return read_ahead(batches.map(functools.partial(_read_eval, split=examples, corrupt=config.corrupt)), config)


def _open_split(config: DataConfig, split: str) -> ImageSplit | PhotoSplit:
    builder = open_builder(config.name, resolve_data_dir(config.data_dir))
    if is_encoded(builder):
        return PhotoSplit(builder, split, config.image_size, config.photo, config.in_memory, config.corrupt)
    return ImageSplit(builder, split, config.image_size, config.in_memory, config.corrupt)


def _read_train(batch: Batch, split: ImageSplit | PhotoSplit, config: DataConfig, seed: int) -> Batch:
    rows = split.read_train(batch["index"], batch["position"], seed)
    images = augment(rows.images, batch["position"], config.augment, seed)
    read = {"image": images, "label": rows.labels, "index": rows.places}
    return read | ({"skipped": rows.skipped} if config.corrupt == "skip" else {})


def _read_eval(batch: Batch, split: ImageSplit | PhotoSplit, corrupt: Corrupt) -> Batch:
    """Blanks the rows past the end of the split, where the endless sequence has begun again."""
    rows = split.read(batch["index"])
    real = batch["position"] < len(split)
    mask = real & ~rows.skipped
    read = {
        "image": np.where(mask[:, None, None, None], rows.images, np.float32(0)),
        "label": np.where(mask, rows.labels, np.int32(0)),
        "index": np.where(real, batch["index"], np.int32(-1)),
        "mask": mask,
    }
    return read | ({"skipped": real & rows.skipped} if corrupt == "skip" else {})

"""Batches of images and labels, for training without end and for one pass of evaluation, read with Grain.

A batch is a dict of NumPy arrays: image, float32 [B, h, w, c] in [0, 1], or in the range that `photo` gives; label,
int32 [B]; index, int32 [B], the place of the example in its split; in evaluation also mask, bool [B], False for rows
that only fill up the last batch.

Training reads one endless sequence of examples that the seed alone determines: shuffled anew in every epoch, batches
crossing from one epoch into the next so that none is short. Batch i of the run is examples i·B to (i+1)·B - 1 of that
sequence, and host h of H reads the contiguous rows h·B/H to (h+1)·B/H - 1 of it. So the examples, their order and their
augmentation are the same on any number of hosts, threads and worker processes, and after a resume.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import grain
import numpy as np
from absl import flags

from moe.data.augment import Augment, augment
from moe.data.photo import PhotoConfig, PhotoSplit, is_encoded
from moe.data.source import ImageSplit, open_builder, resolve_data_dir

Batch: TypeAlias = dict[str, np.ndarray]


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


@dataclasses.dataclass(frozen=True)
class _Share:
    """Which rows of a batch of all hosts are this host's."""

    batch_size: int
    process_index: int
    process_count: int

    def __post_init__(self) -> None:
        if not 0 <= self.process_index < self.process_count:
            raise ValueError(f"there is no process {self.process_index} of {self.process_count}: count from 0")
        if self.batch_size < 1 or self.batch_size % self.process_count:
            raise ValueError(
                f"a batch of {self.batch_size} examples cannot be shared by {self.process_count} processes: choose a "
                f"positive multiple of {self.process_count} as batch size"
            )

    @property
    def rows(self) -> int:
        return self.batch_size // self.process_count


class _HostBatches(grain.MapDataset):
    """Element i: {"position", "index"} of this host's rows of batch i, in order, int64 and int32 [rows].

    The parent maps positions in the sequence to indices of examples. Grain's own slice would deal positions out to the
    hosts in turn, so that the order of examples within a batch, and with it the groups that tokens are routed in, would
    depend on the number of hosts.
    """

    def __init__(self, parent: grain.MapDataset, share: _Share, first: int) -> None:
        """The batches from position `first` of `parent` on, whole ones only."""
        super().__init__(parent)
        self._share = share
        self._first = first

    def __len__(self) -> int:
        return (len(self.parents[0]) - self._first) // self._share.batch_size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        start = self._first + index * self._share.batch_size + self._share.process_index * self._share.rows
        positions = range(start, start + self._share.rows)
        indices = [self.parents[0][position] for position in positions]
        return {"position": np.array(positions, np.int64), "index": np.array(indices, np.int32)}


class TrainIterator(grain.DatasetIterator):
    """An endless iterator over batches whose position can be saved: {"examples": how many all hosts have consumed}.

    The state is plain JSON, and the same on every host: what one host saved restores any number of hosts, with any
    number of threads and workers, and another batch size as well. Close it when done, so that workers end in order.
    """

    _reader: grain.DatasetIterator | None = None

    def __init__(
        self, sequence: grain.MapDataset, share: _Share, read: Callable[[Batch], Batch], config: DataConfig
    ) -> None:
        """Iterates over this host's rows of the batches of an endless sequence of indices, which `read` reads."""
        super().__init__()
        self._sequence = sequence
        self._share = share
        self._read = read
        self._config = config
        self._examples = 0

    def __next__(self) -> Batch:
        """The next batch: this host's rows of it."""
        self.start_prefetch()
        assert self._reader is not None
        batch = next(self._reader)
        self._examples += self._share.batch_size
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position of the next batch."""
        return {"examples": self._examples}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position that `get_state` returned."""
        self.close()
        self._examples = state["examples"]

    def start_prefetch(self) -> None:
        """Begins to read ahead from the current position, where the config says so."""
        if self._reader is None:
            batches = _HostBatches(self._sequence, self._share, self._examples).map(self._read)
            self._reader = iter(_prefetch(batches, self._config))
            self._reader.start_prefetch()

    def close(self) -> None:
        """Ends threads and worker processes; the iterator can be used again."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None


def inspect_data(config: DataConfig) -> DataInfo:
    """The number of classes, the shape of an image and the sizes of the splits; errors as `make_train_iterator`."""
    builder = open_builder(config.name, resolve_data_dir(config.data_dir))
    train = _open_split(dataclasses.replace(config, in_memory=False), config.train_split)
    images, _ = train.read(np.zeros(1, np.int32))
    return DataInfo(
        classes=builder.info.features["label"].num_classes,
        image_shape=images.shape[1:],
        train_examples=len(train),
        splits={name: split.num_examples for name, split in builder.info.splits.items()},
    )


def make_train_iterator(
    config: DataConfig, batch_size: int, seed: int, process_index: int, process_count: int
) -> TrainIterator:
    """This host's rows of every batch of the training sequence (see above), without end.

    Args:
        config: the data set.
        batch_size: examples in a batch, of all hosts together.
        seed: determines order and augmentation.
        process_index: which host this is, from 0.
        process_count: how many hosts share every batch.

    Raises:
        ValueError: the set is unknown or not prepared, the split is unknown or empty, the seed is out of range, or the
            hosts cannot share the batch equally.
        OSError: the set cannot be written.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"the seed of the data is {seed}: choose one between 0 and {2**32 - 1}")
    share = _Share(batch_size, process_index, process_count)
    split = _open_split(config, config.train_split)
    indices = grain.MapDataset.range(len(split))
    if config.shuffle:
        indices = indices.seed(seed).shuffle()
    read = functools.partial(_read_train, split=split, config=config.augment, seed=seed)
    return TrainIterator(indices.repeat(), share, read, config)


def make_eval_batches(
    config: DataConfig, split: str, batch_size: int, process_index: int, process_count: int
) -> Iterable[Batch]:
    """This host's rows of the batches that hold every example of `split` once, in order; iterate as often as needed.

    The last batch is filled up to `batch_size` with rows whose mask is False, image and label 0, and index -1, so all
    hosts get the same number of batches. Arguments and errors are those of `make_train_iterator`.
    """
    share = _Share(batch_size, process_index, process_count)
    examples = _open_split(config, split)
    sequence = grain.MapDataset.range(len(examples)).repeat()
    batches = _HostBatches(sequence, share, first=0)[: -(-len(examples) // batch_size)]
    return _prefetch(batches.map(functools.partial(_read_eval, split=examples)), config)


def _open_split(config: DataConfig, split: str) -> ImageSplit | PhotoSplit:
    builder = open_builder(config.name, resolve_data_dir(config.data_dir))
    if is_encoded(builder):
        return PhotoSplit(builder, split, config.image_size, config.photo, config.in_memory)
    return ImageSplit(builder, split, config.image_size, config.in_memory)


def _read_train(batch: Batch, split: ImageSplit | PhotoSplit, config: Augment, seed: int) -> Batch:
    if isinstance(split, PhotoSplit):
        images, labels = split.read_train(batch["index"], batch["position"], seed)
    else:
        images, labels = split.read(batch["index"])
    return {"image": augment(images, batch["position"], config, seed), "label": labels, "index": batch["index"]}


def _read_eval(batch: Batch, split: ImageSplit | PhotoSplit) -> Batch:
    """Blanks the rows past the end of the split, where the endless sequence has begun again."""
    images, labels = split.read(batch["index"])
    mask = batch["position"] < len(split)
    return {
        "image": np.where(mask[:, None, None, None], images, np.float32(0)),
        "label": np.where(mask, labels, np.int32(0)),
        "index": np.where(mask, batch["index"], np.int32(-1)),
        "mask": mask,
    }


def _prefetch(batches: grain.MapDataset, config: DataConfig) -> grain.IterDataset:
    """The batches in order, read ahead of demand by as many threads and processes as the config says."""
    # Grain wants a buffer that can keep every thread busy; without threads nothing is read ahead.
    buffer = max(config.prefetch, config.threads) if config.threads else 0
    reader = batches.to_iter_dataset(grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=buffer))
    if not config.workers:
        return reader
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads flags of its own here, which only a program run by absl has parsed
    options = grain.MultiprocessingOptions(num_workers=config.workers, per_worker_buffer_size=config.prefetch)
    return reader.mp_prefetch(options)

"""Which examples make up a batch: one endless sequence, cut the same way on any number of hosts, read ahead with Grain.

Training reads one endless sequence of examples that the seed alone determines: shuffled anew in every epoch, batches
crossing from one epoch into the next so that none is short. Batch i of the run is examples i·B to (i+1)·B - 1 of that
sequence, and host h of H reads the contiguous rows h·B/H to (h+1)·B/H - 1 of it, or such rows as it is told. So the
examples, their order and their augmentation are the same on any number of hosts, threads and worker processes, and
after a resume.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import grain
import numpy as np
from absl import flags

Batch: TypeAlias = dict[str, np.ndarray]


@runtime_checkable
class Ahead(Protocol):
    """The part of a data config that says how far, and with what, batches are read before they are asked for."""

    @property
    def threads(self) -> int:
        """Threads that read ahead; 0 reads each batch when it is asked for."""

    @property
    def workers(self) -> int:
        """Processes that do so instead, each with so many threads."""

    @property
    def prefetch(self) -> int:
        """Batches to hold ready, in each process."""


@dataclasses.dataclass(frozen=True)
class Share:
    """Which rows of a batch of all hosts are this host's, in order."""

    batch_size: int
    rows: tuple[int, ...]

    @classmethod
    def of(cls, batch_size: int, process_index: int, process_count: int, rows: Sequence[int] | None) -> "Share":
        """The given rows; without any, one of equal parts. Raises ValueError where they aren't rows of the batch."""
        if not 0 <= process_index < process_count:
            raise ValueError(f"there is no process {process_index} of {process_count}: count from 0")
        if rows is not None:
            if not rows or not all(0 <= row < batch_size for row in rows):
                raise ValueError(f"rows {list(rows)[:8]} must be some of the {batch_size} of a batch, counted from 0")
            return cls(batch_size, tuple(int(row) for row in rows))
        if batch_size < 1 or batch_size % process_count:
            raise ValueError(
                f"a batch of {batch_size} examples cannot be shared by {process_count} processes: choose a "
                f"positive multiple of {process_count} as batch size"
            )
        size = batch_size // process_count
        return cls(batch_size, tuple(range(process_index * size, (process_index + 1) * size)))


class HostBatches(grain.MapDataset):
    """Element i: {"position", "index"} of this host's rows of batch i, in order, int64 and int32 [rows].

    The parent maps positions in the sequence to indices of examples. Grain's own slice would deal positions out to the
    hosts in turn, so that the order of examples within a batch, and with it the groups that tokens are routed in, would
    depend on the number of hosts.
    """

    def __init__(self, parent: grain.MapDataset, share: Share, first: int) -> None:
        """The batches from position `first` of `parent` on, whole ones only."""
        super().__init__(parent)
        self._share = share
        self._first = first

    def __len__(self) -> int:
        return (len(self.parents[0]) - self._first) // self._share.batch_size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        start = self._first + index * self._share.batch_size
        positions = [start + row for row in self._share.rows]
        indices = [self.parents[0][position] for position in positions]
        return {"position": np.array(positions, np.int64), "index": np.array(indices, np.int32)}


class TrainIterator(grain.DatasetIterator):
    """An endless iterator over batches whose position can be saved: {"examples": how many all hosts have consumed, …}.

    The state is plain JSON. The position in it is the same on every host: what one host saved restores any number of
    hosts, with any number of threads and workers, and another batch size as well. Beside it stands "skipped", which
    only counts and changes no batch. Close the iterator when done, so that workers end in order.

    skipped: how many rows of this host had an example so far that was skipped, by the batches' own "skipped"; after a
        resume on top of those that the saved state counts, which are those of the host that saved it.
    """

    _reader: grain.DatasetIterator | None = None

    def __init__(self, sequence: grain.MapDataset, share: Share, read: Callable[[Batch], Batch], config: Ahead) -> None:
        """Iterates over this host's rows of the batches of an endless sequence of indices, which `read` reads."""
        super().__init__()
        self._sequence = sequence
        self._share = share
        self._read = read
        self._config = config
        self._examples = 0
        self.skipped = 0

    def __next__(self) -> Batch:
        """The next batch: this host's rows of it."""
        self.start_prefetch()
        assert self._reader is not None
        batch = next(self._reader)
        self._examples += self._share.batch_size
        if "skipped" in batch:
            self.skipped += int(np.sum(batch["skipped"]))
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position of the next batch, and the count of what was skipped before."""
        return {"examples": self._examples, "skipped": self.skipped}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position that `get_state` returned; without "skipped", nothing was. ValueError for others."""
        counts = [state.get("examples"), state.get("skipped", 0)] if isinstance(state, dict) else [None]
        if not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError(f"a position in the data must be {{'examples': N, 'skipped': M}}, not {state!r}")
        self.close()
        self._examples, self.skipped = counts

    def indices(self, examples: int) -> list[Any]:
        """What the parent calls the examples of the batch, of all hosts, that begins behind so many examples."""
        return [self._sequence[examples + row] for row in range(self._share.batch_size)]

    def start_prefetch(self) -> None:
        """Begins to read ahead from the current position, where the config says so."""
        if self._reader is None:
            batches = HostBatches(self._sequence, self._share, self._examples).map(self._read)
            self._reader = iter(read_ahead(batches, self._config))
            self._reader.start_prefetch()

    def close(self) -> None:
        """Ends threads and worker processes; the iterator can be used again."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None


def check_seed(seed: int) -> None:
    """Raises ValueError for a seed of the data that is out of range."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"the seed of the data is {seed}: choose one between 0 and {2**32 - 1}")


def read_ahead(batches: grain.MapDataset, config: Ahead) -> grain.IterDataset:
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

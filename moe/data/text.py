"""Rows of tokens, packed from documents for training without end, and cut from each document for evaluation.

A batch is a dict of NumPy arrays [B, L]: tokens, int32; targets, int32, the token that follows each; segment, int32,
the number of a token's document within its row, from 1, and 0 for padding; position, int32, the token's place in its
document, or in its row if the document began before; loss_mask, bool, whether the target counts; and index, int32 [B],
the row's number in its epoch. Evaluation adds mask, bool [B], False for rows that only fill up the last batch, and
target_bytes, int32 [B, L], the bytes of text that a target stands for.

The end token stands before every document, so that its first token is predicted too, and the last token of a document
predicts the end. Training lays all documents of an epoch end to end, in an order of the epoch's own, and cuts the
stream into rows of L targets; the rows of an epoch are shuffled in turn, since those of a long document follow each
other. The last row of an epoch is filled up with padding. So every token is a target once in an epoch, and a row
depends on the seed, the epoch and its number alone: see `moe.data.batches` for hosts, threads and resuming.

Tokens are held in memory, with 2 bytes each for vocabularies up to 65 536 and 4 above, by every host and by every
worker process; `MAX_TOKENS` is the most that a split may have.
"""

import dataclasses
import functools
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import grain
import numpy as np
from jaxtyping import Int, Int32, Int64, Integer

from moe.data.batches import Batch, HostBatches, Share, TrainIterator, check_seed, read_ahead
from moe.data.documents import file_documents, set_documents
from moe.data.source import open_builder, resolve_data_dir
from moe.data.tokenizer import Tokenizer, TokenizerConfig, open_tokenizer

MAX_TOKENS = 2**31


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Which text, and how it is read.

    name: "stdlib"; another tfds set that is prepared in `data_dir`; "files" for those of `paths`; or "files:PATTERN".
    mixture: pairs (name, weight): instead of `name`, several sources, each with its share of the training rows;
        evaluation reads the test splits of all.
    paths, test_paths, format, field: see `moe.data.documents.file_documents`; field is also the feature of tfds sets.
    tokenizer: how text becomes tokens. length: L, tokens in a row.
    train_split, test_split: of a tfds set, also slices: "train[:10%]"; files have train and test.
    shuffle: whether documents and rows have an order of their own in every epoch, or else the stored one.
    data_dir, threads, workers, prefetch: as for images (`moe.data.pipeline.DataConfig`).
    """

    name: str = "stdlib"
    mixture: tuple[Any, ...] = ()
    paths: tuple[str, ...] = ()
    test_paths: tuple[str, ...] = ()
    format: Literal["text", "jsonl", "parquet"] = "text"
    field: str = "text"
    tokenizer: TokenizerConfig = TokenizerConfig()
    length: int = 256
    data_dir: str = ""
    train_split: str = "train"
    test_split: str = "test"
    shuffle: bool = True
    threads: int = 1
    workers: int = 0
    prefetch: int = 2

    def __post_init__(self) -> None:
        """Raises ValueError for a number out of range, files without paths, or a mixture without shares."""
        for name, least in (("length", 1), ("threads", 0), ("workers", 0), ("prefetch", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"data.{name} is {getattr(self, name)}: it must be at least {least}")
        for entry in self.mixture:
            if len(entry) != 2 or not isinstance(entry[0], str) or not entry[1] > 0:
                raise ValueError(
                    f"data.mixture has the entry {entry!r}: give pairs (name, weight) with weights above 0"
                )
        if "files" in self.shares and not self.paths:
            raise ValueError("data.name is 'files', but data.paths is empty: name the files, or patterns of them")

    @property
    def shares(self) -> Mapping[str, float]:
        """The weight of every source, by name."""
        return {name: float(weight) for name, weight in self.mixture} or {self.name: 1.0}


@dataclasses.dataclass(frozen=True)
class TextInfo:
    """What a model, a schedule and a report need to know of a text.

    vocab_size, end: of the tokenizer. length: L. train_examples: rows that hold all training documents once.
    train_documents, train_tokens, train_bytes: size of the training split, with an end token per document.
    manifests: SHA-256 of what was read, by source, of sources that record it.
    """

    vocab_size: int
    end: int
    length: int
    train_examples: int
    train_documents: int
    train_tokens: int
    train_bytes: int
    manifests: Mapping[str, str]


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Tokenised documents, one after another, each behind an end token.

    tokens: of all, [N]. starts: where each begins, and N, [D + 1]. sizes: bytes of text of each, [D].
    """

    tokens: Integer[np.ndarray, "N"]
    starts: Int64[np.ndarray, "D_1"]
    sizes: Int64[np.ndarray, "D"]


def inspect_text(config: TextConfig) -> TextInfo:
    """Reads the training split once for its numbers; errors as `make_text_train_iterator`."""
    tokenizer = open_tokenizer(config.tokenizer)
    corpora = [_open(config, name, config.train_split) for name in config.shares]
    return TextInfo(
        vocab_size=tokenizer.vocab_size,
        end=tokenizer.end,
        length=config.length,
        train_examples=sum(-(-len(corpus.tokens) // config.length) for corpus in corpora),
        train_documents=sum(len(corpus.sizes) for corpus in corpora),
        train_tokens=sum(len(corpus.tokens) for corpus in corpora),
        train_bytes=sum(int(corpus.sizes.sum()) for corpus in corpora),
        manifests=_manifests(config),
    )


def check_vocabulary(info: TextInfo, model_vocab: int) -> None:
    """Raises ValueError if the tokenizer's ids reach beyond the model's vocabulary; a larger one is only padding."""
    if info.vocab_size > model_vocab:
        raise ValueError(
            f"the tokenizer has {info.vocab_size} tokens and the model a vocabulary of {model_vocab}: set "
            f"model.vocab_size to at least {info.vocab_size}, or choose another data.tokenizer"
        )


def make_text_train_iterator(
    config: TextConfig, batch_size: int, seed: int, process_index: int, process_count: int
) -> TrainIterator:
    """This host's rows of every batch of the training sequence (see above), without end.

    Args:
        config: the text.
        batch_size: rows in a batch, of all hosts together.
        seed: determines order.
        process_index: which host this is, from 0.
        process_count: how many hosts share every batch.

    Raises:
        ValueError: a source, split, file, field or tokenizer isn't there or is unfit, there is no text, it is too much
            to hold, the seed is out of range, or the hosts cannot share the batch equally.
        OSError: a set of `moe.data.source.BUILDERS` cannot be written.
    """
    check_seed(seed)
    share = Share(batch_size, process_index, process_count)
    end = open_tokenizer(config.tokenizer).end
    packed = [
        Packed(_open(config, name, config.train_split), config.length, end, (seed, source), config.shuffle)
        for source, name in enumerate(config.shares)
    ]
    sequences = [
        grain.MapDataset.range(sys.maxsize).map(functools.partial(_place, source, rows))
        for source, rows in enumerate(packed)
    ]
    sequence = grain.MapDataset.mix(sequences, list(config.shares.values()))
    return TrainIterator(sequence, share, functools.partial(_read_train, packed=packed), config)


def make_text_eval_batches(
    config: TextConfig, split: str, batch_size: int, process_index: int, process_count: int
) -> Iterable[Batch]:
    """This host's rows of the batches that hold every document of `split` once, in order; iterate as often as needed.

    Each document is cut into windows of L targets by itself, so that no window sees another, and the last window of a
    document is filled up with padding. target_bytes sums to the bytes of the split, whatever the tokenizer: where its
    tokens stand for more or fewer bytes than a document has, the document's end carries the difference. Rows that fill
    up the last batch are all zero, with index -1, so all hosts get the same number of batches. Arguments and errors are
    those of `make_text_train_iterator`.
    """
    share = Share(batch_size, process_index, process_count)
    corpus = _concatenate([_open(config, name, split) for name in config.shares])
    windows = Windows(corpus, config.length, open_tokenizer(config.tokenizer))
    batches = HostBatches(grain.MapDataset.range(len(windows)).repeat(), share, first=0)
    return read_ahead(batches[: -(-len(windows) // batch_size)].map(functools.partial(_read_eval, windows)), config)


class Packed:
    """The rows of every epoch of a corpus."""

    def __init__(self, corpus: Corpus, length: int, end: int, key: tuple[int, int], shuffle: bool) -> None:
        """key: what the order depends on, besides the epoch. length: L. end: id of the end token."""
        self._corpus = corpus
        self._length = length
        self._end = end
        self._key = key
        self._shuffle = shuffle
        self._documents = (-1, np.zeros(0, np.int64), np.zeros(0, np.int64))  # epoch, order, starts in its stream
        self._rows = (-1, np.zeros(0, np.int64))  # epoch, order

    def __len__(self) -> int:
        """Rows in an epoch."""
        return -(-len(self._corpus.tokens) // self._length)

    def row(self, place: int) -> tuple[int, int]:
        """The epoch and the number in it of the row at this place of the endless sequence."""
        epoch, place = divmod(place, len(self))
        rows = self._rows  # another thread may put another epoch there
        if rows[0] != epoch:
            rows = self._rows = (epoch, self._permutation(epoch, 0, len(self)))
        return epoch, int(rows[1][place])

    def read(self, epoch: int, row: Int[np.ndarray, "B"]) -> Batch:
        """These rows of an epoch."""
        order, starts = self._layout(epoch)
        corpus = self._corpus
        column = np.arange(self._length + 1)
        place = row[:, None].astype(np.int64) * self._length + column
        document = np.searchsorted(starts, place.ravel(), side="right").reshape(place.shape) - 1
        document = np.minimum(document, len(order) - 1)
        within = place - starts[document]
        real = place < starts[-1]
        held = np.where(real, corpus.starts[order[document]] + within, 0)
        token = np.where(real, corpus.tokens[held], self._end)
        return _batch(token, real, document - document[:, :1] + 1, np.minimum(within, column), row)

    def _layout(self, epoch: int) -> tuple[Int64[np.ndarray, "D"], Int64[np.ndarray, "D_1"]]:
        """The order of the documents in an epoch, and where each begins in its stream."""
        known, order, starts = self._documents
        if known != epoch:
            lengths = np.diff(self._corpus.starts)
            order = self._permutation(epoch, 1, len(lengths))
            starts = np.concatenate([[0], np.cumsum(lengths[order])])
            self._documents = (epoch, order, starts)
        return order, starts

    def _permutation(self, epoch: int, what: int, size: int) -> Int64[np.ndarray, "{size}"]:
        """An order that no version of NumPy changes: raw bits are promised to stay, its permutations aren't."""
        if not self._shuffle:
            return np.arange(size)
        bits = np.random.Philox(np.random.SeedSequence([*self._key, epoch, what])).random_raw(size)
        return np.argsort(bits, kind="stable")


class Windows:
    """The windows of a corpus, document by document."""

    def __init__(self, corpus: Corpus, length: int, tokenizer: Tokenizer) -> None:
        """length: L."""
        self._corpus = corpus
        self._length = length
        self._tokenizer = tokenizer
        lengths = np.diff(corpus.starts)
        self._first = np.concatenate([[0], np.cumsum(-(-lengths // length))])
        bytes_of = np.concatenate([[0], np.cumsum(tokenizer.token_bytes[corpus.tokens], dtype=np.int64)])
        self._rest = corpus.sizes - np.diff(bytes_of[corpus.starts])

    def __len__(self) -> int:
        """How many there are."""
        return int(self._first[-1])

    def read(self, window: Int[np.ndarray, "B"]) -> Batch:
        """These windows, with target_bytes."""
        corpus = self._corpus
        document = np.searchsorted(self._first, window, side="right") - 1
        column = np.arange(self._length + 1)
        place = (corpus.starts[document] + (window - self._first[document]) * self._length)[:, None] + column
        stop = corpus.starts[document + 1][:, None]
        real = place < stop
        token = np.where(real, corpus.tokens[np.where(real, place, 0)], self._tokenizer.end)
        batch = _batch(token, real, np.ones_like(place), np.broadcast_to(column, place.shape), window)
        size = np.where(
            (place == stop)[:, 1:], self._rest[document][:, None], self._tokenizer.token_bytes[token[:, 1:]]
        )
        return batch | {"target_bytes": np.where(batch["loss_mask"], size, 0).astype(np.int32)}


def _batch(
    token: Integer[np.ndarray, "B L_1"],
    real: np.ndarray,
    segment: Int[np.ndarray, "B L_1"],
    position: Int[np.ndarray, "B L_1"],
    row: Int[np.ndarray, "B"],
) -> Batch:
    """A batch of rows of L + 1 tokens, blank where a token isn't real; a target stands behind each that is."""
    keep = real[:, :-1]
    blank = {"tokens": token[:, :-1], "targets": token[:, 1:], "segment": segment[:, :-1], "position": position[:, :-1]}
    batch = {name: np.where(keep, value, 0).astype(np.int32) for name, value in blank.items()}
    return batch | {"loss_mask": keep.copy(), "index": row.astype(np.int32)}


def _place(source: int, packed: Packed, place: int) -> tuple[int, int, int]:
    return (source, *packed.row(place))


def _read_train(batch: Batch, packed: list[Packed]) -> Batch:
    """Rows of one source and epoch are read together."""
    index: Int32[np.ndarray, "B 3"] = batch["index"]
    kinds, kind = np.unique(index[:, :2], axis=0, return_inverse=True)
    parts = [packed[source].read(int(epoch), index[kind == i, 2]) for i, (source, epoch) in enumerate(kinds)]
    back = np.argsort(np.argsort(kind, kind="stable"), kind="stable")
    return {name: np.concatenate([part[name] for part in parts])[back] for name in parts[0]}


def _read_eval(windows: Windows, batch: Batch) -> Batch:
    """Blanks the rows past the end of the split, where the endless sequence has begun again."""
    mask = batch["position"] < len(windows)
    rows = windows.read(batch["index"])
    index = np.where(mask, rows.pop("index"), np.int32(-1))
    blanked = {name: np.where(mask[:, None], value, value.dtype.type(0)) for name, value in rows.items()}
    return blanked | {"index": index, "mask": mask}


def _documents(config: TextConfig, name: str, split: str) -> Iterator[tuple[str, bytes]]:
    files, _, pattern = name.partition(":")
    if files != "files":
        return set_documents(name, split, config.field, resolve_data_dir(config.data_dir))
    paths = (pattern,) if pattern else config.paths
    return file_documents(paths, split, config.format, config.field, () if pattern else config.test_paths)


def _open(config: TextConfig, name: str, split: str) -> Corpus:
    """Reads and tokenises a split of one source; documents without text are left out."""
    tokenizer = open_tokenizer(config.tokenizer)
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
    end = np.array([tokenizer.end], dtype)
    parts: list[np.ndarray] = []
    sizes: list[int] = []
    starts = [0]
    for label, text in _documents(config, name, split):
        if not text:
            continue
        try:
            tokens = tokenizer.encode(text)
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from error
        parts += [end, tokens.astype(dtype)]
        sizes.append(len(text))
        starts.append(starts[-1] + 1 + len(tokens))
        if starts[-1] > MAX_TOKENS:
            raise ValueError(
                f"data {name!r}, split {split!r}, has more than the {MAX_TOKENS} tokens that are held in memory: "
                f"choose less of it, such as the split '{split}[:1%]' of a tfds set, or fewer files"
            )
    if not parts:
        raise ValueError(f"data {name!r} has no text in its split {split!r}: choose another split or other files")
    return Corpus(np.concatenate(parts), np.array(starts, np.int64), np.array(sizes, np.int64))


def _concatenate(corpora: list[Corpus]) -> Corpus:
    starts = np.cumsum([0, *np.concatenate([np.diff(corpus.starts) for corpus in corpora])])
    tokens, sizes = ([getattr(corpus, name) for corpus in corpora] for name in ("tokens", "sizes"))
    return Corpus(np.concatenate(tokens), starts.astype(np.int64), np.concatenate(sizes))


def _manifests(config: TextConfig) -> dict[str, str]:
    sets = [name for name in config.shares if name.partition(":")[0] != "files"]
    metadata = {name: open_builder(name, resolve_data_dir(config.data_dir)).info.metadata or {} for name in sets}
    return {name: found["manifest_sha256"] for name, found in metadata.items() if "manifest_sha256" in found}

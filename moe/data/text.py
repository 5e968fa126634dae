"""Rows of tokens, packed from documents for training without end, and cut from each document for evaluation.

A batch is a dict of NumPy arrays [B, L]: tokens, int32; targets, int32, the token that follows each; segment, int32,
the number of a token's document within its row, from 1, and 0 for padding; position, int32, the token's place in its
document, or in its row if the document began before; loss_mask, bool, whether the target counts; document, int32, the
number of a token's document in its source's split, -1 for padding; and, int32 [B], source, the number of the source,
and index, the row's number in its source's epoch, or in the split (`name_document` has names for them). Evaluation adds
mask, bool [B], False for rows that only fill up the last batch, and target_bytes, int32 [B, L], the bytes of text that
a target stands for.

A document is read from the tokenizer's begin token on, so that its first token is predicted too, and its last token
predicts the end token, which is never read; one token may be both. So every token that is read has a target, and no
target lies beyond a document's end. Training lays all documents of an epoch end to end, in an order of the epoch's own,
and cuts the stream into rows of L targets; the rows of an epoch are shuffled in turn, since those of a long document
follow each other. The last row of an epoch is filled up with padding. So every token is a target once in an epoch, and
a row depends on the seed, the epoch and its number alone: see `moe.data.batches` for hosts, threads and resuming.

Tokens stay on disk (`moe.data.corpus`), 2 bytes each for vocabularies up to 65 536 and 4 above. In memory there are
some 40 bytes per document and 8 per row of an epoch.
"""

import dataclasses
import functools
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import grain
import numpy as np
from jaxtyping import Int, Int32, Int64, Integer

from moe.data.batches import Batch, HostBatches, Share, TrainIterator, check_seed, read_ahead
from moe.data.corpus import Corpus, open_corpus
from moe.data.documents import FORMATS, Source
from moe.data.records import Corrupt
from moe.data.source import open_builder, resolve_data_dir
from moe.data.tokenizer import TokenizerConfig, open_tokenizer

# What a source of a mixture may have of its own.
_OWN = ("test_paths", "format", "field", "train_split", "test_split")


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Which text, and how it is read.

    name: "stdlib"; another tfds set that is prepared in `data_dir`; "files" for those of `paths`; or "files:PATTERN".
    mixture: entries (name, weight): instead of `name`, several sources, each with its share of the training rows;
        evaluation reads the test splits of all. (name, weight, {"format": "jsonl", …}) sets for that source alone what
        would otherwise be the same for all: test_paths, format, field, train_split, test_split.
    paths, test_paths, format, field, train_split, test_split: see `moe.data.documents.Source`. Patterns in
        a mixture have test_paths of their own, if any.
    tokenizer: how text becomes tokens. length: L, tokens in a row.
    shuffle: whether documents and rows have an order of their own in every epoch, or else the stored one.
    cache_dir: where tokens are kept; empty for the folder `tokens` in that of the data sets.
    data_dir, threads, workers, prefetch: as for images (`moe.data.pipeline.DataConfig`).
    corrupt: what to do about a document that can't be read: "stop" with an error that names file and place, or "skip":
        leave it out when the text is tokenised, name and count it.
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
    cache_dir: str = ""
    train_split: str = "train"
    test_split: str = "test"
    shuffle: bool = True
    threads: int = 1
    workers: int = 0
    prefetch: int = 2
    corrupt: Corrupt = "stop"

    def __post_init__(self) -> None:
        """Raises ValueError for a number out of range, files without paths, or a mixture without shares."""
        for name, least in (("length", 1), ("threads", 0), ("workers", 0), ("prefetch", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"data.{name} is {getattr(self, name)}: it must be at least {least}")
        for source in self.sources:
            if source.name == "files" and not self.paths:
                raise ValueError("data.name is 'files', but data.paths is empty: name the files, or patterns of them")

    @property
    def sources(self) -> tuple[Source, ...]:
        """All sources, in order."""
        return tuple(self._source(*_entry(entry)) for entry in self.mixture or ((self.name, 1.0),))

    def _source(self, name: str, weight: float, own: Mapping[str, Any]) -> Source:
        shared = {key: getattr(self, key) for key in _OWN} | {"paths": self.paths, "corrupt": self.corrupt}
        if name.startswith("files:"):
            shared |= {"paths": (name.removeprefix("files:"),)}
            shared |= {"test_paths": ()} if self.mixture else {}
        return Source(name, weight, **(shared | dict(own)))


def _entry(entry: Any) -> tuple[str, float, Mapping[str, Any]]:
    match entry:
        case [str(name), int() | float() as weight, *rest] if weight > 0 and len(rest) < 2:
            own = rest[0] if rest else {}
            if isinstance(own, Mapping) and not set(own) - set(_OWN):
                return name, float(weight), {key: _own(name, key, value) for key, value in own.items()}
    raise ValueError(
        f"data.mixture has the entry {entry!r}: give (name, weight) with a weight above 0, or (name, weight, settings) "
        f"with settings of {', '.join(_OWN)}"
    )


def _own(name: str, key: str, value: Any) -> Any:
    """A setting of one source, of its type; JSON has lists for tuples."""
    if key == "test_paths" and isinstance(value, list | tuple):
        return tuple(str(path) for path in value)
    if key == "test_paths" or not isinstance(value, str) or (key == "format" and value not in FORMATS):
        kinds = {"test_paths": "a list of files or patterns", "format": f"one of {', '.join(FORMATS)}"}
        raise ValueError(f"data.mixture has {key} = {value!r} for {name}: give {kinds.get(key, 'a name')}")
    return value


@dataclasses.dataclass(frozen=True)
class TextInfo:
    """What a model, a schedule and a report need to know of a text.

    vocab_size, begin, end: of the tokenizer. length: L. train_examples: rows that hold all training documents once.
    train_documents, train_tokens, train_bytes: size of the training split, with a begin token per document.
    manifests: by source, the SHA-256 that a set records of itself; or else that of the SHA-256 of all training texts.
    """

    vocab_size: int
    begin: int
    end: int
    length: int
    train_examples: int
    train_documents: int
    train_tokens: int
    train_bytes: int
    manifests: Mapping[str, str]


def inspect_text(config: TextConfig) -> TextInfo:
    """Reads the training split once for its numbers; errors as `make_text_train_iterator`."""
    tokenizer = open_tokenizer(config.tokenizer)
    corpora = _open(config, config.train_split)
    return TextInfo(
        vocab_size=tokenizer.vocab_size,
        begin=tokenizer.begin,
        end=tokenizer.end,
        length=config.length,
        train_examples=sum(-(-len(corpus.tokens) // config.length) for corpus in corpora),
        train_documents=sum(corpus.meta["documents"] for corpus in corpora),
        train_tokens=sum(corpus.meta["tokens"] for corpus in corpora),
        train_bytes=sum(corpus.meta["bytes"] for corpus in corpora),
        manifests=_manifests(config, corpora),
    )


def name_document(config: TextConfig, split: str, source: int, document: int) -> str:
    """What a document of a batch is called: "a.jsonl, line 3"; source, document: as the batch has them."""
    return _open(config, split, with_sizes=split == config.test_split)[source].name(document)


def check_vocabulary(config: TextConfig, model_vocab: int) -> None:
    """Raises ValueError if the tokenizer's ids reach beyond the model's vocabulary; a larger one is only padding."""
    size = open_tokenizer(config.tokenizer).vocab_size
    if size > model_vocab:
        raise ValueError(
            f"the tokenizer has {size} tokens and the model a vocabulary of {model_vocab}: set model.vocab_size to at "
            f"least {size}, or choose another data.tokenizer"
        )


def make_text_train_iterator(
    config: TextConfig,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    rows: Sequence[int] | None = None,
) -> TrainIterator:
    """This host's rows of every batch of the training sequence (see above), without end.

    Args:
        config: the text.
        batch_size: rows in a batch, of all hosts together.
        seed: determines order.
        process_index: which host this is, from 0.
        process_count: how many hosts share every batch.
        rows: of every batch that this host reads, instead of an equal part of it.

    Raises:
        ValueError: a source, split, file, field or tokenizer isn't there or is unfit, there is no text, the seed is out
            of range, or the hosts cannot share the batch equally.
        OSError: tokens, or a set of `moe.data.source.BUILDERS`, cannot be written.
    """
    check_seed(seed)
    share = Share.of(batch_size, process_index, process_count, rows)
    end = open_tokenizer(config.tokenizer).end
    packed = [
        Packed(corpus, config.length, end, (seed, source), config.shuffle)
        for source, corpus in enumerate(_open(config, config.train_split))
    ]
    sequences = [
        grain.MapDataset.range(sys.maxsize).map(functools.partial(_place, source, rows))
        for source, rows in enumerate(packed)
    ]
    sequence = grain.MapDataset.mix(sequences, [source.weight for source in config.sources])
    return TrainIterator(sequence, share, functools.partial(_read_train, packed=packed), config)


def make_text_eval_batches(
    config: TextConfig,
    split: str,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    rows: Sequence[int] | None = None,
) -> Iterable[Batch]:
    """This host's rows of the batches that hold every document of `split` once, in order; iterate as often as needed.

    Each document is cut into windows of L targets by itself, so that no window sees another, and the last window of a
    document is filled up with padding. target_bytes sums to the bytes of the split, whatever the tokenizer: bytes that
    no token stands for are those of the document's end. Rows that fill up the last batch are all zero, with source,
    document and index -1, so all hosts get the same number of batches. Arguments and errors are those of
    `make_text_train_iterator`.
    """
    share = Share.of(batch_size, process_index, process_count, rows)
    end = open_tokenizer(config.tokenizer).end
    windows = [Windows(corpus, config.length, end) for corpus in _open(config, split, with_sizes=True)]
    count = sum(map(len, windows))
    batches = HostBatches(grain.MapDataset.range(count).repeat(), share, first=0)
    return read_ahead(batches[: -(-count // batch_size)].map(functools.partial(_read_eval, windows)), config)


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
        nth = np.searchsorted(starts, place.ravel(), side="right").reshape(place.shape) - 1
        nth = np.minimum(nth, len(order) - 1)
        document = order[nth]
        within = place - starts[nth]
        real = place < starts[-1]
        token = corpus.tokens[np.where(real, corpus.starts[document] + within, 0)]
        # What follows the last token of a document is its end, not the begin of the next.
        follows = np.where(real & (within > 0), token, self._end)
        return _batch(token, follows, real, nth - nth[:, :1] + 1, np.minimum(within, column), document, row)

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

    def __init__(self, corpus: Corpus, length: int, end: int) -> None:
        """corpus: with sizes. length: L. end: id of the end token."""
        assert corpus.sizes is not None
        self._corpus = corpus
        self._sizes = corpus.sizes
        self._length = length
        self._end = end
        lengths = np.diff(corpus.starts)
        self._first = np.concatenate([[0], np.cumsum(-(-lengths // length))])

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
        held = np.where(real, place, 0)
        token = corpus.tokens[held]
        follows = np.where(real, token, self._end)
        document = np.broadcast_to(document[:, None], place.shape)
        batch = _batch(
            token, follows, real, np.ones_like(place), np.broadcast_to(column, place.shape), document, window
        )
        size = np.where(place == stop, corpus.documents[document, 1], self._sizes[held])[:, 1:]
        return batch | {"target_bytes": np.where(batch["loss_mask"], size, 0).astype(np.int32)}


def _batch(
    token: Integer[np.ndarray, "B L_1"],
    follows: Integer[np.ndarray, "B L_1"],
    real: np.ndarray,
    segment: Int[np.ndarray, "B L_1"],
    position: Int[np.ndarray, "B L_1"],
    document: Int[np.ndarray, "B L_1"],
    row: Int[np.ndarray, "B"],
) -> Batch:
    """A batch of rows of L + 1 tokens, blank where a token isn't real; a target stands behind each that is.

    follows: what each token is as the target of the one before it.
    """
    keep = real[:, :-1]
    blank = {
        "tokens": token[:, :-1],
        "targets": follows[:, 1:],
        "segment": segment[:, :-1],
        "position": position[:, :-1],
    }
    batch = {name: np.where(keep, value, 0).astype(np.int32) for name, value in blank.items()}
    batch |= {"loss_mask": keep.copy(), "document": np.where(keep, document[:, :-1], -1).astype(np.int32)}
    return batch | {"index": row.astype(np.int32)}


def _place(source: int, packed: Packed, place: int) -> tuple[int, int, int]:
    return (source, *packed.row(place))


def _read_train(batch: Batch, packed: list[Packed]) -> Batch:
    """Rows of one source and epoch are read together."""
    index: Int32[np.ndarray, "B 3"] = batch["index"]
    kinds, kind = np.unique(index[:, :2], axis=0, return_inverse=True)
    parts = [packed[source].read(int(epoch), index[kind == i, 2]) for i, (source, epoch) in enumerate(kinds)]
    return _merge(parts, kind) | {"source": index[:, 0]}


def _read_eval(windows: list[Windows], batch: Batch) -> Batch:
    """Blanks the rows past the end of the split, where the endless sequence has begun again."""
    first = np.cumsum([0, *map(len, windows)])
    index, mask = batch["index"], batch["position"] < first[-1]
    source = (np.searchsorted(first, index, side="right") - 1).astype(np.int32)
    kinds, kind = np.unique(source, return_inverse=True)
    rows = _merge([windows[i].read(index[source == i] - first[i]) for i in kinds], kind)
    rows = {name: np.where(mask.reshape(-1, *[1] * (value.ndim - 1)), value, 0).astype(value.dtype)
            for name, value in rows.items()}  # fmt: skip
    missing = np.int32(-1)
    return rows | {
        "document": np.where(mask[:, None], rows["document"], missing),
        "source": np.where(mask, source, missing),
        "index": np.where(mask, index, missing),
        "mask": mask,
    }


def _merge(parts: list[Batch], kind: Int[np.ndarray, "B"]) -> Batch:
    """One batch of the parts, whose rows lie where `kind` is the part's number."""
    back = np.argsort(np.argsort(kind, kind="stable"), kind="stable")
    return {name: np.concatenate([part[name] for part in parts])[back] for name in parts[0]}


def _open(config: TextConfig, split: str, with_sizes: bool = False) -> list[Corpus]:
    """A split of every source, tokenised; a source may call those of the config otherwise."""
    data_dir = resolve_data_dir(config.data_dir)
    cache_dir = os.path.expanduser(config.cache_dir) or os.path.join(data_dir, "tokens")
    corpora = []
    for source in config.sources:
        own = {config.train_split: source.train_split, config.test_split: source.test_split}.get(split, split)
        corpora.append(open_corpus(source, own, config.tokenizer, data_dir, cache_dir, with_sizes))
    return corpora


def _manifests(config: TextConfig, corpora: list[Corpus]) -> dict[str, str]:
    manifests: dict[str, str] = {}
    for number, (source, corpus) in enumerate(zip(config.sources, corpora, strict=True), 1):
        recorded: Mapping[str, Any] = {}
        if not source.is_files:
            recorded = open_builder(source.name, resolve_data_dir(config.data_dir)).info.metadata or {}
        name = f"{source.name} ({number})" if source.name in manifests else source.name
        manifests[name] = recorded.get("manifest_sha256", corpus.meta["sha256"])
    return manifests

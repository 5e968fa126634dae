"""Documents of text as bytes, read one after another: of a prepared tfds set, or of files that a user has."""

import dataclasses
import functools
import glob
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import pyarrow
from pyarrow import parquet

from moe.data.records import Corrupt, Damage, Records
from moe.data.source import open_builder
from moe.data.stdlib import held_out, is_low

FORMATS = ("text", "jsonl", "parquet")
_READ = 1024  # examples of a tfds set, or rows of a Parquet file, that are read at once
_BLOCK = 2**24  # bytes of a text file that are read at once
_PARQUET = (pyarrow.ArrowException, OSError)  # what pyarrow raises on damage
# Against files without any document of a split; the second: whether there are test_paths.
_REMEDIES = {
    ("train", True): "name other files in data.paths",
    ("train", False): "the hash of their texts kept all for testing: name the files to test on in data.test_paths",
    ("test", True): "name other files in data.test_paths",
    ("test", False): "the hash of their texts, which keeps 5 %, kept none for testing: name the files to test on in "
    "data.test_paths",
}


@dataclasses.dataclass(frozen=True)
class Source:
    """Where documents come from.

    name: a tfds set; "files" for those of `paths`; or "files:PATTERN" for those that match. weight: share of the rows
    in training, next to other sources. format: of files: "text": a document per file; "jsonl": one per line;
    "parquet": one per row. field: key or column of the text, in JSONL and Parquet; feature, in tfds sets.
    test_paths: files of the test split; if there are none, it is the documents of the others whose texts hash lowest
    (5 %), so that copies of a text stay on the same side. train_split, test_split: of a tfds set, also slices:
    "train[:10%]"; files have train and test. corrupt: what to do about documents that can't be read: "stop" with an
    error that names file and place, or "skip", name and count them.
    """

    name: str
    weight: float = 1.0
    paths: tuple[str, ...] = ()
    test_paths: tuple[str, ...] = ()
    format: Literal["text", "jsonl", "parquet"] = "text"
    field: str = "text"
    train_split: str = "train"
    test_split: str = "test"
    corrupt: Corrupt = "stop"

    @property
    def is_files(self) -> bool:
        """Whether it is files rather than a tfds set."""
        return self.name.partition(":")[0] == "files"


class Document(NamedTuple):
    """A document: the number of its file, its place there (see `name_document`), and its text, in pieces.

    Damage, instead of a text, has the whole sentence about it; place 0 among lines or rows is that of their file, where
    all of it can't be read.
    """

    file: int
    place: int
    pieces: Iterable[bytes] | Damage


# What a reader of files yields: place and text.
Read: TypeAlias = Iterator[tuple[int, Iterable[bytes] | Damage]]


@dataclasses.dataclass(frozen=True)
class Documents:
    """A split of a source.

    label: name of the split, for messages. files: names of what documents are numbered in: of files, or of the set.
    unit: what a document is there: "line", "row", "example"; "" if a file is a document. identity: plain data that
    change when what is read does: names, sizes and times of change of all files, not their contents. read: all
    documents in order, also damaged ones. remedy: what to do if there are none. notes: what is left out. skips: whether
    damaged ones are left out, too.
    """

    label: str
    files: tuple[str, ...]
    unit: str
    identity: Mapping[str, Any]
    read: Callable[[], Iterator[Document]]
    remedy: str
    notes: tuple[str, ...] = ()
    skips: bool = False


def name_document(files: Sequence[str], unit: str, file: int, place: int) -> str:
    """What a message calls a document, such as "a.jsonl, line 3"."""
    of_whole = unit in ("line", "row") and not place  # those count from 1
    return files[file] if of_whole or not unit else f"{files[file]}, {unit} {place}"


def open_documents(source: Source, split: str, data_dir: str) -> Documents:
    """The documents of a split of a source.

    Raises:
        ValueError: the set, its split or its feature `field` isn't there, a path matches nothing, a file that is named
            without a pattern is empty, or files have no such split.
        OSError: a set of `moe.data.source.BUILDERS` cannot be written under `data_dir`.
    """
    return _open_files(source, split) if source.is_files else _open_set(source, split, data_dir)


def _open_set(source: Source, split: str, data_dir: str) -> Documents:
    builder = open_builder(source.name, data_dir)
    info = builder.info
    if source.field not in info.features:
        raise ValueError(
            f"data set {info.full_name} has no feature {source.field!r} (it has {', '.join(info.features)}): set "
            "data.field"
        )
    records = Records(builder, split)
    label = records.name
    stored = sorted(path for path in Path(builder.data_dir).iterdir() if path.is_file())
    return Documents(
        label=label,
        files=(label,),
        unit="example",
        identity={"set": label, "field": source.field, "files": [_stamp(path) for path in stored]},
        read=functools.partial(_read_set, records, source.field),
        remedy="choose another split",
        skips=source.corrupt == "skip",
    )


def _read_set(records: Records, field: str) -> Iterator[Document]:
    for start in range(0, len(records), _READ):
        indices = range(start, min(start + _READ, len(records)))
        for index, example in zip(indices, records.fetch(indices), strict=True):
            if isinstance(example, Damage):
                yield Document(0, index, Damage(f"{records.describe(index, example.reason)}; prepare the set again"))
                continue
            text = example[field]
            if not isinstance(text, str | bytes):
                raise ValueError(
                    f"feature {field!r} of data set {records.name} is not text: set data.field to one that is"
                )
            yield Document(0, index, (text.encode() if isinstance(text, str) else text,))


def _open_files(source: Source, split: str) -> Documents:
    if split not in ("train", "test"):
        raise ValueError(
            f"files have no split {split!r}: choose train or test (set data.test_paths to name test files)"
        )
    pattern = source.name.partition(":")[2]
    of_test = split == "test" and source.test_paths
    found, empty = _expand(source.test_paths if of_test else (pattern,) if pattern else source.paths)
    unit, read = {"text": ("", _text), "jsonl": ("line", _jsonl), "parquet": ("row", _parquet)}[source.format]
    side = None if source.test_paths else split == "test"
    label = f"{source.name}[{split}]"
    return Documents(
        label=label,
        files=tuple(found),
        unit=unit,
        identity={
            "files": [_stamp(Path(path)) for path in found],
            "format": source.format,
            "field": source.field,
            "side": side,
        },
        read=functools.partial(_read_files, read, found, source.field, side),
        remedy=_REMEDIES[split, bool(source.test_paths)],
        notes=(f"{label}: {count_names(empty, 'empty file')} left out",) if empty else (),
        skips=source.corrupt == "skip",
    )


def _read_files(
    read: Callable[[str, str, bool | None], Read],
    paths: Sequence[str],
    field: str,
    side: bool | None,
) -> Iterator[Document]:
    for number, path in enumerate(paths):
        for place, pieces in read(path, field, side):
            yield Document(number, place, pieces)


def _stamp(path: Path) -> list[Any]:
    state = path.stat()
    return [str(path.absolute()), state.st_size, state.st_mtime_ns]


def count_names(names: Sequence[str], what: str) -> str:
    """How many there are, and the first of them: "2 files (a, b)"."""
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return f"{len(names)} {what}{'s' if len(names) > 1 else ''} ({shown})"


def _expand(paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files that paths and patterns name, each once, and the empty ones that only a pattern found."""
    found: list[str] = []
    for path in paths:
        # A name may hold letters that patterns give a meaning, such as brackets.
        matches = [path] if Path(path).is_file() else sorted(glob.glob(path, recursive=True))
        matches = [match for match in matches if Path(match).is_file()]
        if not matches:
            raise ValueError(f"there is no file {path}: correct data.paths or data.test_paths")
        if matches == [path] and not Path(path).stat().st_size:
            raise ValueError(f"file {path} is empty: leave it out of data.paths and data.test_paths")
        found += matches
    once = list(dict.fromkeys(found))
    empty = [path for path in once if not Path(path).stat().st_size]
    return [path for path in once if path not in set(empty)], empty


def _text(path: str, field: str, side: bool | None) -> Read:
    del field
    if side is not None:
        with open(path, "rb") as file:
            if is_low(hashlib.file_digest(file, "sha256").digest()) != side:
                return
    yield 0, _pieces(path)


def _pieces(path: str) -> Iterator[bytes]:
    """The file, cut behind a line's end, or else before a character, where it is too long to be read at once."""
    rest = b""
    with open(path, "rb") as file:
        block = file.read(_BLOCK)
        while following := file.read(_BLOCK):
            block = rest + block
            cut = block.rfind(b"\n") + 1
            if not cut:  # the last byte that doesn't continue a character, if there is one
                cut = next((i for i in range(len(block) - 1, max(len(block) - 4, 0), -1) if block[i] & 0xC0 != 0x80), 0)
            cut = cut or len(block)
            yield block[:cut]
            rest, block = block[cut:], following
    yield rest + block


def _jsonl(path: str, field: str, side: bool | None) -> Read:
    offset = 0
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            start, offset = offset, offset + len(line)
            if not line.strip():
                continue
            text = _parse(line, field, start)
            if isinstance(text, Damage):
                yield number, Damage(f"{path}, line {number}{text.reason}")
            elif side is None or held_out(text) == side:
                yield number, (text,)


def _parse(line: bytes, field: str, start: int) -> bytes | Damage:
    """The text in a line of JSON that starts at this byte of its file, or how the sentence about the line goes on."""
    try:
        document = json.loads(line)
    except UnicodeDecodeError as error:
        return Damage(
            f": byte {start + error.start} of the file is not UTF-8, as JSON has to be: convert the file, or is "
            "data.format right?"
        )
    except (ValueError, RecursionError) as error:
        return Damage(f" is not JSON ({error}): is data.format right?")
    if not isinstance(document, dict) or not isinstance(document.get(field), str):
        return Damage(f" has no text in field {field!r}: correct data.field or the line")
    # A lone surrogate is valid JSON and no valid text; the tokenizer decides about its bytes.
    return document[field].encode(errors="surrogatepass")


def _parquet(path: str, field: str, side: bool | None) -> Read:
    try:
        file = parquet.ParquetFile(path, page_checksum_verification=True)
    except _PARQUET as error:
        _check_access(error)
        yield 0, Damage(f"file {path} is not Parquet or damaged ({error}): is data.format right?")
        return
    with file:
        if field not in file.schema_arrow.names:
            columns = ", ".join(file.schema_arrow.names)
            raise ValueError(f"file {path} has no column {field!r} (it has {columns}): correct data.field")
        row = end = 0
        for group in range(file.num_row_groups):
            row, end = end, end + file.metadata.row_group(group).num_rows
            try:
                for text in _column(file, group, field):
                    row += 1
                    if not isinstance(text, str | bytes):
                        reason = f"{path}, row {row} has no text in column {field!r}: correct data.field or the row"
                        yield row, Damage(reason)
                    elif side is None or held_out(text) == side:
                        yield row, (text.encode() if isinstance(text, str) else text,)
            except _PARQUET as error:
                _check_access(error)
                # Pages are compressed one after another: without this one there is no way to the rest of the group.
                reason = f"{path} is damaged ({error}): its rows {row + 1} to {end} can't be read; write the file again"
                yield from ((lost, Damage(reason)) for lost in range(row + 1, end + 1))


def _check_access(error: Exception) -> None:
    """Raises the error again if it is the system's, which is none of the file's contents."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error


def _column(file: parquet.ParquetFile, group: int, field: str) -> Iterator[Any]:
    """The values of a column in a row group."""
    for batch in file.iter_batches(batch_size=_READ, row_groups=[group], columns=[field]):
        column = batch.column(0)
        if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
            # As bytes: only the tokenizer knows whether they have to be UTF-8.
            column = column.view(pyarrow.binary() if column.type == pyarrow.string() else pyarrow.large_binary())
        yield from column.to_pylist()

"""Documents of text as bytes: of a prepared tfds set, or of files that a user has."""

import glob
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow
from pyarrow import parquet

from moe.data.source import open_builder, open_split
from moe.data.stdlib import held_out

FORMATS = ("text", "jsonl", "parquet")
_READ = 1024  # examples of a tfds set, or rows of a Parquet file, that are read at once


def set_documents(name: str, split: str, field: str, data_dir: str) -> Iterator[tuple[str, bytes]]:
    """(a name for errors, text) of every example of a split of a tfds set, in its order.

    Raises ValueError if the set, its split or its feature `field` isn't there; other errors as `open_builder`.
    """
    builder = open_builder(name, data_dir)
    info = builder.info
    if field not in info.features:
        raise ValueError(
            f"data set {info.full_name} has no feature {field!r} (it has {', '.join(info.features)}): set data.field"
        )
    examples = open_split(builder, split)
    for start in range(0, len(examples), _READ):
        indices = range(start, min(start + _READ, len(examples)))
        for index, example in zip(indices, examples.__getitems__(list(indices)), strict=True):
            text = example[field]
            yield f"{info.full_name}[{split}], example {index}", text.encode() if isinstance(text, str) else text


def file_documents(
    paths: Sequence[str], split: str, form: str, field: str, test_paths: Sequence[str]
) -> Iterator[tuple[str, bytes]]:
    """(a name for errors, text) of every document of the split "train" or "test" of files, in the order of their names.

    The test split is that of `test_paths` if there are any; otherwise the documents of `paths` whose texts hash lowest
    (5 %), so that copies of a text stay on the same side.

    Args:
        paths: files, or patterns of `glob` with ** for any folders.
        split: "train" or "test".
        form: "text": a document per file; "jsonl": one per line; "parquet": one per row.
        field: key or column of the text, in JSONL and Parquet.
        test_paths: files of the test split, likewise.

    Raises:
        ValueError: a path matches nothing, a file is empty or not of this form, or there is no such split.
    """
    if split not in ("train", "test"):
        raise ValueError(
            f"files have no split {split!r}: choose train or test (set data.test_paths to name test files)"
        )
    read = {"text": _text, "jsonl": _jsonl, "parquet": _parquet}[form]
    for path in _expand(test_paths if split == "test" and test_paths else paths):
        for name, text in read(path, field):
            if test_paths or held_out(text) == (split == "test"):
                yield name, text


def _expand(paths: Sequence[str]) -> list[str]:
    """The files that paths and patterns name, each once; empty files only if a pattern found them."""
    found: list[str] = []
    for path in paths:
        matches = [match for match in sorted(glob.glob(path, recursive=True)) if Path(match).is_file()]
        if not matches:
            raise ValueError(f"there is no file {path}: correct data.paths or data.test_paths")
        if matches == [path] and not Path(path).stat().st_size:
            raise ValueError(f"file {path} is empty: leave it out of data.paths and data.test_paths")
        found += matches
    return list(dict.fromkeys(found))


def _text(path: str, field: str) -> Iterator[tuple[str, bytes]]:
    del field
    yield path, Path(path).read_bytes()


def _jsonl(path: str, field: str) -> Iterator[tuple[str, bytes]]:
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                document = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is not JSON ({error}): is data.format right?") from error
            if not isinstance(document, dict) or not isinstance(document.get(field), str):
                raise ValueError(
                    f"{path}, line {number} has no text in field {field!r}: correct data.field or the line"
                )
            # A lone surrogate is valid JSON and no valid text; the tokenizer decides about its bytes.
            yield f"{path}, line {number}", document[field].encode(errors="surrogatepass")


def _parquet(path: str, field: str) -> Iterator[tuple[str, bytes]]:
    try:
        file = parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"file {path} is not Parquet ({error}): is data.format right?") from error
    with file:
        if field not in file.schema_arrow.names:
            columns = ", ".join(file.schema_arrow.names)
            raise ValueError(f"file {path} has no column {field!r} (it has {columns}): correct data.field")
        row = 0
        for batch in file.iter_batches(batch_size=_READ, columns=[field]):
            for text in batch.column(0).to_pylist():
                row += 1
                if not isinstance(text, str | bytes):
                    raise ValueError(
                        f"{path}, row {row} has no text in column {field!r}: correct data.field or the row"
                    )
                yield f"{path}, row {row}", text.encode() if isinstance(text, str) else text

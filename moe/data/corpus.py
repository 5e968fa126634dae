"""Tokenised documents, kept on disk and mapped into memory, so that a text is tokenised once.

A corpus is a folder. Its name ends in a hash of what was tokenised and how (`Documents.identity`,
`identify_tokenizer`), so that a changed file, split or tokenizer has another. It holds arrays in the machine's byte
order, and `meta.json`, which repeats the whole hash and has the size and CRC-32 of every array: they are read through
once per process, about a second per gigabyte, and a folder that fails is made anew. Any number of processes and hosts
may share the folder of all corpora: each writes a folder of its own and renames it into place. None of them is needed:
delete what takes space.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import socket
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Int64, Integer, UInt32

from moe.data.documents import Document, Documents, Source, count_names, name_document, open_documents
from moe.data.records import Damage
from moe.data.tokenizer import NotUtf8Error, Tokenizer, TokenizerConfig, identify_tokenizer, open_tokenizer

_FORMAT = 1
_META = "meta.json"
_CHUNK = 2**22
_ARRAYS = {"tokens", "sizes", "starts", "documents"}
_DTYPES = {"uint16": np.uint16, "int32": np.int32}


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """A split of a source, tokenised: its documents one after another, each behind a begin token.

    tokens: of all, [N]. sizes: how many bytes of text each token stands for, [N], where they were asked for.
    starts: where each document begins, and N, [D + 1]. documents: of each, [D, 4], the bytes of its text, how many of
    them no token stands for (0 without sizes), the number of its file and its place there.
    meta: what meta.json holds. It travels between processes by its folder's name.
    """

    folder: str
    meta: Mapping[str, Any]
    tokens: Integer[np.ndarray, "N"]
    sizes: UInt32[np.ndarray, "N"] | None
    starts: Int64[np.ndarray, "D_1"]
    documents: Int64[np.ndarray, "D 4"]

    def __reduce__(self) -> tuple[Any, ...]:
        """Its folder, to be opened again."""
        return _map, (self.folder,)

    def name(self, document: int) -> str:
        """What a document is called: "a.jsonl, line 3"."""
        _, _, file, place = (int(value) for value in self.documents[document])
        return name_document(self.meta["files"], self.meta["unit"], file, place)


class _DamageError(Exception):
    """What is wrong with a folder."""


def open_corpus(
    source: Source, split: str, tokenizer: TokenizerConfig, data_dir: str, cache_dir: str, with_sizes: bool
) -> Corpus:
    """A split of a source, tokenised now or before.

    Documents without text are left out, and where the source says so those that can't be read, which is said.

    Args:
        source: where documents come from.
        split: which of them.
        tokenizer: what makes tokens of them.
        data_dir: folder of all tfds sets.
        cache_dir: folder of all corpora.
        with_sizes: whether the bytes of each token are wanted, which takes 4 more bytes per token.

    Raises:
        ValueError: as `open_documents`, `open_tokenizer` and `Documents.read`; a document can't be read, or is not
            UTF-8 and has to be, and is not to be skipped; or there is no text.
        OSError: `cache_dir` cannot be written.
    """
    documents = open_documents(source, split, data_dir)
    identity: list[Any] = [_FORMAT, sys.byteorder, documents.identity, identify_tokenizer(tokenizer), with_sizes]
    identity += [source.corrupt] if source.corrupt != "stop" else []
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    name = "".join(letter if letter.isalnum() else "-" for letter in documents.label)[-60:].strip("-")
    folder = Path(cache_dir) / f"{name}-{key[:16]}"
    if folder.exists():
        try:
            return _checked(str(folder), key, _changed(folder))
        except _DamageError as damage:
            print(f"{folder} {damage}: tokenising {documents.label} again", flush=True)
    _write(folder, key, documents, open_tokenizer(tokenizer), with_sizes)
    try:
        return _checked(str(folder), key, _changed(folder))
    except _DamageError as damage:
        raise OSError(
            f"{folder} {damage}, though it was just written: is the disk sound, and is there space?"
        ) from None


def _changed(folder: Path) -> tuple[int, ...]:
    return tuple(path.stat().st_mtime_ns for path in sorted(folder.iterdir()))


@functools.lru_cache(maxsize=16)  # inspection, training and evaluation ask for the same ones
def _checked(folder: str, key: str, changed: tuple[int, ...]) -> Corpus:
    """The corpus, read through for damage; says what was left out of it."""
    del changed  # only so that what changes on disk is looked at again
    try:
        meta = json.loads((Path(folder) / _META).read_text())
        arrays = {name: (int(size), int(crc)) for name, (size, crc) in meta["arrays"].items()}
        found, dtype, notes = meta["key"], meta["dtype"], list(map(str, meta["notes"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _DamageError("has no meta.json that can be read") from None
    if found != key:
        raise _DamageError("is of other text")
    if not _ARRAYS - {"sizes"} <= arrays.keys() <= _ARRAYS or dtype not in list(_DTYPES):
        raise _DamageError("has a meta.json of another kind")
    for name, (size, crc) in arrays.items():
        path = Path(folder) / name
        if not path.is_file() or path.stat().st_size != size:
            raise _DamageError(f"is damaged ({name} does not have its {size} bytes)")
        if _crc(path) != crc:
            raise _DamageError(f"is damaged ({name} has changed)")
    for note in notes:
        print(note, flush=True)
    return _map(folder)


def _crc(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


def _map(folder: str) -> Corpus:
    meta = json.loads((Path(folder) / _META).read_text())

    def array(name: str, dtype: Any) -> np.ndarray:
        return np.memmap(Path(folder) / name, dtype, "r")

    return Corpus(
        folder=folder,
        meta=meta,
        tokens=array("tokens", _DTYPES[meta["dtype"]]),
        sizes=array("sizes", "uint32") if "sizes" in meta["arrays"] else None,
        starts=array("starts", "int64"),
        documents=array("documents", "int64").reshape(-1, 4),
    )


def _write(folder: Path, key: str, documents: Documents, tokenizer: Tokenizer, with_sizes: bool) -> None:
    """Tokenises into a folder of this process and renames it, unless another process was faster."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder.parent)
        private = folder.parent / f".{folder.name}.{socket.gethostname()}.{os.getpid()}"
        shutil.rmtree(private, ignore_errors=True)
        private.mkdir()
    except OSError as error:
        raise OSError(
            f"cannot keep the tokens of {documents.label} under {folder.parent} ({error.strerror}): set data.cache_dir "
            "to a folder that you may write to"
        ) from error
    try:
        meta = {"key": key, **_tokenise(private, documents, tokenizer, with_sizes)}
        arrays = sorted(path for path in private.iterdir())
        meta["arrays"] = {path.name: (path.stat().st_size, _crc(path)) for path in arrays}
        (private / _META).write_text(json.dumps(meta))
        _put(private, folder, key)
    finally:
        shutil.rmtree(private, ignore_errors=True)
    print(
        f"tokenised {documents.label}: {meta['documents']} documents, {meta['bytes']} bytes, {meta['tokens']} tokens, "
        f"kept in {folder}",
        flush=True,
    )


def _put(private: Path, folder: Path, key: str) -> None:
    """Renames `private` to `folder`, where there may be a damaged one, or a good one of another process."""
    with contextlib.suppress(OSError, _DamageError):
        _checked(str(folder), key, _changed(folder))
        return
    if folder.exists():
        trash = private.with_name(f"{private.name}.old")
        with contextlib.suppress(FileNotFoundError):  # another process has moved it away
            folder.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)
    try:
        private.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _sweep(parent: Path) -> None:
    """Removes what processes of this host left behind that were killed while they wrote."""
    for path in parent.glob(f".*.{socket.gethostname()}.*"):
        pid = path.name.removesuffix(".old").rpartition(".")[2]
        if pid.isdecimal() and not _is_alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)
            print(f"removed {path}, which a process that was killed left behind", flush=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _tokenise(folder: Path, documents: Documents, tokenizer: Tokenizer, with_sizes: bool) -> dict[str, Any]:
    """Writes the arrays; returns the rest of the meta data."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32)
    names = ("tokens", "starts", "documents", *(("sizes",) if with_sizes else ()))
    digest = hashlib.sha256()
    tokens = size = count = 0
    empty: list[str] = []
    damaged: list[str] = []
    reason = ""
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / name, "wb")) for name in names}
        for document in documents.read():
            name = name_document(documents.files, documents.unit, document.file, document.place)
            try:
                written = _tokenise_document(files, dtype, name, document, tokenizer)
            except DocumentError as error:
                if not documents.skips:
                    raise ValueError(f"{error} (data.corrupt=skip leaves such documents out)") from error
                damaged.append(name)
                reason = reason or str(error)
                continue
            if written is None:
                empty.append(name)
                continue
            files["starts"].write(np.int64(tokens).tobytes())
            entry = (written.size, written.left, document.file, document.place)
            files["documents"].write(np.array(entry, np.int64).tobytes())
            digest.update(written.sha256)
            tokens, size, count = tokens + written.tokens, size + written.size, count + 1
        files["starts"].write(np.int64(tokens).tobytes())
    if not count:
        lost = f", as {count_names(damaged, 'document')} can't be read ({reason})" if damaged else ""
        raise ValueError(f"data {documents.label} has no text{lost}: {documents.remedy}")
    notes = [f"{documents.label}: {count_names(empty, 'document')} without text left out"] if empty else []
    if damaged:
        notes.append(
            f"{documents.label}: {count_names(damaged, 'document')} that can't be read left out; the first: {reason}"
        )
    return {
        "label": documents.label,
        "files": documents.files,
        "unit": documents.unit,
        "dtype": dtype.name,
        "documents": count,
        "tokens": tokens,
        "bytes": size,
        "sha256": digest.hexdigest(),
        "notes": [*documents.notes, *notes],
    }


class DocumentError(ValueError):
    """A document can't be read; the message is the whole sentence."""


class _Written(NamedTuple):
    """Of a document: its bytes, those that no token stands for, its tokens with the begin, and its text's SHA-256."""

    size: int
    left: int
    tokens: int
    sha256: bytes


def _tokenise_document(
    files: Mapping[str, BinaryIO], dtype: np.dtype, name: str, document: Document, tokenizer: Tokenizer
) -> _Written | None:
    """Writes the tokens of a document, and their sizes if there is a file for them; None if it has no text.

    Raises DocumentError for one that can't be read, of which nothing is left in the files.
    """
    if isinstance(document.pieces, Damage):
        raise DocumentError(document.pieces.reason)
    places = {file: file.tell() for file in files.values()}
    digest = hashlib.sha256()
    size = ended = tokens = 0
    for piece in document.pieces:
        if piece and not size:
            files["tokens"].write(np.array([tokenizer.begin], dtype).tobytes())
            if "sizes" in files:
                files["sizes"].write(np.uint32(0).tobytes())
        try:
            if "sizes" in files:
                ids, ends = tokenizer.encode_spans(piece)
                files["sizes"].write(np.diff(ends + size, prepend=ended).astype(np.uint32).tobytes())
                ended = size + int(ends[-1]) if len(ends) else ended
            else:
                ids = tokenizer.encode(piece)
        except ValueError as error:
            for file, place in places.items():
                file.seek(place)
                file.truncate()
            said = NotUtf8Error(size + error.position) if isinstance(error, NotUtf8Error) else error
            raise DocumentError(f"{name}: {said}") from error
        files["tokens"].write(ids.astype(dtype).tobytes())
        digest.update(piece)
        size += len(piece)
        tokens += len(ids)
    return _Written(size, size - ended if "sizes" in files else 0, 1 + tokens, digest.digest()) if size else None

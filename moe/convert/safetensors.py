"""The safetensors format, tensor by tensor.

A file is the length of a header (8 bytes, little-endian), the header (JSON: name → dtype, shape, data_offsets), then
the data, row by row. A model of several files has an index (JSON) of which file holds which tensor. The package
`safetensors` neither returns bfloat16 as NumPy arrays nor writes a file piece by piece, so this reads and writes the
format itself; tests hold it against the package.
"""

import json
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from moe.files import AnyPath

DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_HEADER = 100_000_000


class Spec(NamedTuple):
    """A tensor's type (a key of DTYPES) and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class _Place(NamedTuple):
    spec: Spec
    path: Path
    offset: int


class Tensors:
    """The tensors of a folder's files: `specs` by name, and `read` for one of them.

    Raises ValueError where a file is missing, truncated or not of the format, or holds a type that weights don't have.
    """

    def __init__(self, folder: Path) -> None:
        self._places: dict[str, _Place] = {}
        for path in _files(folder):
            self._places |= _read_header(path)
        self.folder = folder

    @property
    def specs(self) -> dict[str, Spec]:
        """Type and shape of every tensor."""
        return {name: place.spec for name, place in self._places.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor, of the type that it is stored in; no other is read."""
        spec, path, offset = self._places[name]
        count = math.prod(spec.shape)
        with path.open("rb") as file:
            file.seek(offset)
            array = np.fromfile(file, DTYPES[spec.dtype], count)
        if array.size != count:
            raise ValueError(f"{path} ended while {name} was read.")
        return array.reshape(spec.shape)


def write_shards(folder: Path, specs: Mapping[str, Spec], tensors: Iterable[np.ndarray], shard_bytes: int) -> None:
    """Writes the tensors, in the order of `specs`, to files of up to `shard_bytes` bytes of data, and their index.

    Takes one tensor at a time; a tensor larger than a file may be gets a file of its own.
    """
    shards = _cut(specs, shard_bytes)
    names = [SINGLE] if len(shards) == 1 else _shard_names(len(shards))
    rest = iter(tensors)
    for file_name, shard in zip(names, shards, strict=True):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in shard:
            start, end = end, end + specs[name].nbytes
            header[name] = {
                "dtype": specs[name].dtype,
                "shape": list(specs[name].shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file_name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name in shard:
                tensor = np.ascontiguousarray(next(rest).reshape(specs[name].shape), DTYPES[specs[name].dtype])
                tensor.tofile(file)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(spec.nbytes for spec in specs.values())},
            "weight_map": {name: file for file, shard in zip(names, shards, strict=True) for name in shard},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def read_json(path: AnyPath) -> dict[str, Any]:
    """A JSON object. Raises ValueError where there is no such file, or it holds something else."""
    try:
        table = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"there is no {path}.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(table, dict):
        raise ValueError(f"{path} must hold a JSON object.")
    return table


def _shard_names(count: int) -> list[str]:
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _cut(specs: Mapping[str, Spec], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.nbytes
    return shards


def _files(folder: Path) -> list[Path]:
    """The files of the index, or the only one; all there."""
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map or not all(map(_is_text, weight_map.values())):
            raise ValueError(f"{folder / INDEX} has no table weight_map of tensors and their files.")
        names = sorted(set(weight_map.values()))
        # A name that leads elsewhere is no file of this model.
        if any(Path(name).name != name or name in ("", "..") for name in names):
            raise ValueError(f"{folder / INDEX} names files outside of {folder}.")
    else:
        names = [SINGLE]
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder} lacks {name}: download it again.")
    return [folder / name for name in names]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _read_header(path: Path) -> dict[str, _Place]:
    """Where each tensor of a file lies, if the file is as long as they need."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise ValueError(f"{path} is truncated or no safetensors file: download it again.")
        text = file.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        header = None
    try:
        header.pop("__metadata__", None)
        return {name: _read_entry(path, name, 8 + length, size, **entry) for name, entry in header.items()}
    except (TypeError, AttributeError):
        raise ValueError(f"{path} has a damaged header: download it again.") from None


def _read_entry(
    path: Path, name: str, first: int, size: int, *, dtype: str, shape: list[int], data_offsets: list[int]
) -> _Place:
    """One entry of a header; `first` is where the data begin in a file of `size` bytes."""
    if dtype not in DTYPES:
        raise ValueError(
            f"{name} in {path} is of type {dtype}: weights of {', '.join(DTYPES)} can be converted, so convert the "
            "unquantised model."
        )
    if not all(type(number) is int for number in (*shape, *data_offsets)) or len(data_offsets) != 2:
        raise TypeError("numbers of another kind")
    spec = Spec(dtype, tuple(shape))
    begin, end = first + data_offsets[0], first + data_offsets[1]
    if not (min(shape, default=0) >= 0 and first <= begin and end - begin == spec.nbytes and end <= size):
        raise ValueError(
            f"{path} is truncated or damaged, download it again: {name} lies at bytes {begin} to {end} of {size}."
        )
    return _Place(spec, path, begin)

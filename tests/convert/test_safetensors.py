"""The file format, read and written by hand here."""

import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from moe.convert.safetensors import Spec, Tensors, write_shards

ARRAYS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3) - 2.5,
    "b": np.array([1.5, -3.0], ml_dtypes.bfloat16),
    "c": np.array([[0.1]], np.float16),
    "d": np.zeros((0, 3), np.float64),
}
SPECS = {
    "a.weight": Spec("F32", (2, 3)),
    "b": Spec("BF16", (2,)),
    "c": Spec("F16", (1, 1)),
    "d": Spec("F64", (0, 3)),
}


def file_of(header: dict, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def one_tensor(**changes: object) -> bytes:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes
    return file_of({"x": entry}, bytes(8))


def test_what_is_read_is_what_the_bytes_say(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "y": {"dtype": "BF16", "shape": [3], "data_offsets": [4, 10]},
        "x": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]},
    }
    # The upper halves of the float32 numbers 1, -2 and 3.
    data = struct.pack("<f", 0.1) + struct.pack("<HHH", 0x3F80, 0xC000, 0x4040)
    (tmp_path / "model.safetensors").write_bytes(file_of(header, data))
    tensors = Tensors(tmp_path)
    assert tensors.specs == {"x": Spec("F32", (1, 1)), "y": Spec("BF16", (3,))}
    assert tensors.read("x") == np.float32(0.1)
    assert tensors.read("y").tolist() == [1.0, -2.0, 3.0]


@pytest.mark.parametrize(("shard_bytes", "files"), [(1000, 1), (26, 2), (1, 4)])
def test_what_is_written_is_read_again(shard_bytes: int, files: int, tmp_path: Path) -> None:
    write_shards(tmp_path, SPECS, iter(ARRAYS.values()), shard_bytes)
    written = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(written) == files
    assert (tmp_path / "model.safetensors.index.json").exists() == (files > 1)
    assert written[0] == ("model.safetensors" if files == 1 else f"model-00001-of-{files:05d}.safetensors")
    tensors = Tensors(tmp_path)
    assert tensors.specs == SPECS
    for name, array in ARRAYS.items():
        assert tensors.read(name).tobytes() == array.tobytes()
        assert tensors.read(name).dtype == array.dtype


def test_data_begin_aligned(tmp_path: Path) -> None:
    write_shards(tmp_path, SPECS, iter(ARRAYS.values()), 1000)
    start = (tmp_path / "model.safetensors").read_bytes()[:8]
    assert struct.unpack("<Q", start)[0] % 8 == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "truncated or no safetensors file"),
        (b"\x05\0\0", "truncated or no safetensors file"),
        (one_tensor()[:30], "truncated or no safetensors file"),
        (one_tensor()[:-1], r"truncated or damaged, download it again: x lies at bytes \d+ to \d+ of \d+"),
        (one_tensor(data_offsets=[-4, 4]), "truncated or damaged"),
        (one_tensor(data_offsets=[0, 4]), "truncated or damaged"),
        (one_tensor(shape=[-2, -1]), "truncated or damaged"),
        (one_tensor(dtype="F8_E4M3"), "x in .* is of type F8_E4M3: weights of F64, F32, F16, BF16 can be converted"),
        (one_tensor(more=1), "damaged header"),
        (one_tensor(shape="ab"), "damaged header"),
        (struct.pack("<Q", 3) + b"{]}", "damaged header"),
        (struct.pack("<Q", 2) + b"[]", "damaged header"),
    ],
)
def test_damaged_files(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        Tensors(tmp_path)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ('{"weight_map": {"x": "gone.safetensors"}}', "lacks gone.safetensors"),
        ('{"weight_map": {"x": "../model.safetensors"}}', "names files outside"),
        ('{"weight_map": {}}', "has no table weight_map"),
        ("{", "is not valid JSON"),
        ("[]", "must hold a JSON object"),
    ],
)
def test_damaged_indexes(index: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=words):
        Tensors(tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lacks model\.safetensors"):
        Tensors(tmp_path)

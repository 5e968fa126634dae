"""Damage to prepared sets on disk, of the kinds that disks and downloads do, and that wrong conversions do."""

import shutil
from collections.abc import Callable
from pathlib import Path

import array_record.python.array_record_module as array_record
from tensorflow_datasets.proto import tf_example_generated_pb2 as tf_example_pb2


def copy(source: str, target: Path) -> str:
    """A copy of a folder of sets, without the folders of tokens."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("tokens"))
    return str(target)


def shard(folder: str, split: str, number: int = 0) -> Path:
    """The file of a split with this number."""
    (path,) = Path(folder).glob(f"**/*-{split}.array_record-{number:05d}-of-*")
    return path


def records(path: Path) -> list[bytes]:
    reader = array_record.ArrayRecordReader(str(path))
    found = reader.read_all()
    reader.close()
    return found


def write(path: Path, content: list[bytes]) -> None:
    """Uncompressed, so that records stand in the file as they are."""
    writer = array_record.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for record in content:
        writer.write(record)
    writer.close()


def flip(path: Path, record: int, at: int) -> None:
    """Changes one byte of a record, counted from its beginning; negative: of what the file says of it, before."""
    found = records(path)
    write(path, found)
    content = bytearray(path.read_bytes())
    content[content.index(found[record]) + at] ^= 0x55
    path.write_bytes(content)


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def change(path: Path, record: int, edit: Callable[[tf_example_pb2.Example], object]) -> None:
    """Edits the features of a record, which remains sound as such."""
    found = records(path)
    example = tf_example_pb2.Example.FromString(found[record])
    edit(example)
    found[record] = example.SerializeToString()
    write(path, found)


def relabel(path: Path, record: int, label: int) -> None:
    def edit(example: tf_example_pb2.Example) -> None:
        example.features.feature["label"].int64_list.value[:] = [label]

    change(path, record, edit)

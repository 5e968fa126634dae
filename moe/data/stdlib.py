"""The Python standard library's own sources as a tfds data set: about 12 MB of real text that needs no download."""

import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from moe.data.generated import GeneratedInfo

HELD_OUT = 0.05  # share of the files that are kept to test on
# Tests, wherever they stand, and what only Windows installs.
_WITHOUT = {"test", "tests", "idle_test", "msilib"}

_DESCRIPTION = """\
The .py files of the modules that the Python that wrote this set lists as its standard library, without its test
packages, one example per file, in the order of their names. A file tests if the hash of its name says so (5 %)."""


class Stdlib(tfds.core.GeneratorBasedBuilder):
    """Features: name, the path below the library's folder; text, the bytes of the file.

    Splits: train; test, the 5 % of files whose names hash lowest (`held_out`), so that a file stays on its side
    whatever else a version of Python adds. The set has the version of Python, as each has sources of its own; the
    metadata hold `manifest_sha256`, the hash of a list of all files' hashes and names, and `bytes`. Only modules of
    `sys.stdlib_module_names` count, which is the same on all platforms: so nothing that a build or an installer writes
    beside them (`_sysconfigdata*`, `config-3.*`, `site-packages`, `sitecustomize.py`), and a version of Python has one
    manifest wherever its sources are installed whole and unchanged.
    """

    # The name changes with what is chosen, so that a set chosen otherwise, from before, isn't taken for this one.
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="modules", description="Modules listed, no tests.")]  # noqa: RUF012

    VERSION = tfds.core.Version("{}.{}.{}".format(*sys.version_info[:3]))
    RELEASE_NOTES = {str(VERSION): "The sources of this version."}  # noqa: RUF012, the base class declares it so

    def _info(self) -> tfds.core.DatasetInfo:
        return GeneratedInfo(
            builder=self,
            description=_DESCRIPTION,
            homepage="https://docs.python.org/3/library/",
            features=tfds.features.FeaturesDict({"name": tfds.features.Text(), "text": tfds.features.Text()}),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager  # nothing to download
        root = Path(sysconfig.get_path("stdlib"))
        names = source_names(root)
        if not names:
            raise ValueError(
                f"this Python has no sources of its standard library under {root}: run it from an ordinary "
                "installation, or choose another set in data.name"
            )
        texts = {name: (root / name).read_bytes() for name in names}
        self.info.metadata["manifest_sha256"] = manifest_sha256(texts)
        self.info.metadata["bytes"] = sum(map(len, texts.values()))
        return {
            "train": self._generate_examples([name for name in names if not held_out(name)], texts),
            "test": self._generate_examples([name for name in names if held_out(name)], texts),
        }

    def _generate_examples(self, names: list[str], texts: dict[str, bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, name in enumerate(names):
            yield index, {"name": name, "text": texts[name]}


def source_names(root: Path) -> list[str]:
    """The .py files below `root` of modules of the standard library, sorted, with slashes; not those of tests."""
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _WITHOUT]
        names += [(Path(folder) / name).relative_to(root).as_posix() for name in files if name.endswith(".py")]
    return sorted(name for name in names if name.partition("/")[0].removesuffix(".py") in sys.stdlib_module_names)


def held_out(key: str | bytes) -> bool:
    """Whether the example of this key tests: whether the key's SHA-256, as a fraction of its range, is below 5 %."""
    return is_low(hashlib.sha256(key.encode() if isinstance(key, str) else key).digest())


def is_low(sha256: bytes) -> bool:
    """Whether a SHA-256, as a fraction of its range, is below 5 %."""
    return int.from_bytes(sha256[:8], "big") < HELD_OUT * 2**64


def manifest_sha256(texts: dict[str, bytes]) -> str:
    """SHA-256 of the lines "hash of the file, two spaces, name" of all files in the order of their names, as hex."""
    lines = [f"{hashlib.sha256(texts[name]).hexdigest()}  {name}\n" for name in sorted(texts)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()

import hashlib
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from moe.data import source, stdlib

ROOT = Path(sysconfig.get_path("stdlib"))


@pytest.fixture(scope="module")
def builder(stdlib_dir):
    return source.open_builder("stdlib", stdlib_dir)


def test_the_set_is_the_librarys_sources_without_its_tests(builder):
    splits = {name: list(builder.as_data_source(name)) for name in ("train", "test")}
    files = {example["name"].decode(): example["text"] for split in splits.values() for example in split}
    assert all((ROOT / name).read_bytes() == text for name, text in files.items())
    assert {"abc.py", "asyncio/base_events.py", "unittest/case.py"} <= files.keys()
    parts = {part for name in files for part in Path(name).parts}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert 8e6 < sum(map(len, files.values())) < 20e6
    for name, split in splits.items():
        names = [example["name"].decode() for example in split]
        assert names == sorted(names)
        fractions = [int(hashlib.sha256(name.encode()).hexdigest(), 16) / 2**256 for name in names]
        assert all((fraction < 0.05) == (name == "test") for fraction in fractions)
    assert 0.02 < len(splits["test"]) / len(files) < 0.08


def test_what_a_machine_writes_beside_the_library_is_left_out(tmp_path):
    own = ["abc.py", "json/__init__.py", "json/decoder.py", "sysconfig/__init__.py"]
    beside = [
        "_sysconfigdata__linux_x86_64-linux-gnu.py",
        "config-3.11-x86_64-linux-gnu/python-config.py",
        "site-packages/abc.py",
        "dist-packages/json/__init__.py",
        "sitecustomize.py",
        "mine/abc.py",
        "json/__pycache__/decoder.cpython-311.pyc",
        "json/decoder.pyi",
        "test/test_abc.py",
        "lib2to3/tests/test_main.py",
        "idlelib/idle_test/test_run.py",
        "msilib/__init__.py",
        "__phello__/spam.py",
    ]
    for name in own + beside:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert stdlib.source_names(tmp_path) == own


def test_the_metadata_name_the_version_and_what_was_read(builder, tmp_path):
    info = builder.info
    assert str(info.version) == "{}.{}.{}".format(*sys.version_info[:3])
    assert info.file_format.value == "array_record"
    for name in stdlib.source_names(ROOT):
        copy = tmp_path / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, copy)
    manifest = subprocess.run(
        "find . -type f | sed s:^./:: | LC_ALL=C sort | tr '\\n' '\\0' | xargs -0 sha256sum | sha256sum",
        shell=True, cwd=tmp_path, capture_output=True, text=True, check=True,
    ).stdout.split()[0]  # fmt: skip
    assert info.metadata["manifest_sha256"] == manifest
    assert info.metadata["bytes"] == sum(path.stat().st_size for path in tmp_path.rglob("*.py"))


def test_a_python_without_sources_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"no sources of its standard library under .*nothing: run it from"):
        source.prepare("stdlib", str(tmp_path / "data"))

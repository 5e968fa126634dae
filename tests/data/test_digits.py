import os
import pathlib
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from sklearn import datasets

from moe.data import source
from moe.data.digits import Digits


@pytest.mark.parametrize(("split", "scans"), [("train", slice(0, 1437)), ("test", slice(1437, 1797))])
def test_splits_hold_scikit_learns_scans_in_order(data_dir, split, scans):
    expected = datasets.load_digits()
    images, labels, *_ = source.ImageSplit(source.open_builder("digits", data_dir), split, size=8).read(
        np.arange(scans.stop - scans.start)
    )
    assert images.dtype == np.float32
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(16 * images[..., 0], expected.images[scans])
    np.testing.assert_array_equal(labels, expected.target[scans])


def test_builder_describes_the_set(data_dir):
    builder = Digits(data_dir=data_dir)
    info = builder.info
    assert {name: split.num_examples for name, split in info.splits.items()} == {"train": 1437, "test": 360}
    assert info.features["image"].shape == (8, 8, 1)
    assert info.features["label"].num_classes == 10
    assert info.metadata["pixel_max"] == 16
    assert info.file_format.value == "array_record"
    example = builder.as_data_source("test")[0]
    assert example["image"].dtype == np.uint8
    np.testing.assert_array_equal(example["image"][..., 0], datasets.load_digits().images[1437])


PREPARE = """
    import pathlib, socket, sys, time

    def refuse(*_):
        raise AssertionError("no network")

    socket.getaddrinfo = socket.socket.connect = refuse

    from moe.data import source

    folder, me, other = sys.argv[1:]
    pathlib.Path(me).touch()
    while not pathlib.Path(other).exists():
        time.sleep(0.001)
    source.prepare("digits", folder)
    print(len(source.ImageSplit(source.open_builder("digits", folder), "train", 8)))
"""


def test_two_processes_may_prepare_at_once_and_write_nowhere_else(tmp_path):
    folder, elsewhere = tmp_path / "datasets", tmp_path / "elsewhere"
    elsewhere.mkdir()
    ready = [str(tmp_path / "ready0"), str(tmp_path / "ready1")]
    root = pathlib.Path(__file__).parents[2]
    environment = os.environ | {"HOME": str(elsewhere), "TMPDIR": str(elsewhere), "PYTHONPATH": str(root)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", textwrap.dedent(PREPARE), str(folder), *pair],
            env=environment,
            cwd=elsewhere,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for pair in (ready, ready[::-1])
    ]
    for process in processes:
        assert process.communicate(timeout=120) == ("1437\n", "")
        assert process.returncode == 0
    assert os.listdir(elsewhere) == []
    assert os.listdir(folder) == ["digits"]
    assert os.listdir(folder / "digits") == ["1.0.0"]


def test_whoever_comes_second_keeps_what_is_there(tmp_path, monkeypatch):
    folder = str(tmp_path)
    generate = Digits.download_and_prepare

    def overtaken(self):
        monkeypatch.setattr(Digits, "download_and_prepare", generate)
        source.prepare("digits", folder)
        files.extend(os.stat(path).st_ino for path in tmp_path.glob("digits/1.0.0/*"))
        generate(self)

    files: list[int] = []
    monkeypatch.setattr(Digits, "download_and_prepare", overtaken)
    source.prepare("digits", folder)
    assert len(files) > 0
    assert files == [os.stat(path).st_ino for path in tmp_path.glob("digits/1.0.0/*")]
    assert os.listdir(folder) == ["digits"]


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(self):
        raise RuntimeError("disk full")

    monkeypatch.setattr(Digits, "download_and_prepare", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        source.prepare("digits", str(tmp_path))
    assert os.listdir(tmp_path / "digits") == []
    assert os.listdir(tmp_path) == ["digits"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write data set 'digits' under .*file \(.*\): set TFDS_DATA_DIR or data"):
        source.prepare("digits", str(tmp_path / "file"))

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from moe.data import source

PHOTO = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)


class Photos(tfds.core.GeneratorBasedBuilder):
    """Two copies of one photograph, as a set that the package knows nothing of."""

    VERSION = tfds.core.Version("2.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Tensor(shape=(12, 20, 3), dtype=np.uint8),
            "label": np.int64,
            "photo": np.int64,
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for index in range(2):
            yield index, {"image": PHOTO, "label": 7, "photo": index}


@pytest.fixture(scope="module")
def photos_dir(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("photos"))
    Photos(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_any_prepared_set_is_read_from_its_files(photos_dir):
    split = source.ImageSplit(source.open_builder("photos", photos_dir), "train", size=6)
    assert len(split) == 2
    assert repr(split) == "ImageSplit(photos/2.0.0[train], size=6)"
    images, labels, *_ = split.read(np.array([1, 0]))
    expected = jax.image.resize(PHOTO[:, 4:16] / np.float32(255), (6, 6, 3), "linear", antialias=True)
    np.testing.assert_allclose(images, [expected, expected], atol=1e-6)
    np.testing.assert_array_equal(labels, [7, 7])


def test_split_in_memory_reads_the_same(data_dir):
    builder = source.open_builder("digits", data_dir)
    index = np.array([359, 0, 17])
    on_disk, held = (source.ImageSplit(builder, "test", 8, in_memory) for in_memory in (False, True))
    for expected, actual in zip(on_disk.read(index), held.read(index), strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(("side", "size"), [(5, 5), (3, 10), (17, 4), (8, 7), (1, 3), (6, 1)])
def test_resize_matches_jax(side, size):
    image = np.random.default_rng(0).random((side, side, 2), np.float32)
    expected = jax.image.resize(image, (size, size, 2), "linear", antialias=True)
    np.testing.assert_allclose(source.resize(image, size), expected, atol=1e-6)


def test_resize_takes_the_central_square():
    image = np.arange(5 * 2, dtype=np.float32).reshape(5, 2, 1)
    np.testing.assert_array_equal(source.resize(image, 2), image[1:3])
    np.testing.assert_array_equal(source.resize(image.transpose(1, 0, 2), 2), image[1:3].transpose(1, 0, 2))


def test_data_dir_is_the_given_one_then_the_environments_then_data(monkeypatch):
    monkeypatch.setenv("HOME", "/elsewhere/someone")
    monkeypatch.setenv("TFDS_DATA_DIR", "/environment")
    assert source.resolve_data_dir("~/given") == "/elsewhere/someone/given"
    assert source.resolve_data_dir() == "/environment"
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert source.resolve_data_dir() == "data"


@pytest.mark.parametrize("name", ["digit", "imagenet2012"])
def test_a_set_that_is_not_there_is_named_with_the_remedy(tmp_path, name):
    with pytest.raises(
        ValueError, match=rf"'{name}' is neither built in \(digits, stdlib\) nor .* `tfds build {name} --data_dir="
    ):
        source.open_builder(name, str(tmp_path))


@pytest.mark.parametrize("split", ["validation", "train[:0%]", "train[:"])
def test_a_split_that_is_not_there_is_answered_with_the_splits(data_dir, split):
    builder = source.open_builder("digits", data_dir)
    with pytest.raises(
        ValueError, match=r"has no split '.*', or it is empty: choose one of train \(1437\), test \(360\)"
    ):
        source.ImageSplit(builder, split, 8)


def test_a_set_without_labels_is_refused(photos_dir, monkeypatch):
    builder = source.open_builder("photos", photos_dir)
    features = tfds.features.FeaturesDict({"image": builder.info.features["image"], "caption": np.int64})
    monkeypatch.setattr(builder.info, "_features", features)
    with pytest.raises(
        ValueError, match=r"photos/2.0.0 has no feature label \(it has image, caption\): choose an image"
    ):
        source.ImageSplit(builder, "train", 6)


def test_files_without_random_access_are_refused(photos_dir, tmp_path):
    copy = tmp_path / "photos"
    shutil.copytree(pathlib.Path(photos_dir) / "photos", copy)
    info = copy / "2.0.0" / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"fileFormat": "tfrecord"}))
    builder = source.open_builder("photos", str(tmp_path))
    with pytest.raises(ValueError, match=r"stored as tfrecord, .*: prepare it again with --file_format=array_record"):
        source.ImageSplit(builder, "train", 6)

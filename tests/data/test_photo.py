"""Photographs: from the bytes that tfds stores to batches, and what a damaged one says."""

import dataclasses
import io
import itertools
import subprocess
import sys
from pathlib import Path

import array_record.python.array_record_module as array_record
import numpy as np
import pytest
from PIL import Image

from moe.data.augment import Augment, uniform
from moe.data.photo import PhotoConfig, PhotoSplit, central_crop, random_crop, sample_box
from moe.data.pipeline import DataConfig, inspect_data, make_eval_batches, make_train_iterator
from moe.data.randaugment import RandAugment
from moe.data.source import open_builder, resize
from tests.data import photos

TRAIN = PhotoConfig(min_area=0.05, flip=True, randaugment=RandAugment(layers=2), resize=28, value_range=(-1.0, 1.0))


@pytest.fixture(scope="module")
def photos_dir(tmp_path_factory):
    return photos.prepare(tmp_path_factory.mktemp("photos"))


@pytest.fixture
def config(photos_dir):
    return DataConfig(name="snapshots", data_dir=photos_dir, image_size=24, photo=TRAIN, threads=0)


def take(iterator, count):
    batches = list(itertools.islice(iterator, count))
    return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for key in expected:
        np.testing.assert_array_equal(actual[key], expected[key], err_msg=key)


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)), np.float32)


def test_evaluation_is_resized_and_cropped_at_the_centre(photos_dir):
    split = PhotoSplit(open_builder("snapshots", photos_dir), "validation", 24, PhotoConfig(resize=32))
    index = np.array([3, 0, 6, 4, 5])
    images, labels, *_ = split.read(index)
    assert repr(split) == "PhotoSplit(snapshots/5.1.0[validation], size=24)"
    assert images.dtype == np.float32
    np.testing.assert_array_equal(labels, (100 + index) % 5)
    for image, place in zip(images, index, strict=True):
        whole = pixels(photos.jpeg(100 + place))
        height, width, _ = whole.shape
        rows, columns = (round(side * 32 / min(height, width)) for side in (height, width))
        scaled = linear(whole, (0, 0, width, height), rows, columns)
        top, left = (rows - 24) // 2, (columns - 24) // 2
        expected = scaled[top : top + 24, left : left + 24]
        np.testing.assert_allclose(255 * image, expected, atol=1.01)  # Pillow rounds after each axis


def linear(image, box, height, width):
    """A part (left, top, width, height), resampled with a triangle as wide as a pixel of the finer grid."""
    left, top, part_width, part_height = box
    for axis, (first, extent, size) in enumerate([(top, part_height, height), (left, part_width, width)]):
        ratio = extent / size
        centres = first + (np.arange(size) + 0.5) * ratio
        distances = np.abs(np.arange(image.shape[axis]) + 0.5 - centres[:, None])
        weights = np.maximum(0, 1 - distances / max(1, ratio))
        weights /= weights.sum(axis=1, keepdims=True)
        image = np.moveaxis(np.tensordot(weights, image, axes=(1, axis)), 0, axis)
    return image


def test_without_resize_the_crop_is_as_large_as_can_be():
    whole = pixels(photos.jpeg(2))
    np.testing.assert_allclose(np.asarray(central_crop(photos.jpeg(2), 16)), resize(whole, 16), atol=1.01)
    np.testing.assert_array_equal(np.asarray(central_crop(photos.jpeg(2), 64)), whole)


def test_a_training_crop_is_the_drawn_part():
    data = photos.jpeg(0)
    whole = pixels(data)
    for position in range(20):
        draws = uniform(0, np.array([position]), 4)[0]
        box = sample_box(draws, 40, 30, 0.05, 4 / 3)
        crop = np.asarray(random_crop(data, 24, draws, 0.05, 4 / 3))
        np.testing.assert_allclose(crop, linear(whole, box, 24, 24), atol=1.01)


def test_large_photographs_are_decoded_at_a_fraction_and_look_the_same():
    data = photos.jpeg(3)  # 200 by 150
    whole = pixels(data)
    opened = []
    for position in range(20):
        draws = uniform(1, np.array([position]), 4)[0]
        box = sample_box(draws, 200, 150, 0.3, 4 / 3)
        crop = np.asarray(random_crop(data, 24, draws, 0.3, 4 / 3), np.float32)
        opened.append(min(box[2:]) // 24)
        assert np.abs(crop - linear(whole, box, 24, 24)).mean() < 2.5
    assert max(opened) >= 4


def test_boxes_stay_inside_and_reach_their_extents():
    for width, height in [(500, 375), (375, 500), (64, 64)]:
        draws = uniform(3, np.arange(4000), 4)
        boxes = np.array([sample_box(one, width, height, 0.05, 4 / 3) for one in draws])
        left, top, part_width, part_height = boxes.T
        assert (boxes[:, :2] >= 0).all()
        assert (left + part_width <= width).all()
        assert (top + part_height <= height).all()
        area = part_width * part_height / (width * height)
        ratio = part_width / part_height
        assert 0.045 < area.min() < 0.06
        assert area.max() > 0.9
        half_pixel = 0.5 / part_height
        assert (ratio >= 3 / 4 - half_pixel).all()
        assert (ratio <= 4 / 3 + half_pixel).all()
        assert ratio.min() < 0.78
        assert ratio.max() > 1.3
        assert left.min() == top.min() == 0
        assert (left + part_width).max() == width
        assert (top + part_height).max() == height


def test_a_box_by_hand():
    # Ratio 1 of [1/2, 2] at a third; heights from 50 (a quarter of 100 · 100) to 100, so 51 of them.
    assert sample_box(np.array([1 / 3, 0.0, 0.0, 0.999]), 100, 100, 0.25, 2.0) == (50, 0, 50, 50)
    assert sample_box(np.array([1 / 3, 0.999, 0.5, 0.5]), 100, 100, 0.25, 2.0) == (0, 0, 100, 100)
    # So long a photograph that no part has a quarter of its area: the largest that fits.
    assert sample_box(np.array([1 / 3, 0.5, 0.5, 0.0]), 1000, 10, 0.25, 2.0) == (0, 0, 10, 10)


@pytest.mark.parametrize("data", [photos.jpeg(2, "L"), photos.jpeg(2, "CMYK"), photos.jpeg(2, progressive=True)])
def test_other_kinds_of_jpeg_are_brought_to_colour(data):
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.float32)
    np.testing.assert_allclose(np.asarray(central_crop(data, 20)), resize(expected, 20), atol=1.01)
    assert random_crop(data, 20, np.full(4, 0.5), 0.05, 4 / 3).mode == "RGB"
    assert random_crop(data, 20, np.full(4, 0.5), 0.05, 4 / 3, mode="L").mode == "L"


def test_training_batches_are_augmented_anew_in_every_epoch(config):
    info = inspect_data(config)
    assert info.image_shape == (24, 24, 3)
    assert (info.classes, info.train_examples, info.splits) == (5, 21, {"train": 21, "validation": 7})
    batches = take(make_train_iterator(config, 7, 0, 0, 1), 6)
    np.testing.assert_array_equal(batches["label"], batches["index"] % 5)
    assert batches["image"].dtype == np.float32
    assert batches["image"].min() >= -1.0
    assert batches["image"].max() <= 1.0
    assert batches["image"].min() < -0.8
    twice = [batches["image"][batches["index"] == place] for place in range(21)]
    assert all(len(pair) == 2 and (pair[0] != pair[1]).any() for pair in twice)


def test_flip_mirrors_about_half(config):
    plain = dataclasses.replace(config, photo=PhotoConfig(), shuffle=False)
    mirrored = dataclasses.replace(plain, photo=PhotoConfig(flip=True))
    before, after = (take(make_train_iterator(one, 42, 0, 0, 1), 1)["image"] for one in (plain, mirrored))
    kept = (after == before).all(axis=(1, 2, 3))
    assert (kept ^ (after == before[:, :, ::-1]).all(axis=(1, 2, 3))).all()
    assert 12 <= kept.sum() <= 30


def test_the_same_images_on_any_hosts_and_threads_and_after_a_resume(config):
    one = take(make_train_iterator(config, 12, 3, 0, 1), 3)
    parts = [make_train_iterator(config, 12, 3, host, 2) for host in range(2)]
    for step in range(3):
        batch = [next(part) for part in parts]
        rows = {key: value[12 * step : 12 * step + 12] for key, value in one.items()}
        assert_same({key: np.concatenate([half[key] for half in batch]) for key in batch[0]}, rows)
    for change in ({"threads": 3}, {"in_memory": True}):
        other = make_train_iterator(dataclasses.replace(config, **change), 6, 3, 0, 1)
        other.set_state({"examples": 12})
        assert_same(take(other, 4), {key: value[12:] for key, value in one.items()})
        other.close()
    other_seed = take(make_train_iterator(config, 12, 4, 0, 1), 1)
    assert (other_seed["image"] != one["image"][:12]).any()


@pytest.mark.nightly
def test_worker_processes_change_nothing(config):
    ahead = make_train_iterator(dataclasses.replace(config, workers=2, threads=1), 6, 3, 0, 1)
    assert_same(take(ahead, 4), take(make_train_iterator(config, 6, 3, 0, 1), 4))
    ahead.close()


def test_the_small_transforms_work_on_photographs_too(config):
    moved = dataclasses.replace(config, augment=Augment(shift=3.0))
    still = take(make_train_iterator(config, 12, 3, 0, 1), 1)["image"]
    assert (take(make_train_iterator(moved, 12, 3, 0, 1), 1)["image"] != still).any()


def test_evaluation_batches_are_masked(config):
    batches = list(make_eval_batches(config, "validation", 4, 0, 1))
    np.testing.assert_array_equal(np.concatenate([batch["mask"] for batch in batches]), [True] * 7 + [False])
    assert not batches[1]["image"][3].any()
    stored, *_ = PhotoSplit(open_builder("snapshots", config.data_dir), "validation", 24, TRAIN).read(np.arange(7))
    np.testing.assert_array_equal(np.concatenate([batch["image"] for batch in batches])[:7], stored)


def test_a_damaged_record_is_named_with_its_file(config, tmp_path):
    """One in the middle of the second file, its picture cut short by half, read past the slice's first two."""
    damage(config.data_dir, tmp_path, file=1, record=3)
    broken = dataclasses.replace(config, data_dir=str(tmp_path), train_split="train[2:]", shuffle=False, threads=1)
    iterator = make_train_iterator(broken, 4, 0, 0, 1)
    message = (
        r"the example at index 8 of snapshots/5.1.0\[train\[2:\]\] can't be used \(.+\): it is record 3 of "
        r".*snapshots-train.array_record-00001-of-00003; prepare the set again"
    )
    next(iterator), next(iterator)
    with pytest.raises(OSError, match=message):
        next(iterator)
    iterator.close()


def damage(source, target, file, record):
    folder = Path(target) / "snapshots" / "5.1.0"
    folder.mkdir(parents=True)
    for path in Path(source).glob("snapshots/5.1.0/*"):
        (folder / path.name).write_bytes(path.read_bytes())
    path = folder / f"snapshots-train.array_record-{file:05d}-of-00003"
    reader = array_record.ArrayRecordReader(str(path))
    records = reader.read_all()
    reader.close()
    begin, end = records[record].index(b"\xff\xd8"), records[record].index(b"\xff\xd9") + 2
    half = (end - begin) // 2
    # Of the same length, so that the record itself is in order.
    records[record] = records[record][: end - half] + bytes(half) + records[record][end:]
    writer = array_record.ArrayRecordWriter(str(path), "group_size:1")
    for one in records:
        writer.write(one)
    writer.close()


def test_a_crop_larger_than_the_photograph_that_it_is_cut_from_is_refused(photos_dir):
    with pytest.raises(ValueError, match=r"data.photo.resize is 20, but crops of data.image_size 24 .* at least 24"):
        PhotoSplit(open_builder("snapshots", photos_dir), "train", 24, PhotoConfig(resize=20))


@pytest.mark.parametrize(
    ("field", "value"),
    [("min_area", 1.5), ("min_area", -0.1), ("max_ratio", 0.5), ("resize", -1), ("value_range", (1.0, 1.0))],
)
def test_fields_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=rf"data.photo.{field} is .*: (it must|give)"):
        PhotoConfig(**{field: value})


def test_no_tensorflow_is_imported(photos_dir):
    code = (
        "import sys; import numpy as np; from moe.data import photo, source; "
        f"b = source.open_builder('snapshots', {photos_dir!r}); "
        "print(photo.PhotoSplit(b, 'train', 8, photo.PhotoConfig()).read(np.arange(2))[0].shape, "
        "'tensorflow' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "(2, 8, 8, 3) False\n"

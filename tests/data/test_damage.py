"""Image sets whose files are damaged: the run stops and says where, or goes on without, in the same way everywhere."""

import contextlib
import dataclasses
import itertools
import json
import re

import numpy as np
import pytest

from moe import tasks
from moe.data.photo import PhotoConfig
from moe.data.pipeline import DataConfig, check_labels, make_eval_batches, make_train_iterator
from moe.data.records import Damage, Records
from moe.data.source import open_builder
from moe.evaluation import classify
from tests.data import damage, photos

PHOTOS = PhotoConfig(min_area=0.3, flip=True)
# Of the 21 examples to train on, 7 in a file: number 3 of the second, and both ends of the split.
LOST, NEXT = [0, 10, 20], {0: 1, 10: 11, 20: 1}


@pytest.fixture(scope="module")
def sound_dir(tmp_path_factory):
    return photos.prepare(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def damaged_dir(sound_dir, tmp_path_factory):
    """Three training examples and one to evaluate on are damaged, each in a way of its own."""
    folder = damage.copy(sound_dir, tmp_path_factory.mktemp("damaged") / "sets")
    damage.flip(damage.shard(folder, "train", 0), 0, at=200)
    damage.relabel(damage.shard(folder, "train", 1), 3, label=5)
    damage.change(damage.shard(folder, "train", 2), 6, halve)
    damage.flip(damage.shard(folder, "validation", 1), 0, at=50)
    return folder


def halve(example):
    """The picture is cut short, as an interrupted download leaves it."""
    value = example.features.feature["image"].bytes_list.value
    value[0] = value[0][: len(value[0]) // 2]


@pytest.fixture
def config(damaged_dir):
    return DataConfig(
        name="snapshots",
        data_dir=damaged_dir,
        test_split="validation",
        image_size=16,
        photo=PHOTOS,
        threads=0,
        corrupt="skip",
    )


def read(config, count, batch_size=6, hosts=1, state=None):
    """So many batches, of which hosts read the rows in turn."""
    with contextlib.ExitStack() as stack:
        iterators = [make_train_iterator(config, batch_size, 3, host, hosts) for host in range(hosts)]
        for iterator in iterators:
            stack.callback(iterator.close)
            if state:
                iterator.set_state(state)
        parts = [next(iterator) for _, iterator in itertools.product(range(count), iterators)]
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for key in expected:
        np.testing.assert_array_equal(actual[key], expected[key], err_msg=key)


# Bytes of a record, and before it what the file says of it.
@pytest.mark.parametrize("at", [-30, -9, 0, 500, 1000])
@pytest.mark.parametrize("threads", [0, 1])
def test_a_flipped_byte_stops_the_run_with_file_and_place(sound_dir, tmp_path, config, at, threads):
    folder = damage.copy(sound_dir, tmp_path / "sets")
    damage.flip(damage.shard(folder, "train", 1), 3, at)
    stopping = dataclasses.replace(
        config, data_dir=folder, corrupt="stop", train_split="train[2:]", shuffle=False, threads=threads
    )
    message = (
        r"the example at index 8 of snapshots/5.1.0\[train\[2:\]\] can't be used \(.*hash mismatch.*\): it is record 3 "
        r"of .*snapshots-train.array_record-00001-of-00003; prepare the set again, .* with data.corrupt=skip"
    )
    with contextlib.closing(make_train_iterator(stopping, 4, 0)) as iterator:
        assert "skipped" not in next(iterator)
        next(iterator)
        with pytest.raises(OSError, match=message):
            next(iterator)
    with pytest.raises(OSError, match=message):
        check_labels(stopping)
    with pytest.raises(OSError, match=message):
        make_train_iterator(dataclasses.replace(stopping, in_memory=True), 4, 0)


def test_no_flipped_byte_gives_another_example(sound_dir, tmp_path):
    folder = damage.copy(sound_dir, tmp_path / "sets")
    path = damage.shard(folder, "train", 1)
    content = path.read_bytes()
    expected = [example["label"] for example in Records(open_builder("snapshots", sound_dir), "train").fetch(range(21))]
    lost = []
    for place in [*range(0, 200, 7), *range(200, len(content), 1501), len(content) - 10]:
        changed = bytearray(content)
        changed[place] ^= 0xFF
        path.write_bytes(changed)
        found = Records(open_builder("snapshots", folder), "train").fetch(range(21))
        same = [isinstance(one, Damage) or one["label"] == label for one, label in zip(found, expected, strict=True)]
        assert all(same)
        lost.append(sum(isinstance(one, Damage) for one in found))
    assert set(lost) >= {0, 1}
    assert max(lost) <= 7


@pytest.mark.parametrize("size", [0, 1000, 65536, 100_000])
def test_a_file_cut_short_loses_its_records_and_no_others(sound_dir, tmp_path, config, size):
    folder = damage.copy(sound_dir, tmp_path / "sets")
    damage.truncate(damage.shard(folder, "train", 1), size)
    cut = dataclasses.replace(config, data_dir=folder)
    batch = read(dataclasses.replace(cut, shuffle=False), 1, batch_size=21)
    np.testing.assert_array_equal(batch["index"], [*range(7), *[14] * 7, *range(14, 21)])
    np.testing.assert_array_equal(batch["skipped"], np.isin(np.arange(21), range(7, 14)))
    assert check_labels(cut)[0].startswith("snapshots/5.1.0[train]: 7 of the 21 examples looked at are skipped; the ")
    with pytest.raises(OSError, match=r"at index 7 of .*: it is record 0 of .*train.array_record-00001-of-00003;"):
        check_labels(dataclasses.replace(cut, corrupt="stop"))


def test_a_skipped_example_is_replaced_by_the_next_and_all_else_stays(sound_dir, config):
    batches, sound = read(config, 8), read(dataclasses.replace(config, data_dir=sound_dir), 8)
    assert not sound["skipped"].any()
    skipped = np.isin(sound["index"], LOST)
    assert 3 <= skipped.sum() < 10
    np.testing.assert_array_equal(batches["skipped"], skipped)
    np.testing.assert_array_equal(batches["index"], [NEXT.get(index, index) for index in sound["index"]])
    np.testing.assert_array_equal(batches["label"], batches["index"] % 5)
    np.testing.assert_array_equal(batches["image"][~skipped], sound["image"][~skipped])


@pytest.mark.parametrize(
    "change", [{}, {"threads": 1}, {"threads": 3}, {"in_memory": True}, {"threads": 1, "workers": 1}]
)
def test_batches_with_skipped_examples_are_the_same_everywhere(config, change):
    one = read(config, 6)
    assert one["skipped"].any()
    changed = dataclasses.replace(config, **change)
    assert_same(read(changed, 6, hosts=1 if "workers" in change else 2), one)
    later = {key: value[12:] for key, value in one.items()}
    assert_same(read(changed, 4, state={"examples": 12}), later)


def test_skipped_examples_are_counted_over_a_resume(config):
    whole = make_train_iterator(config, 6, 3)
    counts = np.cumsum([next(whole)["skipped"].sum() for _ in range(8)])
    assert whole.get_state() == {"examples": 48, "skipped": counts[-1]}
    assert 0 < counts[3] < counts[-1]
    first = make_train_iterator(dataclasses.replace(config, threads=1), 6, 3)
    for _ in range(4):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    first.close()
    assert state == {"examples": 24, "skipped": counts[3]}
    resumed = make_train_iterator(config, 6, 3)
    resumed.set_state(state)
    for _ in range(4):
        next(resumed)
    assert resumed.skipped == counts[-1]
    resumed.set_state({"examples": 24})
    assert resumed.get_state() == state | {"skipped": 0}


def test_each_skipped_example_is_named_once(config, capsys):
    read(config, 14)
    lines = capsys.readouterr().out.splitlines()
    places = [
        re.match(r"skipped: the example at index (\d+) of .* record (\d) of .*-0000(\d)-of-00003$", line)
        for line in lines
    ]
    assert sorted(tuple(map(int, place.groups())) for place in places) == [(0, 0, 0), (10, 3, 1), (20, 6, 2)]
    assert "(its label is 5, and the 5 classes are 0 to 4)" in "".join(lines)


def test_evaluation_leaves_them_out_and_counts_them(config, sound_dir):
    batches = list(make_eval_batches(config, "validation", 4))
    joined = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
    np.testing.assert_array_equal(joined["index"], [*range(7), -1])
    # The second of three files begins with the third example.
    lost = int(np.flatnonzero(joined["skipped"]).item())
    assert lost in (2, 3)
    np.testing.assert_array_equal(joined["mask"], [place not in (lost, 7) for place in range(8)])
    assert not joined["image"][lost].any()
    sound = next(iter(make_eval_batches(dataclasses.replace(config, data_dir=sound_dir), "validation", 8)))
    kept = joined["mask"]
    np.testing.assert_array_equal(joined["image"][kept], sound["image"][kept])

    def predict(_, batch):
        return np.eye(5)[batch["label"]] * 3.0

    measures = classify.evaluate(predict, None, batches)
    expected = {"accuracy": 1.0, "loss": np.log(1 + 4 * np.exp(-3.0)), "skipped": 1.0}
    assert {name: measures[name] for name in expected} == pytest.approx(expected)
    assert "skipped" not in classify.evaluate(predict, None, [sound])
    with pytest.raises(OSError, match=rf"index {lost} of snapshots/5.1.0\[validation\] can't be used"):
        list(make_eval_batches(dataclasses.replace(config, corrupt="stop"), "validation", 4))


@pytest.mark.parametrize("label", [-1, 10])
def test_a_label_that_is_no_class_is_named_at_the_start(data_dir, tmp_path, label):
    folder = damage.copy(data_dir, tmp_path / "sets")
    damage.relabel(damage.shard(folder, "test"), 123, label)
    digits = DataConfig(data_dir=folder)
    message = (
        rf"the example at index 123 of digits/1.0.0\[test\] can't be used \(its label is {label}, and the 10 classes "
        r"are 0 to 9\): it is record 123 of .*digits-test.array_record-00000-of-00001; .*choose another split"
    )
    model = tasks.ViTConfig(image_size=(8, 8, 1), num_classes=10)
    with pytest.raises(OSError, match=message):
        tasks.check_images(digits, model)
    with pytest.raises(OSError, match=message):
        list(make_eval_batches(digits, "test", 90))
    assert tasks.check_images(dataclasses.replace(digits, corrupt="skip"), model) == {}


def test_a_split_without_any_labels_is_refused_also_where_they_are_skipped(sound_dir, tmp_path, config):
    folder = damage.copy(sound_dir, tmp_path / "sets")
    for number in range(3):
        path = damage.shard(folder, "validation", number)
        for record in range(len(damage.records(path))):
            damage.relabel(path, record, -1)
    unlabelled = dataclasses.replace(config, data_dir=folder)
    with pytest.raises(
        OSError, match=r"of snapshots/5.1.0\[validation\] none of 7 examples can be used, such as: .* -1"
    ):
        check_labels(unlabelled)
    with pytest.raises(OSError, match=r"none of the 7 examples of snapshots/5.1.0\[validation\] can be used: prepare"):
        read(dataclasses.replace(unlabelled, train_split="validation"), 1)


def test_large_splits_are_looked_at_in_1024_places(data_dir, monkeypatch):
    monkeypatch.setattr("moe.data.records._ALL", 1436)
    seen = []
    fetch = Records.fetch
    monkeypatch.setattr(Records, "fetch", lambda self, places: seen.extend(places) or fetch(self, places))
    assert check_labels(DataConfig(data_dir=data_dir, test_split="train")) == ()
    assert len(set(seen)) == len(seen) == 1024
    assert (min(seen), max(seen)) == (0, 1436)
    assert max(np.diff(seen)) == 2


def drop(name):
    def edit(example):
        del example.features.feature[name]

    return edit


def shorten(example):
    del example.features.feature["image"].int64_list.value[-8:]


@pytest.mark.parametrize("edit", [drop("image"), drop("label"), shorten])
@pytest.mark.parametrize("in_memory", [False, True])
def test_a_record_without_a_feature_or_of_another_shape(data_dir, tmp_path, edit, in_memory):
    folder = damage.copy(data_dir, tmp_path / "sets")
    damage.change(damage.shard(folder, "train"), 5, edit)
    digits = DataConfig(data_dir=folder, train_split="train[:9]", shuffle=False, threads=0, in_memory=in_memory)
    with pytest.raises(
        OSError, match=r"at index 5 of digits/1.0.0\[train\[:9\]\] can't be used \(.+\): it is record 5 of"
    ):
        next(make_train_iterator(digits, 9, 0))
    batch = next(make_train_iterator(dataclasses.replace(digits, corrupt="skip"), 9, 0))
    np.testing.assert_array_equal(batch["index"], [0, 1, 2, 3, 4, 6, 6, 7, 8])
    stored = next(iter(make_eval_batches(DataConfig(data_dir=data_dir), "train[:9]", 9)))
    for key in ("image", "label"):
        np.testing.assert_array_equal(batch[key], stored[key][batch["index"]])


def test_many_damaged_examples_are_named_up_to_ten(data_dir, tmp_path, capsys):
    folder = damage.copy(data_dir, tmp_path / "sets")
    damage.truncate(damage.shard(folder, "train"), 1000)
    digits = DataConfig(data_dir=folder, train_split="train[:20]", threads=0, corrupt="skip")
    with pytest.raises(OSError, match=r"none of the 20 examples of digits/1.0.0\[train\[:20\]\] can be used"):
        next(make_train_iterator(digits, 4, 0))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[-1].endswith("; further ones are counted only")


def test_a_split_smaller_than_a_batch_is_said_and_than_the_processes_refused(data_dir):
    digits = DataConfig(data_dir=data_dir, train_split="train[:6]")
    assert tasks.shortage(digits, 6, 2) == ""
    assert re.search(r"'train\[:6\]' has 6 examples, fewer than a batch of 7: every", tasks.shortage(digits, 7, 2))
    with pytest.raises(ValueError, match=r"has 6 examples, fewer than the 8 processes of this run: choose a larger"):
        tasks.shortage(digits, 8, 8)
    with pytest.raises(ValueError, match=r"has no split 'train\[:0%\]', or it is empty"):
        check_labels(DataConfig(data_dir=data_dir, test_split="train[:0%]"))

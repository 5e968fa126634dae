import dataclasses
import itertools
import json

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from moe.data.augment import Augment
from moe.data.pipeline import DataConfig, inspect_data, make_eval_batches, make_train_iterator

AUGMENT = Augment(shift=1.0, rotate_degrees=15.0, scale=0.1)


@pytest.fixture
def config(data_dir):
    return DataConfig(data_dir=data_dir, in_memory=True, augment=AUGMENT, threads=0)


def take(iterator, count):
    batches = list(itertools.islice(iterator, count))
    return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for key in expected:
        np.testing.assert_array_equal(actual[key], expected[key], err_msg=key)


def test_train_batches_are_typed_examples_of_the_set(config):
    batch = next(make_train_iterator(dataclasses.replace(config, augment=Augment()), 32, 0, 0, 1))
    assert {key: (value.dtype.name, value.shape) for key, value in batch.items()} == {
        "image": ("float32", (32, 8, 8, 1)),
        "label": ("int32", (32,)),
        "index": ("int32", (32,)),
    }
    stored = next(iter(make_eval_batches(config, "train", 1437, 0, 1)))
    for key in ("image", "label", "index"):
        np.testing.assert_array_equal(batch[key], stored[key][batch["index"]])


def test_every_epoch_is_another_permutation(config):
    small = dataclasses.replace(config, train_split="train[:30]")
    index = take(make_train_iterator(small, 20, 0, 0, 1), 6)["index"].reshape(4, 30)
    np.testing.assert_array_equal(np.sort(index, axis=1), np.tile(np.arange(30), (4, 1)))
    other = take(make_train_iterator(small, 20, 1, 0, 1), 6)["index"].reshape(4, 30)
    assert len(np.unique(np.concatenate([index, other]), axis=0)) == 8


def test_without_shuffling_the_order_is_that_of_the_files(config):
    ordered = dataclasses.replace(config, train_split="train[:30]", shuffle=False)
    np.testing.assert_array_equal(take(make_train_iterator(ordered, 20, 0, 0, 1), 3)["index"], [*range(30)] * 2)


def test_an_example_is_moved_anew_in_every_epoch(config):
    one = dataclasses.replace(config, train_split="train[:1]")
    images = take(make_train_iterator(one, 4, 0, 0, 1), 2)["image"]
    assert len(np.unique(images.reshape(8, -1), axis=0)) == 8


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_together_read_the_batches_of_one(config, hosts):
    one = make_train_iterator(config, 16, 7, 0, 1)
    several = [make_train_iterator(config, 16, 7, host, hosts) for host in range(hosts)]
    for _ in range(3):
        parts = [next(iterator) for iterator in several]
        assert_same({key: np.concatenate([part[key] for part in parts]) for key in parts[0]}, next(one))


@pytest.mark.parametrize("consumed", [0, 1, 3])
def test_a_run_goes_on_where_its_state_says(config, consumed):
    small = dataclasses.replace(config, train_split="train[:30]")
    whole = take(make_train_iterator(small, 8, 0, 0, 1), 8)
    saved = make_train_iterator(small, 8, 0, 0, 1)
    if consumed:
        take(saved, consumed)
    state = json.loads(json.dumps(saved.get_state()))
    rest = {key: value[8 * consumed :] for key, value in whole.items()}

    resumed = make_train_iterator(small, 8, 0, 0, 1)
    next(resumed)
    resumed.set_state(state)
    assert resumed.get_state() == state
    assert_same(take(resumed, 8 - consumed), rest)
    assert resumed.get_state() == {"examples": 64, "skipped": 0}

    several = [make_train_iterator(small, 8, 0, host, 2) for host in range(2)]
    for iterator in several:
        iterator.set_state(state)
    first, second = (take(iterator, 8 - consumed) for iterator in several)
    for key, value in rest.items():
        by_host = value.reshape(-1, 2, 4, *value.shape[1:])
        np.testing.assert_array_equal(first[key].reshape(by_host[:, 0].shape), by_host[:, 0])
        np.testing.assert_array_equal(second[key].reshape(by_host[:, 1].shape), by_host[:, 1])

    larger = make_train_iterator(small, 24, 0, 0, 1)
    larger.set_state(state)
    assert_same(next(larger), {key: value[:24] for key, value in rest.items()})


@pytest.mark.parametrize("change", [{"threads": 3, "prefetch": 5}, {"in_memory": False, "threads": 1}])
def test_reading_ahead_changes_neither_batches_nor_state(config, change):
    ahead = make_train_iterator(dataclasses.replace(config, **change), 8, 0, 0, 1)
    plain = make_train_iterator(config, 8, 0, 0, 1)
    assert_same(take(ahead, 3), take(plain, 3))
    assert ahead.get_state() == plain.get_state()
    ahead.set_state({"examples": 8})
    plain.set_state({"examples": 8})
    assert_same(take(ahead, 2), take(plain, 2))


@pytest.mark.nightly
def test_worker_processes_change_neither_batches_nor_state(config):
    workers = dataclasses.replace(config, workers=2, threads=1, in_memory=False)
    ahead, plain = make_train_iterator(workers, 8, 0, 0, 1), make_train_iterator(config, 8, 0, 0, 1)
    ahead.set_state({"examples": 24})
    plain.set_state({"examples": 24})
    assert_same(take(ahead, 5), take(plain, 5))
    assert ahead.get_state() == plain.get_state()
    ahead.close()
    evaluated = [take(make_eval_batches(each, "test", 100, 0, 1), None) for each in (workers, config)]
    assert_same(*evaluated)


def test_orbax_saves_and_restores_the_position(config, tmp_path):
    iterator = make_train_iterator(config, 8, 0, 0, 1)
    take(iterator, 2)
    with ocp.Checkpointer(grain.checkpoint.CheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "data", args=grain.checkpoint.CheckpointSave(iterator))
        expected = next(iterator)
        restored = make_train_iterator(config, 8, 0, 0, 1)
        checkpointer.restore(tmp_path / "data", args=grain.checkpoint.CheckpointRestore(restored))
    assert_same(next(restored), expected)


@pytest.mark.parametrize(("batch_size", "hosts"), [(100, 1), (100, 4), (360, 2), (720, 1)])
def test_evaluation_sees_every_example_once_and_masks_the_rest(config, batch_size, hosts):
    parts = [list(make_eval_batches(config, "test", batch_size, host, hosts)) for host in range(hosts)]
    steps = -(-360 // batch_size)
    assert [len(part) for part in parts] == [steps] * hosts
    whole = {key: np.concatenate([part[step][key] for step in range(steps) for part in parts]) for key in parts[0][0]}
    assert {key: value.dtype.name for key, value in whole.items()} == {
        "image": "float32",
        "label": "int32",
        "index": "int32",
        "mask": "bool",
    }
    padding = steps * batch_size - 360
    np.testing.assert_array_equal(whole["mask"], [True] * 360 + [False] * padding)
    np.testing.assert_array_equal(whole["index"], [*range(360)] + [-1] * padding)
    stored = next(iter(make_eval_batches(config, "test", 360, 0, 1)))
    for key in ("image", "label"):
        np.testing.assert_array_equal(whole[key][:360], stored[key])
        assert not whole[key][360:].any()


def test_evaluation_can_be_repeated(config):
    batches = make_eval_batches(dataclasses.replace(config, threads=2), "test", 100, 0, 1)
    assert_same(take(iter(batches), None), take(iter(batches), None))


def test_inspect_data(config):
    info = inspect_data(dataclasses.replace(config, train_split="train[:90%]", image_size=10))
    assert info.classes == 10
    assert info.image_shape == (10, 10, 1)
    assert info.train_examples == 1293
    assert info.splits == {"train": 1437, "test": 360}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 0, 0, 4), r"a batch of 10 examples cannot be shared by 4 processes: choose a positive multiple of 4"),
        ((0, 0, 0, 1), r"a batch of 0 examples cannot be shared by 1 processes: choose a positive multiple of 1"),
        ((8, 0, 2, 2), r"there is no process 2 of 2"),
        ((8, -1, 0, 1), r"the seed of the data is -1: choose one between 0 and 4294967295"),
    ],
)
def test_arguments_out_of_range_are_refused(config, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_train_iterator(config, *arguments)


@pytest.mark.parametrize("field", ["image_size", "threads", "workers", "prefetch"])
def test_fields_out_of_range_are_refused(field):
    with pytest.raises(ValueError, match=rf"data.{field} is -1: it must be at least \d"):
        DataConfig(**{field: -1})

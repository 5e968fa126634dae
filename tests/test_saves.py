"""When a run saves, what it keeps, and what happens where storage fails."""

import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from moe import cli, saves
from moe.checkpoint import CheckpointConfig, CheckpointError, Checkpoints
from moe.saves import Saves
from tests import chaos
from tests.test_chaos import IMAGES

# Bytes of a file: more than a log needs, less than the arrays of a checkpoint or all metrics.
LARGEST = 60_000


class Clock:
    """Time that the test turns."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(saves, "time", clock)
    return clock


def state(step: int) -> dict[str, Any]:
    return {"step": jnp.int32(step)}


def save(run: Saves, step: int) -> None:
    run.save(step, state(step), {"examples": step})


class Run:
    """The saves of a folder, and the folder."""

    def __init__(self, folder: Path, restored: int | None = None, **config: Any) -> None:
        self.config = CheckpointConfig(**config)
        self.checkpoints = Checkpoints(folder, keep=self.config.keep)
        self.saves = Saves(self.checkpoints, self.config, restored)

    def steps(self) -> list[int]:
        return self.checkpoints.steps()


@pytest.fixture
def make_run(tmp_path: Path) -> Iterator[Any]:
    runs: list[Run] = []

    def make(**config: Any) -> Run:
        runs.append(Run(tmp_path / "checkpoints", **config))
        return runs[-1]

    yield make
    for run in runs:
        run.checkpoints.close()


def test_the_schedule_counts_steps_and_minutes(clock: Clock, make_run: Any) -> None:
    run = make_run(every=10, minutes=2.0)
    due = []
    for step in range(1, 31):
        clock.now += 20
        if run.saves.is_due(step, step % 2 == 0):
            due.append(step)
            save(run.saves, step)
    # Six steps take two minutes, and only even ones are looked at.
    assert due == [6, 10, 16, 20, 26, 30]
    assert run.saves.is_due(40, False)
    run.checkpoints.wait()
    run = make_run(every=0)
    assert not any(run.saves.is_due(step, True) for step in range(1, 2000))


def test_the_newest_and_the_best_stay(make_run: Any, tmp_path: Path) -> None:
    run = make_run(every=1, keep=2, keep_best=2, best="accuracy")
    accuracy = {1: 0.1, 2: 0.9, 3: 0.5, 4: 0.8, 5: 0.3, 6: 0.2}
    for step, value in accuracy.items():
        save(run.saves, step)
        assert not run.saves.rate(step, {"loss": 1.0, "accuracy": value})
    run.saves.complete(6, state(6), {"examples": 6})
    assert run.steps() == [2, 4, 5, 6]
    # Another process goes on with what was measured; an evaluation among the best saves.
    run = make_run(every=0, keep=1, keep_best=2, best="accuracy", restored=6)
    assert run.saves.rate(7, {"accuracy": 0.85})
    save(run.saves, 7)
    assert not run.saves.rate(8, {"accuracy": 0.1})
    run.saves.complete(8, state(8), {"examples": 8})
    assert run.steps() == [2, 7, 8]
    (tmp_path / "checkpoints" / "measures.json").write_text("[")
    run = make_run(every=0, keep=1, keep_best=1, restored=8)
    assert run.steps() == [2, 7, 8]


def test_nothing_goes_before_its_successor_is_whole(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(every=1, keep=1)
    save(run.saves, 1)
    run.checkpoints.wait()
    removed = []
    monkeypatch.setattr("moe.checkpoint._remove", lambda path: removed.append((path.name, run.steps())))
    save(run.saves, 2)
    assert removed == []
    run.saves.is_due(3, False)
    run.checkpoints.wait()
    assert removed == [("1", [1, 2])]


def test_a_save_that_fails_is_tried_again_and_the_last_one_thrice(
    clock: Clock, make_run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(every=100)
    save(run.saves, 100)
    run.saves.is_due(101, True)
    with monkeypatch.context() as broken:
        broken.setattr("orbax.checkpoint.CheckpointManager.save", _full)
        save(run.saves, 200)
        assert not run.saves.is_due(201, True)
        err = capsys.readouterr().err
        assert "checkpoints/200 was not written: OSError: [Errno 28] No space left on device" in err
        assert "Training goes on; the next try is at the first log point in 30 s" in err
        clock.now += 29
        assert not run.saves.is_due(202, True)
        clock.now += 1
        assert not run.saves.is_due(203, False)
        assert run.saves.is_due(204, True)
        save(run.saves, 204)
        assert not run.saves.is_due(205, True)
        assert "in 60 s" in capsys.readouterr().err
        with pytest.raises(CheckpointError, match=r"206, after 3 tries, and the newest whole one is of 100: .*28"):
            run.saves.complete(206, state(206), {"examples": 206})
    run.saves.complete(206, state(206), {"examples": 206})
    assert run.steps() == [100, 206]


def _full(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("fields", [{"every": -1}, {"minutes": -1.0}, {"keep": 0}, {"keep_best": -1}])
def test_settings_out_of_range_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"checkpoint\.every = .*checkpoint\.keep = "):
        CheckpointConfig(**fields)


def test_a_disk_that_refuses_to_grow_costs_no_step(tmp_path: Path) -> None:
    """Every file of a running process is held to a few bytes, and later no more; in the end all is there."""
    overrides = [*IMAGES, "--config.log_every=1", "--config.checkpoint.every=10"]
    alone, full = tmp_path / "alone", tmp_path / "full"
    assert chaos.start(alone, [*overrides, "--config.steps=80"]).wait(timeout=300) == 0

    process = chaos.start(full, [*overrides, "--config.steps=80"])
    _wait(lambda: (full / "checkpoints" / "10").is_dir(), process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (LARGEST, resource.RLIM_INFINITY))
    _wait(lambda: "was not written" in _log(tmp_path, "full"), process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert process.wait(timeout=300) == 0
    assert chaos.state_of(full) == chaos.state_of(alone)
    assert chaos.losses(full) == chaos.losses(alone)

    ends = tmp_path / "ends"
    process = chaos.start(ends, [*overrides, "--config.steps=80"])
    _wait(lambda: (ends / "checkpoints" / "10").is_dir(), process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (LARGEST, resource.RLIM_INFINITY))
    assert process.wait(timeout=300) == cli.FAILURE
    assert "Traceback" not in _log(tmp_path, "ends")
    saved = [path for path in (ends / "checkpoints").iterdir() if path.name.isdigit()]
    assert saved
    assert chaos.start(ends, [*overrides, "--config.steps=80"]).wait(timeout=300) == 0
    assert chaos.state_of(ends) == chaos.state_of(alone)


def _log(folder: Path, name: str) -> str:
    return (folder / f"{name}.log").read_text()


def _wait(is_there: Any, process: Any) -> None:
    deadline = time.monotonic() + 200
    while not is_there():
        assert process.poll() is None, json.dumps(process.returncode)
        assert time.monotonic() < deadline
        time.sleep(0.002)

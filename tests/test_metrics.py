"""Where a run's time goes, by a clock that the test turns."""

import json
from pathlib import Path

import pytest

from moe import metrics
from moe.metrics import Clock, MetricsWriter


class Time:
    """A clock that stands still unless told otherwise."""

    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    clock = Time()
    monkeypatch.setattr(metrics.time, "time", clock.time)
    return clock


def test_goodput_is_training_over_all_that_has_passed(time: Time) -> None:
    clock = Clock()
    time.now += 10  # compiling
    clock.resume({})
    time.now += 60
    with clock.spent("checkpoint"):
        time.now += 5
    time.now += 20
    with clock.spent("evaluation"):
        time.now += 5
    values = clock.values()
    assert values["time/training_seconds"] == 80
    assert values["time/checkpoint_seconds"] == values["time/evaluation_seconds"] == 5
    assert values["time/elapsed_seconds"] == 100
    assert values["goodput"] == 0.8


def test_time_between_starts_and_steps_run_again_are_not_training(time: Time) -> None:
    clock = Clock()
    clock.resume({})
    time.now += 50
    last = clock.values()
    time.now += 30  # steps that no line of metrics.jsonl keeps
    time.now += 100  # until the machine is there again
    clock = Clock()
    time.now += 20
    clock.resume(last)
    time.now += 50
    values = clock.values()
    assert values["time/training_seconds"] == 100
    assert values["time/elapsed_seconds"] == 250
    assert values["goodput"] == 0.4


def test_lines_of_a_part_that_is_run_again_are_taken_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = MetricsWriter(tmp_path, 0)
    for step in (1, 2, 3):
        writer.write(step, {"train/loss": 1.0 / step, "time/elapsed_seconds": float(step)})
    writer.close()
    assert writer.last == {}
    writer = MetricsWriter(tmp_path, 2)
    assert writer.last == {"step": 2, "train/loss": 0.5, "time/elapsed_seconds": 2.0}
    writer.write(3, {"train/loss": 0.25})
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["train/loss"] for line in lines] == [1.0, 0.5, 0.25]
    assert "took out 1 lines after step 2" in capsys.readouterr().err


def test_a_clock_goes_on_where_the_last_line_is_an_evaluations(tmp_path: Path, time: Time) -> None:
    writer, clock = MetricsWriter(tmp_path, 0), Clock()
    clock.resume(writer.last)
    time.now += 30
    writer.write(1, clock.values())
    writer.write(1, {"test/loss": 1.0})
    writer.close()
    writer, clock = MetricsWriter(tmp_path, 1), Clock()
    clock.resume(writer.last)
    time.now += 10
    assert clock.values()["time/training_seconds"] == 40
    writer.close()

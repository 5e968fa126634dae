"""Where a run's time goes, by a clock that the test turns."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moe import metrics
from moe.events import load_summaries
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


def test_lines_that_are_damaged_or_cut_off_are_taken_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, cut = '{"step": 1, "train/loss": 1.0}\n', '{"step": 2, "train/loss": 0.5}'
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe\n" + whole.encode() + cut.encode())
    writer = MetricsWriter(tmp_path, 2)
    writer.write(3, {"train/loss": 0.25})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text() == whole + '{"step": 3, "train/loss": 0.25}\n'
    assert "took out 2 lines" in capsys.readouterr().err


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


def test_the_load_of_experts_goes_to_a_file_beside_and_is_taken_out_with_its_step(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0)
    for step in (1, 2, 3):
        writer.write(
            step, {"train/loss": 1.0}, {"layer_1": np.array([0.75, 0.25]), "layer_3": np.array([1 / 3, 2 / 3])}
        )
    writer.write(3, {"test/loss": 1.0})
    writer.close()
    MetricsWriter(tmp_path, 2).close()
    lines = [json.loads(line) for line in (tmp_path / "load.jsonl").read_text().splitlines()]
    assert lines == [{"step": n, "load": {"layer_1": [0.75, 0.25], "layer_3": [0.33333, 0.66667]}} for n in (1, 2)]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_tensorboard_gets_a_histogram_a_layer_and_a_picture_of_all() -> None:
    """Of four experts one has three quarters of the rows, which is three times the mean, and two have none."""
    first, second, picture = load_summaries({"layer_1": [0.75, 0.0, 0.0, 0.25], "layer_3": [0.25] * 4})
    assert (first.tag, second.tag, picture.tag) == (
        "moe/layer_1/load_to_mean",
        "moe/layer_3/load_to_mean",
        "moe/load_to_mean",
    )
    assert (first.histo.num, first.histo.sum, first.histo.max) == (4, 4, 3)
    assert (first.histo.bucket[0], first.histo.bucket[-1], sum(first.histo.bucket)) == (2, 1, 4)
    pixels = np.asarray(Image.open(io.BytesIO(picture.image.encoded_image_string)))
    assert pixels.shape == (picture.image.height, picture.image.width, 3) == (32, 64, 3)
    assert pixels[0, 0].tolist() == [0xFD, 0xE7, 0x25]
    assert pixels[0, 16].tolist() == [0x44, 0x01, 0x54]
    assert (pixels[16:] == pixels[16, 0]).all()


def test_loads_that_are_no_numbers_are_shown_as_none() -> None:
    histogram = load_summaries({"layer_1": [float("nan")] * 2})[0].histo
    assert (histogram.max, histogram.bucket[0]) == (0, 2)

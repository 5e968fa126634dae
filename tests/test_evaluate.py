"""evaluate.py as a user runs it: several checkpoints, one that is still to come, diagnostics, queues, few-shot."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import evaluate
from moe import cli
from tests.test_programs import compile_fast, copied, finished, in_repository, mistake, read, run_evaluate

__all__ = ["compile_fast", "copied", "finished", "in_repository"]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_everything_of_one_checkpoint(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extra = ["--diagnostics", "--against=3", "--capacity-factor=0.5", "--few-shot"]
    assert run_evaluate(copied, *extra) == 0
    out = capsys.readouterr().out
    assert "layer_1" in out
    assert "25-shot" in out
    evaluation, routing, shots = (read(copied / f"{name}.json") for name in ("evaluation", "routing", "few_shot"))
    queued = {name: evaluation.pop(name) for name in list(evaluation) if "capacity" in name}
    assert evaluation == read(copied / "result.json")
    assert queued.pop("capacity_factor") == 0.5
    assert {name.removeprefix("test_capacity/") for name in queued} == {
        name.removeprefix("test/") for name in evaluation if name.startswith("test/")
    }
    assert queued["test_capacity/loss"] != evaluation["test/loss"]
    assert evaluation["test/loss_low"] < evaluation["test/loss"] < evaluation["test/loss_high"]

    assert (routing["step"], routing["against"], routing["router"], routing["k"]) == (6, 3, "softmax", 2)
    assert routing["tokens"] == 360 * 4
    for layers, dropped in ((routing["layers"], False), (routing["capacity"]["layers"], True)):
        assert list(layers) == ["layer_0", "layer_1"]
        for layer in layers.values():
            assert sum(layer["load"]) == pytest.approx(1)
            assert (layer["overflow"] > 0.3) == dropped
            assert layer["experts_per_token_histogram"] == [0, 0, 1, 0, 0]
            assert layer["topk_same"] == 1
            assert 0 < layer["changed_sets"] < 1
            assert set(layer["mutual_information"]) == {"class", "position"}
    cost = routing["cost"]
    # Two experts of two matrices of 16 × 16 in each of two layers.
    assert cost["expert_flops_per_token"] == 2 * 2 * 2 * 2 * 16 * 16
    assert cost["router_seconds_per_batch"] > 0
    assert cost["seconds_per_batch"] > 0
    assert list(shots["shots"]) == ["1", "5", "10", "25"]
    assert shots["test_examples"] == 360
    assert all(0 < found["accuracy"] <= 1 for found in shots["shots"].values())


def test_every_checkpoint_has_a_line(copied: Path) -> None:
    assert run_evaluate(copied, "--steps=all") == 0
    found = lines(copied / "evaluations.jsonl")
    assert [line["step"] for line in found] == [3, 6]
    assert found[1] == read(copied / "result.json")
    assert not (copied / "evaluation.json").exists()
    assert run_evaluate(copied, "--steps=3", "--config.router.name=sparse_topk") == 0
    (line,) = lines(copied / "evaluations.jsonl")
    assert line["settings"] == ["router.name=sparse_topk"]
    assert line["test/loss"] != found[0]["test/loss"]


def test_watching_evaluates_what_comes_and_ends_with_the_run(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    last, away = copied / "checkpoints" / "6", tmp_path / "6"
    shutil.move(last, away)
    monkeypatch.setattr(evaluate, "_POLL_SECONDS", 0.01)
    mistake(capsys, run_evaluate(copied, "--watch", "--patience=0.001"), cli.FAILURE, "0.001 minutes", "step 6")
    assert [line["step"] for line in lines(copied / "evaluations.jsonl")] == [3]

    def come(seconds: float) -> None:
        if away.exists():
            shutil.move(away, last)

    monkeypatch.setattr(evaluate.time, "sleep", come)
    assert run_evaluate(copied, "--watch") == 0
    out = capsys.readouterr().out
    assert "step 6: test/accuracy" in out
    assert "step 3: " not in out
    assert [line["step"] for line in lines(copied / "evaluations.jsonl")] == [3, 6]
    assert lines(copied / "evaluations.jsonl")[1] == read(copied / "result.json")
    assert run_evaluate(copied, "--watch", "--diagnostics") == 0
    assert [line["step"] for line in lines(copied / "routing.jsonl")] == [3, 6]
    assert run_evaluate(copied, "--watch", "--diagnostics", "--against=3") == 0
    assert [line["against"] for line in lines(copied / "routing.jsonl")] == [3, 3]
    assert [line["step"] for line in lines(copied / "evaluations.jsonl")] == [3, 6]
    capsys.readouterr()
    code = run_evaluate(copied, "--watch", "--config.router.name=sparse_topk")
    mistake(capsys, code, cli.USAGE, "under settings []", "router.name=sparse_topk", "remove it")


def test_a_damaged_checkpoint_among_several_is_named_and_the_others_are_evaluated(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (copied / "checkpoints" / "3" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    capsys.readouterr()
    assert run_evaluate(copied, "--steps=all") == cli.FAILURE
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2
    assert "checkpoints/3" in err[0]
    assert err[1].endswith("1 of 2 checkpoints can't be read: step 3.")
    assert [line["step"] for line in lines(copied / "evaluations.jsonl")] == [6]


def test_one_device_and_another_batch_that_does_not_divide_the_set_measure_the_same(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    # Four batches and a half on one device; the run itself measured five on eight.
    assert run_evaluate(copied, "--config.batch_size=80", "--config.moe.group_size=10") == 0
    alone, spread = read(copied / "evaluation.json"), read(copied / "result.json")
    assert alone.pop("params/sha256") == spread.pop("params/sha256")
    assert alone == pytest.approx(spread, rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "code", "parts"),
    [
        (["--steps=3,4"], cli.FAILURE, ["step 4", "3, 6"]),
        (["--steps=some"], cli.USAGE, ["--steps=some", "'all'"]),
        (["--watch", "--step=3"], cli.USAGE, ["--watch", "--step"]),
        (["--against=3"], cli.USAGE, ["--against=3", "--diagnostics"]),
        (["--against=4", "--diagnostics"], cli.FAILURE, ["step 4", "3, 6"]),
        (["--capacity-factor=-1"], cli.USAGE, ["--capacity-factor=-1.0", "positive"]),
        (["--capacity-factor=nan"], cli.USAGE, ["--capacity-factor=nan"]),
        (["--capacity-factor=0"], cli.USAGE, ["--capacity-factor=0", "positive"]),
        (["--watch", "--patience=nan"], cli.USAGE, ["--patience=nan"]),
        (["--watch", "--patience=-1"], cli.USAGE, ["--patience=-1"]),
        (["--few-shot=no_such_set"], cli.USAGE, ["no_such_set"]),
    ],
)
def test_what_can_not_be_evaluated_is_one_sentence(
    flags: list[str], code: int, parts: list[str], finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    mistake(capsys, run_evaluate(finished, *flags), code, *parts)


@pytest.mark.parametrize("file", ["metrics.jsonl", "load.jsonl"])
def test_a_report_of_a_run_without_diagnostics_is_one_sentence(
    file: str, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (copied / "report.html").stat().st_mtime_ns
    (copied / file).write_bytes(b"\xff\xfe")
    mistake(capsys, run_evaluate(copied, "--report"), cli.FAILURE, file, "--report")
    (copied / file).unlink()
    mistake(capsys, run_evaluate(copied, "--report", "--steps=all"), cli.FAILURE, file, "--report")
    assert (copied / "report.html").stat().st_mtime_ns == before


def test_a_model_without_experts_has_no_routing() -> None:
    from configs import digits
    from moe import config as config_lib

    table = digits.get_config()
    table.model.moe_every = 0
    with pytest.raises(ValueError, match="no experts"):
        evaluate.Wanted(diagnostics=True).check(config_lib.resolve(table))


def test_sums_are_exact_beyond_float32() -> None:
    parts = [{"a": np.float32(2**24)}, {"a": np.float32(1)}]
    assert evaluate.total(parts) == {"a": 2**24 + 1}

"""train.py in several processes that share a workdir, as hosts of a slice do; gloo carries what they exchange."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe import cli
from tests import compiling

REPOSITORY = Path(__file__).parents[1]
STEPS = 40
# Seconds that a machine gives between its notice and its end.
DEADLINE = 30
RUN = [
    "--config=configs/digits.py",
    "--config.model.width=32",
    "--config.model.depth=2",
    "--config.model.moe_every=1",
    "--config.model.heads=2",
    "--config.moe.expert_width=32",
    "--config.moe.num_experts=8",
    "--config.batch_size=64",
    "--config.moe.group_size=8",
    f"--config.steps={STEPS}",
    "--config.log_every=1",
    "--config.optimizer.warmup_steps=10",
    "--config.checkpoint.every=0",
]


def start(
    workdir: Path | list[Path], count: int, devices: int, *overrides: str, program: str = "train.py"
) -> list[subprocess.Popen]:
    """So many processes of a program, with so many devices each, and one workdir or one each."""
    workdirs = workdir if isinstance(workdir, list) else [workdir] * count
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    flags = " ".join([f"--xla_force_host_platform_device_count={devices}", *compiling.FLAGS])
    shared = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONWARNINGS": "ignore"}
    shared["TFDS_DATA_DIR"] = str(workdirs[0].parent / "data")
    processes = []
    for index in range(count):
        who = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(index)}
        command = [
            sys.executable,
            program,
            f"--workdir={workdirs[index]}",
            *(RUN if program == "train.py" else []),
            *overrides,
        ]
        environment = {**shared, **(who if count > 1 else {})}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, cwd=REPOSITORY, env=environment, **pipes))
    return processes


def finish(processes: list[subprocess.Popen], code: int = 0) -> list[str]:
    """What each process printed, once all have ended with this exit code."""
    ended = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [code] * len(processes), ended
    return [out + err for out, err in ended]


def losses(workdir: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def wait_for_step(workdir: Path, step: int, processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 240
    while not (workdir / "metrics.jsonl").exists() or max(losses(workdir), default=0) < step:
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes), finish(processes)
        time.sleep(0.02)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process with one device, undisturbed."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    finish(start(workdir, 1, 1))
    return workdir


@pytest.mark.parametrize(
    ("count", "devices", "mesh"),
    [
        # Experts in every process; with a piece of each matrix in two, which then read the same examples.
        (2, 2, ["--config.mesh.data=1", "--config.mesh.expert=4"]),
        (4, 1, ["--config.mesh.data=1", "--config.mesh.expert=2", "--config.mesh.tensor=2"]),
    ],
)
def test_stopped_on_several_processes_a_run_ends_on_one_as_if_undisturbed(
    count: int, devices: int, mesh: list[str], alone: Path, tmp_path: Path, record: Callable[..., None]
) -> None:
    workdir = tmp_path / "run"
    processes = start(workdir, count, devices, *mesh)
    wait_for_step(workdir, 5, processes)
    # Notice to one of them.
    processes[-1].send_signal(signal.SIGTERM)
    begin = time.monotonic()
    told = finish(processes, cli.STOPPED)
    seconds = time.monotonic() - begin
    assert seconds < DEADLINE
    record("from SIGTERM to the exit, all saved", f"{count} processes", seconds, "s")
    assert all("the same command goes on" in text for text in told)
    assert sum("step 5/40" in text for text in told) == 1
    (stopped,) = (int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*"))
    assert 5 <= stopped < STEPS
    assert max(losses(workdir)) == stopped

    (text,) = finish(start(workdir, 1, 4, "--config.mesh.fsdp=2", "--config.mesh.expert=2"))
    assert f"resuming from step {stopped}" in text
    actual, expected = losses(workdir), losses(alone)
    assert list(actual) == list(expected) == list(range(1, STEPS + 1))
    for step in expected:
        assert actual[step] == pytest.approx(expected[step], rel=1e-4), step
    results = [json.loads((run / "result.json").read_text()) for run in (workdir, alone)]
    assert results[0]["test/loss"] == pytest.approx(results[1]["test/loss"], rel=1e-4)


@pytest.mark.nightly
def test_processes_agree_that_a_checkpoint_is_damaged(alone: Path, tmp_path: Path) -> None:
    """Where only one of them reads the part that is: the newest is set aside by all, and the one before is used."""
    workdir = tmp_path / "run"
    mesh = ["--config.mesh.data=1", "--config.mesh.expert=4", "--config.checkpoint.every=20"]
    finish(start(workdir, 2, 2, *mesh))
    newest = workdir / "checkpoints" / str(STEPS)
    for path in (newest / "state" / "ocdbt.process_1" / "d").iterdir():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (workdir / "result.json").unlink()
    for text in finish(start(workdir, 2, 2, *mesh)):
        assert "Traceback" not in text
    assert (workdir / "checkpoints" / f"{STEPS}.damaged").is_dir()
    results = [json.loads((run / "result.json").read_text()) for run in (workdir, alone)]
    assert results[0]["test/loss"] == pytest.approx(results[1]["test/loss"], rel=1e-4)


def test_evaluation_is_the_same_on_two_processes(alone: Path) -> None:
    more = ["--diagnostics", "--capacity-factor=1", "--few-shot"]
    finish(start(alone, 2, 2, "--config.mesh.data=1", "--config.mesh.expert=4", *more, program="evaluate.py"))
    result, evaluation = (json.loads((alone / name).read_text()) for name in ("result.json", "evaluation.json"))
    assert evaluation.pop("capacity_factor") == 1
    queued = {name for name in evaluation if name.startswith("test_capacity/")}
    assert len(queued) == len([name for name in result if name.startswith("test/")])
    for name in queued:
        del evaluation[name]
    measured = {name for name in result if name.startswith("test/") and name != "test/accuracy"}
    assert {name: evaluation.pop(name) for name in measured} == pytest.approx(
        {name: result.pop(name) for name in measured}, rel=1e-6
    )
    assert evaluation == result
    routing, probe = (json.loads((alone / name).read_text()) for name in ("routing.json", "few_shot.json"))
    finish(start(alone, 1, 1, "--config.mesh.data=1", "--config.mesh.expert=1", *more, program="evaluate.py"))
    again = json.loads((alone / "routing.json").read_text())
    assert list(routing["layers"]) == ["layer_0", "layer_1"]
    for kind in ("layers", "capacity"):
        ours, theirs = (found[kind].get("layers", found[kind]) for found in (routing, again))
        for layer in theirs:
            for name in ("load", "entropy", "overflow", "topk_jaccard", "choice_similarity_mean"):
                assert ours[layer][name] == pytest.approx(theirs[layer][name], abs=1e-3), (kind, layer, name)
    assert all(found["accuracy"] > 0.3 for found in probe["shots"].values())


def test_a_signal_costs_no_step_and_no_bit(alone: Path, tmp_path: Path, record: Callable[..., None]) -> None:
    workdir = tmp_path / "run"
    processes = start(workdir, 1, 1)
    wait_for_step(workdir, 5, processes)
    processes[0].send_signal(signal.SIGTERM)
    begin = time.monotonic()
    (text,) = finish(processes, cli.STOPPED)
    seconds = time.monotonic() - begin
    assert "told to stop: saved after step" in text
    assert seconds < DEADLINE
    record("from SIGTERM to the exit, all saved", "1 process", seconds, "s")
    assert not (workdir / "result.json").exists()
    finish(start(workdir, 1, 1))
    assert (workdir / "result.json").read_text() == (alone / "result.json").read_text()
    assert losses(workdir) == losses(alone)


def test_a_workdir_that_is_not_shared_is_refused(tmp_path: Path) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    for text in finish(start(folders, 2, 1, "--config.mesh.data=2"), cli.FAILURE):
        assert "isn't the same folder for the 2 processes of this run" in text


def test_programs_are_compiled_once_where_they_are_kept(tmp_path: Path) -> None:
    kept = tmp_path / "programs"
    counts = []
    for name in ("first", "second"):
        finish(start(tmp_path / name, 1, 1, f"--config.compiler.cache={kept}", "--config.steps=11"))
        counts.append(len(list(kept.glob("*-cache"))))
    assert counts[0] > 0
    assert counts[0] == counts[1]
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("first", "second")]
    assert results[0] == results[1]

"""sweep.py with a stand-in for train.py; and, at night, with train.py itself."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import sweep
from moe import cli
from tests.pages import parse_page
from tests.test_imports import REPOSITORY

# Ends as the file `codes` says, which names runs; writes what a run writes, the config as the test expects it.
STAND_IN = """
import json, pathlib, shutil, signal, sys, time
flags = dict(word.removeprefix("--").partition("=")[::2] for word in sys.argv[1:])
workdir = pathlib.Path(flags["workdir"])
here = workdir.parent
with (here / "began").open("a") as file:
    file.write(workdir.name + "\\n")
print("one line\\nthe reason" if workdir.name.startswith("soft-") else "fine")
code = json.loads((here / "codes").read_text()).get(workdir.name, 0)
if code == 99:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    (here / f"listening-{workdir.name}").touch()
    time.sleep(30)
if code:
    sys.exit(code)
workdir.mkdir(exist_ok=True)
shutil.copy(here / f"{workdir.name}.json", workdir / "config.json")
(workdir / "result.json").write_text(json.dumps({"step": 3000, "test/accuracy": 0.9 + int(flags["config.seed"]) / 100}))
"""
FLAGS = ["--config=configs/digits.py", "--routers=softmax,soft", "--seeds=2", "--jobs=2", "--config.router.k=1"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for a sweep of four runs; what its file `codes` says of each is how it ends."""
    monkeypatch.chdir(REPOSITORY)
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(sweep, "TRAIN", script)
    (tmp_path / "codes").write_text("{}")
    jobs = sweep.make_jobs("configs/digits.py", ["softmax", "soft"], [0, 1], ["router.k=1"], tmp_path)
    for job in jobs:
        (tmp_path / f"{job.workdir.name}.json").write_text(job.config)
    return tmp_path


def run(folder: Path, *argv: str, flags: list[str] = FLAGS) -> int:
    with pytest.raises(SystemExit) as exit_info:
        cli.run(sweep.main, [*flags, f"--workdir={folder}", *argv])
    return int(exit_info.value.code or 0)


def began(folder: Path) -> list[str]:
    return sorted((folder / "began").read_text().split())


def test_the_grid_is_run_once_and_ends_in_a_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder) == 0
    everything = ["soft-0", "soft-1", "softmax-0", "softmax-1"]
    assert began(folder) == everything
    out = capsys.readouterr().out
    assert "softmax-1: done, accuracy 0.91" in out
    assert "(4 of 4)" in out
    page = parse_page((folder / "compare.html").read_text())
    assert "0.9050 ± 0.0050" in page.text
    assert run(folder) == 0
    assert began(folder) == everything
    assert "4 of 4 runs have finished before" in capsys.readouterr().out


def test_a_run_that_fails_is_named_with_its_log_and_the_others_go_on(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "codes").write_text('{"soft-0": 3}')
    assert run(folder) == 1
    err = capsys.readouterr().err
    assert (
        f"{folder}/soft-0 failed with exit code 3; its log {folder}/soft-0.log ends\n    one line\n    the reason\n"
        in err
    )
    assert err.endswith("1 of 4 runs failed (soft-0): the same command tries them again.\n")
    assert "0.905" in parse_page((folder / "compare.html").read_text()).text
    (folder / "codes").write_text("{}")
    assert run(folder) == 0
    assert began(folder) == ["soft-0", "soft-0", "soft-1", "softmax-0", "softmax-1"]


def test_a_run_of_another_config_is_run_again(folder: Path) -> None:
    assert run(folder) == 0
    path = folder / "soft-1" / "config.json"
    path.write_text(path.read_text().replace('"steps": 3000', '"steps": 4000'))
    assert run(folder) == 0
    assert began(folder).count("soft-1") == 2


def test_sigterm_stops_all_runs_and_ends_with_75(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "codes").write_text('{"softmax-0": 99, "soft-0": 99}')

    def terminate() -> None:
        while not ((folder / "listening-softmax-0").exists() and (folder / "listening-soft-0").exists()):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate).start()
    assert run(folder) == cli.STOPPED
    assert "4 of 4 runs were told to stop; the same command goes on." in capsys.readouterr().err
    assert began(folder) == ["soft-0", "softmax-0"]


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--routers=softmax,nonsense"], ["nonsense", "softmax, sparse_topk"]),
        (["--routers=softmax,softmax"], ["--routers=softmax,softmax", "once"]),
        (["--routers=softmax,"], ["--routers=softmax,"]),
        (["--seeds=many"], ["--seeds=many", "such as 5"]),
        (["--seeds=0"], ["--seeds=0"]),
        (["--seeds=1,1"], ["--seeds=1,1"]),
        (["--seeds=-1,2"], ["--seeds=-1,2"]),
        (["--jobs=-1"], ["--jobs=-1"]),
        (["--config.seed=3"], ["config.seed", "--seeds"]),
        (["--config.router.name=soft"], ["config.router.name", "--routers"]),
        (["--config.stepz=3"], ["stepz", "did you mean 'steps'"]),
        (["--workdir=gs://bucket/sweep"], ["gs://bucket/sweep", "folder of this machine"]),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_run(
    argv: list[str], parts: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, *argv) == cli.USAGE
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    for part in parts:
        assert part in err
    assert not (folder / "began").exists()


@pytest.mark.nightly
def test_runs_of_train_py_are_swept_and_compared(tmp_path: Path) -> None:
    from tests.test_programs import SMALL

    small = [word for word in SMALL if "config=" not in word]
    command = [
        sys.executable,
        "sweep.py",
        "--routers=softmax,sparse_topk",
        "--seeds=2",
        f"--workdir={tmp_path}",
        *small,
    ]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TFDS_DATA_DIR": str(tmp_path / "data")}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "minus softmax" in parse_page((tmp_path / "compare.html").read_text()).text
    steps = [
        json.loads((tmp_path / f"{name}-1" / "result.json").read_text())["step"] for name in ("softmax", "sparse_topk")
    ]
    assert steps == [6, 6]
    again = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert "4 of 4 runs have finished before" in again.stdout

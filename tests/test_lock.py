"""One run at a time in a workdir."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe import cli, lock
from moe.lock import WorkdirLock
from tests.test_programs import compile_fast, in_repository, mistake, run_train  # noqa: F401, fixtures

HOLD = """
import sys, time, pathlib
from moe.lock import WorkdirLock
lock = WorkdirLock(pathlib.Path(sys.argv[1]))
print("held", flush=True)
time.sleep(300)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """Another process that has the workdir."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_run_is_refused_while_the_first_lives(
    holder: subprocess.Popen, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    who = f"is in use by another run (process {holder.pid} on "
    mistake(capsys, run_train(tmp_path), cli.USAGE, who, "stop it, or choose another --workdir")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    WorkdirLock(tmp_path).close()


def test_a_lock_ends_with_its_process_and_not_with_its_children(tmp_path: Path) -> None:
    script = HOLD.replace("time.sleep(300)", "import os\nif os.fork(): os._exit(0)\ntime.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=Path(__file__).parents[1],
                               stdout=subprocess.PIPE, start_new_session=True)  # fmt: skip
    process.wait()
    WorkdirLock(tmp_path).close()
    os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def leased(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A workdir as on a bucket, where files can't be locked, and leases are short."""
    monkeypatch.setattr(lock, "is_remote", lambda path: True)
    monkeypatch.setattr(lock, "_LEASE", 20.0)
    monkeypatch.setattr(lock, "_RENEWAL", 0.2)
    return tmp_path


def test_a_lease_that_is_renewed_is_respected(leased: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = WorkdirLock(leased)
    monkeypatch.setattr(lock.socket, "gethostname", lambda: "elsewhere")
    with pytest.raises(ValueError, match="is in use by another run"):
        WorkdirLock(leased)
    first.close()
    WorkdirLock(leased).close()
    assert list(leased.iterdir()) == []


def test_a_lease_whose_owner_died_is_taken_over(leased: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_LEASE", 1.0)
    (leased / "run.lock").write_text(json.dumps({"host": "elsewhere", "pid": 1, "renewed": 3}))
    begin = time.monotonic()
    WorkdirLock(leased).close()
    assert time.monotonic() - begin >= 1.0  # it was watched
    (leased / "run.lock").write_text("no JSON")
    WorkdirLock(leased).close()

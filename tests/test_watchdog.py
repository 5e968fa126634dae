"""A run that is stuck says where, and ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe.watchdog import STUCK, Watchdog
from tests import chaos
from tests.test_chaos import IMAGES

SCRIPT = """
import pathlib, sys, threading, time
from moe.watchdog import Watchdog

def wait_for_a_batch():
    threading.Event().wait()

with Watchdog(0.01, pathlib.Path(sys.argv[1])) as watchdog:
    for _ in watchdog.over(range(4), "evaluating"):
        time.sleep(0.4)
    watchdog.hear("waiting for the examples of step 3")
    wait_for_a_batch()
"""


def test_a_stuck_run_writes_its_stacks_and_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    ended = subprocess.run(
        command, cwd=chaos.REPOSITORY, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == STUCK
    stacks = (tmp_path / "stacks-0.txt").read_text()
    for text in (stacks, ended.stderr):
        assert "stuck for 0.01 minutes (watchdog_minutes) while waiting for the examples of step 3" in text
        assert "in wait_for_a_batch" in text


def test_what_is_heard_of_goes_on(tmp_path: Path) -> None:
    with Watchdog(0.01, tmp_path) as watchdog:
        for _ in range(5):
            time.sleep(0.2)
            watchdog.hear("computing")
    with Watchdog(0.0, tmp_path):
        time.sleep(0.1)
    assert not (tmp_path / "stacks-0.txt").exists()


@pytest.mark.nightly
def test_an_input_that_stops_ends_the_run_and_a_new_start_goes_on(tmp_path: Path) -> None:
    """The process that reads the data is stopped; nothing else is wrong."""
    overrides = [*IMAGES, "--config.steps=400", "--config.log_every=1", "--config.checkpoint.every=20",
                 "--config.data.workers=1"]  # fmt: skip
    workdir = tmp_path / "run"
    process = chaos.start(workdir, [*overrides, "--config.watchdog_minutes=0.3"])
    while len(chaos.losses(workdir)) < 50:
        assert process.poll() is None
        time.sleep(0.01)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    for child in children:
        os.kill(int(child), signal.SIGSTOP)
    assert process.wait(timeout=120) == STUCK
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    assert "while waiting for the examples of step" in (workdir / "stacks-0.txt").read_text()
    assert chaos.start(workdir, overrides).wait(timeout=300) == 0
    assert json.loads((workdir / "result.json").read_text())["step"] == 400

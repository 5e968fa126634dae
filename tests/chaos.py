"""Runs that are killed at random moments, and what is compared with an undisturbed one."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests import compiling

REPOSITORY = Path(__file__).parents[1]


class Survival(NamedTuple):
    """kills: by the moment they came at. repeated: steps that were run again after each that cost any."""

    kills: dict[str, int]
    repeated: list[int]


def start(workdir: Path, overrides: Sequence[str]) -> subprocess.Popen[str]:
    """train.py on one device, with compiled programs kept beside the workdir."""
    flags = " ".join(["--xla_force_host_platform_device_count=1", *compiling.FLAGS])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONWARNINGS": "ignore"}
    environment["TFDS_DATA_DIR"] = str(workdir.parent / "data")
    cache = f"--config.compiler.cache={workdir.parent / 'programs'}"
    command = [sys.executable, "train.py", f"--workdir={workdir}", cache, *overrides]
    log = (workdir.parent / f"{workdir.name}.log").open("a")
    with log:
        return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log, text=True)


def losses(workdir: Path) -> dict[int, float]:
    """The loss of every step that is logged; a line cut off by a kill counts for nothing."""
    found = {}
    path = workdir / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if "train/loss" in values:
            found[values["step"]] = values["train/loss"]
    return found


def state_of(workdir: Path) -> dict[str, Any]:
    """Position in the data and the checksum of every array of the newest checkpoint."""
    step = max(int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*") if path.name.isdigit())
    record = json.loads((workdir / "checkpoints" / str(step) / "data" / "metadata").read_text())
    return {"step": step, "position": record["position"], "arrays": record["arrays"]}


def disturb(workdir: Path, overrides: Sequence[str], kills: int, seed: int) -> Survival:
    """Runs to the end, with so many SIGKILLs: while it starts, computes, writes a checkpoint or removes one."""
    draw = random.Random(seed)
    done = dict.fromkeys(("starting", "computing", "saving"), 0)
    repeated: list[int] = []
    reached = 0
    for number in range(kills + 1):
        before = len(_log(workdir))
        process = start(workdir, overrides)
        if number < kills:
            wanted = "starting" if draw.random() < 0.1 else ("computing", "saving")[number % 2]
            moment = _wait_for(wanted, workdir, process, draw)
            assert process.poll() is None, f"ended with {process.returncode} before its kill: {_log(workdir)[-2000:]}"
            process.send_signal(signal.SIGKILL)
            done[moment] += 1
        code = process.wait(timeout=600)
        assert code == (0 if number == kills else -signal.SIGKILL), _log(workdir)[-2000:]
        # One that was killed before it went on from anywhere repeats nothing.
        if found := re.search(r"resuming from step (\d+)", _log(workdir)[before:]):
            repeated.append(reached - int(found[1]))
        elif reached and max(losses(workdir), default=0) < reached:
            repeated.append(reached)
        reached = max(losses(workdir), default=0)
    return Survival(done, repeated)


def _wait_for(moment: str, workdir: Path, process: subprocess.Popen[str], draw: random.Random) -> str:
    """Waits for such a moment; where it doesn't come in time, any moment will do."""
    if moment == "starting":
        time.sleep(draw.uniform(0.5, 6))
        return moment
    folder = workdir / "checkpoints"
    before = max(losses(workdir), default=0)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if max(losses(workdir), default=0) > before or (before == 0 and losses(workdir)):
            break
        time.sleep(0.02)
    if moment == "saving":
        deadline = time.monotonic() + 3
        while process.poll() is None and time.monotonic() < deadline:
            if any(".orbax-checkpoint-tmp" in path.name or ".trash" in path.name for path in folder.iterdir()):
                time.sleep(draw.uniform(0, 0.05))
                return moment
            time.sleep(0.001)
        return "computing"
    time.sleep(draw.uniform(0, 1.5))
    return moment


def _log(workdir: Path) -> str:
    path = workdir.parent / f"{workdir.name}.log"
    return path.read_text() if path.exists() else ""

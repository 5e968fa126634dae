"""The processes of a run, on one host or many: how they find each other, what only the first does, when all stop."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

# Who they are, where no cluster says so. JAX itself reads the first.
_ADDRESS, _COUNT, _INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# Set to more than 1 in every process that Slurm's srun or Open MPI's mpirun starts as one of several.
T = TypeVar("T")
_LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


def initialize() -> None:
    """Joins the other processes of this run, where there are any; before anything else that JAX does.

    JAX_COORDINATOR_ADDRESS (host:port of the first), JAX_NUM_PROCESSES and JAX_PROCESS_ID say who they are; on Cloud
    TPU, on GKE, and under Slurm and Open MPI JAX finds out by itself. Raises ValueError where the variables are
    incomplete, ConnectionError where the others don't answer.
    """
    given = {name: os.environ[name] for name in (_ADDRESS, _COUNT, _INDEX) if os.environ.get(name)}
    arguments: dict[str, Any] = {}
    if _COUNT in given or _INDEX in given:
        if len(given) < 3 or not given[_COUNT].isdigit() or not given[_INDEX].isdigit():
            raise ValueError(
                f"{_ADDRESS} (host:port), {_COUNT} and {_INDEX} (numbers) say together which process this is, and here "
                f"is {given}: set all three or none."
            )
        count, index = int(given[_COUNT]), int(given[_INDEX])
        if index >= count:
            raise ValueError(f"{_INDEX} = {index} must be below {_COUNT} = {count}: processes are counted from 0.")
        arguments = {"coordinator_address": given[_ADDRESS], "num_processes": count, "process_id": index}
    elif not (_has_tpu() or any(int(os.environ.get(name, "1")) > 1 for name in _LAUNCHERS)):
        return
    # A notice of preemption to one process reaches all, and they agree on the step at which they stop.
    jax.config.update("jax_enable_preemption_service", True)
    try:
        jax.distributed.initialize(**arguments)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ConnectionError(f"the processes of this run didn't find each other ({arguments}): {reason}") from error


def _has_tpu() -> bool:
    """Whether chips are attached to this machine, and wanted."""
    platforms = os.environ.get("JAX_PLATFORMS", "tpu").split(",")
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    return "tpu" in platforms and bool(chips)


def is_first() -> bool:
    """Whether this is the process that writes for all: metrics, configs, results."""
    return jax.process_index() == 0


def say(*lines: str, error: bool = False) -> None:
    """Prints lines once, however many processes there are."""
    if lines and is_first():
        # Where the disk of a log is full, the run goes on.
        with contextlib.suppress(OSError):
            print(*lines, sep="\n", file=sys.stderr if error else sys.stdout, flush=True)


def wait(name: str) -> None:
    """Returns when every process has come to this point."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agree(value: bool) -> bool:
    """Whether the value is true in every process; all have to ask."""
    if jax.process_count() == 1:
        return value
    return bool(np.all(multihost_utils.process_allgather(np.array(value))))


def follow(value: bool) -> bool:
    """The value that the first process has; all have to ask."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.array(value)))


def follow_number(value: int) -> int:
    """The number that the first process has; all have to ask."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.array(value)))


class Interrupted(Exception):
    """What was under way has ended before its time, since the run is to stop."""


class StopSignal:
    """SIGTERM, with which clusters give notice that a machine is taken away: to one process, and all stop together.

    On TPU VMs and GKE the same notice comes before maintenance. Used as a context.
    """

    def __enter__(self) -> "StopSignal":
        self._received = False
        self._asked = 0
        self._before: Any = None
        # Of several processes JAX's preemption service listens, in each.
        self._together = jax.distributed.is_initialized()
        if not self._together and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def is_due(self) -> bool:
        """Whether the run is to stop here; every process asks at the same places, and all get one answer."""
        self._asked += 1
        return multihost_utils.reached_preemption_sync_point(self._asked) if self._together else self._received

    def during(self, items: Iterable[T]) -> Iterator[T]:
        """The items, as long as the run isn't to stop; where it is, raises Interrupted instead of the next."""
        for item in items:
            if self.is_due():
                raise Interrupted
            yield item

"""Where a run's numbers go: metrics.jsonl, load.jsonl, TensorBoard, the terminal; and its parameters' hash."""

import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tqdm import tqdm

from moe.checksums import name_leaves
from moe.events import load_summaries
from moe.files import AnyPath, describe, is_remote, write_whole
from moe.parallel import hosts
from moe.tracking import Tracker
from moe.types import PyTree

# Between copies of a run's numbers to object storage.
_COPY_SECONDS = 30.0
# Entries of an array that are brought to all hosts at a time.
_GATHERED = 2**26
# The files of lines.
_METRICS, _LOAD = "metrics.jsonl", "load.jsonl"


class MetricsWriter:
    """Adds one line per log point to metrics.jsonl, and the same numbers to TensorBoard event files.

    The experts' load goes to load.jsonl, {"step": …, "load": {"layer_1": [share of each expert, …], …}}, and to
    TensorBoard as histograms and a picture. Only the first process writes. Objects on a bucket can't be added to: there
    all is written on this machine, and copied at most every `_COPY_SECONDS` and in the end. What can't be written, for
    want of space or of a connection, is said once, kept, and written when that is possible again.
    """

    def __init__(self, workdir: AnyPath, start_step: int, tracker: Tracker | None = None) -> None:
        """Lines after `start_step` are from a part of the run that is computed again; they are taken out.

        tracker: gets the same numbers, and is closed with this. last: of the other lines the last one with a clock's
        values, {} where there is none.
        """
        self.last: dict[str, Any] = {}
        self._pending: dict[str, list[str]] = {_METRICS: [], _LOAD: []}
        self._is_failing = False
        self._tracker = tracker
        self._events: EventsWriter | None = None
        if not hosts.is_first():
            return
        self._target = workdir
        self._folder = Path(tempfile.mkdtemp(prefix="metrics-")) if is_remote(workdir) else workdir
        self._copied = time.monotonic()
        _, kept = self._begin(_LOAD, start_step)
        again, kept = self._begin(_METRICS, start_step)
        logged = (line for line in map(json.loads, reversed(kept)) if "time/elapsed_seconds" in line)
        self.last = next(logged, {})
        if again:
            print(f"metrics.jsonl: took out {again} lines after step {start_step}, which is run again", file=sys.stderr)
        # Not SummaryWriter: its thread ends where the disk is full, and then whoever adds to its queue waits for ever.
        (self._folder / "tensorboard").mkdir(exist_ok=True)
        self._events = EventsWriter(str(self._folder / "tensorboard" / "events"))
        if again:
            restart = SessionLog(status=SessionLog.START)
            self._events.write_event(Event(step=start_step + 1, wall_time=time.time(), session_log=restart))

    def _begin(self, name: str, start_step: int) -> tuple[int, list[str]]:
        """How many lines of the file are taken out, and those that stay."""
        kept, again = _split_lines(self._target / name, start_step)
        if again or (kept and is_remote(self._target)):
            write_whole(self._folder / name, "".join(kept))
        return again, kept

    def write(self, step: int, values: Mapping[str, float], load: Mapping[str, Any] | None = None) -> None:
        """Writes {"step": step, **values}; load: shares of the experts in the rows, by layer."""
        if self._events is None:
            return
        self._pending[_METRICS].append(json.dumps({"step": step, **values}) + "\n")
        tags = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        if load:
            # Five places, and one more for each digit by which an even share is smaller.
            places = 4 + len(str(max(map(len, load.values()))))
            shares = {name: np.round(np.asarray(one, np.float64), places).tolist() for name, one in load.items()}
            self._pending[_LOAD].append(json.dumps({"step": step, "load": shares}, separators=(",", ":")) + "\n")
            tags += load_summaries(load)
        event = Event(step=step, wall_time=time.time(), summary=Summary(value=tags))
        if self._tracker is not None:
            self._tracker.log(step, values)
        try:
            self._append()
            self._events.write_event(event)
            self._events.flush()
            if is_remote(self._target) and time.monotonic() - self._copied > _COPY_SECONDS:
                self._copy()
        except OSError as error:
            if not self._is_failing:
                hosts.say(f"metrics of step {step} can't be written yet: {describe(error)}", error=True)
            self._is_failing = True
        else:
            self._is_failing = False

    def _append(self) -> None:
        """Adds what is pending to each file, all of it or nothing."""
        for name, lines in self._pending.items():
            if not lines:
                continue
            with (self._folder / name).open("ab", buffering=0) as file:
                size = file.seek(0, os.SEEK_END)
                data = "".join(lines).encode()
                try:
                    if file.write(data) < len(data):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)
                except OSError:
                    file.truncate(size)
                    raise
            lines.clear()

    def _copy(self) -> None:
        lines = (name for name in self._pending if (self._folder / name).exists())
        events = (f"tensorboard/{file.name}" for file in (self._folder / "tensorboard").iterdir())
        for name in (*lines, *events):
            (self._target / name).parent.mkdir(parents=True, exist_ok=True)
            (self._target / name).write_bytes((self._folder / name).read_bytes())
        self._copied = time.monotonic()

    def close(self) -> None:
        """Completes the files; says what couldn't be written."""
        if self._events is None:
            return
        if self._tracker is not None:
            self._tracker.close()
        try:
            self._append()
            self._events.close()
            if is_remote(self._target):
                self._copy()
                shutil.rmtree(self._folder)
        except OSError as error:
            hosts.say(f"the last lines of metrics.jsonl are not written: {describe(error)}", error=True)
        self._events = None


def _split_lines(path: AnyPath, step: int) -> tuple[list[str], int]:
    """The lines up to `step`, and how many others there are (one cut off by a crash, or damaged, is one of those)."""
    if not path.exists():
        return [], 0
    kept: list[str] = []
    lines = path.read_bytes().splitlines(keepends=True)
    for line in lines:
        try:
            if json.loads(line)["step"] <= step and line.endswith(b"\n"):
                kept.append(line.decode())
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return kept, len(lines) - len(kept)


class Progress:
    """A progress bar on a terminal, plain lines elsewhere: step, loss, examples/s, time left."""

    def __init__(self, total: int, start: int) -> None:
        self._total = total
        self._start = start
        self._began = time.monotonic()
        silent = not (hosts.is_first() and sys.stderr.isatty())
        self._bar = tqdm(total=total, initial=start, unit="step", disable=silent)

    def advance(self) -> None:
        """One more step is done."""
        self._bar.update()

    def log(self, step: int, loss: float, examples_per_second: float) -> None:
        """Shows the state of the run at a log point."""
        if not self._bar.disable:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {examples_per_second:.0f} examples/s")
            return
        left = (time.monotonic() - self._began) / max(step - self._start, 1) * (self._total - step)
        hosts.say(
            f"step {step}/{self._total}  loss {loss:.4f}  {examples_per_second:.0f} examples/s  "
            f"{tqdm.format_interval(left)} left"
        )

    def close(self) -> None:
        """Ends the bar's line."""
        self._bar.close()


def is_measure(name: str) -> bool:
    """Whether a key of result.json is a measure of the test set, and not an end of its interval."""
    return name.startswith("test/") and not name.endswith(("_low", "_high"))


def flatten(tree: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """{"loss": 1} -> {"prefix/loss": 1.0}, for scalars."""
    return {f"{prefix}/{name}": float(value) for name, value in tree.items()}


def per_layer(metrics: Mapping[str, Any], first: int, every: int) -> dict[str, float]:
    """Metrics over MoE layers, as {"layer_3/entropy": …}, numbered by the block that the experts stand in.

    Scalars only; for the load of every expert see `layer_loads`.
    """
    return {
        f"layer_{first + every * index}/{name}": float(value)
        for name, values in metrics.items()
        for index, value in enumerate(values)
        if np.ndim(value) == 0
    }


def log_values(metrics: Mapping[str, Any], moe_blocks: range) -> dict[str, float]:
    """A step's metrics as one flat table: train/…, router/… (weighted losses, added up over layers), guard/…,
    moe/layer_N/…, blocks/layer_N/…. moe_blocks: the blocks with experts.
    """
    return {
        **flatten(metrics["train"], "train"),
        **flatten(metrics["router"], "router"),
        **flatten(metrics["guard"], "guard"),
        **flatten(per_layer(metrics["moe"], moe_blocks.start, moe_blocks.step), "moe"),
        **flatten(per_layer(metrics["blocks"], first=0, every=1), "blocks"),
    }


def layer_loads(metrics: Mapping[str, Any], first: int, every: int) -> dict[str, Any]:
    """The shares of the experts in the rows, {"layer_3": [E], …}; {} of a model without experts."""
    return {f"layer_{first + every * index}": shares for index, shares in enumerate(metrics.get("expert_load", ()))}


def params_sha256(params: PyTree) -> str:
    """SHA-256 over all parameters, in alphabetical order of their paths: each one's path, type, shape and bytes.

    Of arrays that lie on several hosts a few rows are brought together at a time.
    """
    digest = hashlib.sha256()
    for name, leaf in sorted(name_leaves(params).items()):
        digest.update(f"{name} {np.dtype(leaf.dtype)} {leaf.shape}\n".encode())
        for part in _pieces(leaf):
            digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()


def _pieces(leaf: jax.Array) -> Iterator[Any]:
    """The array, along its leading axis, whole where it lies on this host."""
    if leaf.is_fully_addressable or leaf.is_fully_replicated:
        yield leaf
        return
    rows = max(1, _GATHERED // max(1, leaf.size // leaf.shape[0]))
    for start in range(0, leaf.shape[0], rows):
        yield multihost_utils.process_allgather(leaf[start : start + rows], tiled=True)


class Clock:
    """Where a run's time goes, from its first start on, over all of its restarts.

    Everything in the loop of steps counts as training, but for what is said to be `spent` on something else, and for
    steps that are run again after a restart.
    """

    def __init__(self) -> None:
        self._begin = time.time()
        self._seconds = {"training": 0.0, "checkpoint": 0.0, "evaluation": 0.0}
        self._since: float | None = None

    def resume(self, last: Mapping[str, Any]) -> None:
        """Goes on from the last line of metrics.jsonl that counts, and begins to count training."""
        if last:
            self._begin = last["time/unix_seconds"] - last["time/elapsed_seconds"]
            self._seconds = {name: last.get(f"time/{name}_seconds", 0.0) for name in self._seconds}
        self._since = time.time()

    @contextmanager
    def spent(self, on: str) -> Iterator[None]:
        """What happens inside is no training."""
        self._count("training")
        try:
            yield
        finally:
            self._count(on)

    def _count(self, name: str) -> None:
        now = time.time()
        if self._since is not None:
            self._seconds[name] += now - self._since
        self._since = now

    def values(self) -> dict[str, float]:
        """Seconds so far, and goodput: those of training over all that have passed."""
        self._count("training")
        now = time.time()
        elapsed = max(now - self._begin, 1e-9)
        return {
            "goodput": self._seconds["training"] / elapsed,
            **{f"time/{name}_seconds": seconds for name, seconds in self._seconds.items()},
            "time/elapsed_seconds": elapsed,
            "time/unix_seconds": now,
        }


def write_json(path: AnyPath, value: Mapping[str, Any]) -> None:
    """Writes the file whole or not at all."""
    write_whole(path, json.dumps(value, indent=2) + "\n")

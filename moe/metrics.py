"""Where a run's numbers go: metrics.jsonl, TensorBoard, the terminal, and the hash of its parameters."""

import hashlib
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tensorboardX import SummaryWriter
from tqdm import tqdm

from moe.types import PyTree


class MetricsWriter:
    """Appends one line per log point to metrics.jsonl, and the same numbers to TensorBoard event files."""

    def __init__(self, workdir: Path, start_step: int) -> None:
        """Lines after `start_step` are from a part of the run that is computed again; they are taken out."""
        self._path = workdir / "metrics.jsonl"
        kept, again = _split_lines(self._path, start_step)
        if again:
            replacement = self._path.with_suffix(".tmp")
            replacement.write_text("".join(kept))
            replacement.replace(self._path)
            print(f"metrics.jsonl: took out {again} lines after step {start_step}, which is run again", file=sys.stderr)
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1 if again else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes {"step": step, **values}."""
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes the event files."""
        self._events.close()


def _split_lines(path: Path, step: int) -> tuple[list[str], int]:
    """The lines up to `step`, and how many others there are (a line cut off by a crash is one of those)."""
    if not path.exists():
        return [], 0
    kept: list[str] = []
    lines = path.read_text().splitlines(keepends=True)
    for line in lines:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            continue
    return kept, len(lines) - len(kept)


class Progress:
    """A progress bar on a terminal, plain lines elsewhere: step, loss, examples/s, time left."""

    def __init__(self, total: int, start: int) -> None:
        self._total = total
        self._start = start
        self._began = time.monotonic()
        self._bar = tqdm(total=total, initial=start, unit="step", disable=not sys.stderr.isatty())

    def advance(self) -> None:
        """One more step is done."""
        self._bar.update()

    def log(self, step: int, loss: float, examples_per_second: float) -> None:
        """Shows the state of the run at a log point."""
        if not self._bar.disable:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {examples_per_second:.0f} examples/s")
            return
        left = (time.monotonic() - self._began) / max(step - self._start, 1) * (self._total - step)
        print(
            f"step {step}/{self._total}  loss {loss:.4f}  {examples_per_second:.0f} examples/s  "
            f"{tqdm.format_interval(left)} left",
            flush=True,
        )

    def close(self) -> None:
        """Ends the bar's line."""
        self._bar.close()


def flatten(tree: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """{"loss": 1} -> {"prefix/loss": 1.0}, for scalars."""
    return {f"{prefix}/{name}": float(value) for name, value in tree.items()}


def per_layer(metrics: Mapping[str, Any], first: int, every: int) -> dict[str, float]:
    """Metrics over MoE layers, as {"layer_3/entropy": …}, numbered by the block that the experts stand in."""
    return {
        f"layer_{first + every * index}/{name}": float(value)
        for name, values in metrics.items()
        for index, value in enumerate(values)
    }


def params_sha256(params: PyTree) -> str:
    """SHA-256 over all parameters, in alphabetical order of their paths: each one's path, type, shape and bytes."""
    digest = hashlib.sha256()
    named = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]
    for name, leaf in sorted(named, key=lambda item: item[0]):
        whole = leaf if leaf.is_fully_addressable else multihost_utils.process_allgather(leaf, tiled=True)
        array = np.ascontiguousarray(whole)
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes the file whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)

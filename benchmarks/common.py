"""What the benchmarks share: interleaved timing, a table on the screen, and results with their circumstances."""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import jax

# What changes how fast the same program runs.
_ENVIRONMENT = ("GLIBC_TUNABLES", "XLA_FLAGS", "OMP_NUM_THREADS")


class Row(TypedDict):
    """One figure. ratio: over the row's baseline, None where there is none."""

    name: str
    case: str
    value: float
    unit: str
    ratio: float | None


def interleaved(
    functions: Mapping[str, Callable[..., Any]],
    *arguments: Any,
    repeats: int = 15,
    seconds: float = 20.0,
    clock: Callable[[], float] = time.perf_counter,
    rest: float = 0.0,
    warm: int = 0,
) -> dict[str, float]:
    """Median milliseconds per call of each function: all run in turn, so that a busy machine slows all alike.

    Every function is called once before, to compile. Stops after `repeats` rounds, or after `seconds` and three rounds.
    clock: time.process_time counts the processor time of all threads, which other work on the machine leaves alone.
    rest: seconds before each call, in which the threads of another library stop to wait for work.
    warm: calls before each timed one, for what follows itself where it is used: memory that a call gives back may have
        gone from the machine by the time that all others have been called, and comes back page by page.
    """
    for function in functions.values():
        jax.block_until_ready(function(*arguments))
    times: dict[str, list[float]] = {name: [] for name in functions}
    begin = time.perf_counter()
    for round_index in range(repeats):
        if round_index >= 3 and time.perf_counter() - begin > seconds:
            break
        for name, function in functions.items():
            time.sleep(rest)
            for _ in range(warm):
                jax.block_until_ready(function(*arguments))
            start = clock()
            jax.block_until_ready(function(*arguments))
            times[name].append(1e3 * (clock() - start))
    return {name: statistics.median(each) for name, each in times.items()}


def timed_rows(case: str, times: Mapping[str, float], baseline: str) -> list[Row]:
    """Rows of one case, with ratios to its baseline."""
    return [
        Row(name=name, case=case, value=value, unit="ms", ratio=value / times[baseline])
        for name, value in times.items()
    ]


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    lines = ["| case | name | value | unit | ratio |", "|---|---|---|---|---|"]
    for row in rows:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        lines.append(f"| {row['case']} | {row['name']} | {row['value']:.3g} | {row['unit']} | {ratio} |")
    return "\n".join(lines)


def circumstances() -> dict[str, str]:
    """The machine, the versions, and the command."""
    packages = {}
    for package in ("jax", "jaxlib", "libtpu", "numpy", "torch", "transformers", "entmax", "pillow"):
        try:
            packages[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0]
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {device.device_kind} ({device.platform})",
        "load at the end": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        "versions": ", ".join(f"{name} {version}" for name, version in packages.items()),
        "environment": " ".join(f"{name}={os.environ[name]}" for name in _ENVIRONMENT if name in os.environ) or "plain",
        "command": " ".join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
    }


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options that every benchmark has."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument(
        "--cpu-time",
        action="store_true",
        help="count processor time, all threads together, for a machine that is shared",
    )
    options.add_argument("--json", type=Path, help="write the rows to this file")
    options.add_argument("--markdown", type=Path, help="write the table to this file, with its circumstances")
    return options


def report(rows: Sequence[Row], options: argparse.Namespace) -> None:
    """Print the table, and keep it where the options say."""
    facts = circumstances()
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(list(rows), indent=1) + "\n")
    if options.markdown:
        head = "\n".join(f"* {name}: {value}" for name, value in facts.items())
        options.markdown.write_text(f"{head}\n\n{table(rows)}\n")

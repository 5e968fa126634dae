"""What the experiments share: the digits, one value a seed in, means with standard errors out."""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn import datasets

from benchmarks.common import Row
from moe.compare.statistics import estimate

TRAIN = 1437  # the split of `moe.data.digits`
Examples = tuple[jax.Array, jax.Array]  # images and labels
PACKAGES = ("jax", "flax", "optax", "numpy", "scikit-learn")


class Sample(NamedTuple):
    """One value a seed, of one method in one case. Methods of a case have the same seeds, so that values pair."""

    name: str
    case: str
    unit: str
    values: Sequence[float]


def digits() -> tuple[Examples, Examples]:
    """The scans to train on, and those to test on, as `moe.data.digits` splits them; [n, 8, 8, 1] in [0, 1]."""
    scans = datasets.load_digits()
    image, label = jnp.asarray(scans.images / 16, jnp.float32)[..., None], jnp.asarray(scans.target, jnp.int32)
    return (image[:TRAIN], label[:TRAIN]), (image[TRAIN:], label[TRAIN:])


def differences(sample: Sample, baseline: Sample) -> list[float]:
    """Seed by seed, what the sample has above the baseline."""
    return [a - b for a, b in zip(sample.values, baseline.values, strict=True)]


def baseline_of(sample: Sample, samples: Sequence[Sample], names: Sequence[str]) -> Sample | None:
    """The first of the named methods that has the sample's case and unit, unless it is the sample itself."""
    for name in names:
        for other in samples:
            if (other.name, other.case, other.unit) == (name, sample.case, sample.unit):
                return None if name == sample.name else other
    return None


def to_rows(samples: Sequence[Sample], baselines: Sequence[str]) -> list[Row]:
    """Means with their ratio to the baseline's, standard errors, paired differences, and the values of the seeds."""
    rows = []
    for sample in samples:
        mean, error, _ = estimate(sample.values)
        baseline = baseline_of(sample, samples, baselines)
        base = float(np.mean(baseline.values)) if baseline else 0.0
        found: list[tuple[str, float, float | None]] = [
            ("", mean, mean / base if base else None),
            (", standard error", error, None),
        ]
        if baseline:
            change, change_error, _ = estimate(differences(sample, baseline))
            found += [(", paired difference", change, None), (", standard error of that", change_error, None)]
        found += [(f", seed {seed}", float(value), None) for seed, value in enumerate(sample.values)]
        rows += [
            Row(name=sample.name + suffix, case=sample.case, value=value, unit=sample.unit, ratio=ratio)
            for suffix, value, ratio in found
            if not math.isnan(value)
        ]
    return rows


def plus_minus(values: Sequence[float], sign: str = "") -> str:
    """Mean ± standard error, two digits of this. sign: before a positive mean."""
    found = estimate(values)
    return f"{sign if found.mean > 0 else ''}{found}"


def table(samples: Sequence[Sample], baselines: Sequence[str]) -> str:
    """The samples in Markdown."""
    lines = ["| case | method | mean ± standard error | unit | paired difference |", "|---|---|---|---|---|"]
    for sample in samples:
        baseline = baseline_of(sample, samples, baselines)
        change = plus_minus(differences(sample, baseline), "+") if baseline else ""
        lines.append(f"| {sample.case} | {sample.name} | {plus_minus(sample.values)} | {sample.unit} | {change} |")
    return "\n".join(lines)


def parser(description: str | None, seeds: int = 5) -> argparse.ArgumentParser:
    """Options that every experiment has."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    options.add_argument("--seeds", type=int, default=seeds, help="runs of each method (default: %(default)s)")
    options.add_argument("--json", type=Path, help="write the rows to this file")
    options.add_argument("--markdown", type=Path, help="write the table to this file, with its circumstances")
    return options


def parse(options: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options given. Ends with exit code 2 where there are too few seeds for a standard error."""
    arguments = options.parse_args(argv)
    if arguments.seeds < 2:
        options.error(f"--seeds={arguments.seeds}: a standard error takes at least 2.")
    return arguments


def report(
    samples: Sequence[Sample],
    baselines: Sequence[str],
    arguments: argparse.Namespace,
    name: str,
    begin: float,
    more: Sequence[str] = (),
) -> None:
    """Print the table, and keep it where the options say.

    begin: `time.perf_counter()` at the start. more: what else there is to say, in sentences.
    """
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in PACKAGES)
    facts = [
        f"machine: {os.cpu_count()} {platform.machine()} cores",
        f"versions: Python {platform.python_version()}, {versions}",
        f"command: {' '.join(['python', '-m', f'experiments.{name}', *sys.argv[1:]])}",
        f"time: {(time.perf_counter() - begin) / 60:.1f} minutes",
        f"paired difference: from the first of {', '.join(repr(each) for each in baselines)} in the case, seed by seed",
        *more,
    ]
    page = table(samples, baselines)
    print("\n".join([page, *more]))
    if arguments.json:
        arguments.json.write_text(json.dumps(to_rows(samples, baselines), indent=1, ensure_ascii=False) + "\n")
    if arguments.markdown:
        arguments.markdown.write_text("\n".join(f"* {fact}" for fact in facts) + f"\n\n{page}\n")

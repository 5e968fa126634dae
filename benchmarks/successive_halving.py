"""Successive halving beside the published curves: quality, gradient and time for all 85 published pairs (n, k).

python -m benchmarks.successive_halving [--json FILE] [--markdown FILE] [--cpu-time] [--figures FOLDER]
                        [--only quality|baseline|time] [--n N ...] [--k K ...] [--samples S] [--redraw FILE ...]

quality   nCCS, over what was published, and the median gradient norm, over that at base 20
baseline  nCCS of iterative softmax at the published sharpness, over what was published, and at a tuned one; k <= 128
time      successive halving, iterative softmax (k <= 128: its time grows with k) and hard top-k with a gather, of one
          batch, forward and with gradient, over the hard one; and from which k on halving is the fastest soft one

The setting is the paper's (arXiv 2010.15552): d = 32, embeddings U[-1, 1], scores U[0, 1], batches of 16. nCCS is the
mean, over the true top k rows, of the largest cosine with any selected row. The gradient norm is the median over all
samples of the 2-norm of d<selected rows, C>/d scores, with one normal C for all weights. Figures need matplotlib.
"""

import argparse
import csv
import functools
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.append(str(Path(__file__).parents[1]))  # for a call by path, which finds no packages beside this folder

from benchmarks import common
from benchmarks.common import Row
from moe import topk

PUBLISHED = Path(__file__).parent / "data" / "successive_halving_published.csv"
WIDTH, BATCH = 32, 16
RELEASED, CENTRED = "base 20", "CentredBoost"
WEIGHTS: dict[str, topk.PairWeights] = {RELEASED: topk.BoostedSoftmax(base=20.0), CENTRED: topk.CentredBoost()}
SHARPNESS = {"iterative softmax, sharpness 2": 2.0, "iterative softmax, sharpness 1e5": 1e5}
LONGEST_ITERATION = 128
HALVING, ITERATIVE, HARD = "successive halving", "iterative softmax", "hard top-k and gather"
Pair = tuple[int, int]
Operator = Callable[[jax.Array, jax.Array], jax.Array]


def published(method: str, column: str) -> dict[Pair, float]:
    """A column of the published table, by (n, k)."""
    with PUBLISHED.open() as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        return {(int(row["n"]), int(row["k"])): float(row[column]) for row in rows if row["method"] == method}


def case(n: int, k: int) -> str:
    """The name of a pair in the table."""
    return f"n={n} k={k}"


def sample(key: jax.Array, n: int, k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One batch of embeddings, scores and cotangents."""
    e_key, v_key, c_key = jax.random.split(key, 3)
    return (
        jax.random.uniform(e_key, (BATCH, n, WIDTH), minval=-1.0),
        jax.random.uniform(v_key, (BATCH, n)),
        jax.random.normal(c_key, (BATCH, k, WIDTH)),
    )


# Quality ------------------------------------------------------------------------------------------------------------


def nccs(embeddings: jax.Array, scores: jax.Array, rows: jax.Array) -> jax.Array:
    """Quality of each sample, in slices of the true top k that keep the table of cosines small."""
    k = rows.shape[-2]
    targets = hard(embeddings, scores, k)
    unit = [x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (targets, rows)]
    slices = jnp.moveaxis(unit[0].reshape(BATCH, max(1, k // 64), -1, WIDTH), 1, 0)
    cosines = jax.lax.map(lambda part: jnp.max(jnp.einsum("bid,bjd->bij", part, unit[1]), axis=-1), slices)
    return jnp.mean(cosines, axis=(0, 2))


@functools.partial(jax.jit, static_argnames=("n", "k"))
def quality_of_batch(key: jax.Array, n: int, k: int) -> dict[str, tuple[jax.Array, jax.Array]]:
    """nCCS and gradient norm of every sample of one batch, for each of the weights on the same data."""
    embeddings, scores, cotangent = sample(key, n, k)
    result = {}
    for name, weights in WEIGHTS.items():

        def select(scores: jax.Array, weights: topk.PairWeights = weights) -> jax.Array:
            return topk.successive_halving(embeddings, scores, k, weights=weights).embeddings

        rows, pull = jax.vjp(select, scores)
        result[name] = nccs(embeddings, scores, rows), jnp.linalg.norm(pull(cotangent)[0], axis=-1)
    return result


@functools.partial(jax.jit, static_argnames=("n", "k"))
def baseline_of_batch(key: jax.Array, n: int, k: int) -> dict[str, tuple[jax.Array]]:
    """nCCS of iterative softmax for every sample of one batch."""
    embeddings, scores, _ = sample(key, n, k)
    return {
        name: (nccs(embeddings, scores, topk.iterative_softmax(embeddings, scores, k, sharpness=value).embeddings),)
        for name, value in SHARPNESS.items()
    }


def batches(of_batch: Callable[..., Any], n: int, k: int, samples: int) -> dict[str, list[np.ndarray]]:
    """What `of_batch` finds, by name, over at least so many samples; the same samples for each function."""
    # Short lengths cost little and scatter most.
    keys = jax.random.split(jax.random.key(n + k), -(-max(samples, 2**16 // n) // BATCH))
    found = [of_batch(key, n, k) for key in keys]
    return {
        name: [np.concatenate(each) for each in zip(*(one[name] for one in found), strict=True)] for name in found[0]
    }


def nccs_rows(name: str, pair: Pair, values: np.ndarray, reference: float | None) -> list[Row]:
    """The mean, over the published one, and its standard error."""
    mean, error = float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))
    ratio = None if reference is None else mean / reference
    return [
        Row(name=name, case=case(*pair), value=mean, unit="nCCS", ratio=ratio),
        Row(name=f"{name}, standard error", case=case(*pair), value=error, unit="nCCS", ratio=None),
    ]


def quality(n: int, k: int, options: argparse.Namespace) -> list[Row]:
    """nCCS and gradient norm of successive halving."""
    reference = published("successive_halving", "nccs_mean")[n, k]
    found = batches(quality_of_batch, n, k, options.samples)
    norms = {name: float(np.median(found[name][1])) for name in WEIGHTS}
    rows = [row for name in WEIGHTS for row in nccs_rows(name, (n, k), found[name][0], reference)]
    return rows + [
        Row(name=name, case=case(n, k), value=norm, unit="gradient norm", ratio=norm / norms[RELEASED])
        for name, norm in norms.items()
    ]


def baseline(n: int, k: int, options: argparse.Namespace) -> list[Row]:
    """nCCS of iterative softmax, as published and tuned."""
    if k > LONGEST_ITERATION:
        return []
    reference = published("iterative_softmax", "nccs_mean")[n, k]
    found = batches(baseline_of_batch, n, k, options.samples)
    return [
        row
        for name, sharpness in SHARPNESS.items()
        for row in nccs_rows(name, (n, k), found[name][0], reference if sharpness == 2 else None)
    ]


# Time ---------------------------------------------------------------------------------------------------------------


def hard(embeddings: jax.Array, scores: jax.Array, k: int) -> jax.Array:
    """The yardstick without a gradient in the scores: top k and gather."""
    _, best = jax.lax.top_k(scores, k)
    return jnp.take_along_axis(embeddings, best[..., None], axis=-2)


def operators(k: int) -> dict[str, Operator]:
    """What is timed at this k. The sharpness of iterative softmax does not change its time."""
    timed: dict[str, Operator] = {
        HARD: lambda e, v: hard(e, v, k),
        HALVING: lambda e, v: topk.successive_halving(e, v, k).embeddings,
    }
    if k <= LONGEST_ITERATION:
        timed[ITERATIVE] = lambda e, v: topk.iterative_softmax(e, v, k).embeddings
    return timed


def times(n: int, k: int, options: argparse.Namespace) -> list[Row]:
    """Every operator on one batch, all in turns: forward, and with the gradient in embeddings and scores."""
    embeddings, scores, cotangent = sample(jax.random.key(0), n, k)
    programs: dict[str, Callable[..., Any]] = {}
    for name, operator in operators(k).items():

        def loss(e: jax.Array, v: jax.Array, operator: Operator = operator) -> jax.Array:
            return jnp.vdot(operator(e, v), cotangent)

        programs[f"{name}, forward"] = jax.jit(operator)
        programs[f"{name}, with gradient"] = jax.jit(jax.grad(loss, (0, 1)))
    clock = time.process_time if options.cpu_time else time.perf_counter
    taken = common.interleaved(programs, embeddings, scores, repeats=options.repeats, seconds=6.0, clock=clock)
    rows = []
    for direction in ("forward", "with gradient"):
        part = {name: value for name, value in taken.items() if name.endswith(direction)}
        rows += common.timed_rows(case(n, k), part, f"{HARD}, {direction}")
    return rows


def crossovers(rows: Iterable[Row]) -> list[Row]:
    """For each n, the k from which on halving beats iterative softmax, with their ratio there; a row even if none."""
    rows = list(rows)
    result = []
    for direction in ("forward", "with gradient"):
        halving, iterative = (by_pair(rows, f"{name}, {direction}", "ms") for name in (HALVING, ITERATIVE))
        for n in sorted({n for n, _ in iterative}):
            ratios = {k: halving[n, k] / value for (other, k), value in sorted(iterative.items()) if other == n}
            slower = [k for k, ratio in ratios.items() if ratio >= 1]
            faster = [k for k in ratios if not slower or k > slower[-1]]
            name, k = (f"faster than {ITERATIVE} from k on", faster[0]) if faster else ("slower up to k", slower[-1])
            result.append(Row(name=f"{name}, {direction}", case=f"n={n}", value=k, unit="k", ratio=ratios[k]))
    return result


def by_pair(rows: Iterable[Row], name: str, unit: str) -> dict[Pair, float]:
    """The values of one name and unit, by (n, k)."""
    found = {}
    for row in rows:
        match = re.fullmatch(r"n=(\d+) k=(\d+)", row["case"])
        if match and (row["name"], row["unit"]) == (name, unit):
            found[int(match[1]), int(match[2])] = row["value"]
    return found


# Figures ------------------------------------------------------------------------------------------------------------


def draw_nccs(rows: list[Row], folder: Path) -> None:
    """The paper's figure of quality against n, measured as lines and published as rings."""
    panels = [
        ("successive halving, base 20", by_pair(rows, RELEASED, "nCCS"), published("successive_halving", "nccs_mean")),
        ("successive halving, CentredBoost", by_pair(rows, CENTRED, "nCCS"), {}),
        *(
            (name, by_pair(rows, name, "nCCS"), published("iterative_softmax", "nccs_mean") if value == 2 else {})
            for name, value in SHARPNESS.items()
        ),
    ]
    figure, axes = canvas(len(panels))
    for axis, (title, measured, paper) in zip(axes, panels, strict=True):
        draw(axis, title, measured, paper)
        axis.axhline(0.97, color="grey", linewidth=0.8, linestyle=":")
        axis.set_ylim(0, 1.02)
    save(figure, axes, "nCCS (rings: published)", folder / "successive_halving_nccs.png")


def draw_time(rows: list[Row], folder: Path) -> None:
    """The paper's figure of time against n, published beside measured: two machines."""
    panels = []
    for name, method in ((HALVING, "successive_halving"), (ITERATIVE, "iterative_softmax")):
        paper = {pair: 1e3 * value for pair, value in published(method, "seconds_per_batch16_median").items()}
        panels += [(f"{name}, published", paper), (f"{name}, here", by_pair(rows, f"{name}, forward", "ms"))]
    figure, axes = canvas(len(panels))
    for axis, (title, values) in zip(axes, panels, strict=True):
        draw(axis, title, values, {})
        axis.set_yscale("log")
    save(figure, axes, "ms per batch of 16, forward", folder / "successive_halving_time.png")


def canvas(panels: int) -> tuple[Any, Any]:
    """A figure of panels in one row that share their axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(1, panels, figsize=(3.6 * panels + 1, 4), sharex=True, sharey=True, layout="constrained")


def draw(axis: Any, title: str, lines: Mapping[Pair, float], rings: Mapping[Pair, float]) -> None:
    """One panel: a colour for each k."""
    from matplotlib import colormaps

    every_k = sorted({k for _, k in published("successive_halving", "nccs_mean")})
    for k, colour in zip(every_k, colormaps["turbo"](np.linspace(0.05, 0.95, len(every_k))), strict=True):
        for values, style in ((lines, {"marker": ".", "linewidth": 1.3}), (rings, {"marker": "o", "linewidth": 0})):
            points = sorted((n, value) for (n, other), value in values.items() if other == k)
            label = f"{k}" if values is lines else None
            axis.plot(
                *zip(*points, strict=True) if points else ([], []), color=colour, label=label, mfc="none", **style
            )
    axis.set_xscale("log", base=2)
    axis.set_xlabel("n")
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3)


def save(figure: Any, axes: Any, ylabel: str, path: Path) -> None:
    """Label and write a figure."""
    axes[0].set_ylabel(ylabel)
    figure.legend(*axes[0].get_legend_handles_labels(), title="k", loc="outside right center")
    figure.savefig(path, dpi=90)


SECTIONS = {"quality": quality, "baseline": baseline, "time": times}


def main() -> None:
    """Run the sections asked for, over the pairs asked for."""
    options = common.parser(__doc__)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument("--only", choices=SECTIONS, action="append", help="sections to run; all by default")
    options.add_argument("--n", type=int, nargs="*", default=[], help="lengths; all by default")
    options.add_argument("--k", type=int, nargs="*", default=[], help="numbers of rows; all by default")
    options.add_argument("--samples", type=int, default=256, help="least samples for a pair's quality")
    options.add_argument("--repeats", type=int, default=15, help="most timed calls of a program")
    options.add_argument("--figures", type=Path, help="draw the paper's figures into this folder")
    options.add_argument(
        "--redraw", type=Path, nargs="+", help="with --figures: measure nothing, draw what these JSON files keep"
    )
    arguments = options.parse_args()
    if arguments.redraw:
        rows = [row for file in arguments.redraw for row in json.loads(file.read_text())]
    else:
        rows = []
        for section in arguments.only or SECTIONS:
            for n, k in published("successive_halving", "nccs_mean"):
                if (not arguments.n or n in arguments.n) and (not arguments.k or k in arguments.k):
                    rows += SECTIONS[section](n, k, arguments)
                    print(section, case(n, k), file=sys.stderr, flush=True)
                    jax.clear_caches()  # hundreds of programs in one process exhaust the kernel's table of mappings
        rows += crossovers(rows)
        common.report(rows, arguments)
    if arguments.figures:
        units = {row["unit"] for row in rows}
        for unit, figure in (("nCCS", draw_nccs), ("ms", draw_time)):
            if unit in units:
                figure(rows, arguments.figures)


if __name__ == "__main__":
    main()

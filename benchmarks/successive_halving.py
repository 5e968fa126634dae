"""Successive halving beside the published curves: quality, gradient and time for all 85 published pairs (n, k).

    python benchmarks/successive_halving.py quality            # -> results/successive_halving_quality.csv
    python benchmarks/successive_halving.py time               # -> results/successive_halving_time.csv
    python benchmarks/successive_halving.py plot               # -> results/successive_halving_{time,nccs}.png
    python benchmarks/successive_halving.py time --n 1024 4096 # some lengths only; other rows of the file are kept

The setting is the paper's (arXiv 2010.15552): d = 32, embeddings U[-1, 1], scores U[0, 1], batches of 16. nCCS is the
mean, over the true top k rows, of the largest cosine with any selected row. The gradient norm is the median over all
samples of the 2-norm of d<selected rows, C>/d scores, with one normal C for all weights. Plots need matplotlib.
"""

import argparse
import csv
import functools
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe import topk

HERE = Path(__file__).parent
PUBLISHED = HERE / "data" / "successive_halving_published.csv"
RESULTS = HERE / "results"
WIDTH, BATCH = 32, 16
WEIGHTS = {"released": topk.BoostedSoftmax(base=20.0), "centred": topk.CentredBoost()}
# Iterative softmax takes time in proportion to k; past this its curve is a straight line.
LONGEST_ITERATION = 128


def published() -> dict[tuple[int, int, str], dict[str, float]]:
    """The published row of every (n, k, method)."""
    with PUBLISHED.open() as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        columns = ("nccs_mean", "nccs_std", "seconds_per_batch16_median")
        return {
            (int(row["n"]), int(row["k"]), row["method"]): {name: float(row[name]) for name in columns} for row in rows
        }


def pairs(lengths: Iterable[int], sizes: Iterable[int]) -> list[tuple[int, int]]:
    """The published (n, k) with n among these lengths and k among these sizes; none given means all."""
    lengths, sizes = set(lengths), set(sizes)
    return sorted({(n, k) for n, k, _ in published() if (not lengths or n in lengths) and (not sizes or k in sizes)})


def sample(key: jax.Array, n: int, k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One batch of embeddings, scores and cotangents."""
    e_key, v_key, c_key = jax.random.split(key, 3)
    return (
        jax.random.uniform(e_key, (BATCH, n, WIDTH), minval=-1.0),
        jax.random.uniform(v_key, (BATCH, n)),
        jax.random.normal(c_key, (BATCH, k, WIDTH)),
    )


def nccs(embeddings: jax.Array, scores: jax.Array, rows: jax.Array) -> jax.Array:
    """Quality of each sample, in slices of the true top k that keep the table of cosines small."""
    k = rows.shape[-2]
    _, best = jax.lax.top_k(scores, k)
    targets = jnp.take_along_axis(embeddings, best[..., None], axis=-2)
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


def quality(n: int, k: int, samples: int) -> list[dict[str, Any]]:
    """One row for each of the weights: nCCS with its standard error, and the median gradient norm."""
    # Short lengths cost little and scatter most.
    batches_needed = max(samples, 2**16 // n) // BATCH
    keys = jax.random.split(jax.random.key(n + k), batches_needed)
    batches = [quality_of_batch(key, n, k) for key in keys]
    rows = []
    for name in WEIGHTS:
        values, norms = (np.concatenate([batch[name][i] for batch in batches]) for i in (0, 1))
        rows.append(
            {
                "n": n,
                "k": k,
                "weights": name,
                "samples": len(values),
                "nccs": round(float(values.mean()), 5),
                "standard_error": round(float(values.std(ddof=1) / np.sqrt(len(values))), 5),
                "median_gradient_norm": round(float(np.median(norms)), 4),
            }
        )
    return rows


def hard(embeddings: jax.Array, scores: jax.Array, k: int) -> jax.Array:
    """The yardstick without a gradient in the scores: top k and gather."""
    _, best = jax.lax.top_k(scores, k)
    return jnp.take_along_axis(embeddings, best[..., None], axis=-2)


def operators(k: int) -> dict[str, Callable[[jax.Array, jax.Array], jax.Array]]:
    """What is timed at this k. The sharpness of iterative softmax does not change its time."""
    timed: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
        "successive_halving": lambda e, v: topk.successive_halving(e, v, k).embeddings,
        "hard": lambda e, v: hard(e, v, k),
    }
    if k <= LONGEST_ITERATION:
        timed["iterative_softmax"] = lambda e, v: topk.iterative_softmax(e, v, k).embeddings
    return timed


def seconds(n: int, k: int, repeats: int) -> list[dict[str, Any]]:
    """Median wall seconds of every operator on one batch, forward and with gradient, taken in turns."""
    embeddings, scores, cotangent = sample(jax.random.key(0), n, k)
    programs = {}
    for name, operator in operators(k).items():

        def loss(e: jax.Array, v: jax.Array, operator: Callable = operator) -> jax.Array:
            return jnp.vdot(operator(e, v), cotangent)

        programs[name] = jax.jit(operator), jax.jit(jax.grad(loss, (0, 1)))
    taken: dict[tuple[str, int], list[float]] = {(name, i): [] for name in programs for i in (0, 1)}
    for repeat in range(repeats + 1):
        for (name, i), times in taken.items():
            start = time.perf_counter()
            jax.block_until_ready(programs[name][i](embeddings, scores))
            if repeat:  # the first call compiles
                times.append(time.perf_counter() - start)
    return [
        {
            "n": n,
            "k": k,
            "operator": name,
            "forward": round(statistics.median(taken[name, 0]), 6),
            "with_gradient": round(statistics.median(taken[name, 1]), 6),
        }
        for name in programs
    ]


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of an earlier run, numbers as numbers."""
    if not path.exists():
        return []
    with path.open() as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        return [
            {name: value if name in ("weights", "operator") else float(value) for name, value in row.items()}
            for row in rows
        ]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace the rows of the (n, k) at hand, keep the others, and say where it was measured."""
    fresh = {(row["n"], row["k"]) for row in rows}
    kept = [row for row in read(path) if (row["n"], row["k"]) not in fresh]
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        file.write(f"# jax {jax.__version__}, {jax.default_backend()}, {platform.machine()}\n")
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        for row in sorted(kept + rows, key=lambda row: (row["n"], row["k"])):
            writer.writerow(
                {name: int(value) if name in ("n", "k", "samples") else value for name, value in row.items()}
            )


def plot() -> None:
    """The paper's two figures, published beside measured: quality and time against n, one line for each k."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    paper = published()
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), sharex=True, sharey=True)
    measured = read(RESULTS / "successive_halving_quality.csv")
    panels = ["published, base 20", "this operator, base 20", "this operator, CentredBoost"]
    sources = [
        {(n, k): row["nccs_mean"] for (n, k, method), row in paper.items() if method == "successive_halving"},
        *({(row["n"], row["k"]): row["nccs"] for row in measured if row["weights"] == name} for name in WEIGHTS),
    ]
    for axis, title, values in zip(axes, panels, sources, strict=True):
        draw(axis, values, title)
        axis.axhline(0.97, color="grey", linewidth=0.6, linestyle=":")
    axes[0].set_ylabel("nCCS")
    axes[-1].legend(title="k", fontsize=7, ncols=2)
    save(figure, "nccs")

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), sharex=True, sharey=True)
    measured = read(RESULTS / "successive_halving_time.csv")
    panels = ["successive halving, published", "successive halving, here", "iterative softmax, here"]
    sources = [
        {
            (n, k): row["seconds_per_batch16_median"]
            for (n, k, method), row in paper.items()
            if method == "successive_halving"
        },
        *(
            {(row["n"], row["k"]): row["forward"] for row in measured if row["operator"] == name}
            for name in ("successive_halving", "iterative_softmax")
        ),
    ]
    for axis, title, values in zip(axes, panels, sources, strict=True):
        draw(axis, values, title)
        axis.set_yscale("log")
    axes[0].set_ylabel("seconds per batch of 16, forward")
    axes[1].legend(title="k", fontsize=7, ncols=2)
    save(figure, "time")


def draw(axis: Any, values: dict[tuple[int, int], float], title: str) -> None:
    """One panel: a line for each k."""
    for k in sorted({k for _, k in values}):
        line = sorted((n, value) for (n, other), value in values.items() if other == k)
        axis.plot(*zip(*line, strict=True), marker=".", linewidth=1, color=f"C{round(np.log2(k)) - 1}", label=f"{k:g}")
    axis.set_xscale("log", base=2)
    axis.set_xlabel("n")
    axis.set_title(title)


def save(figure: Any, name: str) -> None:
    """Write the figure beside the results."""
    figure.tight_layout()
    figure.savefig(RESULTS / f"successive_halving_{name}.png", dpi=110)


def main() -> None:
    """Measure or plot, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["quality", "time", "plot"])
    parser.add_argument("--n", type=int, nargs="*", default=[], help="lengths (default: all that were published)")
    parser.add_argument("--k", type=int, nargs="*", default=[], help="numbers of rows (default: all)")
    parser.add_argument("--samples", type=int, default=256, help="least samples per pair (quality)")
    parser.add_argument("--repeats", type=int, default=7, help="timed calls per operator (time)")
    options = parser.parse_args()
    if options.what == "plot":
        plot()
        return
    for n, k in pairs(options.n, options.k):
        if options.what == "quality":
            rows = quality(n, k, options.samples)
        else:
            rows = seconds(n, k, options.repeats)
        write(RESULTS / f"successive_halving_{options.what}.csv", rows)
        for row in rows:
            print(*(f"{name} {value}" for name, value in row.items()), sep="  ", flush=True)


if __name__ == "__main__":
    main()

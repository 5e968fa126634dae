"""How fast and how exact `moe.topk.mask` is, beside the plain softmax + top_k, and its solvers beside each other.

python -m benchmarks.topk [--json FILE] [--markdown FILE] [--cpu-time]
                        [--only routers|solvers|errors|pruning] [--quick]

routers   forward, and forward with gradient, at router sizes; ratio to softmax + lax.top_k in the same run
solvers   PAV, Dykstra and Threshold by n, and Dykstra's time for one sweep
errors    largest error against float64, in units of the scale (1), over strengths from 1e-4 to 1e2
pruning   n = 10^6, k = 10^5: time, and how far the sum is from k; beside entmax.budget_bisect where it is installed
"""

import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.append(str(Path(__file__).parents[1]))  # for a call by path, which finds no packages beside this folder

from benchmarks import common
from benchmarks.common import Row
from moe import isotonic, topk

STRENGTH = 0.3
ROUTER_SHAPES = [(16384, 8), (16384, 32), (16384, 128), (4096, 512)]
BASELINE = "softmax + top_k"
Clock = Callable[[], float]


def normal(*shape: int, seed: int = 0) -> jax.Array:
    """Gaussian logits."""
    return jax.random.normal(jax.random.key(seed), shape)


def plain(x: jax.Array, k: int) -> jax.Array:
    """What a router without this package does, as one array of the values that it selects."""
    return jax.lax.top_k(jax.nn.softmax(x), k)[0]


def with_gradient(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], Any]:
    """Forward and backward, with a cotangent that depends on the output."""
    return jax.jit(jax.value_and_grad(lambda x: jnp.sum(jnp.square(function(x)))))


def routers(quick: bool, clock: Clock) -> list[Row]:
    """`mask` with its default solver against softmax + top_k."""
    rows = []
    for tokens, n in ROUTER_SHAPES[: 2 if quick else None]:
        x = normal(tokens, n)
        for k in (2,) if n < 32 else (2, 8):
            functions = {BASELINE: functools.partial(plain, k=k)}
            for p, label in ((2.0, "2"), (4 / 3, "4/3")):
                functions[f"mask p={label}"] = functools.partial(topk.mask, k=k, p=p, strength=STRENGTH)
            for direction, wrap in (("forward", jax.jit), ("forward + backward", with_gradient)):
                times = common.interleaved({name: wrap(f) for name, f in functions.items()}, x, clock=clock)
                rows += common.timed_rows(f"{tokens}x{n} k={k} {direction}", times, BASELINE)
    return rows


def solvers(quick: bool, clock: Clock) -> list[Row]:
    """The mask by each solver. Ratio to Threshold."""
    rows: list[Row] = []
    for tokens, n in ((4096, 8), (4096, 32), (4096, 128))[: 1 if quick else None]:
        x = normal(tokens, n)
        for p, label in ((2.0, "2"), (4 / 3, "4/3")):
            candidates = {
                "Threshold": isotonic.Threshold(),
                "Dykstra, 100 sweeps": isotonic.Dykstra(100, 0.0),
                "PAV": isotonic.Pav(),
            }
            functions = {
                name: jax.jit(functools.partial(topk.mask, k=2, p=p, strength=STRENGTH, solver=solver))
                for name, solver in candidates.items()
            }
            times = common.interleaved(functions, x, repeats=5, clock=clock)
            rows += common.timed_rows(f"{tokens}x{n} k=2 p={label}", times, "Threshold")
    x = -jnp.sort(-normal(16384, 32), axis=-1)
    w = (jnp.arange(32) < 2).astype(jnp.float32)

    def sweeps(steps: int) -> Callable[[jax.Array], jax.Array]:
        solver = isotonic.Dykstra(steps, 0.0)
        return jax.jit(lambda s: isotonic.solve(s, w, strength=STRENGTH, p=2.0, solver=solver).value)

    times = common.interleaved({"few": sweeps(10), "many": sweeps(60)}, x, clock=clock)
    each = (times["many"] - times["few"]) / 50
    return [*rows, Row(name="Dykstra, one sweep", case="16384x32 p=2", value=each, unit="ms", ratio=None)]


def errors(quick: bool, clock: Clock) -> list[Row]:
    """Largest error of the mask against bisection in float64 to the last bit. No clock is read."""
    del clock
    rows: list[Row] = []
    for n, k in ((8, 2), (32, 2), (32, 8), (128, 8)):
        x = np.asarray(normal(1024 if quick else 4096, n, seed=n))
        for p, label, r in ((2.0, "2", 1), (4 / 3, "4/3", 3)):
            run = jax.jit(functools.partial(topk.mask, k=k, p=p))
            worst, dirt = 0.0, 0
            for strength in np.float32(10.0) ** np.arange(-4, 3, dtype=np.float32):
                y, exact = np.asarray(run(x, strength=strength)), exact_mask(x, k, float(strength), r)
                worst = max(worst, float(np.abs(y - exact).max()))
                dirt += int(np.sum((exact == 0) & (y != 0)) + np.sum((exact == 1) & (y != 1)))
            rows.append(Row(name="largest error", case=f"n={n} k={k} p={label}", value=worst, unit="", ratio=None))
            rows.append(Row(name="inexact 0 or 1", case=f"n={n} k={k} p={label}", value=dirt, unit="", ratio=None))
    return rows


def exact_mask(x: np.ndarray, k: int, strength: float, r: int) -> np.ndarray:
    """The mask in float64, by bisection for tau until the bracket is empty."""
    x = x.astype(np.float64)
    ranked = -np.sort(-x, axis=-1)
    kth = ranked[:, k - 1 : k]
    heights = (x - kth) / strength + 1
    low, high = np.zeros_like(kth), np.ones_like(kth)
    for _ in range(60):
        middle = (low + high) / 2
        enough = np.sum(np.clip(heights - middle, 0, 1) ** r, axis=-1, keepdims=True) >= k
        low, high = np.where(enough, middle, low), np.where(enough, high, middle)
    hard = np.sum(heights > 0, axis=-1, keepdims=True) <= k
    return np.clip(heights - np.where(hard, 0, low), 0, 1) ** r


def pruning(quick: bool, clock: Clock) -> list[Row]:
    """One long vector; the ratio is to softmax + top_k."""
    n, k = 10**6, 10**5
    x = normal(n)
    mask = functools.partial(topk.mask, k=k, p=2.0)
    rows: list[Row] = []
    for direction, wrap in (("forward", jax.jit), ("forward + backward", with_gradient)):
        functions = {BASELINE: wrap(functools.partial(plain, k=k)), "mask p=2": wrap(mask)}
        functions |= entmax(np.array(x), k, direction != "forward")
        times = common.interleaved(functions, x, repeats=9, clock=clock)
        rows += common.timed_rows(f"n=10^6 k=10^5 {direction}", times, BASELINE)
    miss = abs(float(np.sum(np.asarray(mask(x), np.float64))) - k) / k
    return [*rows, Row(name="|sum - k| / k", case="n=10^6 k=10^5", value=miss, unit="", ratio=None)]


def entmax(x: np.ndarray, k: int, gradient: bool) -> dict[str, Callable[[jax.Array], Any]]:
    """entmax.budget_bisect at 24 steps, which is the same mask (p = 2, strength 1); {} where it isn't installed."""
    # Otherwise its threads go on spinning into the time of whatever runs next. Read when the library is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        import torch
        from entmax import budget_bisect
    except ImportError:
        return {}
    leaf = torch.from_numpy(x).requires_grad_(gradient)

    def run(_: jax.Array) -> Any:
        y = budget_bisect(leaf, budget=k, n_iter=24)
        if gradient:
            y.square().sum().backward()
        return y

    return {"entmax.budget_bisect, 24 steps": run}


SECTIONS = {"routers": routers, "solvers": solvers, "errors": errors, "pruning": pruning}


def main() -> None:
    """Run the sections asked for."""
    options = common.parser(__doc__)
    options.add_argument("--only", choices=SECTIONS, action="append", help="sections to run; all by default")
    options.add_argument("--quick", action="store_true", help="fewer shapes")
    arguments = options.parse_args()
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    rows = [row for name in arguments.only or SECTIONS for row in SECTIONS[name](arguments.quick, clock)]
    common.report(rows, arguments)


if __name__ == "__main__":
    main()

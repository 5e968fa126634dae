"""What do the TPU kernels of the top-k solvers cost, in cycles per token, against XLA and against memory?

    python -m benchmarks.tpu_kernels [--chips v5e v5p v6e] [--n 8 32 128] [--only NAME ...] [--json FILE]
        [--markdown FILE]

Needs no TPU: libtpu (extra `tpu-aot`) compiles every program for each chip and writes its final VLIW schedule. Cycles
are bundles times the trip counts of the loops they stand in, XLA's loops around kernels included. That leaves out
stalls, and the time that memory takes, which stands beside it as the limit: bytes that enter and leave the program,
over the chip's bandwidth. XLA's sums are lower bounds: what it compiles once and calls twice is counted once. Loops
whose trip count depends on data (the repair of rare problems in Threshold) count as one trip. Every chip is compiled
for in a process of its own.
"""

import argparse
import functools
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from moe.plan.program import ENVIRONMENT

ROOT = Path(__file__).parents[1]
TOKENS = 65536
K = 2
SWEEPS = 100
# Bundles after a branch that are executed whether it is taken or not.
DELAY_SLOTS = 4


class Chip(NamedTuple):
    """A device: a topology that has it, its clock, and its memory's bandwidth, as published.

    A v5p's two TensorCores share every program, so that each runs half of the trips.

    The clock follows from the peak: 197, 459 and 918 TFLOP/s in bfloat16 on 4 matrix units of 128 x 128, 2 x 4 of
    128 x 128 and 4 of 256 x 256.
    """

    topology: str
    hertz: float
    bytes_per_second: float


CHIPS = {
    "v5e": Chip("v5e:2x2", 1.50e9, 819e9),
    "v5p": Chip("v5p:2x2x1", 1.75e9, 2765e9),
    "v6e": Chip("v6e:2x2", 1.75e9, 1640e9),
}


# What is compared -----------------------------------------------------------------------------------------------------


def programs() -> dict[str, Callable[..., Any]]:
    """Each maps x [T, n] and a traced strength to a mask [T, n]; softmax + top_k to probabilities and indices."""
    import jax
    import jax.numpy as jnp

    from moe import isotonic
    from moe.isotonic.kernels import dykstra, threshold

    def clip(x: Any, found: Any, strength: Any, p: float) -> Any:
        levels = ((x - found.center[:, None]) + found.offset[:, None]) / strength
        return jnp.clip(levels, 0, 1) ** round(1 / (p - 1))

    def xla_threshold(x: Any, strength: Any, p: float) -> Any:
        return clip(x, isotonic.Threshold(implementation="xla").topk(x, K, strength=strength, p=p), strength, p)

    def xla_dykstra(x: Any, strength: Any) -> Any:
        ranked = jnp.flip(jnp.sort(x, axis=-1), axis=-1)
        w = jnp.broadcast_to((jnp.arange(x.shape[-1]) < K).astype(x.dtype), x.shape)
        solution = isotonic.Dykstra(steps=SWEEPS, tol=0.0).solve(ranked, w, strength=strength, p=2.0)
        return jnp.clip((x - solution.value[:, K - 1 : K]) / strength, 0, 1)

    return {
        "softmax + top_k": lambda x, strength: jax.lax.top_k(jax.nn.softmax(x, axis=-1), K),
        "threshold p=2 xla": functools.partial(xla_threshold, p=2.0),
        "threshold p=2 pallas_tpu": lambda x, strength: threshold.mask(x, strength, k=K, p=2.0)[0],
        "threshold p=4/3 xla": functools.partial(xla_threshold, p=4 / 3),
        "threshold p=4/3 pallas_tpu": lambda x, strength: threshold.mask(x, strength, k=K, p=4 / 3)[0],
        "dykstra xla": xla_dykstra,
        "dykstra pallas_tpu": lambda x, strength: clip(
            x, dykstra.crossing(x, strength, k=K, steps=SWEEPS), strength, 2.0
        ),
    }


# Counting cycles ------------------------------------------------------------------------------------------------------


def schedule_cycles(schedule: str) -> int:
    """Bundles of one kernel times the trip counts of their loops, from the text of its final bundles.

    A loop runs from the bundle that starts its region to the branch back to that region and its delay slots. Its trip
    count is the constant that the branch's predicate compares a counter with, over the counter's increment.
    """
    bundles = [line for line in schedule.splitlines() if re.match(r"\s*(0x[0-9a-f]+|0)\s[^:]*:[> ]*\{", line)]
    starts = {
        region: position
        for position, bundle in enumerate(bundles)
        if re.match(r"\s*\S+[^:{]*\bLB\b", bundle)
        for region in re.findall(r"Start region (\d+)", bundle)
    }
    weights = [1] * len(bundles)
    for position, bundle in enumerate(bundles):
        branch = re.search(r"sbr\.rel \(!?(%p\w+)\) target = \$region(\d+)", bundle)
        if branch is None or starts.get(branch[2], position + 1) > position:
            continue
        trips = loop_trips(schedule, branch[1])
        for inside in range(starts[branch[2]], min(position + DELAY_SLOTS + 1, len(bundles))):
            weights[inside] *= trips
    return sum(weights)


def loop_trips(schedule: str, predicate: str) -> int:
    """Trips of the loop that ends when `predicate` does; 1 where that depends on data."""
    guard = r"(?:\(!?%p\w+\), )?"
    test = re.search(rf"{predicate} = scmp\.\w+\.s32\.totalorder {guard}(%s\d+)_\w+, (\d+)", schedule)
    if test is None:
        return 1
    step = re.search(rf"{test[1]}_\w+ = sadd\.s32 {guard}(\d+),", schedule)
    return -(-int(test[2]) // (int(step[1]) if step else 1))


def loop_counts(hlo: str) -> dict[str, int]:
    """How often XLA runs each instruction: the product of the trip counts of the while loops around it."""
    computations = dict(re.findall(r"^(?:ENTRY )?(%\S+) \(.*?\{\n(.*?)^\}", hlo, flags=re.MULTILINE | re.DOTALL))
    counts: dict[str, int] = {}

    def visit(computation: str, times: int) -> None:
        for name, instruction in re.findall(r"^ +(?:ROOT )?%(\S+) = (.*)$", computations[computation], re.MULTILINE):
            counts[name] = times
            loop = re.search(r" while\(.*condition=(%[^,\s]+), body=(%[^,\s]+)", instruction)
            if loop:
                limits = re.findall(r"s32\[\]\S* constant\((\d+)\)", computations[loop[1]])
                visit(loop[2], times * max(map(int, limits), default=1))

    visit(re.findall(r"^ENTRY (%\S+)", hlo, flags=re.MULTILINE)[0], 1)
    return counts


def program_cycles(hlo: str, schedules: list[Path]) -> int:
    """All kernels of one program, each as often as XLA runs it."""
    counts = loop_counts(hlo)
    total = 0
    for path in schedules:
        name = re.sub(r"^\d+-|-\d+-final_bundles\.txt$", "", path.name)
        total += counts.get(name, 0) * schedule_cycles(path.read_text())
    return total


# One chip, in a process of its own ------------------------------------------------------------------------------------


def compile_all(chip: Chip, sizes: list[int], only: list[str], dump: Path) -> dict[str, float]:
    """Compile every chosen program at every n, reading each one's schedules and deleting them: they are gigabytes."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    device = topologies.get_topology_desc(platform="tpu", topology_name=chip.topology).devices[0]
    argument = functools.partial(
        jax.ShapeDtypeStruct, dtype=jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device)
    )
    costs = {}
    for n in sizes:
        for name, program in programs().items():
            if not any(part in name for part in only):
                continue
            compiled = jax.jit(program).trace(argument((TOKENS, n)), argument(()))
            compiled = compiled.lower(lowering_platforms=("tpu",)).compile()
            schedules = [file for file in dump.glob("*final_bundles.txt") if "schedule-analysis" not in file.name]
            cycles = program_cycles(compiled.as_text(), schedules)
            for file in dump.iterdir():
                file.unlink()
            costs[f"{name}|{n}"] = cycles / TOKENS
            print(f"{chip.topology} n={n} {name}: {cycles / TOKENS:.3f}", file=sys.stderr, flush=True)
    return costs


def run_chip(name: str, sizes: list[int], only: list[str]) -> dict[str, float]:
    """`compile_all` in a subprocess, whose environment makes libtpu compile without a TPU and write schedules."""
    with tempfile.TemporaryDirectory() as dump:
        environment = (
            os.environ
            | ENVIRONMENT
            | {
                "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true",
            }
        )
        options = ["--worker", dump, "--chips", name, "--n", *map(str, sizes), "--only", *only]
        command = [sys.executable, "-m", "benchmarks.tpu_kernels", *options]
        done = subprocess.run(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# The table ----------------------------------------------------------------------------------------------------------


def rows_of(chip: str, costs: dict[str, float]) -> list[dict[str, Any]]:
    """One row per program and n; ratio to softmax + top_k on the same chip."""
    rows = []
    for key, cost in costs.items():
        name, n = key.split("|")
        baseline = costs.get(f"softmax + top_k|{n}")
        ratio = round(cost / baseline, 3) if baseline else None
        row = {"name": name, "case": f"{chip} n={n} k={K}", "value": round(cost, 3), "unit": "cycles/token"}
        rows.append(row | {"ratio": ratio})
    return rows


def table(chip: str, sizes: list[int], costs: dict[str, float]) -> str:
    """A Markdown table of one chip."""
    spec = CHIPS[chip]
    lines = [
        f"### {chip}",
        "",
        "| | " + " | ".join(f"n={n}" for n in sizes) + " |",
        "|---|" + "---:|" * len(sizes),
    ]
    for name in dict.fromkeys(key.split("|")[0] for key in costs):
        cells = []
        for n in sizes:
            cycles = costs[f"{name}|{n}"]
            xla = costs.get(f"{name.removesuffix('pallas_tpu')}xla|{n}") if name.endswith("pallas_tpu") else None
            cells.append(f"{cycles:.2f}" + (f" ({xla / cycles:.1f}× less)" if xla else ""))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    # x and the mask, in float32
    limits = [2 * 4 * n * spec.hertz / spec.bytes_per_second for n in sizes]
    lines.append("| limit: read x, write the mask | " + " | ".join(f"{limit:.2f}" for limit in limits) + " |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, run, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--n", nargs="+", type=int, default=[8, 32, 128])
    parser.add_argument("--only", nargs="+", default=[""], help="programs whose name has one of these in it")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file, with their circumstances")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(compile_all(CHIPS[options.chips[0]], options.n, options.only, options.worker)))
        return
    try:
        libtpu = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        sys.exit("libtpu, which holds the TPU compiler, is not installed: pip install 'moe-jax[tpu-aot]'")
    text = [
        "# Cycles per token of the top-k solvers on TPU, by compiled schedule",
        f"`python -m benchmarks.tpu_kernels {' '.join(sys.argv[1:])}` · jax {importlib.metadata.version('jax')}, "
        f"libtpu {libtpu}, Python {platform.python_version()} · T={TOKENS}, k={K}, {SWEEPS} Dykstra sweeps, float32",
        "Bundles of the final schedule times trip counts; nothing was timed on a TPU. Stalls and memory time are not "
        "in it: a program takes at least the last row. In brackets: against the XLA version of the same solver.",
    ]
    print("\n\n".join(text), flush=True)
    rows: list[dict[str, Any]] = []
    for chip in options.chips:
        costs = run_chip(chip, options.n, options.only)
        rows += rows_of(chip, costs)
        text.append(table(chip, options.n, costs))
        print(f"\n{text[-1]}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text("\n\n".join(text) + "\n")


if __name__ == "__main__":
    main()

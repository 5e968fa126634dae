"""What does the MoE layer's dispatch cost on 16 TPU chips: FLOPs, memory, bytes between devices, cycles?

    python -m benchmarks.tpu_moe_layer [--chips v5e v5p] [--only NAME ...] [--expert 4 16] [--json FILE]
        [--markdown FILE]

Needs no TPU: libtpu (extra `tpu-aot`) compiles forward and backward of every implementation for the whole slice, and
the figures are read from what it makes; nothing is timed. 65 536 tokens in 16 groups, D = 1024, F = 4096, E = 32,
K = 2, SwiGLU, activations in bfloat16, matrices in float32; a mesh of data x expert. Routing itself isn't in it.

FLOPs: over those of 3 products of every choice with each matrix; kernels as `program.flops` counts them, for
choices drawn uniformly, which need no further round of exchange; and at most: all rounds that are compiled, each with
as many rows as a device has, however they fall to its experts. Memory is per device, and has room for all rounds.
Bytes are those that a device receives, see `traffic.transfers`; cycles what the compiler estimates for fusions, and the
kernels' bundles times their grids, halved where two cores share a chip; both of the first round alone. No cycles are
known of sorts, of collectives, and of kernels that wait for memory.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import common
from benchmarks.tpu_kernels import ROOT, schedule_cycles
from moe.layers.mlp import WEIGHT_AXES, mlp
from moe.ops.permute import capacity
from moe.parallel.dispatch import dispatch
from moe.parallel.mesh import BATCH_AXES, MeshConfig, make_mesh, partition_spec
from moe.plan import program, traffic
from moe.types import Assignments

# A slice of 16 chips, and the cores that share a kernel's grid.
CHIPS = {"v5e": ("v5e:4x4", 1), "v5p": ("v5p:2x2x4", 2)}
# Rows that dispatch pads each expert's to.
BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Implementation:
    """How a layer dispatches. capacity_factor None: nothing is dropped. options: further arguments of `dispatch`."""

    capacity_factor: float | None
    options: tuple[tuple[str, Any], ...] = ()


IMPLEMENTATIONS = {
    "einsum_1.25": Implementation(1.25, (("implementation", "einsum"),)),
    "capacity_1.05": Implementation(1.05),
    "capacity_1.25": Implementation(1.25),
    "dropless": Implementation(None),
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """A layer: T, D, F, E, K."""

    tokens: int = 65536
    width: int = 1024
    hidden: int = 4096
    experts: int = 32
    k: int = 2

    def active_flops(self, devices: int) -> float:
        """Of one device, forward and backward: 3 matrices, each in 3 products."""
        return 9 * 2 * self.tokens * self.k * self.width * self.hidden / devices


def compile_layer(shape: Shape, implementation: Implementation, mesh: Mesh) -> jax.stages.Compiled:
    """Loss and gradients in tokens, matrices and combine weights; one group of tokens on each device."""
    groups = mesh.devices.size
    tokens = shape.tokens // groups
    axes = {name: ("expert", *one) for name, one in WEIGHT_AXES.items()}
    factor = implementation.capacity_factor
    places = None if factor is None else capacity(factor, tokens, shape.k, shape.experts)

    def argument(sizes: tuple[int, ...], dtype: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))

    sizes = dict.fromkeys(axes, (shape.experts, shape.width, shape.hidden))
    sizes["w_out"] = (shape.experts, shape.hidden, shape.width)
    weights = {name: argument(sizes[name], jnp.float32, partition_spec(axes[name])) for name in axes}
    rows = functools.partial(argument, (groups, tokens * shape.k), spec=PartitionSpec(BATCH_AXES))
    choices = argument((groups,), jnp.int32, PartitionSpec(BATCH_AXES))
    routing = Assignments(rows(jnp.int32), rows(jnp.int32), rows(jnp.float32), rows(jnp.bool_), choices)
    x = argument((groups, tokens, shape.width), jnp.bfloat16, PartitionSpec(BATCH_AXES))

    def loss(x: jax.Array, weights: Any, weight: jax.Array, routing: Assignments) -> jax.Array:
        y, _ = dispatch(
            lambda weights, x, product: mlp(weights, x, "swiglu", product),
            weights,
            axes,
            x,
            routing._replace(weight=weight),
            num_experts=shape.experts,
            capacity=places,
            mesh=mesh,
            **dict(implementation.options),
        )
        return 0.5 * jnp.sum(jnp.square(y.astype(jnp.float32)))

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    return step.trace(x, weights, routing.weight, routing).lower(lowering_platforms=("tpu",)).compile()


def uniform_visits(shape: Shape, groups: int) -> program.Visits:
    """Mean over the shards of experts when every choice is as likely to be any expert."""
    shards = shape.experts // groups
    here = shape.tokens * shape.k // 16
    counts = np.random.default_rng(0).multinomial(shards * here, [1 / shape.experts] * shape.experts)
    sizes = -(-counts.reshape(shards, groups) // BLOCK) * BLOCK
    return lambda kernel: float(np.mean([program.visited(one.tolist(), kernel.rows) for one in sizes]))


def measure(shape: Shape, compiled: jax.stages.Compiled, mesh: Mesh, dump: Path, cores: int) -> dict[str, float]:
    """The figures of one program; `dump` holds its schedules."""
    hlo, memory, groups = compiled.as_text(), compiled.memory_analysis(), shape.experts // mesh.shape["expert"]
    drawn = uniform_visits(shape, groups)
    most = program.most_visits(shape.tokens * shape.k // 16, groups, BLOCK)
    files = {file.name.split("-")[1]: file for file in dump.glob("*-*-final_bundles.txt")}
    schedules = {one.module: files[one.name] for one in program.kernels(hlo) if one.name in files}

    def kernel_cycles(kernel: program.Kernel) -> float:
        schedule = schedule_cycles(schedules[kernel.module].read_text())
        return schedule * kernel.steps * (drawn(kernel) if kernel.dynamic else 1)

    active = shape.active_flops(16)
    figures = {
        "FLOPs / active": program.flops(hlo, drawn, min) / active,
        "at most": program.flops(hlo, most) / active,
        "temp MB": memory.temp_size_in_bytes / 1e6,
        "peak MB": memory.peak_memory_in_bytes / 1e6,
        "fusions, Mcycles": program.fusion_cycles(hlo, min) / 1e6,
        "kernels, Mcycles": program.kernel_total(hlo, kernel_cycles, min) / cores / 1e6,
    }
    for one in sorted(traffic.transfers(hlo, mesh.shape, min)):
        figures[f"{one.kind} MB"] = figures.get(f"{one.kind} MB", 0.0) + one.bytes / 1e6
    return figures


def worker(chip: str, only: list[str], expert: list[int], dump: Path) -> Iterator[dict[str, Any]]:
    """Compiles everything for one chip, and deletes each program's schedules: they are gigabytes."""
    from jax.experimental import topologies

    topology, cores = CHIPS[chip]
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    for along in expert:
        mesh = make_mesh(MeshConfig(data=-1, expert=along), devices)
        for name, implementation in IMPLEMENTATIONS.items():
            if any(part in name for part in only):
                compiled = compile_layer(Shape(), implementation, mesh)
                figures = measure(Shape(), compiled, mesh, dump, cores)
                for file in dump.iterdir():
                    file.unlink()
                print(chip, along, name, figures, file=sys.stderr, flush=True)
                yield {"name": name, "case": f"{chip} data={sizes[0]} expert={along}", **figures}


def run_chip(chip: str, only: list[str], expert: list[int]) -> list[dict[str, Any]]:
    """`worker` in a process of its own, whose environment makes libtpu compile without a TPU and write schedules."""
    with tempfile.TemporaryDirectory() as dump:
        flags = {"LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"}
        options = ["--worker", dump, "--chips", chip, "--only", *only, "--expert", *map(str, expert)]
        command = [sys.executable, "-m", "benchmarks.tpu_moe_layer", *options]
        environment = os.environ | program.ENVIRONMENT | flags
        done = subprocess.run(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(found: list[dict[str, Any]]) -> str:
    """The figures in Markdown, a line for each program."""
    columns = list(dict.fromkeys(name for one in found for name in one))
    lines = ["| " + " | ".join(columns) + " |", "|---|---|" + "---:|" * (len(columns) - 2)]
    for one in found:
        cells = (one.get(column, 0.0) for column in columns)
        lines.append("| " + " | ".join(f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells) + " |")
    return "\n".join(lines)


def unit(figure: str) -> str:
    """The last word of a figure's name, where that is a unit."""
    return figure.split()[-1] if figure.endswith(("MB", "Mcycles")) else ""


def main() -> None:
    """Parse the command line, compile, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--only", nargs="+", default=[""], help="implementations whose name has one of these in it")
    parser.add_argument("--expert", nargs="+", type=int, default=[4], help="sizes of the mesh's expert axis")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file, with its circumstances")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(list(worker(options.chips[0], options.only, options.expert, options.worker))))
        return
    try:
        importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        sys.exit("libtpu, which holds the TPU compiler, is not installed: pip install 'moe-jax[tpu-aot]'")
    found = [row for chip in options.chips for row in run_chip(chip, options.only, options.expert)]
    print(table(found))
    if options.json:
        rows = [
            common.Row(name=one["name"], case=f"{one['case']}, {figure}", value=value, unit=unit(figure), ratio=None)
            for one in found
            for figure, value in one.items()
            if figure not in ("name", "case")
        ]
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.markdown:
        head = "\n".join(f"* {name}: {value}" for name, value in common.circumstances().items())
        options.markdown.write_text(f"{head}\n\n{table(found)}\n")


if __name__ == "__main__":
    main()

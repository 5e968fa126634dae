"""Says what a training step does on a slice of TPUs that one doesn't hold: memory, FLOPs, bytes, the least time.

    python plan.py --config=configs/mixtral_8x7b.py:v5p-128 --topology=v5p:4x4x4 [--config.mesh.expert=8 …]
    python plan.py --config=configs/mixtral_8x7b.py:v5p-128 --topology=v5p:4x4x4 --sweep

Compiles the step of train.py itself with the compiler for TPUs, libtpu (pip install 'moe-jax[tpu-aot]'), and reads the
figures from the program; nothing is timed. Up to three more programs find the largest batch that fits, unless
--quick; --sweep plans the three meshes that arithmetic finds best instead of the config's own. --json FILE writes the
same figures. Exit code 1 where it doesn't fit.
"""

import dataclasses
import functools
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from moe import cli, compiler
from moe import config as config_lib
from moe.config import Config
from moe.models import make_model
from moe.parallel.mesh import MeshConfig, batch_shards, make_mesh, mesh_shape
from moe.plan import analytic, estimate, program, search, traffic
from moe.plan.activations import kept_bytes
from moe.plan.chips import GIB, Slice, parse_slice
from moe.plan.page import page, ranking
from train import DEFAULT_CONFIG, Step, make_step

# Of the model's own FLOPs, recomputation included: beyond this something multiplies what it needn't.
_SUSPICIOUS = {"none": 1.5, "dots": 1.8, "full": 2.0}


def plan(config: Config, slice_: Slice) -> dict[str, Any]:
    """What `--json` writes. Raises ValueError where config and slice don't fit together."""
    mesh = slice_mesh(config, slice_)
    step = make_step(config, mesh)
    state = step.abstract_state
    facts = {
        "topology": slice_.topology,
        "slices": slice_.count,
        "chips": slice_.chips,
        "devices": slice_.devices,
        "mesh": dict(mesh.shape),
        "tokens_per_step": analytic.tokens_per_step(config),
        "libtpu": importlib.metadata.version("libtpu"),
        "source": slice_.chip.source,
        "experts_per_device": config.moe.num_experts // mesh.shape["expert"],
        # Of a grouped product; along `tensor` devices share the rows, and split the matrices.
        "rows_per_device": round(
            analytic.tokens_per_step(config)
            * analytic.experts_per_token(config)
            / config.accumulation_steps
            / batch_shards(mesh)
        ),
        **{f"parameters/{name}": n for name, n in analytic.parameter_counts(config, state.variables).items()},
        "hbm/limit_bytes": slice_.chip.usable_bytes,
        "hbm/parameters_bytes": analytic.device_bytes(state.variables),
        "hbm/optimizer_bytes": analytic.device_bytes(state.opt_state),
        "hbm/activations_bytes": kept_bytes(config, state.variables, step.abstract_batch, mesh),
        "flops/active": analytic.active_flops(config, state.variables) / slice_.devices,
    }
    facts |= compile_step(step)
    if "hbm/temporaries_bytes" in facts:
        # What the compiler counts together.
        facts["hbm/temporaries_bytes"] = max(0, facts["hbm/temporaries_bytes"] - facts["hbm/activations_bytes"])
    facts["fits"] = facts["hbm/peak_bytes"] <= facts["hbm/limit_bytes"]
    if (hlo := facts.pop("hlo")) is not None:
        facts |= costs(hlo, facts, mesh, slice_)
    return facts | {"faults": list(faults(config, facts))}


def fill(mesh: MeshConfig, slice_: Slice, overrides: Sequence[str]) -> MeshConfig:
    """The mesh, with copies along `data` for what it leaves of the slice, unless the command says how many.

    Raises ValueError where it doesn't divide the slice.
    """
    try:
        mesh_shape(mesh, slice_.devices)
    except ValueError:
        rest = dataclasses.replace(mesh, data=-1)
        if any(assignment.startswith("mesh.data=") for assignment in overrides):
            raise
        mesh_shape(rest, slice_.devices)
        return rest
    return mesh


def slice_mesh(config: Config, slice_: Slice) -> Mesh:
    """The mesh of `config.mesh` over devices that this machine doesn't have."""
    for name, value in program.ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Or JAX looks for a TPU here.
    jax.config.update("jax_platforms", "cpu")
    mesh_shape(config.mesh, slice_.devices)
    options: dict[str, Any] = dict(slice_.chip.options)
    if slice_.count > 1:
        options["num_slices"] = slice_.count
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=slice_.topology, **options)
    except Exception as error:  # Of many kinds, by what libtpu finds wrong.
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"libtpu can't compile for {slice_.topology}: {reason}.") from error
    return make_mesh(config.mesh, found.devices)


def compile_step(step: Step) -> dict[str, Any]:
    """The program's text as "hlo", None where it doesn't fit, what it needs of memory, and how long that took."""
    lowered = step.loop.train.trace(step.loop.abstract_state, step.abstract_batch).lower(lowering_platforms=("tpu",))
    begin = time.monotonic()
    try:
        compiled = compiler.compile_step(lowered, step.compiler_options)
    except compiler.TooLarge as error:
        return {"hlo": None, "hbm/peak_bytes": error.needed, "compile_seconds": time.monotonic() - begin}
    memory = compiled.memory_analysis()
    return {
        "hlo": compiled.as_text(),
        "hbm/peak_bytes": memory.peak_memory_in_bytes,
        "hbm/temporaries_bytes": memory.temp_size_in_bytes,
        "compile_seconds": time.monotonic() - begin,
    }


def costs(hlo: str, facts: dict[str, Any], mesh: Mesh, slice_: Slice) -> dict[str, Any]:
    """FLOPs, bytes and bounds of a program; of conditionals the cheapest branch, which runs where routing is even."""
    flops = program.flops(hlo, even_visits(facts), branch=min)
    moved = traffic.moved_bytes(hlo, branch=min)
    sent = traffic.transfers(hlo, mesh.shape, branch=min)
    bounds = estimate.bound(flops, moved, sent, mesh, slice_)
    per_second = slice_.chip.flops / slice_.chip.cores
    return {
        "flops/compiled": flops,
        "flops/ratio": flops / facts["flops/active"],
        "hbm/moved_bytes": moved,
        "collectives": [one._asdict() for one in sent],
        **{f"bound/{part}_seconds": seconds for part, seconds in bounds.seconds.items()},
        "bound/interconnect": dict(bounds.interconnect),
        "bound/step_seconds": bounds.step_seconds,
        "bound/by": bounds.by,
        "bound/mfu": facts["flops/active"] / per_second / bounds.step_seconds,
        "bound/tokens_per_second_per_chip": facts["tokens_per_step"] / bounds.step_seconds / slice_.chips,
    }


def even_visits(facts: dict[str, Any]) -> program.Visits:
    """Tiles that a grouped product visits on a device where every expert there has as many rows as any other."""
    experts = facts["experts_per_device"]
    rows = -(-facts["rows_per_device"] // experts)
    return lambda kernel: program.visited([rows] * experts, kernel.rows)


def faults(config: Config, facts: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a plan, each in a sentence with its remedy."""
    model, moe = config.model, config.moe
    if facts.get("flops/ratio", 0.0) > _SUSPICIOUS[model.remat]:
        yield (
            f"the program multiplies {facts['flops/ratio']:.1f} times what the model needs: with moe.dispatch = "
            f"'{moe.dispatch}' and the router '{config_lib.name_of(config.router)}' experts work on rows that nobody "
            "uses; moe.dispatch = 'dropless' costs what the rows in use do."
        )
    half, copies = 0.5 * facts["hbm/limit_bytes"], facts["mesh"]["data"]
    held = facts["hbm/parameters_bytes"] + facts["hbm/optimizer_bytes"]
    rest = facts["hbm/peak_bytes"] - held
    if copies > 1 and held > half:
        yield (
            f"parameters and moments take {held / GIB:.2f} GiB of each device, and there are {copies} copies of them: "
            "raise mesh.expert or mesh.fsdp in place of mesh.data."
        )
    if rest > half and model.remat != "full":
        yield (
            f"{rest / GIB:.2f} GiB are neither parameters nor moments, and model.remat = '{model.remat}' keeps "
            f"{facts['hbm/activations_bytes'] / GIB:.2f} of them for the backward pass: 'full' keeps little more than "
            "each period's input."
        )
    elif rest > half:
        yield (
            f"{rest / GIB:.2f} GiB are neither parameters nor moments: raise accumulation_steps = "
            f"{config.accumulation_steps}, or lower batch_size = {config.batch_size}."
        )


def main(argv: Sequence[str]) -> None:
    """The command line."""
    parser = cli.make_parser(__doc__ or "", DEFAULT_CONFIG)
    parser.add_argument("--config", default=DEFAULT_CONFIG, help="config FILE, or FILE:SLICE for its mesh there")
    parser.add_argument("--topology", required=True, help="kind and shape of the slice, such as v5p:4x4x8")
    parser.add_argument("--slices", type=int, default=1, help="so many such slices (default: %(default)s)")
    parser.add_argument("--sweep", action="store_true", help="plan and rank the most promising meshes")
    parser.add_argument("--quick", action="store_true", help="don't search for the largest batch")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments, overrides = cli.parse(parser, argv)
    with cli.usage_errors():
        slice_ = parse_slice(arguments.topology, arguments.slices)
        table = config_lib.load_file(arguments.config)
        config_lib.override(table, overrides)
        config = config_lib.resolve(table)
        if not arguments.sweep:
            config = dataclasses.replace(config, mesh=fill(config.mesh, slice_, overrides))
    try:
        importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        raise cli.Failure("libtpu, the compiler for TPUs, isn't installed: pip install 'moe-jax[tpu-aot]'.") from None
    with cli.usage_errors():
        if arguments.sweep:
            model = make_model(config.model, config.moe, config.router)
            variables = jax.eval_shape(model.init, jax.random.key(0))
            plans = search.sweep(config, slice_, variables, lambda one: plan(one, slice_))
            facts: dict[str, Any] = {**plans[0][1], "sweep": [one for _, one in plans]}
        else:
            facts = plan(config, slice_)
            if not arguments.quick:
                measure = functools.partial(plan, slice_=slice_)
                facts["batch/largest"] = search.largest_batch(config, facts["mesh"], facts, measure)
    facts = {"config": arguments.config, "batch_size": config.batch_size, **facts}
    print(page(facts))
    if arguments.sweep:
        print(f"\n{ranking(facts['sweep'])}")
    if arguments.json:
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n")
    if not facts["fits"]:
        sys.exit(cli.FAILURE)


if __name__ == "__main__":
    cli.run(main)

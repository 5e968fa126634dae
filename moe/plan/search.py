"""Which mesh and which batch are best on a slice: arithmetic first, and then the compiler for the few that are left."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from moe.config import Config
from moe.models import Variables
from moe.parallel.mesh import BATCH_AXES, MeshConfig
from moe.plan import analytic
from moe.plan.chips import Slice

Facts = Mapping[str, Any]
# Of parameters, two moments and a gradient, in float32.
_STATE_BYTES = 16
_COMPILED = 3


def meshes(config: Config, slice_: Slice) -> Iterator[MeshConfig]:
    """Every mesh over the slices' devices that divides the config's batch, experts, heads and widths."""
    devices, model = slice_.devices // slice_.count, config.model
    micro_batch = config.batch_size // config.accumulation_steps
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    for fsdp, expert, tensor in itertools.product(divisors, repeat=3):
        data, left = divmod(devices, fsdp * expert * tensor)
        widths = (model.attention.heads, model.attention.kv_heads, model.mlp_width, config.moe.expert_width)
        fits = (
            data
            and not left
            and micro_batch % (slice_.count * data * fsdp * expert) == 0
            and config.moe.num_experts % expert == 0
            and model.width % fsdp == 0
            and all(width % tensor == 0 for width in widths)
        )
        if fits:
            yield MeshConfig(dcn=slice_.count, data=data, fsdp=fsdp, expert=expert, tensor=tensor)


def rough_seconds(config: Config, mesh: MeshConfig, slice_: Slice, variables: Variables) -> float:
    """A step's time by arithmetic, for the order of meshes alone: compute, or what is sent over all links of a chip.

    Infinite where parameters, moments and a gradient don't fit. Sent: gradients once among those that have the same
    piece of a parameter; by `fsdp` the parameters for each micro-batch, forward and backward, and their gradients; by
    `expert` every choice, there and back, forward and backward; by `tensor` the sums of two products of each block.
    """
    chip, model = slice_.chip, config.model
    counts = analytic.parameter_counts(config, variables)
    # Of a device, but for fsdp: experts are also cut by their axis, everything else is copied along it.
    experts = counts["experts"] / mesh.tensor / mesh.expert
    others = (counts["all"] - counts["experts"]) / mesh.tensor
    if (experts + others) / mesh.fsdp * _STATE_BYTES > chip.usable_bytes:
        return math.inf
    again, width = int(model.remat != "none"), 2 if model.dtype == "bfloat16" else 4
    replicas = mesh.dcn * mesh.data
    row = analytic.tokens_per_step(config) / (replicas * mesh.fsdp * mesh.expert) * model.width * width
    layers = (model.depth - model.dense_layers) // (model.moe_every or 1)
    gathered = config.accumulation_steps * (3 + again) * 4
    copies = experts * _others(replicas) + others * _others(replicas * mesh.expert)
    sent = [
        2 * 4 * copies / mesh.fsdp,
        gathered * (experts + others) * _others(mesh.fsdp),
        (4 + 2 * again) * layers * row * analytic.experts_per_token(config) * _others(mesh.expert),
        2 * (4 + 2 * again) * model.depth * row * _others(mesh.tensor),
    ]
    compute = analytic.active_flops(config, variables) / slice_.devices * (1 + again / 3) * chip.cores / chip.flops
    return max(compute, sum(sent) * chip.cores / chip.links / chip.link_bandwidth)


def _others(n: int) -> float:
    """The share of what is sent that comes from others."""
    return (n - 1) / n


def sweep(
    config: Config, slice_: Slice, variables: Variables, measure: Callable[[Config], Facts]
) -> list[tuple[MeshConfig, Facts]]:
    """The plans of the most promising meshes, best first; those that don't fit stand last.

    measure: the plan of a config. Raises ValueError where no mesh divides the slice.
    """
    found = sorted(meshes(config, slice_), key=lambda mesh: rough_seconds(config, mesh, slice_, variables))
    if not found:
        raise ValueError(
            f"no mesh of {slice_.devices} devices divides a micro-batch of "
            f"{config.batch_size // config.accumulation_steps} examples, {config.moe.num_experts} experts and the "
            "model's widths: change batch_size or accumulation_steps."
        )
    plans = [(mesh, measure(dataclasses.replace(config, mesh=mesh))) for mesh in found[:_COMPILED]]
    return sorted(plans, key=lambda pair: (not pair[1]["fits"], pair[1].get("bound/step_seconds", math.inf)))


def largest_batch(config: Config, mesh: Mapping[str, int], facts: Facts, measure: Callable[[Config], Facts]) -> int:
    """The largest batch that fits with as many accumulation steps, 0 if none does; `facts` are the config's own plan.

    Memory grows in proportion to a device's rows: two plans give the line, and a third or fourth proves the answer.
    """
    unit = config.accumulation_steps * math.prod(mesh[axis] for axis in BATCH_AXES)
    known = {config.batch_size // unit: facts}

    def fits(rows: int) -> bool:
        if rows not in known:
            known[rows] = measure(dataclasses.replace(config, batch_size=rows * unit))
        return known[rows]["fits"]

    rows = config.batch_size // unit
    fits(other := 2 * rows if facts["fits"] else max(1, rows // 2))
    if other != rows:
        slope = (known[other]["hbm/peak_bytes"] - facts["hbm/peak_bytes"]) / (other - rows)
        room = facts["hbm/limit_bytes"] - facts["hbm/peak_bytes"]
        guess = max(1, int(rows + room / slope)) if slope > 0 else other
        for _ in range(_COMPILED - 1):
            if fits(guess):
                break
            guess = max(1, guess - max(1, guess // 20))
    return max((rows for rows, one in known.items() if one["fits"]), default=0) * unit

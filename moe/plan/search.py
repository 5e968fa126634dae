"""Which mesh and which batch are best on a slice: arithmetic first, and then the compiler for the few that are left."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from moe.config import Config
from moe.models import Variables
from moe.parallel.mesh import BATCH_AXES, MESH_AXES, MeshConfig, mesh_shape
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


class _Rough(NamedTuple):
    """What arithmetic says of a mesh: of a device, parameters that are computed with, in experts' matrices and in all
    others, and tokens of a step.
    """

    experts: float
    others: float
    tokens: float
    row_width: float

    @classmethod
    def of(cls, config: Config, mesh: MeshConfig, variables: Variables) -> "_Rough":
        """row_width: entries that a token's choices have in one MoE layer, with room for uneven ones."""
        counts, model = analytic.parameter_counts(config, variables), config.model
        tokens = analytic.tokens_per_step(config) / (mesh.dcn * mesh.data * mesh.fsdp * mesh.expert)
        room = min(config.moe.receive_factor, mesh.expert)
        width = 2 * model.width + 3 * config.moe.expert_width / mesh.tensor
        return cls(
            counts["experts"] / mesh.tensor / mesh.expert,
            (counts["all"] - counts["experts"]) / mesh.tensor,
            tokens,
            analytic.experts_per_token(config) * max(1.0, room) * width,
        )


def rough_bytes(config: Config, mesh: MeshConfig, variables: Variables) -> float:
    """Memory of a device by arithmetic, to leave meshes out: state, kept inputs of blocks, one layer's work.

    State: parameters, two moments, a gradient, and with micro-batches their sum, in float32. A layer: its matrices,
    gathered, in both types, with their gradient; the rows of its choices, and their cotangents.
    """
    rough, model = _Rough.of(config, mesh, variables), config.model
    parameters = rough.experts + rough.others
    state = parameters / mesh.fsdp * (_STATE_BYTES + 4 * (config.accumulation_steps > 1))
    tokens = rough.tokens / config.accumulation_steps
    kept = tokens * model.depth * model.width * _width(config) * (1 if model.remat == "full" else 12)
    return state + kept + parameters / model.depth * 10 + 2 * tokens * rough.row_width * _width(config)


def rough_seconds(config: Config, mesh: MeshConfig, slice_: Slice, variables: Variables) -> float:
    """A step's time by arithmetic, for the order of meshes alone: by compute, memory, or all links of a chip,
    with a tenth of what doesn't bind, since nothing overlaps wholly.

    Infinite where it doesn't fit. Sent: gradients once among those that have the same piece of a parameter; by `fsdp`
    the parameters for each micro-batch, forward and backward, and their gradients; by `expert` every choice, there and
    back, forward and backward; by `tensor` the sums of two products of each block. Memory: parameters some 26 bytes a
    micro-batch, and entries of a token some 28 or 60 times, as plans of Mixtral and OLMoE have it.
    """
    chip, model = slice_.chip, config.model
    if rough_bytes(config, mesh, variables) > chip.usable_bytes:
        return math.inf
    rough = _Rough.of(config, mesh, variables)
    again, replicas = int(model.remat != "none"), mesh.dcn * mesh.data
    row = rough.tokens * model.width * _width(config)
    layers = (model.depth - model.dense_layers) // (model.moe_every or 1)
    copies = rough.experts * _others(replicas) + rough.others * _others(replicas * mesh.expert)
    sent = [
        2 * 4 * copies / mesh.fsdp,
        config.accumulation_steps * (3 + again) * 4 * (rough.experts + rough.others) * _others(mesh.fsdp),
        (4 + 2 * again) * layers * row * analytic.experts_per_token(config) * _others(mesh.expert),
        2 * (4 + 2 * again) * model.depth * row * _others(mesh.tensor),
    ]
    of_tokens = rough.tokens * _width(config) * (28 * layers * rough.row_width + 60 * model.depth * model.width)
    moved = config.accumulation_steps * (rough.experts + rough.others) * 26 + of_tokens
    compute = analytic.active_flops(config, variables) / slice_.devices * (1 + again / 3) * chip.cores / chip.flops
    links = sum(sent) * chip.cores / chip.links / chip.link_bandwidth
    parts = (compute, links, moved * chip.cores / chip.hbm_bandwidth)
    return 0.9 * max(parts) + 0.1 * sum(parts)


def _others(n: int) -> float:
    """The share of what is sent that comes from others."""
    return (n - 1) / n


def _width(config: Config) -> int:
    """Bytes of an activation's entry."""
    return 2 if config.model.dtype == "bfloat16" else 4


def sweep(
    config: Config, slice_: Slice, variables: Variables, measure: Callable[[Config], Facts]
) -> list[tuple[MeshConfig, Facts]]:
    """The plans of the most promising meshes and of the config's own, best first; those that don't fit stand last.

    measure: the plan of a config. Raises ValueError where no mesh divides the slice.
    """
    found = sorted(meshes(config, slice_), key=lambda mesh: rough_seconds(config, mesh, slice_, variables))
    if not found:
        raise ValueError(
            f"no mesh of {slice_.devices} devices divides a micro-batch of "
            f"{config.batch_size // config.accumulation_steps} examples, {config.moe.num_experts} experts and the "
            "model's widths: change batch_size or accumulation_steps."
        )
    chosen = found[:_COMPILED] + [mesh for mesh in found[_COMPILED:] if mesh == _filled(config.mesh, slice_)]
    plans = [(mesh, measure(dataclasses.replace(config, mesh=mesh))) for mesh in chosen]
    return sorted(plans, key=lambda pair: (not pair[1]["fits"], pair[1].get("bound/step_seconds", math.inf)))


def _filled(mesh: MeshConfig, slice_: Slice) -> MeshConfig | None:
    """The mesh with its sizes on that slice, None where it isn't one there."""
    try:
        return MeshConfig(**dict(zip(MESH_AXES, mesh_shape(mesh, slice_.devices), strict=True)))
    except ValueError:
        return None


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

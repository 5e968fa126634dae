"""What a run begins with instead of random weights, `config.init_from`: an MLP becomes experts, the rest is kept.

Arrays are read shard by shard, as the mesh lays them out, and experts are made on the devices.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from moe.checkpoint import CheckpointError, complete_steps
from moe.checksums import checksums
from moe.config import Config, name_of
from moe.convert.source import Source, SourceArray, VariablePath, name_variables, open_source
from moe.files import AnyPath, open_path
from moe.layers.block import stacked_blocks
from moe.models import ModelConfig, Variables
from moe.ops.upcycle import alter, granularity, group_columns, to_experts
from moe.parallel import hosts
from moe.types import GROUP_AXIS, Layout, RouterInputs, Slots

Kind = Literal["kept", "upcycled", "fresh"]
# Settings of a model that change no function, or whose change shows in what is kept and fresh.
_HARMLESS = {"length", "mlp_width", "moe_every", "dense_layers", "scan_layers", "remat", "dtype", "loss_chunk"}
_EXPERTS, _MLP, _GATE = ("f", "experts"), ("f", "weights"), ("f", "w_gate")
_ROUTER = (("f", "router_params"), ("f", "router_state"))


class Place(NamedTuple):
    """An array of one block by its path there, or with layer -1 one of those around the blocks."""

    collection: str
    path: VariablePath
    layer: int


class Origin(NamedTuple):
    """Where the array of a block comes from: row `row` of `array`, None for fresh values.

    pieces: of the MLP that becomes this block's experts; 0: none does.
    """

    kind: Kind
    array: SourceArray | None
    row: int
    pieces: int


class Part(NamedTuple):
    """Rows of one of the run's arrays that come from the same array in the same way; see `Origin`."""

    kind: Kind
    array: SourceArray | None
    pieces: int
    rows: list[int]
    source_rows: list[int]
    places: list[Place]


class Initial(NamedTuple):
    """Where every array of a run comes from; dropped: what there is in the source and not in the run."""

    source: Source
    config: Config
    parts: dict[VariablePath, list[Part]]
    dropped: list[Place]


def plan_start(config: Config, abstract: Variables, workdir: AnyPath) -> Initial | None:
    """`plan_initial`, where there is something to begin with and no checkpoint in the workdir to go on from."""
    if not config.init_from:
        return None
    if complete_steps(workdir / "checkpoints"):
        hosts.say(f"{workdir} has checkpoints of its own: nothing is taken from init_from = {config.init_from}")
        return None
    return plan_initial(config, abstract)


def plan_initial(config: Config, abstract: Variables) -> Initial:
    """Opens `config.init_from` and finds out where each array of `abstract` is to come from; reads none.

    Raises CheckpointError where it isn't there or can't be read, ValueError where it doesn't fit the config.
    """
    source = open_source(open_path(config.init_from))
    _check_model(source, config.model)
    known = {place: (array, row) for path, array in source.arrays.items() for row, place in _places(path, source.model)}
    used: set[Place] = set()
    parts: dict[VariablePath, list[Part]] = {}
    for path, leaf in name_variables(abstract).items():
        parts[path] = []
        for row, place in _places(path, config.model):
            shape = leaf.shape[1:] if place.layer >= 0 else leaf.shape
            taken, origin = _find(place, shape, known, source, config)
            used |= taken
            part = Part(origin.kind, origin.array, origin.pieces, [], [], [])
            alike = next((one for one in parts[path] if one[:3] == part[:3]), None)
            if alike is None:
                parts[path].append(alike := part)
            alike.rows.append(row)
            alike.source_rows.append(origin.row)
            alike.places.append(place)
    return Initial(source, config, parts, [place for place in known if place not in used])


def load_initial(initial: Initial, fresh: Variables) -> Variables:
    """Reads what is to be read; `fresh`, of the run's shapes and shardings, gives the rest, and is used up.

    Raises CheckpointError where an array that is kept as a whole has changed since it was saved.
    """
    key = jax.random.key(initial.config.seed)

    def load(keys: tuple, leaf: jax.Array, collection: str) -> jax.Array:
        path = (collection, *(str(one.key) for one in keys))
        parts = initial.parts[path]
        if all(part.kind == "fresh" and part.pieces < 2 for part in parts):
            return leaf
        arrays = [_load_part(path, part, initial, leaf, key) for part in parts]
        order = np.argsort(np.concatenate([part.rows for part in parts]), kind="stable")
        if len(arrays) > 1:
            arrays = [_jit(lambda *arrays: jnp.concatenate(arrays)[order], leaf.sharding)(*arrays)]
        # Of a large model there is no room for both.
        leaf.delete()
        return arrays[0]

    variables = Variables(
        *(
            jax.tree_util.tree_map_with_path(functools.partial(load, collection=collection), tree)
            for collection, tree in zip(Variables._fields, fresh, strict=True)
        )
    )
    _compare(initial, variables)
    return variables


def _compare(initial: Initial, variables: Variables) -> None:
    """Compares the checksums of arrays that are the source's own, row by row."""
    source = initial.source
    wholes = {}
    for path, leaf in name_variables(variables).items():
        array, parts = source.arrays.get(path), initial.parts[path]
        is_whole = len(parts) == 1 and parts[0].kind == "kept" and parts[0].array is array
        if is_whole and array is not None and array.shape == leaf.shape and parts[0].rows == parts[0].source_rows:
            wholes[path] = leaf
    names = {".".join(path): path for path in wholes}
    found = checksums({name: wholes[path] for name, path in names.items()})
    changed = [name for name, total in found.items() if source.sums.get(names[name], total) != total]
    if changed:
        raise CheckpointError(
            f"{source.name} is damaged: {len(changed)} of its arrays have changed since it was written "
            f"({', '.join(changed[:3])}): begin with another checkpoint."
        )


def describe(initial: Initial) -> Iterator[str]:
    """What became of every parameter: a line for each kind, with all names."""
    yield f"begins with {initial.source.name}"
    kinds: dict[str, list[Place]] = {"kept": [], "upcycled": [], "fresh": [], "dropped": initial.dropped}
    for parts in initial.parts.values():
        for part in parts:
            kinds[part.kind] += part.places
    for kind, places in kinds.items():
        names = f": {_names(places)}" if places else ""
        yield f"  {kind}: {len(places)} arrays{names}"
    yield from (f"  {note}" for note in _notes(initial))


def _places(path: VariablePath, model: ModelConfig) -> Iterator[tuple[int, Place]]:
    """The blocks that share an array of `model`, with their rows in it."""
    stacked = stacked_blocks(model, path[1:])
    if stacked is None:
        yield 0, Place(path[0], path[1:], -1)
        return
    layers, inner = stacked
    yield from ((row, Place(path[0], inner, layer)) for row, layer in enumerate(layers))


def _find(
    place: Place,
    shape: tuple[int, ...],
    known: Mapping[Place, tuple[SourceArray, int]],
    source: Source,
    config: Config,
) -> tuple[set[Place], Origin]:
    """Where the array of a block comes from, and what of the source it uses."""
    kind: Kind = "kept"
    if place in known:
        array, row = known[place]
        theirs = array.shape[1:] if place.layer >= 0 else array.shape
        if place.path[:2] == _EXPERTS:
            kind = "kept" if theirs[0] == shape[0] else "upcycled"
            theirs = (shape[0], *theirs[1:])
        elif place.path == _GATE or place.path[:2] in _ROUTER:
            same = type(source.router) is type(config.router) and theirs == shape
            per_expert = place.path == _GATE and _gate_is_per_expert(source) and _gate_is_per_expert(config)
            if not (same or per_expert):
                return set(), Origin("fresh", None, 0, 0)
            theirs = shape
        if theirs != shape:
            raise ValueError(
                f"{_names([place])} has shape {theirs} in {source.name}, and the config asks for {shape}: the models "
                "must agree in it."
            )
        return {place}, Origin(kind, array, row, 0)
    matrix = place._replace(path=(*_MLP, place.path[-1]))
    if place.path[:2] == _EXPERTS and matrix in known:
        return {matrix}, Origin("upcycled", *known[matrix], _pieces(source, config))
    was_dense = place._replace(path=(*_MLP, "w_in")) in known
    grouped = place.path == _GATE and was_dense and _gate_is_per_expert(config)
    return set(), Origin("fresh", None, 0, _pieces(source, config) if grouped else 0)


def _check_model(source: Source, ours: ModelConfig) -> None:
    """Raises ValueError where nothing of the source could be of use."""
    kinds = [name_of(model) for model in (source.model, ours)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"{source.name} holds a model of kind '{kinds[0]}', and model.name is '{kinds[1]}'.")
    for name in ("width", "depth", "activation"):
        there, here = getattr(source.model, name), getattr(ours, name)
        if there != here:
            raise ValueError(f"model.{name} = {here!r} must be {there!r}, as it is in {source.name}.")


def _pieces(source: Source, config: Config) -> int:
    moe = config.moe
    return granularity(config.upcycle, source.model.mlp_width, moe.expert_width, moe.num_experts, config.router.k)


def _gate_is_per_expert(one: Source | Config) -> bool:
    return one.router.num_logits(one.moe.num_experts) == one.moe.num_experts


def _load_part(path: VariablePath, part: Part, initial: Initial, leaf: jax.Array, key: jax.Array) -> jax.Array:
    """The part's rows of an array that is to lie where `leaf` does."""
    rows, source_rows = np.array(part.rows), np.array(part.source_rows)
    if part.array is None:
        return _jit(lambda x: group_columns(x[rows], part.pieces or 1), leaf.sharding)(leaf)
    array, sharding = part.array, leaf.sharding
    assert isinstance(sharding, NamedSharding)
    stacked = part.places[0].layer >= 0
    shape = (len(rows), *leaf.shape[1:]) if stacked else leaf.shape
    if part.pieces:
        # The MLP as it is, cut as its experts will be.
        shape = (len(rows), *array.shape[1:])
        spec = (*sharding.spec, *(None,) * (leaf.ndim - len(sharding.spec)))
        sharding = NamedSharding(sharding.mesh, PartitionSpec(spec[0], *spec[2:]))

    def read(index: tuple[slice, ...]) -> np.ndarray:
        # Experts beyond the source's begin again with its first.
        indices = [np.arange(size)[one] % there for size, one, there in zip(shape, index, array.shape, strict=True)]
        if stacked:
            indices[0] = source_rows[np.arange(len(rows))[index[0]]]
        return array.read(indices)

    x = _read_shards(shape, sharding, read)
    if part.kind == "kept":
        return x
    upcycle, num_experts, layers = initial.config.upcycle, initial.config.moe.num_experts, _layers(part.places)

    def make(x: jax.Array) -> jax.Array:
        experts = to_experts(x, path[-1], num_experts, part.pieces) if part.pieces else x
        return alter(experts, path[-1], upcycle, jnp.array(layers), key)

    return _jit(make, leaf.sharding)(x)


def _jit(function: Callable[..., jax.Array], sharding: Any) -> Callable[..., jax.Array]:
    return jax.jit(function, out_shardings=sharding)


def _read_shards(
    shape: tuple[int, ...], sharding: NamedSharding, read: Callable[[tuple[slice, ...]], np.ndarray]
) -> jax.Array:
    """A global array; one shard at a time is in memory here, and devices that hold the same get it from one reading."""
    holders: dict[tuple, tuple[tuple[slice, ...], list[jax.Device]]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        holders.setdefault(tuple((one.start, one.stop) for one in index), (index, []))[1].append(device)
    shards = []
    for index, devices in holders.values():
        block = read(index)
        shards += [jax.device_put(block, device) for device in devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _notes(initial: Initial) -> Iterator[str]:
    """What else a user should know before training on."""
    source, config = initial.source, initial.config
    parts = [part for parts in initial.parts.values() for part in parts]
    if any(part.kind == "upcycled" and not part.pieces for part in parts):
        there, here = source.moe.num_experts, config.moe.num_experts
        yield f"{there} experts there and {here} here: number e is that of number e mod {there}" + (
            f", and the last {there - here} are dropped" if here < there else ""
        )
    pieces = max(part.pieces for part in parts)
    if pieces > 1:
        yield f"{config.moe.num_experts // pieces} virtual groups of {pieces} experts, each with one gate column"
    if pieces:
        total, scale = _weight_sum(config), config.upcycle.output_scale
        if abs(total * scale - 1) > 0.01:
            yield (
                f"a token's combine weights add up to about {total:.2f}, so that the experts' output is "
                f"{total * scale:.2f} of the MLP's; upcycle.output_scale = {1 / total:.2f} would make up for it"
            )
    ours, theirs = _settings(config.model), _settings(source.model)
    for name, here in ours.items():
        if here != theirs[name]:
            yield f"model.{name} = {here!r}, but {theirs[name]!r} there: not the function that these weights learnt"


def _settings(model: ModelConfig) -> dict[str, Any]:
    """The fields of a model that its function depends on, with what attention makes of them."""
    fields = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    attention = dataclasses.asdict(model.attention)
    fields |= {name: attention[name] for name in ("kv_heads", "head_width") if name in fields}
    return {name: value for name, value in fields.items() if name not in _HARMLESS}


def _weight_sum(config: Config) -> float:
    """What the combine weights of a token add up to on average over standard normal logits, in evaluation; 1 for slots,
    which mix tokens before the experts see them.
    """
    router, num_experts, tokens = config.router, config.moe.num_experts, 256
    params, state = router.init(num_experts)
    logits = jax.random.normal(jax.random.key(0), (1, tokens, router.num_logits(num_experts)))
    layout = Layout(num_experts, 1, config.moe.balance_scope)

    def route(logits: jax.Array) -> Any:
        inputs = RouterInputs(logits, ids=jnp.arange(tokens), mask=jnp.ones(tokens, bool), layout=layout)
        return router(params, inputs, state, None).routing

    routing = jax.jit(jax.vmap(route, axis_name=GROUP_AXIS))(logits)
    if isinstance(routing, Slots):
        return 1.0
    return float(jnp.sum(routing.weight, where=routing.valid)) / tokens


def _layers(places: list[Place]) -> list[int]:
    return [place.layer for place in places]


def _names(places: list[Place]) -> str:
    """Names of arrays, those of the same blocks together."""
    layers: dict[str, list[int]] = {}
    for place in places:
        layers.setdefault(".".join(place.path), []).append(place.layer)
    names: dict[str, list[str]] = {}
    for name, blocks in layers.items():
        names.setdefault(_blocks(sorted(blocks)), []).append(name)
    return "; ".join(", ".join(group) + blocks for blocks, group in names.items())


def _blocks(layers: list[int]) -> str:
    if layers == [-1]:
        return ""
    if len(layers) > 2 and layers == list(range(layers[0], layers[-1] + 1)):
        return f" of blocks {layers[0]} to {layers[-1]}"
    return f" of block{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"

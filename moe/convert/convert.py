"""Models of Hugging Face's format to workdirs and back, a tensor at a time."""

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from moe import config as config_lib
from moe.checkpoint import CheckpointConfig, CheckpointError, Checkpoints
from moe.convert.names import Leaf, Piece, make_leaves
from moe.convert.safetensors import DTYPES, Spec, Tensors, read_json, write_shards
from moe.convert.settings import Settings, find_architecture, generate, parse
from moe.convert.store import StoredVariables, Streamed, save_parameters
from moe.data.text import TextConfig
from moe.data.tokenizer import TokenizerConfig
from moe.files import AnyPath, is_remote
from moe.models import LmConfig, make_model
from moe.ops.upcycle import UpcycleConfig
from moe.optim import OptimizerConfig
from moe.parallel.mesh import MeshConfig
from moe.routers import Softmax
from moe.workdir import read_config

# What a workdir keeps of the model it came from: its config, and files that aren't weights.
SOURCE = "huggingface"
KEPT = (
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
_TYPES = "dtypes.json"


def from_hf(folder: Path, workdir: Path) -> None:
    """Makes a workdir of a folder with config.json and safetensors; nothing is left behind where that fails.

    Raises ValueError where the workdir exists, or the model isn't whole or not of a supported kind.
    """
    settings, tensors, leaves = open_hf(folder)
    with _new_folder(workdir) as made:
        source = made / SOURCE
        source.mkdir()
        # In a cache of the Hub, files are links to their contents, MODEL/snapshots/REVISION/NAME to MODEL/blobs/HASH.
        root = folder.resolve()
        _copy(folder, source, ("config.json", *KEPT), root.parents[1] if root.parent.name == "snapshots" else root)
        types = {name: tensors.specs[name].dtype for leaf in leaves for piece in leaf.pieces for name in piece.names}
        (source / _TYPES).write_text(json.dumps(types, indent=0) + "\n")
        has_tokenizer = (folder / "tokenizer.json").is_file()
        tokenizer = (
            TokenizerConfig("huggingface", str(workdir.absolute() / SOURCE / "tokenizer.json"))
            if has_tokenizer
            else None
        )
        (made / "config.json").write_text(config_lib.to_json(make_table(settings, tokenizer)))
        model = make_model(settings.model, settings.moe, settings.router)
        router_state = jax.eval_shape(model.init, jax.random.key(0)).router_state
        save_parameters(made / "checkpoints", _streamed(tensors, leaves), router_state)


def open_hf(folder: Path) -> tuple[Settings, Tensors, list[Leaf]]:
    """What a folder with config.json and safetensors holds.

    Raises ValueError where the model isn't whole or not of a supported kind.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}.")
    table = read_json(folder / "config.json")
    architecture, settings = find_architecture(table), parse(table)
    tensors = Tensors(folder)
    leaves = make_leaves(settings, architecture)
    _check(tensors, leaves, settings)
    return settings, tensors, leaves


def to_hf(workdir: AnyPath, folder: Path, step: int | None = None, shard_bytes: int = 5_000_000_000) -> None:
    """Writes config.json and safetensors of a workdir's model, of its newest checkpoint by default.

    Tensors get the types that they came with, float32 where the model didn't come from there. Raises ValueError where
    the folder exists or no supported architecture is this model, CheckpointError where there is no checkpoint.
    """
    config = config_lib.resolve(read_config(workdir))
    checkpoints = Checkpoints(workdir / "checkpoints")
    stored = StoredVariables(workdir / "checkpoints" / str(checkpoints.choose(step)) / "state")
    checkpoints.close()
    source = workdir / SOURCE
    original = read_json(source / "config.json") if (source / "config.json").is_file() else {}
    types = read_json(source / _TYPES) if original else {}
    if wrong := [name for name, kind in types.items() if kind not in list(DTYPES)]:
        raise ValueError(f"{source / _TYPES} has {wrong[0]} = {types[wrong[0]]!r}: it must be of {', '.join(DTYPES)}.")
    if not isinstance(config.model, LmConfig):
        raise ValueError(f"{workdir} holds a model of images, and only language models can be converted.")
    if not isinstance(config.router, Softmax):
        raise ValueError(
            f"{workdir} has the router {config_lib.name_of(config.router)}, and Hugging Face's formats only softmax."
        )
    settings = Settings(config.model, config.moe, config.router)
    table = generate(settings, original)
    leaves = make_leaves(settings, find_architecture(table))
    arrays = {leaf.path: stored.open(("params", *leaf.path)) for leaf in leaves}
    for leaf in leaves:
        if arrays[leaf.path].shape != leaf.shape:
            raise CheckpointError(
                f"{'.'.join(leaf.path)} in the checkpoint has shape {arrays[leaf.path].shape}, and {workdir}'s config "
                f"asks for {leaf.shape}."
            )
    # Block by block, as such files usually are, and all that one part gives together.
    parts = sorted(((leaf, piece) for leaf in leaves for piece in leaf.pieces), key=lambda pair: pair[1].layer)
    specs = {
        name: Spec(types.get(name, "F32"), shape)
        for _, piece in parts
        for name, shape in zip(piece.names, piece.shapes, strict=True)
    }
    with _new_folder(folder) as made:
        (made / "config.json").write_text(json.dumps(table, indent=2) + "\n")
        _copy(source, made, KEPT, source if is_remote(source) else Path(source).resolve())
        write_shards(made, specs, _unpacked(arrays, parts), shard_bytes)


def make_table(settings: Settings, tokenizer: TokenizerConfig | None) -> ml_collections.ConfigDict:
    """A config with these settings, every field in it, that trains further on the default text."""
    length = min(settings.model.length, 1024)
    data = TextConfig(length=length, tokenizer=tokenizer or TokenizerConfig())
    router = _plain(settings.router)
    name = config_lib.name_of(settings.router)
    table = {
        "seed": 0,
        "steps": 1000,
        "batch_size": 8,
        "accumulation_steps": 1,
        "label_smoothing": 0.0,
        "init_from": "",
        "upcycle": _plain(UpcycleConfig()),
        "loss": "softmax",
        "log_every": 50,
        "evaluate_every": 0,
        "model": {"name": "lm", **_plain(settings.model)},
        "moe": _plain(settings.moe),
        "router": {"name": name, "k": router.pop("k"), name: router},
        "data": _plain(data),
        "optimizer": _plain(OptimizerConfig(learning_rate=1e-5)),
        "mesh": _plain(MeshConfig()),
        "checkpoint": _plain(CheckpointConfig()),
    }
    config = ml_collections.ConfigDict(table)
    config_lib.resolve(config)
    return config


def _plain(value: Any) -> dict[str, Any]:
    """A dataclass as a table; one of several to choose from with its name."""
    table = {}
    for field in dataclasses.fields(value):
        entry = getattr(value, field.name)
        if dataclasses.is_dataclass(entry):
            name = config_lib.name_of(entry)
            entry = {"name": name, name: _plain(entry)} if name else _plain(entry)
        table[field.name] = entry
    return table


def _check(tensors: Tensors, leaves: list[Leaf], settings: Settings) -> None:
    """Raises ValueError unless the files hold the tensors of the model, of their shapes, and no others."""
    wanted = {
        name: shape
        for leaf in leaves
        for piece in leaf.pieces
        for name, shape in zip(piece.names, piece.shapes, strict=True)
    }
    specs = tensors.specs
    if missing := [name for name in wanted if name not in specs]:
        raise ValueError(f"{tensors.folder} lacks {missing[0]}" + _others(missing) + ".")
    for name, shape in wanted.items():
        if specs[name].shape != shape:
            raise ValueError(
                f"{name} in {tensors.folder} has shape {specs[name].shape}, and config.json asks for {shape}."
            )
    # A tied head may be stored nevertheless; frequencies follow from the config.
    surplus = [name for name in specs if name not in wanted and not name.endswith("rotary_emb.inv_freq")]
    if settings.model.tied_head:
        surplus = [name for name in surplus if name != "lm_head.weight"]
    if surplus:
        raise ValueError(
            f"{tensors.folder} holds {surplus[0]}" + _others(surplus) + ", which config.json doesn't ask for."
        )


def _others(names: list[str]) -> str:
    return f" and {len(names) - 1} more tensors" if len(names) > 1 else ""


def _streamed(tensors: Tensors, leaves: list[Leaf]) -> dict[str, Any]:
    """The tree of parameters, with arrays that read their tensors when they are written."""
    tree: dict[Any, Any] = {}
    for leaf in leaves:
        *parents, name = leaf.path
        table = tree
        for parent in parents:
            table = table.setdefault(parent, {})

        def parts(pieces: list[Piece] = leaf.pieces) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
            for piece in pieces:
                yield piece.at, piece.pack([tensors.read(name) for name in piece.names]).astype(np.float32)

        table[name] = Streamed(leaf.shape, np.dtype(np.float32), len(leaf.pieces[0].at), parts)
    return tree


def _unpacked(arrays: Mapping[tuple[str, ...], Any], parts: list[tuple[Leaf, Piece]]) -> Iterator[np.ndarray]:
    for leaf, piece in parts:
        yield from piece.unpack(arrays[leaf.path][piece.at].read().result())


def _copy(source: AnyPath, target: Path, names: Sequence[str], root: AnyPath) -> None:
    """Copies those of the files that are there. Raises ValueError for a link that leads out of `root`."""
    for name in names:
        path = source / name
        if not path.is_file():
            continue
        if not (is_remote(path) or Path(path).resolve().is_relative_to(root)):
            raise ValueError(f"{path} is a link to {Path(path).resolve()}, outside of {root}: put a copy in its place.")
        (target / name).write_bytes(path.read_bytes())


@contextlib.contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside the target that takes its name at the end, or is removed when something goes wrong.

    Raises ValueError if the target exists.
    """
    if target.exists():
        raise ValueError(f"{target} exists: choose another name, or remove it.")
    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield made
        # mkdtemp's folders are for their owner alone.
        made.chmod(0o777 & ~_umask())
        made.rename(target)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

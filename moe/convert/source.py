"""What a run can begin with: the arrays of a workdir's checkpoint or of a Hugging Face model, read in parts."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from moe import config as config_lib
from moe.checkpoint import CheckpointError, Checkpoints
from moe.convert.convert import open_hf
from moe.convert.names import Leaf
from moe.convert.safetensors import Tensors, read_json
from moe.convert.store import StoredVariables
from moe.files import AnyPath
from moe.layers.moe import MoeConfig
from moe.models import ModelConfig, make_model
from moe.routers import Router
from moe.workdir import read_config

# By the names of the modules, after "params" or "router_state".
VariablePath = tuple[str, ...]


class SourceArray(NamedTuple):
    """An array of a stored model.

    read(indices): its entries at every combination of some indices for each axis, as float32.
    """

    shape: tuple[int, ...]
    read: Callable[[Sequence[np.ndarray]], np.ndarray]


class Source(NamedTuple):
    """A stored model. name: what messages call it. sums: checksums of its arrays, where they are known."""

    name: str
    model: ModelConfig
    moe: MoeConfig
    router: Router
    arrays: Mapping[VariablePath, SourceArray]
    sums: Mapping[VariablePath, str]


def open_source(path: AnyPath) -> Source:
    """Opens a workdir (its newest checkpoint), a checkpoint WORKDIR/checkpoints/N, or a Hugging Face folder.

    Raises CheckpointError where it isn't there or can't be read, ValueError where it is none of these or not supported.
    """
    if path.parent.name == "checkpoints" and path.name.isdecimal():
        return _open_workdir(path.parent.parent, int(path.name))
    if not path.is_dir():
        raise CheckpointError(f"init_from = {path}: there is no such folder.")
    if (path / "checkpoints").is_dir():
        return _open_workdir(path, None)
    config = path / "config.json"
    if config.is_file() and read_json(config).keys() & {"architectures", "model_type"}:
        return _open_hf(Path(path))
    raise ValueError(
        f"init_from = {path} is neither the workdir of a run with checkpoints nor the folder of a Hugging Face model "
        "with config.json and safetensors."
    )


def name_variables(variables: Any) -> dict[VariablePath, Any]:
    """The leaves of `Variables` by path."""
    named = {}
    for collection, tree in zip(variables._fields, variables, strict=True):
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
            named[(collection, *(str(key.key) for key in keys))] = leaf
    return named


def _open_workdir(workdir: AnyPath, step: int | None) -> Source:
    config = config_lib.resolve(read_config(workdir))
    checkpoints = Checkpoints(workdir / "checkpoints")
    chosen = checkpoints.choose(step)
    folder = workdir / "checkpoints" / str(chosen)
    sums = {
        tuple(name.split("/")[1:]): total
        for name, total in checkpoints.sums(chosen).items()
        if name.startswith("variables/")
    }
    checkpoints.close()
    stored = StoredVariables(folder / "state")
    model = make_model(config.model, config.moe, config.router)
    arrays = {}
    for path, leaf in name_variables(jax.eval_shape(model.init, jax.random.key(0))).items():
        array = stored.open(path)
        if array.shape != leaf.shape:
            raise CheckpointError(
                f"{'.'.join(path)} in checkpoint {folder} has shape {array.shape}, and {workdir}'s config asks for "
                f"{leaf.shape}."
            )
        arrays[path] = SourceArray(array.shape, _reader_of_stored(array))
    return Source(str(folder), config.model, config.moe, config.router, arrays, sums)


def _open_hf(folder: Path) -> Source:
    settings, tensors, leaves = open_hf(folder)
    arrays = {("params", *leaf.path): SourceArray(leaf.shape, _reader_of_leaf(tensors, leaf)) for leaf in leaves}
    return Source(str(folder), settings.model, settings.moe, settings.router, arrays, {})


def _reader_of_stored(array: Any) -> Callable[[Sequence[np.ndarray]], np.ndarray]:
    def read(indices: Sequence[np.ndarray]) -> np.ndarray:
        # Neighbours as slices, which TensorStore reads in one go.
        parts = tuple(slice(i[0], i[-1] + 1) if np.all(np.diff(i) == 1) else i for i in indices)
        return np.asarray(array.oindex[parts].read().result(), np.float32)

    return read


def _reader_of_leaf(tensors: Tensors, leaf: Leaf) -> Callable[[Sequence[np.ndarray]], np.ndarray]:
    def read(indices: Sequence[np.ndarray]) -> np.ndarray:
        out = np.empty([len(wanted) for wanted in indices], np.float32)
        for piece in leaf.pieces:
            depth = len(piece.at)
            places = [np.flatnonzero(wanted == at) for wanted, at in zip(indices, piece.at, strict=False)]
            if all(map(len, places)):
                part = piece.pack([tensors.read(name) for name in piece.names])
                out[np.ix_(*places)] = part[np.ix_(*indices[depth:])]
        return out

    return read

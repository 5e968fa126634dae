"""Checkpoints written and read part by part, so that no array is in memory as a whole.

Orbax saves arrays that are there; one stack of experts of all layers can be a third of a model. So its type handler is
given leaves that make their parts when it writes them, straight to TensorStore, a chunk for each part. What it writes
beside them, and how it makes a checkpoint visible, is its own, and `moe.checkpoint` reads the result as any other.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from moe.checkpoint import CheckpointError
from moe.files import AnyPath, is_remote
from moe.models import Variables
from moe.types import PyTree


@dataclasses.dataclass(frozen=True)
class Streamed:
    """An array that is made while it is written.

    parts(): pairs (index, array[index]), which cover the array; every index is as long as `index_length`.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    index_length: int
    parts: Callable[[], Iterator[tuple[tuple[int, ...], np.ndarray]]]

    @property
    def chunk(self) -> tuple[int, ...]:
        """The shape of a part, with the axes that the index picks from."""
        return (1,) * self.index_length + self.shape[self.index_length :]


class _Handler(ocp.type_handlers.NumpyHandler):
    """Writes `Streamed` leaves one after the other; they are read as NumPy arrays are."""

    async def serialize(
        self,
        values: Sequence[Any],
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[Any] | None = None,
    ) -> Sequence[Any]:
        for value, info in zip(values, infos, strict=True):
            spec = {
                "driver": "zarr",
                "kvstore": {"driver": "file", "path": str(info.parent_dir / info.name)},
                "metadata": {
                    "shape": value.shape,
                    "chunks": value.chunk,
                    "dtype": value.dtype.str,
                    "compressor": {"id": "zstd", "level": 1},
                },
            }
            array = tensorstore.open(spec, create=True, open=True).result()
            for index, part in value.parts():
                array[index].write(part).result()
        done: Future[None] = Future()
        done.set_result(None)
        return [done]


def save_parameters(folder: Path, params: PyTree, router_state: PyTree) -> None:
    """Writes a checkpoint of step 0 that holds a model's variables alone; leaves of params are `Streamed`."""
    registry = ocp.type_handlers.create_type_handler_registry((Streamed, _Handler()))
    handlers = {
        "state": ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry),
        "data": ocp.JsonCheckpointHandler(),
    }
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    with ocp.CheckpointManager(folder.absolute(), options=options, item_handlers=handlers) as manager:
        state = {"variables": Variables(params, router_state)}
        manager.save(0, args=ocp.args.Composite(state=ocp.args.PyTreeSave(state), data=ocp.args.JsonSave({})))


class StoredVariables:
    """The variables of a checkpoint's model, read part by part."""

    def __init__(self, state: AnyPath) -> None:
        """state: the folder of a step's item of that name."""
        self._state = state
        self._merged = (state / "manifest.ocdbt").is_file()

    def open(self, path: tuple[str, ...]) -> Any:
        """An array that reads what it is indexed with; path: of `Variables`. CheckpointError if it isn't there."""
        name = ".".join(("variables", *path))
        base = str(self._state) if is_remote(self._state) else f"file://{self._state.absolute()}"
        kvstore: Any = f"{base}/{name}/"
        if self._merged:
            kvstore = {"driver": "ocdbt", "base": f"{base}/", "path": f"{name}/"}
        try:
            return tensorstore.open({"driver": "zarr", "kvstore": kvstore}, open=True, read=True).result()
        except ValueError as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{name} in checkpoint {self._state} can't be read: {reason}.") from error

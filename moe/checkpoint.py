"""Checkpoints, through Orbax: the training state and the position in the data, written in the background."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp

from moe.files import AnyPath, is_remote
from moe.types import PyTree


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """every: steps between checkpoints; the last step is always saved; 0: only the last. keep: newest ones to keep."""

    every: int = 500
    keep: int = 3

    def __post_init__(self) -> None:
        if self.every < 0 or self.keep < 1:
            raise ValueError(
                f"checkpoint.every = {self.every} must not be negative, and checkpoint.keep = {self.keep} at least 1."
            )


class CheckpointError(Exception):
    """A checkpoint is missing, damaged or of another model; the message is one sentence."""


def complete_steps(folder: AnyPath) -> list[int]:
    """Steps that have a complete checkpoint in the folder, oldest first; none where there is no such folder."""
    if not folder.is_dir():
        return []
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        return checkpoints.steps()


class Checkpoints:
    """The checkpoints of one run, a folder for each step. A save becomes visible only when it is complete."""

    def __init__(self, folder: AnyPath, keep: int | None = None) -> None:
        """Keeps the `keep` newest when one is saved; None opens the folder for reading only."""
        self.folder = folder if is_remote(folder) else folder.absolute()
        reading = keep is None
        if reading and not folder.is_dir():
            raise CheckpointError(f"there are no checkpoints in {folder}: give the workdir of a training run.")
        if not is_remote(folder) and folder.is_dir():
            _check_links(self.folder)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, read_only=reading, create=not reading)
        handlers = {"state": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
        try:
            self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            # It reads what the steps say of themselves.
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"the checkpoints in {folder} can't be read: {reason}.") from error

    def steps(self) -> list[int]:
        """Steps that have a complete checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def choose(self, wanted: int | None) -> int:
        """The newest step, or the wanted one. Raises CheckpointError if it doesn't exist."""
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"there is no complete checkpoint in {self.folder}.")
        if wanted is None:
            return steps[-1]
        if wanted not in steps:
            raise CheckpointError(f"there is no checkpoint of step {wanted}: there are {', '.join(map(str, steps))}.")
        return wanted

    def save(self, step: int, state: PyTree, data: dict[str, Any]) -> None:
        """Starts to write `state` (arrays) and `data` (JSON); the copy from the devices is done on return."""
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data))
        self._manager.save(step, args=items, force=True)

    def restore(self, step: int, abstract_state: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """State and data position of `step`; arrays take shape, type and sharding from `abstract_state`.

        Raises CheckpointError if the checkpoint can't be read or holds another model's arrays.
        """
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), data=ocp.args.JsonRestore())
        with self._explained(step):
            self._check_shapes(step, abstract_state)
            restored = self._manager.restore(step, args=items)
        return restored.state, restored.data

    def restore_variables(self, step: int, abstract_variables: PyTree) -> PyTree:
        """The model's variables alone, of a state that has them under that name; errors as `restore`."""
        part = {"variables": abstract_variables}
        restore_args = ocp.checkpoint_utils.construct_restore_args(part)
        with self._explained(step), ocp.PyTreeCheckpointer() as checkpointer:
            self._check_shapes(step, part, within="variables/")
            args = ocp.args.PyTreeRestore(part, restore_args=restore_args, partial_restore=True)
            return checkpointer.restore(self.folder / str(step) / "state", args=args)["variables"]

    @contextlib.contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        """Makes one sentence of whatever goes wrong while step is read."""
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:  # Orbax and TensorStore raise many kinds for the many ways a file can be damaged.
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"checkpoint {self.folder / str(step)} can't be read ({type(error).__name__}: {reason}): "
                f"{self._others(step)}"
            ) from error

    def _check_shapes(self, step: int, abstract_state: PyTree, within: str = "") -> None:
        _check_names(self.folder / str(step) / "state" / "_METADATA")
        metadata = self._manager.item_metadata(step)["state"]
        if metadata is None:
            raise CheckpointError(f"checkpoint {self.folder / str(step)} holds no state: {self._others(step)}")
        saved = {_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(metadata)}
        wanted = {_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_state)}
        for name in sorted(name for name in saved.keys() | wanted.keys() if name.startswith(within)):
            if saved.get(name) != wanted.get(name):
                raise CheckpointError(
                    f"checkpoint {self.folder / str(step)} doesn't fit the config: it has {name} "
                    f"{_describe(saved.get(name))}, the config asks for {_describe(wanted.get(name))}."
                )

    def _others(self, step: int) -> str:
        others = [str(other) for other in self.steps() if other != step]
        return f"the other steps here are {', '.join(others)}." if others else "it is the only one here."

    def wait(self) -> None:
        """Returns when every save is complete."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Completes every save and releases the folder."""
        self._manager.close()


def _check_links(folder: AnyPath) -> None:
    """Raises CheckpointError where a step's folder is somewhere else: the oldest ones are deleted as a run goes on."""
    for path in folder.iterdir():
        if path.name.isdecimal() and path.is_symlink():
            raise CheckpointError(
                f"checkpoint {path} is a link to {os.readlink(path)}: put a copy in its place, or remove the link."
            )


def _check_names(path: AnyPath) -> None:
    """Raises CheckpointError where the metadata name an array outside of the checkpoint's folder."""
    if not path.is_file():
        return
    table = json.loads(path.read_text())
    arrays = table.get("tree_metadata", {}) if isinstance(table, dict) else {}
    for entry in arrays.values():
        if wrong := [str(key["key"]) for key in entry["key_metadata"] if not set("/\\").isdisjoint(str(key["key"]))]:
            raise CheckpointError(f"{path} names an array {wrong[0]!r}, which isn't in this folder: it can't be read.")


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _describe(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else f"of shape {tuple(shape)}"

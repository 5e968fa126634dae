"""Checkpoints, through Orbax: the training state and the position in the data, written in the background.

A checkpoint is seen only when it is whole, and counts as whole once all of it has been written. It holds a checksum of
every array (`moe.checksums`), made on the devices before the copy from them, and everything that is read is compared
with it, on whatever mesh. Older checkpoints go only then.
"""

import contextlib
import dataclasses
import gc
import hashlib
import json
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import orbax.checkpoint as ocp
from etils import epath

from moe.checksums import checksums, name_leaves
from moe.files import AnyPath, describe, is_remote
from moe.parallel import hosts
from moe.types import PyTree

# What a position alone may hold: the checkpoints of converted weights, which have no checksums.
_UNCHECKED: tuple[set[str], ...] = (set(), {"examples"})


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When a run saves, and what it keeps.

    every: steps between checkpoints; the last step is always saved; 0: only the last. minutes: another checkpoint where
    so many minutes have passed since one began, looked at at log points; 0: never. keep: newest ones to keep.
    keep_best: as many more, with the best `best` on the test set: the lowest "loss" or the highest "accuracy"; an
    evaluation that is among them saves. background: whether training goes on while a checkpoint is written. Where it
    doesn't, a run that is killed never repeats more than `every` steps; otherwise also those that were computed while
    the last checkpoint was being written.
    """

    every: int = 500
    minutes: float = 0.0
    keep: int = 3
    keep_best: int = 0
    best: Literal["loss", "accuracy"] = "loss"
    background: bool = True

    def __post_init__(self) -> None:
        if self.every < 0 or self.minutes < 0 or self.keep < 1 or self.keep_best < 0:
            raise ValueError(
                f"checkpoint.every = {self.every}, checkpoint.minutes = {self.minutes:g} and checkpoint.keep_best = "
                f"{self.keep_best} must not be negative, and checkpoint.keep = {self.keep} at least 1."
            )


class CheckpointError(Exception):
    """A checkpoint is missing, damaged, of another model or can't be written; the message is one sentence."""


class DamagedError(CheckpointError):
    """A checkpoint that is there can't be read, or has changed since it was written."""


def complete_steps(folder: AnyPath) -> list[int]:
    """Steps that have a complete checkpoint in the folder, oldest first; none where there is no such folder."""
    if not folder.is_dir():
        return []
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        return checkpoints.steps()


class Checkpoints:
    """The checkpoints of one run, a folder for each step. Of several processes that write, all call everything."""

    def __init__(self, folder: AnyPath, keep: int | None = None) -> None:
        """Keeps the `keep` newest, and what `spare` names, once another is whole; None: for reading only.

        What a process left behind that was killed while it wrote is removed.
        """
        self.folder = epath.Path(folder if is_remote(folder) else folder.absolute())
        self.spare: frozenset[int] = frozenset()
        self._keep = keep
        self._saving: int | None = None
        self._failure: Exception | None = None
        if keep is None and not folder.is_dir():
            raise CheckpointError(f"there are no checkpoints in {folder}: give the workdir of a training run.")
        if not is_remote(folder) and folder.is_dir():
            _check_links(Path(folder))
        if keep is not None and self.folder.is_dir():
            if hosts.is_first():
                _remove_trash(self.folder)
            self._set_unreadable_aside()
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        reading = self._keep is None
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None, read_only=reading, create=not reading, cleanup_tmp_directories=not reading
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
        try:
            return ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            # It reads what the steps say of themselves.
            raise CheckpointError(f"the checkpoints in {self.folder} can't be read: {describe(error)}.") from error

    def _set_unreadable_aside(self) -> None:
        """One step whose own note Orbax can't read would keep it from opening all of them."""
        found = ocp.path.step.standard_name_format().find_all(self.folder)
        unreadable = {step.step: reason for step in found if (reason := _unreadable(step))}
        if len(unreadable) == len(found):
            return
        for step, reason in unreadable.items():
            place = self.folder / str(step)
            hosts.say(
                f"checkpoint {place} can't be read ({reason}): it is set aside in {self._rename(step)}", error=True
            )

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

    def save(self, step: int, state: PyTree, position: dict[str, Any]) -> None:
        """Starts to write `state` (arrays) and `position` (JSON); the copy from the devices is done on return.

        The save before is waited for; `wait` says whether this one succeeds.
        """
        self.wait()
        sums = checksums(state)
        arrays = {name: [list(leaf.shape), sums[name]] for name, leaf in name_leaves(state).items()}
        record = _sealed({"step": step, "position": position, "arrays": arrays})
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(record))
        self._saving = step
        try:
            self._manager.save(step, args=items, force=True)
        except Exception as error:  # as many kinds as there are ways for storage to fail
            self._failure = error

    @property
    def is_writing(self) -> bool:
        """Whether a save is still under way here."""
        return self._saving is not None and self._failure is None and self._manager.is_saving_in_progress()

    def wait(self) -> None:
        """Returns when the save under way is whole, and removes what is no longer to be kept.

        Raises CheckpointError where it failed, in every process if in one; what was written of it is removed.
        """
        if self._saving is None:
            return
        step, self._saving = self._saving, None
        failure, self._failure = self._failure, None
        if failure is None:
            try:
                self._manager.wait_until_finished()
            except Exception as error:
                failure = error
        if hosts.agree(failure is None):
            self._remove_old()
            return
        with contextlib.suppress(Exception):
            self._manager.close()
        with contextlib.suppress(Exception):  # storage that fails may fail here, too: what is left goes another time
            self._manager = self._open()
        reason = "another process failed" if failure is None else describe(failure)
        raise CheckpointError(f"checkpoint {self.folder / str(step)} was not written: {reason}.")

    def _remove_old(self) -> None:
        if self._keep is None:
            return
        old = [step for step in self.steps()[: -self._keep] if step not in self.spare]
        if not old:
            return
        if hosts.is_first():
            for step in old:
                try:
                    _remove(self.folder / str(step))
                except OSError as error:
                    hosts.say(f"checkpoint {self.folder / str(step)} can't be removed: {describe(error)}", error=True)
        hosts.wait("old checkpoints are removed")
        self._manager.reload()

    def restore(self, step: int, abstract_state: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """State and data position of `step`; arrays take shape, type and sharding from `abstract_state`.

        Raises DamagedError if the checkpoint can't be read or has changed since it was written, CheckpointError if it
        holds another model's arrays; in every process if in one.
        """
        record, state = self._restore(step, abstract_state)
        return state, record["position"]

    def restore_variables(self, step: int, abstract_variables: PyTree) -> PyTree:
        """The model's variables alone, of a state that has them under that name; errors as `restore`."""
        return self._restore(step, {"variables": abstract_variables}, within="variables/")[1]["variables"]

    def sums(self, step: int) -> dict[str, str]:
        """The checksum of every array by its name (`moe.checksums`), none where they were not kept; errors as
        `restore`.
        """
        with self._explained(step):
            arrays = self._read_record(step).get("arrays", {})
            return {name: total for name, (_, total) in arrays.items()}

    def _restore(self, step: int, abstract: PyTree, within: str = "") -> tuple[dict[str, Any], PyTree]:
        record: dict[str, Any] = {}
        restored: PyTree = None
        failure: CheckpointError | None = None
        try:
            with self._explained(step):
                _check_names(self.folder / str(step) / "state" / "_METADATA")
                record = self._read_record(step)
                self._check_shapes(step, record, abstract, within)
                arguments = ocp.args.PyTreeRestore(
                    abstract,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
                    partial_restore=bool(within),
                )
                # By the handler alone: what Orbax has around it waits for processes that may have failed.
                with _one_failure(), contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
                    restored = handler.restore(self.folder / str(step) / "state", args=arguments)
        except CheckpointError as error:
            failure = error
        if not hosts.agree(failure is None):
            raise failure or DamagedError(f"checkpoint {self.folder / str(step)} can't be read by another process.")
        self._compare(step, record, restored)
        return record, restored

    def _compare(self, step: int, record: dict[str, Any], restored: PyTree) -> None:
        if "arrays" not in record:
            return
        changed = [name for name, found in checksums(restored).items() if found != record["arrays"][name][1]]
        if changed:
            raise DamagedError(
                f"checkpoint {self.folder / str(step)} is damaged: {len(changed)} of its arrays have changed since it "
                f"was written ({', '.join(changed[:3])}{', …' if len(changed) > 3 else ''}): {self._others(step)}"
            )

    def _read_record(self, step: int) -> dict[str, Any]:
        """What stands beside the arrays: the position in the data and the arrays' shapes and checksums, if any."""
        path = self.folder / str(step)
        record = ocp.JsonCheckpointHandler().restore(path / "data", args=ocp.args.JsonRestore())
        if isinstance(record, dict) and record.keys() in _UNCHECKED:
            return {"position": record}
        if not isinstance(record, dict) or record != _sealed(record):
            raise DamagedError(f"checkpoint {path} is damaged: its own record has changed: {self._others(step)}")
        if record["step"] != step:
            raise DamagedError(f"checkpoint {path} is that of step {record['step']}: {self._others(step)}")
        return record

    @contextlib.contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        """Makes one sentence of whatever goes wrong while step is read."""
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:  # Orbax and TensorStore raise many kinds for the many ways a file can be damaged.
            raise DamagedError(
                f"checkpoint {self.folder / str(step)} can't be read ({describe(error)}): {self._others(step)}"
            ) from None

    def _check_shapes(self, step: int, record: dict[str, Any], abstract: PyTree, within: str) -> None:
        if "arrays" in record:
            saved = {name: tuple(shape) for name, (shape, _) in record["arrays"].items()}
        else:
            metadata = self._manager.item_metadata(step)["state"]
            if metadata is None:
                raise DamagedError(f"checkpoint {self.folder / str(step)} holds no state: {self._others(step)}")
            saved = {name: tuple(leaf.shape) for name, leaf in name_leaves(metadata).items()}
        wanted = {name: tuple(leaf.shape) for name, leaf in name_leaves(abstract).items()}
        for name in sorted(name for name in saved.keys() | wanted.keys() if name.startswith(within)):
            if saved.get(name) != wanted.get(name):
                raise CheckpointError(
                    f"checkpoint {self.folder / str(step)} doesn't fit the config: it has {name} "
                    f"{_shape(saved.get(name))}, the config asks for {_shape(wanted.get(name))}."
                )

    def _others(self, step: int) -> str:
        others = [str(other) for other in self.steps() if other != step]
        return f"the other steps here are {', '.join(others)}." if others else "it is the only one here."

    def restore_newest(self, abstract_state: PyTree) -> tuple[PyTree, dict[str, Any]] | None:
        """As `restore`, of the newest checkpoint that is whole; None where there is none.

        Newer ones that are damaged are reported and set aside. Raises CheckpointError where all are.
        """
        damaged: dict[int, DamagedError] = {}
        for step in reversed(self.steps()):
            try:
                restored = self.restore(step, abstract_state)
            except DamagedError as error:
                damaged[step] = error
                continue
            for number, damage in damaged.items():
                hosts.say(f"{str(damage).rstrip('.')}: it is set aside in {self.set_aside(number)}", error=True)
            return restored
        if damaged:
            raise CheckpointError(
                f"all {len(damaged)} checkpoints of {self.folder} are damaged, and left as they are: "
                f"{next(iter(damaged.values()))}"
            )
        return None

    def set_aside(self, step: int) -> AnyPath:
        """Renames a damaged checkpoint, so that it is no longer seen; returns its new place."""
        target = self._rename(step)
        self._manager.reload()
        return target

    def _rename(self, step: int) -> AnyPath:
        target = self.folder / f"{step}.damaged"
        number = 1
        while target.exists():
            number += 1
            target = self.folder / f"{step}.damaged-{number}"
        hosts.wait("every process knows where a damaged checkpoint goes")
        if hosts.is_first():
            (self.folder / str(step)).rename(target)
        hosts.wait("a damaged checkpoint is set aside")
        return target

    def close(self) -> None:
        """Completes the save under way, as `wait`, and releases the folder."""
        try:
            self.wait()
        finally:
            self._manager.close()


@contextlib.contextmanager
def _one_failure() -> Iterator[None]:
    """Of arrays that are read side by side, the first failure counts; those of the others are not printed, too."""
    logger, hook = logging.getLogger("asyncio"), sys.unraisablehook
    logger.disabled, sys.unraisablehook = True, lambda _: None
    try:
        yield
    except Exception as error:
        seen: BaseException | None = error
        while seen is not None:
            traceback.clear_frames(seen.__traceback__)
            seen = seen.__cause__ or seen.__context__
        with warnings.catch_warnings(action="ignore"):
            gc.collect()
        # TensorStore's threads find out that nobody waits any more.
        time.sleep(0.05)
        raise
    finally:
        logger.disabled, sys.unraisablehook = False, hook


def _unreadable(step: ocp.path.step.Metadata) -> str:
    """Why Orbax can't read what it noted of a step, or ""."""
    try:
        step.commit_timestamp  # noqa: B018, it is read from the disk
    except Exception as error:
        return describe(error)
    return ""


def _check_links(folder: Path) -> None:
    """Raises CheckpointError where a step's folder is somewhere else: the oldest ones are deleted as a run goes on."""
    for path in folder.iterdir():
        if path.name.isdecimal() and path.is_symlink():
            raise CheckpointError(
                f"checkpoint {path} is a link to {os.readlink(path)}: put a copy in its place, or remove the link."
            )


def _check_names(path: AnyPath) -> None:
    """Raises DamagedError where the metadata name an array outside of the checkpoint's folder."""
    if not path.is_file():
        return
    table = json.loads(path.read_text())
    arrays = table.get("tree_metadata", {}) if isinstance(table, dict) else {}
    for entry in arrays.values():
        if wrong := [str(key["key"]) for key in entry["key_metadata"] if not set("/\\").isdisjoint(str(key["key"]))]:
            raise DamagedError(f"{path} names an array {wrong[0]!r}, which isn't in this folder: it can't be read.")


def _sealed(record: dict[str, Any]) -> dict[str, Any]:
    """The record with a hash of all the rest."""
    rest = {name: value for name, value in record.items() if name != "sha256"}
    text = json.dumps(rest, sort_keys=True)
    return {**rest, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _remove(path: epath.Path) -> None:
    """Removes a checkpoint so that, stopped at any moment, it is not taken for a whole one."""
    if is_remote(path):
        # Orbax takes a checkpoint on a bucket for whole where this file is.
        (path / "commit_success.txt").unlink(missing_ok=True)
        path.rmtree()
        return
    path.rename(path.with_name(f"{path.name}.trash")).rmtree()


def _remove_trash(folder: epath.Path) -> None:
    for path in folder.glob("*.trash"):
        with contextlib.suppress(OSError):
            path.rmtree()


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else f"of shape {shape}"

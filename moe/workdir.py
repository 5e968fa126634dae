"""The folder of a run: which config it belongs to, whether it can be written, and the model that it holds."""

import dataclasses
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
from jax.sharding import Mesh

from moe import config as config_lib
from moe.checkpoint import CheckpointError, Checkpoints, complete_steps
from moe.config import Config
from moe.files import AnyPath, is_remote, write_whole
from moe.lock import WorkdirLock
from moe.models import Model, Variables, make_model
from moe.parallel import hosts
from moe.parallel.mesh import MeshConfig, make_mesh, param_shardings

# What a run writes in its workdir, besides what is replaced whole.
_WRITTEN = ("checkpoints", "load.jsonl", "metrics.jsonl", "profile", "tensorboard", "wandb")

# Fields in which a resumed run may differ from the one that wrote its checkpoints: they change where and how long it
# computes, what it says and how fast it learns, but not what the stored arrays mean.
FREE_FIELDS = (
    "mesh.",
    "checkpoint.",
    "compiler.",
    "guard.spike",
    "guard.abort_after",
    "watchdog_minutes",
    "wandb.",
    # Sums in another order.
    "accumulation_steps",
    "log_every",
    "evaluate_every",
    "steps",
    # Only what a run begins with.
    "init_from",
    "upcycle.",
    "optimizer.learning_rate",
    "optimizer.warmup_steps",
    "optimizer.final_fraction",
    "data.data_dir",
    "data.in_memory",
    "data.corrupt",
    "data.threads",
    "data.workers",
    "data.prefetch",
    "model.remat",
    "model.scan_layers",
)


class Opened(NamedTuple):
    """A workdir that is this run's until `lock` is closed; how the config differs from the one that began the run."""

    differences: list[str]
    lock: WorkdirLock | None


def open_workdir(workdir: AnyPath, config: ml_collections.ConfigDict) -> Opened:
    """Makes the folder the run's own and writes its config.json.

    Of several processes the first writes, and locks. Raises ValueError if the folder is in use or holds another
    config's checkpoints, OSError if it can't be written, or isn't the same for every process.
    """
    _check_writable(workdir)
    _check_links(workdir)
    path = workdir / "config.json"
    started = bool(complete_steps(workdir / "checkpoints"))
    differences: list[str] = []
    if started:
        if not path.exists():
            raise ValueError(f"{workdir} holds checkpoints but no config.json: choose another --workdir.")
        differences = list(_differences(_flat(read_config(workdir)), _flat(config)))
        refused = [line for line in differences if not line.startswith(FREE_FIELDS)]
        if refused:
            raise ValueError(
                f"{workdir} holds checkpoints of another config, which differs in {'; '.join(refused)}: "
                "choose another --workdir, or set these fields back."
            )
    lock = _lock(workdir)
    if hosts.is_first():
        write_whole(path, config_lib.to_json(config))
    hosts.wait("config.json is written")
    if not hosts.agree(path.exists()):
        raise OSError(
            f"workdir {workdir} isn't the same folder for the {jax.process_count()} processes of this run: choose one "
            "on storage that they share, such as gs://BUCKET/runs/NAME."
        )
    return Opened(differences, lock)


def _lock(workdir: AnyPath) -> WorkdirLock | None:
    """The first process's lock; raises ValueError in all where it has none."""
    lock: WorkdirLock | None = None
    refusal: ValueError | None = None
    if hosts.is_first():
        try:
            lock = WorkdirLock(workdir)
        except ValueError as error:
            refusal = error
    if not hosts.agree(refusal is None):
        raise refusal or ValueError(f"{workdir} is in use by another run, as the first process says.")
    return lock


def _check_writable(workdir: AnyPath) -> None:
    try:
        if is_remote(workdir):
            probe = workdir / f".writable-{jax.process_index()}"
            probe.write_text("")
            probe.unlink()
        else:
            workdir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=workdir):
                pass
    except OSError as error:
        missing = is_remote(workdir) and isinstance(error, FileNotFoundError)
        reason = "there is no such bucket" if missing else error.strerror or " ".join(str(error).split())
        raise OSError(f"workdir {workdir} can't be written ({reason}): choose another with --workdir.") from error


def _check_links(workdir: AnyPath) -> None:
    """Raises ValueError where a run would write elsewhere through a link, as in a workdir that somebody else packed."""
    for path in () if is_remote(workdir) else map(workdir.joinpath, _WRITTEN):
        if path.is_symlink():
            raise ValueError(
                f"{path} is a link to {os.readlink(path)}, and a run writes nowhere but in its workdir: remove the "
                "link, or let the workdir as a whole be one."
            )


def read_config(workdir: AnyPath) -> ml_collections.ConfigDict:
    """The config of the run in `workdir`. Raises CheckpointError if there is none or it can't be read."""
    path = workdir / "config.json"
    try:
        return config_lib.from_json(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{workdir} is not the workdir of a run: it has no config.json.") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} can't be read: {error}.") from error


def fit_mesh(table: ml_collections.ConfigDict, overrides: Iterable[str]) -> str:
    """Puts a run from another number of devices on all devices here, copied: only speed depends on it.

    Returns a sentence that says so, or "". Where `overrides` name a mesh, that is wanted, and stays.
    """
    if any(assignment.startswith("mesh.") for assignment in overrides):
        return ""
    mesh = config_lib.resolve(table).mesh
    try:
        make_mesh(mesh)
    except ValueError as error:
        table.update({"mesh": dataclasses.asdict(MeshConfig())})
        return f"{error} Running with a copy on each device."
    return ""


class Loaded(NamedTuple):
    """The model of a run, ready to be applied: `model.apply(variables, inputs, keys=None, mesh=mesh)`.

    config: the run's, with moe.group_size = 1. mesh: over all devices here. variables: as the checkpoint has them.
    """

    config: Config
    mesh: Mesh
    model: Model
    variables: Variables


def load_model(workdir: AnyPath, step: int | None = None, overrides: Sequence[str] = ()) -> Loaded:
    """The model that the checkpoint of a step holds (the newest by default), under the workdir's config with overrides.

    Every example is routed by itself, so that what the model says of it depends on no other. Raises CheckpointError
    where there is none, ValueError where the overrides don't fit.
    """
    table = read_config(workdir)
    config_lib.override(table, overrides)
    if notice := fit_mesh(table, overrides):
        hosts.say(notice, error=True)
    config = config_lib.resolve(table)
    config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, group_size=1))
    mesh = make_mesh(config.mesh)
    model = make_model(config.model, config.moe, config.router)
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    shardings = (param_shardings(*pair, mesh) for pair in zip(abstract, model.axes, strict=True))
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        Variables(*shardings),
    )
    checkpoints = Checkpoints(workdir / "checkpoints")
    return Loaded(config, mesh, model, checkpoints.restore_variables(checkpoints.choose(step), abstract))


def _flat(config: ml_collections.ConfigDict) -> dict[str, Any]:
    def walk(table: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in table.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{name}.")
            else:
                yield prefix + name, list(value) if isinstance(value, tuple) else value

    return dict(walk(config.to_dict(), ""))


def _differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            yield f"{name} ({old.get(name, 'absent')!r} there, {new.get(name, 'absent')!r} now)"

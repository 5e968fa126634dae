"""The folder of a run: which config it belongs to, and whether it can be written."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_collections

from moe import config as config_lib
from moe.checkpoint import CheckpointError

# Fields in which a resumed run may differ from the one that wrote its checkpoints: they change where and how long it
# computes, what it says and how fast it learns, but not what the stored arrays mean.
FREE_FIELDS = (
    "mesh.",
    "checkpoint.",
    "log_every",
    "evaluate_every",
    "steps",
    "optimizer.learning_rate",
    "optimizer.warmup_steps",
    "optimizer.final_fraction",
    "data.data_dir",
    "data.in_memory",
    "data.threads",
    "data.workers",
    "data.prefetch",
    "model.remat",
    "model.scan_layers",
)


def open_workdir(workdir: Path, config: ml_collections.ConfigDict) -> list[str]:
    """Makes the folder the run's own and writes its config.json; returns the differences to a config already there.

    Raises ValueError if the folder holds another config's checkpoints, OSError if it can't be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise OSError(
            f"workdir {workdir} can't be written ({error.strerror}): choose another with --workdir."
        ) from error
    path = workdir / "config.json"
    started = any((workdir / "checkpoints").glob("[0-9]*"))
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
    temporary = path.with_suffix(".tmp")
    temporary.write_text(config_lib.to_json(config))
    temporary.replace(path)
    return differences


def read_config(workdir: Path) -> ml_collections.ConfigDict:
    """The config of the run in `workdir`. Raises CheckpointError if there is none or it can't be read."""
    path = workdir / "config.json"
    try:
        return config_lib.from_json(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{workdir} is not the workdir of a run: it has no config.json.") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} can't be read: {error}.") from error


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

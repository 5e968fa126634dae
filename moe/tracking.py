"""A run's numbers in Weights & Biases too, where the config asks for it (pip install 'moe-jax[wandb]')."""

import dataclasses
import importlib.util
import json
import tempfile
import uuid
from collections.abc import Mapping
from typing import Any, Literal

from moe.files import AnyPath, describe, is_remote, write_whole
from moe.parallel import hosts


@dataclasses.dataclass(frozen=True)
class WandbConfig:
    """Where to, and how.

    project: its name there; "": nothing is sent, and the package isn't needed. mode: "offline": into the folder `wandb`
    of the workdir, for `wandb sync`; "online": over the network, to whom `wandb login` says.
    """

    project: str = ""
    mode: Literal["offline", "online"] = "offline"

    def check(self) -> None:
        """Raises ValueError where the package is wanted, and not installed."""
        if self.project and importlib.util.find_spec("wandb") is None:
            raise ValueError(
                f"wandb.project = '{self.project}' needs wandb, which isn't installed: pip install 'moe-jax[wandb]', "
                "or leave the project empty."
            )


class Tracker:
    """One run there for one workdir, however often it is started again: wandb.json in the workdir keeps its id.

    Steps that are run again are not sent twice: Weights & Biases keeps what it has. What goes wrong there is said once,
    and the run goes on without.
    """

    def __init__(self, config: WandbConfig, table: Mapping[str, Any], workdir: AnyPath) -> None:
        """table: the run's config, as it is shown there. Only the first process sends anything."""
        self._run: Any = None
        if not config.project or not hosts.is_first():
            return
        try:
            import wandb

            self._run = wandb.init(
                project=config.project,
                id=_run_id(workdir),
                resume="allow",
                mode=config.mode,
                name=workdir.name,
                dir=tempfile.mkdtemp(prefix="wandb-") if is_remote(workdir) else str(workdir),
                config=dict(table),
            )
        except Exception as error:  # Of many kinds: no account, no network, no such project.
            self._fail(error)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Sends the values of a step."""
        if self._run is None:
            return
        try:
            self._run.log(dict(values), step=step)
        except Exception as error:
            self._fail(error)

    def close(self) -> None:
        """Waits until all is sent or stored."""
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:
            self._fail(error)
        self._run = None

    def _fail(self, error: Exception) -> None:
        hosts.say(f"the run goes on without Weights & Biases: {describe(error)}", error=True)
        self._run = None


def _run_id(workdir: AnyPath) -> str:
    """The id that the workdir's run has there; a new one where it has none."""
    path = workdir / "wandb.json"
    try:
        found = json.loads(path.read_text())["id"]
        if isinstance(found, str) and found.isalnum():
            return found
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    fresh = uuid.uuid4().hex[:12]
    write_whole(path, json.dumps({"id": fresh}) + "\n")
    return fresh

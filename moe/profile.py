"""A profile of some training steps, for xprof and TensorBoard."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax

from moe.files import AnyPath, is_remote


def parse_steps(text: str) -> range:
    """ "10:15" is steps 10 to 15, both included. Raises ValueError for anything else."""
    first, colon, last = text.partition(":")
    if not (colon and first.isdigit() and last.isdigit() and 0 < int(first) <= int(last)):
        raise ValueError(f"profile steps '{text}' must be FIRST:LAST, counted from 1, such as 10:15.")
    return range(int(first), int(last) + 1)


class Profile:
    """Records steps as they run, every process its own devices, into `folder`, where xprof reads them."""

    def __init__(self, steps: range, folder: AnyPath) -> None:
        """steps: none, where it is empty. folder: on object storage it is filled when the last step is done."""
        self._steps = steps
        self._folder = folder
        self._local: AnyPath = folder
        self._is_running = False

    def begin(self, step: int) -> None:
        """Before a step."""
        if self._steps and step == self._steps.start:
            if is_remote(self._folder):
                self._local = Path(tempfile.mkdtemp(prefix="profile-"))
            jax.profiler.start_trace(str(self._local))
            self._is_running = True

    def end(self, step: int, result: Any) -> bool:
        """After a step that gave `result`; whether the profile is complete now."""
        if not self._is_running or step < self._steps.stop - 1:
            return False
        jax.block_until_ready(result)
        self.close()
        return True

    def close(self) -> None:
        """Ends a recording that still runs, and keeps it."""
        if not self._is_running:
            return
        self._is_running = False
        jax.profiler.stop_trace()
        if self._local is not self._folder:
            local = Path(self._local)
            for file in (path for path in local.rglob("*") if path.is_file()):
                target = self._folder / file.relative_to(local).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
            shutil.rmtree(local)

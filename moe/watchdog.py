"""Ends a run that is stuck, so that whoever looks after it can start it again, and says where it was stuck."""

import contextlib
import faulthandler
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import jax

from moe.files import AnyPath

# Exit code of a run that was stuck (EX_SOFTWARE of sysexits.h): the same command goes on from the newest checkpoint.
STUCK = 70
T = TypeVar("T")


class Watchdog:
    """Where nothing has been heard for so many minutes, writes the stacks of all threads and ends the process.

    The stacks go to stderr and to stacks-PROCESS.txt of the workdir. 0 minutes: never. Used as a context.
    """

    def __init__(self, minutes: float, workdir: AnyPath) -> None:
        self._seconds = 60 * minutes
        self._path = workdir / f"stacks-{jax.process_index()}.txt"
        self._heard = time.monotonic()
        self._doing = "starting"
        self._done = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self._heard = time.monotonic()
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def hear(self, doing: str) -> None:
        """Says that the run lives, and what it does next: "waiting for the examples of step 3"."""
        self._doing = doing
        self._heard = time.monotonic()

    def over(self, items: Iterable[T], doing: str) -> Iterator[T]:
        """The items, each a sign of life."""
        for item in items:
            self.hear(doing)
            yield item

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self._seconds / 4)):
            if time.monotonic() - self._heard > self._seconds:
                self._end()

    def _end(self) -> None:
        message = (
            f"stuck for {self._seconds / 60:g} minutes (watchdog_minutes) while {self._doing}; the stacks of all "
            f"threads are in {self._path}; the same command goes on from the newest checkpoint."
        )
        with contextlib.suppress(Exception), tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            stacks = file.read()
            with contextlib.suppress(Exception):
                print(stacks, message, sep="\n", file=sys.stderr, flush=True)
            self._path.write_text(f"{message}\n\n{stacks}")
        os._exit(STUCK)

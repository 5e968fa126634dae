"""One run at a time in a workdir: the second is refused while the first lives, and goes on where that has died.

On a disk it is a lock of the operating system on the file `run.lock`, which ends with its process, however that ends. A
bucket has none: there the file is a lease that the first process renews, and another takes it over once it has watched
it for as long as a lease lasts without a change.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from typing import Any

from moe.files import AnyPath, is_remote

_NAME = "run.lock"
# A lease lasts so many seconds, and is renewed that often.
_LEASE, _RENEWAL = 60.0, 15.0


class WorkdirLock:
    """The right to write in a workdir, until `close`. Raises ValueError where another living process has it."""

    def __init__(self, workdir: AnyPath) -> None:
        self._path = workdir / _NAME
        self._workdir = workdir
        self._closed = threading.Event()
        self._mine = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        if is_remote(workdir):
            self._lease()
        else:
            self._lock()

    def _lock(self) -> None:
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # A lock of the process: children that outlive it don't have it.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            owner = _parse(self._path.read_text())
            os.close(self._file)
            raise self._refusal(owner) from None
        except OSError as error:  # some network file systems have no locks
            print(f"{self._path} can't be locked ({error.strerror}): see to it that no other run uses {self._workdir}")
        # On a full disk nobody learns who it is.
        with contextlib.suppress(OSError):
            os.truncate(self._file, 0)
            os.write(self._file, json.dumps(self._mine).encode())

    def _lease(self) -> None:
        found = self._read()
        if found and not self._is_dead(found):
            print(f"{self._workdir} has a lease of {_owner(found)}: watching for {_LEASE:.0f} s whether it lives")
            deadline = time.monotonic() + _LEASE
            while time.monotonic() < deadline and self._read() == found:
                time.sleep(min(1.0, _RENEWAL))
            if self._read() not in (found, {}):
                raise self._refusal(self._read())
        self._renew(0)
        time.sleep(min(0.5, _RENEWAL))
        # Of two that took it over at once the later one has it.
        if any(self._read().get(name) != value for name, value in self._mine.items()):
            raise self._refusal(self._read())
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def _keep(self) -> None:
        count = 0
        while not self._closed.wait(_RENEWAL):
            count += 1
            # A bucket that doesn't answer now may do so next time.
            with contextlib.suppress(Exception):
                self._renew(count)

    def _renew(self, count: int) -> None:
        self._path.write_text(json.dumps({**self._mine, "renewed": count}))

    def _read(self) -> dict[str, Any]:
        try:
            return _parse(self._path.read_text())
        except FileNotFoundError:
            return {}

    def _is_dead(self, owner: dict[str, Any]) -> bool:
        if owner.get("host") != socket.gethostname() or not isinstance(owner.get("pid"), int):
            return False
        try:
            os.kill(owner["pid"], 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return owner["pid"] == os.getpid()

    def _refusal(self, owner: dict[str, Any]) -> ValueError:
        return ValueError(
            f"{self._workdir} is in use by {_owner(owner)}: wait for that run or stop it, or choose another --workdir."
        )

    def close(self) -> None:
        """Gives the workdir back."""
        self._closed.set()
        if is_remote(self._workdir):
            self._thread.join()
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
        else:
            os.close(self._file)


def _parse(text: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        value = json.loads(text)
        if isinstance(value, dict):
            return value
    return {}


def _owner(owner: dict[str, Any]) -> str:
    known = {name: owner.get(name, "unknown") for name in ("pid", "host", "since")}
    return f"another run (process {known['pid']} on {known['host']}, since {known['since']})"

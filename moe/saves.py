"""When a run saves: on schedule, after an evaluation among the best, again where a save failed, before it ends."""

import contextlib
import json
import time
from collections.abc import Mapping
from typing import Any

from moe.checkpoint import CheckpointConfig, CheckpointError, Checkpoints
from moe.files import describe, write_whole
from moe.parallel import hosts
from moe.types import PyTree

# After a save that failed, the next is tried after so many seconds, and twice as many each time up to the second.
_RETRY_SECONDS = (30.0, 600.0)
# How often the last save of a run is tried, with so many seconds between.
_LAST_TRIES, _LAST_SECONDS = 3, 2.0
_MEASURES = "measures.json"


class Saves:
    """The saves of one run. A save that fails is reported and tried again, and training goes on.

    Every process calls everything at the same steps; the first one's clock counts.
    """

    def __init__(self, checkpoints: Checkpoints, config: CheckpointConfig, restored: int | None = None) -> None:
        """restored: the step that the run goes on from. whole: the newest step that is known to be saved."""
        self._checkpoints = checkpoints
        self._config = config
        self.whole = restored
        self._under_way: int | None = None
        self._began = time.monotonic()
        self._retry_at: float | None = None
        self._delay = _RETRY_SECONDS[0]
        self._failures = 0
        self._reason = ""
        self._measures = _read_measures(checkpoints)
        checkpoints.spare = self._best()

    def is_due(self, step: int, is_log_point: bool) -> bool:
        """Whether to save after this step. At log points, what became of the last save is looked at, too."""
        if is_log_point and hosts.follow(not self._checkpoints.is_writing):
            self._settle()
        if self._config.every and step % self._config.every == 0:
            return True
        return is_log_point and hosts.follow(self._is_time())

    def _is_time(self) -> bool:
        now = time.monotonic()
        if self._retry_at is not None and now >= self._retry_at:
            return True
        return bool(self._config.minutes) and now - self._began >= 60 * self._config.minutes

    def save(self, step: int, state: PyTree, position: dict[str, Any]) -> None:
        """Begins to save, once the save before has ended."""
        self._settle()
        if step == self.whole:
            return
        self._began, self._retry_at = time.monotonic(), None
        self._under_way = step
        self._checkpoints.save(step, state, position)
        if not self._config.background:
            self._settle()

    def rate(self, step: int, measures: Mapping[str, float]) -> bool:
        """Notes what an evaluation after `step` gave; whether the step is among the best and not saved yet."""
        if not self._config.keep_best:
            return False
        self._measures[step] = float(measures[self._config.best])
        best = self._best()
        self._checkpoints.spare = best
        if hosts.is_first():
            with contextlib.suppress(OSError):  # a full disk: the next evaluation writes all of them
                write_whole(self._checkpoints.folder / _MEASURES, json.dumps(self._measures))
        return step in best and step not in (self.whole, self._under_way)

    def _best(self) -> frozenset[int]:
        sign = -1 if self._config.best == "accuracy" else 1
        ranked = sorted(self._measures, key=lambda step: (sign * self._measures[step], -step))
        return frozenset(ranked[: self._config.keep_best])

    def _settle(self, *, is_end: bool = False) -> None:
        """Waits for the save under way; says where it failed, and when it is tried again, unless the run ends."""
        if self._under_way is None:
            return
        step, self._under_way = self._under_way, None
        try:
            self._checkpoints.wait()
        except CheckpointError as error:
            self._failures += 1
            self._reason = str(error)
            self._retry_at = time.monotonic() + self._delay
            then = (
                f"Training goes on; the next try is at the first log point in {self._delay:.0f} s, or at the next "
                f"checkpoint that is due ({self._failures} failed so far)."
            )
            hosts.say(f"{error}" if is_end else f"{error} {then}", error=True)
            self._delay = min(2 * self._delay, _RETRY_SECONDS[1])
        else:
            self.whole, self._delay = step, _RETRY_SECONDS[0]

    def complete(self, step: int, state: PyTree, position: dict[str, Any]) -> None:
        """Returns when this step, the run's last, is saved whole. Raises CheckpointError where it can't be."""
        for attempt in range(_LAST_TRIES):
            if attempt:
                time.sleep(_LAST_SECONDS)
            if self._under_way != step:
                self.save(step, state, position)
            self._settle(is_end=True)
            if self.whole == step:
                return
        known = "there is no whole checkpoint" if self.whole is None else f"the newest whole one is of {self.whole}"
        raise CheckpointError(
            f"the run ends without a checkpoint of its last step, {step}, after {_LAST_TRIES} tries, and {known}: "
            f"{self._reason} Make room and give the same command again."
        )


def _read_measures(checkpoints: Checkpoints) -> dict[int, float]:
    """What earlier parts of the run measured, of the steps that are still there."""
    path = checkpoints.folder / _MEASURES
    if not path.exists():
        return {}
    try:
        known = {int(step): float(value) for step, value in json.loads(path.read_text()).items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        hosts.say(f"{path} can't be read ({describe(error)}): the best checkpoints are counted anew.", error=True)
        return {}
    there = checkpoints.steps()
    return {step: value for step, value in known.items() if step in there}

"""What the host makes of updates that were left out (`moe.guard`) and of collapsed routers, at log points."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from moe.config import Config
from moe.files import AnyPath, is_remote
from moe.parallel import hosts
from moe.plan.analytic import tokens_per_step
from moe.tasks import TASKS

# A router counts as collapsed in a layer where so many of its experts get no token though there are at least `_CHOICES`
# choices for each, or where the entropy is below this share of that of an even choice.
_DEAD, _CHOICES, _ENTROPY = 0.5, 4, 0.01
_SHOWN = 8
# Of the steps skipped between two log points so many are said; bad_steps.jsonl has all.
_SAID = 3


class _Seen(NamedTuple):
    step: int
    examples: int
    values: Any


class Watch:
    """Collects what each step returned, without waiting for it, and looks at it at log points.

    Every process has one, and all come to the same answer. The first writes `bad_steps.jsonl`, a line for every update
    that was left out: step, what was wrong, loss, gradient_norm, block, the number of the first block whose output
    isn't finite (null: none), and examples, all of the batch.
    """

    def __init__(self, config: Config, workdir: AnyPath, indices: Callable[[int], Sequence[Any]]) -> None:
        """indices: see `moe.data.batches.TrainIterator`."""
        self._config = config
        self._path = workdir / "bad_steps.jsonl"
        self._indices = indices
        self._pending: list[_Seen] = []
        self._collapsed: set[str] = set()
        # Of the steps in a row up to now.
        self._first: dict[str, Any] | None = None

    def add(self, step: int, position: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
        """Keeps what is needed of a step's metrics; position: of its batch, see `TrainIterator.get_state`."""
        train = metrics["train"]
        values = {"guard": metrics["guard"], "rms": metrics["blocks"]["rms"]}
        values |= {name: train[name] for name in ("loss", "gradient_norm")}
        self._pending.append(_Seen(step, position["examples"], values))

    def look(self, values: Mapping[str, float]) -> str:
        """Says and writes down the updates left out since the last look, and warns of collapsed routers.

        values: of this log point, as they are logged. Returns why the run is to end, or "".
        """
        last = self._pending[-1].step
        gave_up = self._look_at_updates()
        self._look_at_routers(last, values)
        return gave_up

    def _look_at_updates(self) -> str:
        seen, self._pending = self._pending, []
        values = jax.device_get([one.values for one in seen])
        bad = []
        for one, value in zip(seen, values, strict=True):
            if not (value["guard"]["nonfinite"] or value["guard"]["spike"]):
                self._first = None
                continue
            bad.append(self._describe(one, value))
            self._first = self._first or bad[-1]
        if not bad:
            return ""
        self._write(bad)
        total, in_a_row = (int(values[-1]["guard"][name]) for name in ("skipped", "skipped_in_a_row"))
        for line in bad[:_SAID]:
            hosts.say(f"{_sentence(line)}: its update is left out ({total} so far)", error=True)
        if len(bad) > _SAID:
            hosts.say(f"… and {len(bad) - _SAID} more updates left out up to step {seen[-1].step}", error=True)
        limit = self._config.guard.abort_after
        if not limit or in_a_row < limit or self._first is None:
            return ""
        return (
            f"{in_a_row} updates in a row were left out (guard.abort_after = {limit}), up to step {seen[-1].step}; "
            f"{_sentence(self._first)}; {self._path.name} names all examples of each; look into it with python "
            f"replay.py --workdir={self._path.parent} --step={self._first['step']}."
        )

    def _write(self, lines: list[dict[str, Any]]) -> None:
        if not hosts.is_first():
            return
        text = "".join(json.dumps(line) + "\n" for line in lines)
        try:
            if is_remote(self._path):
                before = self._path.read_text() if self._path.exists() else ""
                self._path.write_text(before + text)
            else:
                with self._path.open("a") as file:
                    file.write(text)
        except OSError as error:
            hosts.say(f"{self._path} can't be written: {error}", error=True)

    def _look_at_routers(self, step: int, values: Mapping[str, float]) -> None:
        """Warns of each layer whose router has collapsed, once until it has recovered."""
        num_experts = self._config.moe.num_experts
        tokens = tokens_per_step(self._config) / self._config.accumulation_steps
        found = {}
        for name, dead in values.items():
            layer, _, metric = name.removeprefix("moe/").partition("/")
            if metric != "dead_experts" or not name.startswith("moe/"):
                continue
            choices = tokens * values[f"moe/{layer}/experts_per_token"]
            entropy = values.get(f"moe/{layer}/entropy", math.inf)
            if dead >= _DEAD * num_experts and choices >= _CHOICES * num_experts:
                found[layer] = f"{dead:g} of {num_experts} experts get no token"
            elif num_experts > 1 and entropy < _ENTROPY * math.log(num_experts):
                found[layer] = f"the entropy of its choices is {entropy:.2g} nats, of {math.log(num_experts):.2f}"
        for layer, what in found.items():
            if layer not in self._collapsed:
                hosts.say(f"step {step}: the router of {layer.replace('_', ' ')} has collapsed: {what}", error=True)
        self._collapsed = set(found)

    def _describe(self, seen: _Seen, values: Any) -> dict[str, Any]:
        wrong = np.flatnonzero(~np.isfinite(values["rms"]))
        loss, norm = (float(values[name]) for name in ("loss", "gradient_norm"))
        name_example = TASKS[self._config.model.task].name_example
        return {
            "step": seen.step,
            "what": "nonfinite" if values["guard"]["nonfinite"] else "spike",
            "loss": loss if math.isfinite(loss) else str(loss),
            "gradient_norm": norm if math.isfinite(norm) else str(norm),
            "block": int(wrong[0]) if len(wrong) else None,
            "examples": [name_example(self._config.data, index) for index in self._indices(seen.examples)],
        }


def _sentence(line: Mapping[str, Any]) -> str:
    if line["what"] == "spike":
        where = "above the running bound (guard.spike)"
    elif line["block"] is not None:
        where = f"and the first output that isn't finite is that of block {line['block']}"
    else:
        where = "and the outputs of all blocks are finite"
    names = line["examples"]
    shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    return (
        f"step {line['step']}: loss {_short(line['loss'])}, gradient norm {_short(line['gradient_norm'])}, {where}; "
        f"examples {shown}"
    )


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"

"""The runs that are compared: what the folder of each says, and which of them differ in nothing but the seed."""

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from moe import cli
from moe.config import CHOICES
from moe.files import AnyPath, is_number, read_lines
from moe.models import MODELS
from moe.workdir import read_config

# Fields that say where, how fast and how visibly a run computes, but not what.
UNIMPORTANT = (
    "mesh.",
    "checkpoint.",
    "compiler.",
    "wandb.",
    "watchdog_minutes",
    "log_every",
    "evaluate_every",
    "data.data_dir",
    "data.cache_dir",
    "data.in_memory",
    "data.threads",
    "data.workers",
    "data.prefetch",
    "model.remat",
    "model.scan_layers",
)
_OPTIONS = {name for options in CHOICES.values() for name in options}
_ABSENT = "–"


class Run(NamedTuple):
    """A finished run. settings: fields of its config by dotted name, see `flat_settings`. lines: of metrics.jsonl."""

    path: AnyPath
    settings: dict[str, Any]
    result: dict[str, Any]
    lines: list[dict[str, Any]]

    @property
    def seed(self) -> int:
        """The seed of its config."""
        return int(self.settings.get("seed", 0))

    @property
    def task(self) -> str:
        """What it is measured on, in words."""
        model = MODELS.get(str(self.settings.get("model.name")))
        names = ("name", "test_split", "test_paths", "mixture")
        data = (self.settings.get(f"data.{name}") for name in names)
        return f"{model[0].task if model else 'unknown'}: {', '.join(str(value) for value in data if value)}"

    @property
    def tokenizer(self) -> str:
        """What makes the tokens that it predicts; the same for all images."""
        names = [name for name in self.settings if name.startswith("data.tokenizer.")]
        return json.dumps({name: self.settings[name] for name in names}, sort_keys=True)

    def measures(self) -> dict[str, float]:
        """What can be compared by number: the tests of result.json, and the median examples_per_second of the log."""
        values = {name: value for name, value in self.result.items() if name.startswith("test/")}
        # Ends of intervals are no measures.
        values = {name: value for name, value in values.items() if not name.endswith(("_low", "_high"))}
        values = {name: float(value) for name, value in values.items() if isinstance(value, float) or is_number(value)}
        speeds = [line["examples_per_second"] for line in self.lines if is_number(line.get("examples_per_second"))]
        return values | ({"examples_per_second": statistics.median(speeds)} if speeds else {})


class Group(NamedTuple):
    """Runs that differ in their seeds alone, by seed. name: in what they differ from the other groups."""

    name: str
    runs: list[Run]


def read_run(path: AnyPath) -> Run:
    """The run in that folder.

    Raises CheckpointError where it isn't one, Failure where it hasn't ended, so that there is nothing to compare.
    """
    config = read_config(path)
    file = path / "result.json"
    try:
        result = json.loads(file.read_text())
        if not isinstance(result, dict):
            raise ValueError("it must hold a table")
    except FileNotFoundError:
        raise cli.Failure(f"{path} has no result.json, so that run hasn't ended: let train.py finish it.") from None
    except (ValueError, RecursionError) as error:
        raise cli.Failure(f"{file} can't be read: {' '.join(str(error).split())}.") from error
    steps, seed = config.get("steps"), config.get("seed", 0)
    if not isinstance(seed, int):
        raise cli.Failure(
            f"{path}/config.json has the seed {seed!r}, which is no integer: it is no config of train.py."
        )
    if steps != result.get("step"):
        raise cli.Failure(
            f"{path} has a result of step {result.get('step')!r} and a config of {steps!r} steps: let train.py finish "
            "it."
        )
    run = Run(path, flat_settings(config.to_dict()), result, read_lines(path / "metrics.jsonl"))
    if not any(name.startswith("test/") for name in run.measures()):
        raise cli.Failure(f"{file} has no measure of a test set: remove it, and let train.py write it anew.")
    return run


def flat_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config by dotted name, without the tables of options that it doesn't choose."""

    def walk(table: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        chosen = table.get("name")
        for name, value in table.items():
            if not isinstance(value, Mapping):
                yield prefix + name, list(value) if isinstance(value, tuple) else value
            elif not (isinstance(chosen, str) and name in _OPTIONS and name != chosen):
                yield from walk(value, f"{prefix}{name}.")

    return dict(walk(config, ""))


def check_comparable(runs: Sequence[Run]) -> None:
    """Raises ValueError where two runs are of different tasks, of other texts, or the same run made twice."""
    first = runs[0]
    seen: dict[str, Run] = {}
    for run in runs:
        if run.task != first.task:
            raise ValueError(
                f"{first.path} ({first.task}) and {run.path} ({run.task}) are of different tasks, whose measures don't "
                "compare: give runs of one task."
            )
        for name in (name for name in first.result if name.startswith("manifest/")):
            if run.result.get(name, first.result[name]) != first.result[name]:
                raise ValueError(
                    f"{first.path} and {run.path} learned from different texts ({name} is "
                    f"{str(first.result[name])[:12]}… and {str(run.result[name])[:12]}…): give runs on one data set."
                )
        same = seen.setdefault(json.dumps([_important(run), run.seed], sort_keys=True), run)
        if same is not run:
            raise ValueError(
                f"{same.path} and {run.path} have the same config and the same seed {run.seed}, which makes them one "
                "run and not two: leave one of them out."
            )


def group_runs(runs: Sequence[Run]) -> tuple[list[Group], dict[str, list[Any]]]:
    """The groups, in the order in which the runs are given; and the fields in which they differ, a value for each."""
    members: dict[str, list[Run]] = {}
    for run in runs:
        members.setdefault(json.dumps(_important(run), sort_keys=True), []).append(run)
    lists = list(members.values())
    settings = [_important(those[0]) for those in lists]
    fields = sorted({name for one in settings for name in one})
    differing = {name: [one.get(name, _ABSENT) for one in settings] for name in fields}
    differing = {name: values for name, values in differing.items() if _differ(name, values)}
    names = _names(differing, len(lists)) if differing else [settings[0].get("router.name", "all")]
    groups = [Group(name, sorted(those, key=lambda run: run.seed)) for name, those in zip(names, lists, strict=True)]
    return groups, differing


def _differ(name: str, values: Sequence[Any]) -> bool:
    """Whether a field says more than which option was chosen, whose settings the other options don't have."""
    present = [value for value in values if value != _ABSENT]
    is_of_option = not _OPTIONS.isdisjoint(name.split(".")[:-1])
    return any(value != present[0] for value in present) or (len(present) < len(values) and not is_of_option)


def _important(run: Run) -> dict[str, Any]:
    return {name: value for name, value in run.settings.items() if name != "seed" and not name.startswith(UNIMPORTANT)}


def _names(differing: Mapping[str, list[Any]], count: int) -> list[str]:
    """Names for the groups: by their routers where these tell them apart, otherwise by every field that differs."""
    if "router.name" in differing:
        names = [str(name) for name in differing["router.name"]]
        if len(set(names)) == count:
            return names
    # A router's own fields are absent elsewhere, and told by its name.
    shown = {name: values for name, values in differing.items() if _ABSENT not in values} or dict(differing)
    short = {name: name if len(shown) > 1 else name.rpartition(".")[2] for name in shown}
    names = [", ".join(f"{short[name]}={values[index]}" for name, values in shown.items()) for index in range(count)]
    if len(set(names)) < count:
        names = [f"{name or 'config'} #{index + 1}" for index, name in enumerate(names)]
    return [name if len(name) <= 80 else f"{name[:76]}… #{index + 1}" for index, name in enumerate(names)]

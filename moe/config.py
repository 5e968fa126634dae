"""From a config file and command-line overrides to frozen dataclasses, with every mistake named in one sentence."""

import ast
import dataclasses
import difflib
import importlib.util
import json
import types
import typing
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import ml_collections
import numpy as np

from moe import isotonic, topk
from moe.checkpoint import CheckpointConfig
from moe.compiler import CompilerConfig
from moe.data.pipeline import DataConfig
from moe.data.text import TextConfig
from moe.guard import GuardConfig
from moe.layers.moe import MoeConfig
from moe.models import MODELS, ModelConfig
from moe.ops.rope import ROPE_SCALINGS, RopeScaling
from moe.ops.upcycle import UpcycleConfig
from moe.optim import OptimizerConfig
from moe.parallel.mesh import MeshConfig
from moe.routers import ROUTERS, Router
from moe.tasks import TASKS
from moe.tracking import WandbConfig

# A table that offers a choice of many: {"name": which, which: {its settings}, another: {its settings}}.
CHOICES: Mapping[Any, Mapping[str, Any]] = {
    Router: ROUTERS,
    isotonic.Solver: isotonic.SOLVERS,
    topk.PairWeights: topk.PAIR_WEIGHTS,
    RopeScaling: ROPE_SCALINGS,
    ModelConfig: {name: config_class for name, (config_class, _) in MODELS.items()},
}


@dataclasses.dataclass(frozen=True)
class Config:
    """A training run, checked: what the fields of a config file become.

    model, moe, router, data, optimizer, mesh, checkpoint, compiler, guard: tables of their own, each with its class.
    seed: of parameters, noise, data order and augmentation. steps: optimizer steps.
    batch_size: examples per step, on all devices together. accumulation_steps: micro-batches that a step's batch is cut
        into, to save memory. label_smoothing: share of the target spread over all classes.
    loss: "softmax": cross-entropy of one choice among the classes; "sigmoid": the sum over the classes of the
        cross-entropy of each by itself, as V-MoE trains.
    init_from: what the run begins with instead of random weights, see `moe.initial`: the workdir of another run, one of
        its checkpoints, or the folder of a Hugging Face model; "": nothing. upcycle: how its MLPs become experts.
    log_every, evaluate_every: in steps; the last step is always logged and evaluated; 0: only the last.
    watchdog_minutes: a run that is not heard of for so long writes its stacks and ends with exit code 70; 0: never.
    wandb: whether the run's numbers go to Weights & Biases, too.
    """

    seed: int
    steps: int
    batch_size: int
    model: ModelConfig
    moe: MoeConfig
    router: Router
    data: DataConfig | TextConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    compiler: CompilerConfig = CompilerConfig()
    guard: GuardConfig = GuardConfig()
    accumulation_steps: int = 1
    label_smoothing: float = 0.0
    loss: Literal["softmax", "sigmoid"] = "softmax"
    init_from: str = ""
    upcycle: UpcycleConfig = UpcycleConfig()
    log_every: int = 50
    evaluate_every: int = 0
    watchdog_minutes: float = 30.0
    wandb: WandbConfig = WandbConfig()

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation_steps", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1.")
        if self.evaluate_every < 0:
            raise ValueError(f"evaluate_every = {self.evaluate_every} must not be negative.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed = {self.seed} must lie between 0 and {2**32 - 1}.")
        if self.batch_size % self.accumulation_steps:
            raise ValueError(
                f"accumulation_steps = {self.accumulation_steps} must divide batch_size = {self.batch_size}."
            )
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing = {self.label_smoothing} must lie in [0, 1).")
        if self.watchdog_minutes < 0:
            raise ValueError(f"watchdog_minutes = {self.watchdog_minutes:g} must not be negative.")


def load_file(path: str) -> ml_collections.ConfigDict:
    """Runs `get_config()` of the Python file at `path`, or reads what `to_json` wrote: the config.json of a workdir.

    "FILE.py:PRESET" is `get_config("PRESET")`, for one of the presets that the file's table MESHES names.
    Only a Python file that the command names is run. What a JSON file says of the compiler isn't taken, but for the
    preset: programs of a cache are run, and options can name files to write. Nor is its project of Weights & Biases, so
    that somebody else's file sends nothing anywhere.
    Raises ValueError if there is no such file, function or preset.
    """
    stem, colon, preset = path.rpartition(".py:")
    path = f"{stem}.py" if colon else path
    file = Path(path)
    if not file.is_file():
        nearby = sorted(str(other) for other in file.parent.glob("*.py")) if file.parent.is_dir() else []
        raise ValueError(f"there is no config file {path}" + (f"; there are {', '.join(nearby)}." if nearby else "."))
    if file.suffix == ".json":
        try:
            table = from_json(file.read_text())
        except ValueError as error:
            raise ValueError(f"config {path} is not valid JSON: {error}.") from None
        if isinstance(table.get("compiler"), ml_collections.ConfigDict):
            with table.compiler.ignore_type():
                table.compiler.update({"cache": "", "options": ()})
        if isinstance(table.get("wandb"), ml_collections.ConfigDict):
            with table.wandb.ignore_type():
                table.wandb.update({"project": ""})
        return table
    spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"config {path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"config {path} has no function get_config() that returns an ml_collections.ConfigDict.")
    if not colon:
        return module.get_config()
    presets = list(getattr(module, "MESHES", {}))
    if preset not in presets:
        known = f"it has {', '.join(presets)}" if presets else f"leave out ':{preset}', as it has none"
        raise ValueError(f"config {path} has no preset '{preset}': {known}.")
    return module.get_config(preset)


def to_json(config: ml_collections.ConfigDict) -> str:
    """The config as JSON, fields in alphabetical order."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> ml_collections.ConfigDict:
    """The inverse of `to_json`, lists for tuples. Raises ValueError where the text is something else."""
    try:
        table = json.loads(text)
        if not isinstance(table, dict):
            raise ValueError("it must hold a table")
        return ml_collections.ConfigDict(table)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except AttributeError as error:  # a name that every Python object has
        raise ValueError(str(error).removesuffix(".")) from None


def override(config: ml_collections.ConfigDict, assignments: Iterable[str]) -> None:
    """Sets fields of `config` from assignments "path.to.field=value", each parsed as the type that the field has.

    Raises ValueError for a field that the config doesn't have, or a value of another type.
    """
    for assignment in assignments:
        path, _, text = assignment.partition("=")
        *parents, name = path.split(".")
        table = config
        for depth, parent in enumerate(parents):
            table = _field(table, parent, ".".join(parents[: depth + 1]))
            if not isinstance(table, ml_collections.ConfigDict):
                raise ValueError(
                    f"config field {'.'.join(parents[: depth + 1])} is not a table; it has no field {name}."
                )
        with table.unlocked():
            table[name] = _parse(text, _field(table, name, path), path)


def name_of(choice: Any) -> str:
    """The name by which a config chooses an object of this class, or "" if it isn't one of several."""
    names = (name for options in CHOICES.values() for name, kind in options.items() if kind is type(choice))
    return next(names, "")


def _field(table: ml_collections.ConfigDict, name: str, path: str) -> Any:
    if name not in table:
        raise ValueError(_unknown(path, name, list(table)))
    return table[name]


def _unknown(path: str, name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"unknown config field {path!r}: {hint}the fields there are {', '.join(sorted(known))}."


def _parse(text: str, old: Any, path: str) -> Any:
    kind = "a table" if isinstance(old, ml_collections.ConfigDict) else type(old).__name__
    try:
        match old:
            case bool():
                return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
            case int():
                return int(text)
            case float():
                return float(Fraction(text)) if "/" in text else float(text)
            case str():
                return text
            case tuple() | list():
                return tuple(ast.literal_eval(text))
    except (ValueError, KeyError, SyntaxError, TypeError, ArithmeticError):
        pass
    if isinstance(old, ml_collections.ConfigDict):
        raise ValueError(f"config field {path} is a table: set one of its fields, {', '.join(sorted(old))}.")
    raise ValueError(f"config field {path} = '{text}' must be of type {kind}, like its present value {old!r}.")


def resolve(config: ml_collections.ConfigDict) -> Config:
    """The frozen form that the rest of the code sees. Raises ValueError for an unknown, missing or unfit field."""
    table = config.to_dict()
    # What the data are is up to the model.
    data = table.pop("data", {})
    values = _values(Config, table, "")
    if "model" in values:
        values["data"] = _build(TASKS[values["model"].task].data, data, "data")
    return _construct(Config, values, "")


def _build(kind: Any, table: Any, path: str) -> Any:
    """An object of the annotated type `kind` from plain data."""
    if kind in CHOICES:
        return _choose(CHOICES[kind], table, path)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, table, path)
    return _check(kind, table, path)


def _build_dataclass(kind: Any, table: Any, path: str) -> Any:
    return _construct(kind, _values(kind, table, path), path)


def _values(kind: Any, table: Any, path: str) -> dict[str, Any]:
    """The fields of the dataclass `kind` that the table gives, each of its own type."""
    if not isinstance(table, Mapping):
        raise ValueError(f"config field {path} = {table!r} must be a table.")
    hints = typing.get_type_hints(kind)
    known = [field.name for field in dataclasses.fields(kind)]
    for name in table:
        if name not in known:
            raise ValueError(_unknown(_join(path, name), name, known))
    return {name: _build(hints[name], value, _join(path, name)) for name, value in table.items()}


def _construct(kind: Any, values: dict[str, Any], path: str) -> Any:
    for field in dataclasses.fields(kind):
        if field.name not in values and field.default is dataclasses.MISSING:
            raise ValueError(f"config field '{_join(path, field.name)}' is missing.")
    return kind(**values)


def _choose(options: Mapping[str, Any], table: Any, path: str) -> Any:
    """The option that table["name"] names, from its own table and from the fields beside it that options share."""
    if not isinstance(table, Mapping) or "name" not in table:
        raise ValueError(f"config field '{_join(path, 'name')}' is missing: it must be one of {', '.join(options)}.")
    name = table["name"]
    if not isinstance(name, str) or name not in options:
        close = difflib.get_close_matches(str(name), list(options), n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise ValueError(f"unknown {path} {name!r}: {hint}it must be one of {', '.join(options)}.")
    # A field that only others share (k, where the router is one of all experts) does as little harm as their tables.
    others = {field for option in options.values() for field in _field_names(option)} - _field_names(options[name])
    shared = {key: value for key, value in table.items() if key not in {"name", *options, *others}}
    own = table.get(name, {})
    if not isinstance(own, Mapping):
        raise ValueError(f"config field {_join(path, name)} = {own!r} must be a table.")
    twice = shared.keys() & own.keys()
    if twice:
        raise ValueError(f"config field '{min(twice)}' stands both in {path} and in {path}.{name}: keep one.")
    kind = options[name]
    return _construct(kind, {**_values(kind, shared, path), **_values(kind, own, _join(path, name))}, path)


def _field_names(kind: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _check(kind: Any, value: Any, path: str) -> Any:
    """`value` if it is of the annotated scalar or tuple type; ints serve as floats, lists as tuples."""
    if typing.get_origin(kind) is typing.Literal:
        options = typing.get_args(kind)
        if value not in options:
            raise ValueError(f"config field {path} = {value!r} must be one of {', '.join(map(repr, options))}.")
        return value
    if isinstance(kind, types.UnionType):
        raise ValueError(f"config field {path} = {value!r} can't be set in a config: leave it out.")
    if kind is Any:
        return value
    origin = typing.get_origin(kind) or kind
    if origin is tuple and isinstance(value, list | tuple):
        entry = (*typing.get_args(kind), Any)[0]
        return tuple(_check(entry, one, f"{path}[{index}]") for index, one in enumerate(value))
    wanted = (int, float) if origin is float else origin
    if not isinstance(value, wanted) or (isinstance(value, bool) and origin is not bool):
        raise ValueError(f"config field {path} = {value!r} must be of type {origin.__name__}.")
    return _number(origin, value, path) if origin in (int, float) else value


def _number(kind: type, value: Any, path: str) -> Any:
    """`value` if 32 bits hold it, as they have to on devices: no NaN, no infinity, nothing that rounds to 0."""
    if kind is int and abs(value) >= 2**32:
        raise ValueError(f"config field {path} = {value} must lie between -{2**32 - 1} and {2**32 - 1}.")
    least, most = (float(size) for size in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))
    if kind is float and value != 0 and not least <= abs(value) <= most:
        raise ValueError(
            f"config field {path} = {value} must be 0 or, with either sign, lie between {least:.2g} and {most:.2g}."
        )
    return kind(value)

"""The page of a run, report.html in its workdir: curves, routing, what experts take, speed, config, environment."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from moe.config import Config, name_of
from moe.data.text import TextConfig
from moe.data.tokenizer import open_tokenizer
from moe.evaluation.charts import Series, heat_scale, heat_slider, heat_square, heat_strip, line_chart, number
from moe.evaluation.examples import Examples, trace_examples
from moe.evaluation.page import details, facts, page, paragraph, section, side_by_side, table
from moe.evaluation.taken import pictures, texts
from moe.files import AnyPath, describe, is_number, read_lines, write_whole
from moe.models import Batch, Variables, ViTConfig
from moe.parallel import hosts

# Title of a chart, and its lines: a key of metrics.jsonl and what it is called.
_CURVES: tuple[tuple[str, dict[str, str]], ...] = (
    ("Loss", {"train/loss": "training, all parts", "train/cross_entropy": "training", "test/loss": "test"}),
    ("Accuracy", {"train/accuracy": "training", "test/accuracy": "test"}),
    ("Bits per byte", {"test/bits_per_byte": "test"}),
    ("Gradient norm", {"train/gradient_norm": "training"}),
)
_SPEEDS: tuple[tuple[str, dict[str, str]], ...] = (
    ("Examples per second", {"examples_per_second": "examples"}),
    ("Tokens per second", {"tokens_per_second": "tokens"}),
    ("Goodput and MFU", {"goodput": "goodput", "mfu": "MFU"}),
)
# Of every layer with experts, and what they are called.
_LAYERS = {
    "load_max_to_mean": "Largest load over the mean",
    "dead_experts": "Experts without a token",
    "entropy": "Entropy of the router, nats",
    "overflow": "Share of choices dropped",
    "experts_per_token": "Experts per token",
}
# Of routing.json, and what they are called; see `moe.evaluation.routing.measure`.
_MEASURES = {
    "load_cv": "load: standard deviation over mean",
    "max_violation": "load: largest over the mean, minus 1",
    "dead_experts": "experts without a token",
    "entropy": "entropy of the router, nats",
    "overflow": "share of choices dropped",
    "experts_per_token": "experts per token",
    "topk_same": "tokens with exactly the k highest logits",
    "topk_jaccard": "overlap with the k highest logits",
    "weight_outside_topk": "weight outside of these",
    "mutual_information": "nats that an expert tells of the {}",
    "changed_sets": "tokens whose experts changed",
    "changed_first": "tokens whose first expert changed",
}
_SIMILARITIES = {"choice": "tokens that chose them", "parameter": "parameters"}
_MAIN = (
    "seed",
    "steps",
    "batch_size",
    "model.name",
    "model.width",
    "model.depth",
    "model.moe_every",
    "moe.num_experts",
    "moe.expert_width",
    "moe.dispatch",
    "router.name",
    "router.k",
    "optimizer.learning_rate",
    "data.name",
)


def write_report(
    config: Config,
    workdir: AnyPath,
    variables: Variables,
    batches: Iterable[Batch],
    mesh: Mesh,
    evaluation: Mapping[str, Any] | None = None,
    routing: Mapping[str, Any] | None = None,
) -> None:
    """Writes report.html of the files in the workdir and of how the first examples of `batches` are routed.

    Every process has to call it; the first writes. evaluation: measures of another evaluation than result.json's.
    routing: what routing.json holds. What isn't there is said, and so is what can't be computed or written for want of
    space; that is no reason for a run to fail.
    """
    examples = None
    try:
        examples = trace_examples(config.model, config.moe, config.router, variables, next(iter(batches)), mesh)
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        hosts.say(f"the report shows no examples: {describe(error)}", error=True)
    if not hosts.is_first():
        return
    if lacking := missing(config, workdir):
        hosts.say(f"{workdir / 'report.html'}: {'; '.join(lacking)}")
    try:
        write_whole(workdir / "report.html", report_page(config, workdir, examples, evaluation, routing))
    except OSError as error:
        hosts.say(f"{workdir / 'report.html'} can't be written: {describe(error)}", error=True)


def report_page(
    config: Config,
    workdir: AnyPath,
    examples: Examples | None,
    evaluation: Mapping[str, Any] | None = None,
    routing: Mapping[str, Any] | None = None,
) -> str:
    """The page as HTML, of the workdir's JSON files and lines, where they exist."""
    lines = read_lines(workdir / "metrics.jsonl")
    no_lines, no_load = (_missing(config, workdir, name) for name in _FILES)
    names = layer_names(config)
    no_routing = "" if routing or not names else _NO_ROUTING
    result, stored = (_read_table(workdir / f"{name}.json") for name in ("result", "config"))
    task = f"{name_of(config.router) or 'router'}, {config.data.name}"
    return page(
        f"{workdir.name}: {task}",
        f"{config.steps} steps of {config.batch_size} examples, seed {config.seed}",
        (
            section("Result", facts(_short(result)) if result else ""),
            section("Evaluation", facts(_short(evaluation)) if evaluation else ""),
            section("Learning curves", side_by_side([*_curves(lines, _CURVES), *_own(lines)]), paragraph(no_lines)),
            section(
                "Load of the experts",
                *_heat(read_lines(workdir / "load.jsonl"), config.moe.num_experts),
                paragraph(no_load),
            ),
            section("Routing", side_by_side(_layer_charts(lines))),
            section(
                "Routing of the test set",
                *(_diagnostics(routing["layers"]) if routing else ()),
                paragraph(no_routing),
            ),
            section("What the experts take", _taken(config, examples, names), note=_NOTE),
            section("Throughput", facts(_speed(lines)), side_by_side(_curves(lines, _SPEEDS))),
            section(
                "Config", facts(_main(stored)), details("All fields", json.dumps(stored, indent=2, sort_keys=True))
            ),
            section("Environment", facts(_read_table(workdir / "environment.json"))),
        ),
    )


_NOTE = (
    "The first examples of the test set as they are evaluated, a view for each layer with experts. The colour is that "
    "of the expert with the largest weight; all are named under the pointer."
)


_NO_ROUTING = "not measured for this page: evaluate.py --diagnostics --report has it"

# What the page's curves are made of, and what it lacks where there are none.
_FILES = {"metrics.jsonl": "learning curves", "load.jsonl": "load of the experts over time"}


def missing(config: Config, workdir: AnyPath) -> list[str]:
    """What a report of the run will lack, a sentence for each file that should have been written and has no line."""
    return list(filter(None, (_missing(config, workdir, name) for name in _FILES)))


def _missing(config: Config, workdir: AnyPath, name: str) -> str:
    if read_lines(workdir / name) or (name == "load.jsonl" and not config.model.moe_every):
        return ""
    return f"no {_FILES[name]}, as {workdir / name} has no line of a step"


def layer_names(config: Config) -> list[str]:
    """The layers with experts, called by the number of their block."""
    model = config.model
    if not model.moe_every:
        return []
    return [f"layer {index}" for index in range(model.dense_layers + model.moe_every - 1, model.depth, model.moe_every)]


def _read_table(path: AnyPath) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _series(lines: Sequence[Mapping[str, Any]], key: str, name: str, colour: int) -> Series:
    points = [(line["step"], line[key]) for line in lines if is_number(line.get(key))]
    return Series(name, [step for step, _ in points], [value for _, value in points], colour)


def _curves(lines: Sequence[Mapping[str, Any]], charts: Sequence[tuple[str, Mapping[str, str]]]) -> list[str]:
    return [
        line_chart(title, [_series(lines, key, name, index) for index, (key, name) in enumerate(keys.items())])
        for title, keys in charts
    ]


def _own(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """The routers' weighted losses, and the size of the blocks' outputs."""
    keys = dict.fromkeys(key for line in lines for key in line)
    titles = {"router/": "Router losses, weighted", "blocks/": "Root mean square of the blocks' outputs"}
    names = {prefix: [key for key in keys if key.startswith(prefix)] for prefix in titles}
    short = {key: key.split("/")[1].replace("_", " ") for keys in names.values() for key in keys}
    return _curves(lines, [(title, {key: short[key] for key in names[prefix]}) for prefix, title in titles.items()])


def _layer_charts(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for line in lines for key in line if key.startswith("moe/layer_"))
    charts = []
    for metric, title in _LAYERS.items():
        those = [key for key in keys if key.endswith(f"/{metric}")]
        charts.append((title, {key: key.split("/")[1].replace("_", " ") for key in those}))
    return _curves(lines, charts)


def _heat(lines: Sequence[Mapping[str, Any]], num_experts: int) -> list[str]:
    """Heat maps of the load over an even share; nothing where none was logged."""
    lines = [line for line in lines if isinstance(line.get("load"), dict)]
    names = list(lines[0]["load"]) if lines else []
    steps, loads = [], []
    for line in lines:
        try:
            load = np.array([line["load"][name] for name in names], np.float64)
        except (KeyError, TypeError, ValueError, OverflowError):
            continue
        if load.shape == (len(names), num_experts) and load.size:
            steps.append(line["step"])
            loads.append(load * num_experts)
    if not loads:
        return []
    stack = np.stack(loads)
    called = [name.replace("_", " ") for name in names]
    strips = [heat_strip(name, steps, stack[:, index]) for index, name in enumerate(called)]
    return [
        paragraph("Share of the rows over an even share."),
        heat_scale(),
        side_by_side([heat_slider(steps, stack, called), *strips]),
    ]


def _diagnostics(layers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The measures of every layer, how many experts tokens had, and which experts are alike."""
    rows = []
    for name, title in _MEASURES.items():
        found = [layer.get(name) for layer in layers.values()]
        kinds = list(found[0]) if isinstance(found[0], dict) else [None]
        for kind in kinds:
            values = [value[kind] if isinstance(value, dict) else value for value in found]
            if any(value is not None for value in values):
                shown = ["-" if value is None else number(value) for value in values]
                rows.append([title.format(kind), *shown])
    called = [name.replace("_", " ") for name in layers]
    counts = [
        Series(name, list(range(len(shares))), shares, index)
        for index, (name, shares) in enumerate(
            zip(called, (layer["experts_per_token_histogram"] for layer in layers.values()), strict=True)
        )
    ]
    squares = [
        heat_square(f"{name}: similarity of experts by {what}", np.array(layer[f"{key}_similarity"]))
        for name, layer in zip(called, layers.values(), strict=True)
        for key, what in _SIMILARITIES.items()
    ]
    histogram = line_chart("Tokens by their number of experts", counts, along="experts")
    return [table(["", *called], rows), side_by_side([histogram, *squares])]


def _taken(config: Config, examples: Examples | None, names: Sequence[str]) -> str:
    if examples is None:
        return ""
    if isinstance(config.model, ViTConfig):
        return pictures(examples, names, config.model.patch_size, config.model.pooling == "class_token")
    assert isinstance(config.data, TextConfig)
    return texts(examples, names, open_tokenizer(config.data.tokenizer).decode)


def _speed(lines: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    found = {}
    for key in ("examples_per_second", "tokens_per_second", "mfu"):
        values = [line[key] for line in lines if is_number(line.get(key))]
        if values:
            found[f"{key.replace('_', ' ')}, median"] = number(statistics.median(values))
    last: Mapping[str, Any] = next((line for line in reversed(lines) if "time/elapsed_seconds" in line), {})
    for key, value in last.items():
        is_duration = key.startswith("time/") and key.endswith("_seconds") and key != "time/unix_seconds"
        if is_duration and is_number(value):
            found[key.removeprefix("time/").replace("_", " ")] = f"{value:.1f}"
    return found


def _short(values: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers as they are read, an interval beside its measure."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if not key.endswith(("_low", "_high")):
            ends = [values[f"{key}_{end}"] for end in ("low", "high") if f"{key}_{end}" in values]
            interval = f" [{', '.join(f'{end:.4g}' for end in ends)}]" if ends else ""
            found[key] = f"{value:.5g}{interval}" if isinstance(value, float) else value
    return found


def _main(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that one looks for first."""
    found = {}
    for path in _MAIN:
        value: Any = stored
        for name in path.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        if value is not None:
            found[path] = value
    return found

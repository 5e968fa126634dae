"""Evaluates checkpoints of a training run, without dropping a token.

    python evaluate.py --workdir=runs/digits [--step=N] [--report] [--config.router.name=sparse_topk …]
    python evaluate.py --workdir=runs/digits --steps=all            # or --steps=500,1000, or --watch a run that goes on
    python evaluate.py --workdir=runs/digits --diagnostics --against=500 --capacity-factor=1.05 --few-shot

The model is rebuilt from the workdir's own config; an override evaluates the same weights under another setting.
Of one checkpoint evaluation.json is written, and routing.json and few_shot.json where they are asked for; of several
evaluations.jsonl, routing.jsonl and few_shot.jsonl, a line for each.
--report writes report.html anew.
"""

import argparse
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import numpy as np

from moe import cli
from moe import config as config_lib
from moe.checkpoint import CheckpointError, Checkpoints, complete_steps
from moe.config import Config
from moe.data.pipeline import DataConfig
from moe.evaluation import cost, few_shot, routing
from moe.evaluation.report import missing, write_report
from moe.evaluation.series import Series
from moe.files import AnyPath, open_path
from moe.layers.moe import MoeConfig
from moe.metrics import flatten, is_measure, params_sha256, write_json
from moe.models import Batch, Model, Variables, ViTConfig, make_model
from moe.parallel import hosts
from moe.parallel.mesh import make_mesh, replicated
from moe.plan import analytic
from moe.tasks import TASKS, caution
from moe.types import PyTree
from moe.workdir import fit_mesh, read_config
from train import DEFAULT_CONFIG, make_predict, make_step

# What is written of one checkpoint, and of several, by the names of `Evaluation.run`.
_FILES = {"evaluation": "evaluation.json", "routing": "routing.json", "few_shot": "few_shot.json"}
_SERIES = {"evaluation": "evaluations.jsonl", "routing": "routing.jsonl", "few_shot": "few_shot.jsonl"}
_POLL_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is to be measured besides the measures of the test set.

    capacity_factor: of expert queues, beside the dropless result; None: none. diagnostics: routing of every layer.
    against: step of another checkpoint whose routing it is compared with. few_shot: a data set to probe the features
        on, "" for the run's own; None: none. report: whether to write report.html.
    """

    capacity_factor: float | None = None
    diagnostics: bool = False
    against: int | None = None
    few_shot: str | None = None
    report: bool = False

    def files(self) -> list[str]:
        """Names of what is to be written, see `Evaluation.run`."""
        few_shot = ["few_shot"] if self.few_shot is not None else []
        return ["evaluation", *(["routing"] if self.diagnostics else []), *few_shot]

    def check(self, config: Config) -> None:
        """Raises ValueError where that can't be had of such a model."""
        if self.capacity_factor is not None and not 0 < self.capacity_factor < math.inf:
            raise ValueError(f"--capacity-factor={self.capacity_factor} must be positive and finite.")
        if self.against is not None and not self.diagnostics:
            raise ValueError(f"--against={self.against} compares the routing of two checkpoints: add --diagnostics.")
        if (self.diagnostics or self.capacity_factor) and not config.model.moe_every:
            raise ValueError("the model has no experts (model.moe_every = 0), so that no token is routed.")
        if self.few_shot is not None and not isinstance(config.model, ViTConfig):
            raise ValueError("--few-shot probes features of images, and this is a language model: leave it out.")


class Evaluation:
    """The programs that measure the checkpoints of one run, compiled once for all of them."""

    def __init__(self, config: Config, workdir: AnyPath, wanted: Wanted) -> None:
        """Raises ValueError where config, data or what is wanted don't fit."""
        wanted.check(config)
        self.config, self.workdir, self.wanted = config, workdir, wanted
        self.mesh = make_mesh(config.mesh)
        self.task = TASKS[config.model.task]
        self.facts = self.task.check_data(config.data, config.model)
        self.batches = self.task.make_eval_batches(config.data, config.data.test_split, config.batch_size)
        self.step = make_step(config, self.mesh)
        self.abstract = self.step.abstract_state.variables
        self.shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
        # By name of the result: the model as the config says, and with queues.
        self.models: dict[str, Model] = {"test": self.step.model}
        self.predicts = {"test": self.step.predict}
        if wanted.capacity_factor:
            model = make_model(config.model, with_queues(config.moe, wanted.capacity_factor), config.router)
            self.models["test_capacity"] = model
            self.predicts["test_capacity"] = self._jit(model.score, config.model.scored)
        self.probe: few_shot.Probe | None = None
        if wanted.few_shot is not None and isinstance(config.model, ViTConfig) and isinstance(config.data, DataConfig):
            self.probe = few_shot.Probe(config.data, wanted.few_shot, config.model.image_size, config.batch_size)

    def _jit(self, function: Callable[..., PyTree], names: Sequence[str], pair: bool = False) -> Any:
        shardings = (self.shardings, self.shardings if self.wanted.against is not None else None)
        return make_predict(function, names, shardings if pair else self.shardings, self.mesh)

    def load(self, step: int) -> Variables:
        """The variables of a checkpoint."""
        with contextlib.closing(Checkpoints(self.workdir / "checkpoints")) as checkpoints:
            return checkpoints.restore_variables(checkpoints.choose(step), self.abstract)

    def run(self, step: int) -> dict[str, dict[str, Any]]:
        """What is to be written of a checkpoint, by name. Raises CheckpointError if it can't be read."""
        variables = self.load(step)
        measures = {
            name: value
            for prefix, predict in self.predicts.items()
            for name, value in flatten(self.task.evaluate(predict, variables, self.batches), prefix).items()
        }
        factor = {"capacity_factor": self.wanted.capacity_factor} if self.wanted.capacity_factor else {}
        sha256 = params_sha256(variables.params)
        results = {"evaluation": {"step": step, **measures, **factor, **self.facts, "params/sha256": sha256}}
        if self.wanted.diagnostics:
            results["routing"] = {"step": step, **self.diagnose(variables)}
        if self.wanted.report:
            found = (results["evaluation"], results.get("routing"))
            write_report(self.config, self.workdir, variables, self.batches, self.mesh, *found)
        if self.probe is not None:
            results["few_shot"] = {"step": step, **self.probe.run(self._features, variables)}
        return results

    def diagnose(self, variables: Variables) -> dict[str, Any]:
        """What routing.json holds: `moe.evaluation.routing.measure` of every layer, and the cost."""
        router, against = self.config.router, self.wanted.against
        grams = np.asarray(self._parameter_gram(variables), np.float64)
        found = {}
        for name, observe in self._observes.items():
            sums, changed = total(observe((variables, self._other), batch) for batch in self.batches)
            found[name] = routing.measure_layers(sums, grams, changed, self.config.model.moe_blocks)
            tokens = float(sums.tokens[0])
        queues = {"factor": self.wanted.capacity_factor, "layers": found.get("test_capacity")}
        return {
            "router": config_lib.name_of(router),
            "k": router.k,
            "experts": self.config.moe.num_experts,
            "tokens": tokens,
            **({} if against is None else {"against": against}),
            "layers": found["test"],
            **({"capacity": queues} if self.wanted.capacity_factor else {}),
            "cost": self._cost(variables, found["test"]),
        }

    @cached_property
    def _other(self) -> Variables | None:
        """The variables to compare with, read once: a run that goes on may remove them."""
        return None if self.wanted.against is None else self.load(self.wanted.against)

    @cached_property
    def _observes(self) -> dict[str, Any]:
        config = self.config

        def program(model: Model) -> Any:
            def run(pair: Any, batch: Batch, mesh: Any) -> PyTree:
                k, experts = config.router.k, config.moe.num_experts
                return routing.observe(model, config.model, pair, batch, k=k, num_experts=experts, mesh=mesh)

            return self._jit(run, config.model.observed, pair=True)

        return {name: program(model) for name, model in self.models.items()}

    @cached_property
    def _parameter_gram(self) -> Any:
        return jax.jit(routing.parameter_gram, out_shardings=replicated(self.mesh))

    def _cost(self, variables: Variables, layers: Mapping[str, Any]) -> dict[str, float]:
        """FLOPs of a token's products, by the rows that experts had here; measured seconds of a whole batch.

        experts_per_token: rows of experts for a token, the mean over layers; where they are slots, fewer than the
        experts that it reads. flops_per_token: forward. expert_flops_per_token: of these, the routed experts'.
        seconds_per_batch: of the scores of a batch, reading it not included. router_seconds_per_batch: of the gates and
        routers of all layers.
        """
        config, model = self.config, self.config.model
        experts = float(np.mean([layer["rows_per_token"] for layer in layers.values()]))
        flops, rest = (analytic.forward_flops(config, self.abstract, many) for many in (experts, 0.0))
        length = analytic.tokens_per_step(config) // config.batch_size
        shape = (config.batch_size, length, model.width)
        router = cost.router_seconds(config.router, config.moe.num_experts, config.moe.group_size, shape, self.mesh)
        return {
            "experts_per_token": experts,
            "flops_per_token": flops,
            "expert_flops_per_token": flops - rest,
            "tokens_per_batch": config.batch_size * length,
            "seconds_per_batch": cost.seconds(self.predicts["test"], variables, next(iter(self.batches))),
            "router_seconds_per_batch": router * len(layers),
        }

    @cached_property
    def _features(self) -> Any:
        return self._jit(self.step.model.method("features"), self.config.model.scored)


def with_queues(moe: MoeConfig, factor: float) -> MoeConfig:
    """The settings under which evaluation drops what queues of this capacity factor have no place for."""
    dispatch = "auto" if moe.dispatch == "dropless" else moe.dispatch
    return dataclasses.replace(moe, dispatch=dispatch, evaluation_capacity_factor=factor)


def total(parts: Iterable[PyTree]) -> PyTree:
    """The sum of trees of arrays, in float64."""
    found = None
    for part in parts:
        part = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), part)
        found = part if found is None else jax.tree.map(np.add, found, part)
    return found


def evaluate_all(evaluation: Evaluation, steps: Sequence[int], settings: list[str]) -> None:
    """Evaluates these steps, oldest first. Raises Failure in the end where some couldn't be read."""
    series = Series(evaluation.workdir, _SERIES, settings, goes_on=False)
    check_read([step for step in steps if not add(evaluation, step, series)], len(steps))


def add(evaluation: Evaluation, step: int, series: Series) -> bool:
    """Evaluates a step and adds what was found to the files; False, after a sentence, where it can't be read."""
    try:
        results = evaluation.run(step)
    except CheckpointError as error:
        hosts.say(str(error), error=True)
        return False
    hosts.say(f"step {step}: " + ", ".join(f"{n} {v:.4f}" for n, v in results["evaluation"].items() if is_measure(n)))
    series.add(results)
    return True


def watch(evaluation: Evaluation, last: int, settings: list[str], patience: float) -> None:
    """Evaluates each checkpoint when it is complete, until that of step `last` is.

    Steps of which all files that are wanted have such a line are not evaluated again. Raises Failure where for
    `patience` minutes (0: ever) no checkpoint came, and in the end where some couldn't be read; one that the run has
    removed is only named.
    """
    with cli.usage_errors():
        series = Series(evaluation.workdir, _SERIES, settings, goes_on=True)
    folder, since = evaluation.workdir / "checkpoints", time.monotonic()
    done = set.intersection(*(series.steps(name) for name in evaluation.wanted.files()))
    if evaluation.wanted.diagnostics:
        done &= series.steps("routing", against=evaluation.wanted.against)
    unread = []
    while last not in done:
        new = sorted(set(complete_steps(folder)) - done)
        step = hosts.follow_number(new[0] if new else -1)
        if step >= 0:
            done.add(step)
            if not add(evaluation, step, series) and step in complete_steps(folder):
                unread.append(step)
            since = time.monotonic()
        elif hosts.follow(0 < patience * 60 < time.monotonic() - since):
            raise cli.Failure(f"no checkpoint came in {patience:g} minutes, and step {last} is not reached.")
        else:
            time.sleep(_POLL_SECONDS)
    check_read(unread, len(done))


def check_read(unread: Sequence[int], count: int) -> None:
    """Raises Failure where checkpoints couldn't be read."""
    if unread:
        raise cli.Failure(f"{len(unread)} of {count} checkpoints can't be read: step {', '.join(map(str, unread))}.")


def evaluate_one(evaluation: Evaluation, step: int) -> None:
    """Evaluates a step, says what was found and writes it."""
    results = evaluation.run(step)
    hosts.say(*describe(results))
    for name, value in results.items() if hosts.is_first() else ():
        write_json(evaluation.workdir / _FILES[name], value)


def describe(results: Mapping[str, dict[str, Any]]) -> list[str]:
    """What is found of one checkpoint, for the terminal."""
    values = results["evaluation"]
    lines = []
    width = max(16, *map(len, values))
    for name, value in values.items():
        if name.endswith(("_low", "_high")):
            continue
        ends = [f"{values[f'{name}_{end}']:.4f}" for end in ("low", "high") if f"{name}_{end}" in values]
        lines.append(f"{name:<{width}} {value}" + (f"  [{', '.join(ends)}]" if ends else ""))
    for layer, found in results.get("routing", {}).get("layers", {}).items():
        shown = ("max_violation", "dead_experts", "entropy", "experts_per_token", "topk_jaccard", "changed_sets")
        lines.append(f"{layer:<{width}} " + ", ".join(f"{n} {found[n]:.4g}" for n in shown if found.get(n) is not None))
    for count, found in results.get("few_shot", {}).get("shots", {}).items():
        lines += [f"{count + '-shot':<{width}} {found['accuracy']:.4f}"] if found else []
    return lines


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = cli.make_parser(__doc__ or "", DEFAULT_CONFIG)
    parser.add_argument("--workdir", required=True, help="folder of the training run")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="step of the checkpoint (default: the newest)")
    which.add_argument("--steps", help="several: all, or some such as 500,1000")
    which.add_argument("--watch", action="store_true", help="each checkpoint as it comes, to the run's last step")
    parser.add_argument(
        "--patience", type=float, default=0.0, help="minutes without a new one that --watch waits; 0: any"
    )
    parser.add_argument("--report", action="store_true", help="write report.html of the run and this checkpoint")
    parser.add_argument("--capacity-factor", type=float, help="also with expert queues of this factor")
    parser.add_argument("--diagnostics", action="store_true", help="routing of every layer, to routing.json")
    parser.add_argument("--against", type=int, help="another step, whose routing it is compared with")
    parser.add_argument(
        "--few-shot", nargs="?", const="", metavar="SET", help="linear probe, on the run's data or another set"
    )
    return parser


def choose_steps(workdir: AnyPath, arguments: argparse.Namespace) -> list[int]:
    """The steps that are to be evaluated. Raises CheckpointError where one, or that of --against, isn't there."""
    if arguments.watch and arguments.against is None:
        return []
    with contextlib.closing(Checkpoints(workdir / "checkpoints")) as checkpoints:
        newest = checkpoints.choose(arguments.step)
        if arguments.against is not None:
            checkpoints.choose(arguments.against)
        if arguments.steps is None:
            return [newest]
        if arguments.steps == "all":
            return checkpoints.steps()
        words = arguments.steps.split(",")
        if not all(word.isdecimal() for word in words):
            raise cli.UsageError(f"--steps={arguments.steps} must be 'all', or steps such as 500,1000.")
        return sorted({checkpoints.choose(int(word)) for word in words})


def main(argv: Sequence[str]) -> None:
    """The command line."""
    arguments, overrides = cli.parse(make_parser(), argv)
    with cli.usage_errors():
        if not 0 <= arguments.patience < math.inf:
            raise ValueError(f"--patience={arguments.patience} must be minutes, 0 for any number of them.")
        workdir = open_path(arguments.workdir)
        hosts.initialize()
    table = read_config(workdir)
    with cli.usage_errors():
        config_lib.override(table, overrides)
        if notice := fit_mesh(table, overrides):
            hosts.say(notice)
        config = config_lib.resolve(table)
    if notice := caution(config.model, config.moe, config.router):
        hosts.say(notice)
    steps = choose_steps(workdir, arguments)
    if arguments.report and not arguments.watch and (lacking := missing(config, workdir)):
        raise cli.Failure(
            f"the run lacks what --report shows: {'; '.join(lacking)}: leave it out, or let train.py reach a log point."
        )
    wanted = Wanted(
        arguments.capacity_factor, arguments.diagnostics, arguments.against, arguments.few_shot, arguments.report
    )
    with cli.usage_errors():
        evaluation = Evaluation(config, workdir, wanted)
    settings = overrides + ([f"capacity_factor={wanted.capacity_factor}"] if wanted.capacity_factor else [])
    if arguments.watch:
        watch(evaluation, config.steps, settings, arguments.patience)
    elif arguments.steps:
        evaluate_all(evaluation, steps, settings)
    else:
        evaluate_one(evaluation, steps[0])


if __name__ == "__main__":
    cli.run(main)

"""Trains a mixture-of-experts model.

    python train.py --config=configs/digits.py --workdir=runs/digits [--config.router.name=sparse_topk …]

The same command again goes on from the newest checkpoint of the workdir, which may be on a bucket (gs://BUCKET/runs/NAME).
Of a run of several hosts every one gets the same command. SIGTERM saves, on all of them, and ends with exit code 75.
--config.init_from=PATH begins with the weights of another run or of a Hugging Face model, whose MLPs become experts.
"""

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh

from moe import cli
from moe import config as config_lib
from moe.checkpoint import CheckpointError, Checkpoints
from moe.compiler import compile_step, compiler_options, keep_programs
from moe.config import Config
from moe.evaluation.environment import environment
from moe.evaluation.report import write_report
from moe.files import AnyPath, open_path
from moe.guard import GuardState, init_guard, judge, keep_unless
from moe.initial import Initial, describe, load_initial, plan_start
from moe.layers.moe import group_count
from moe.lock import WorkdirLock
from moe.metrics import (
    Clock,
    MetricsWriter,
    Progress,
    flatten,
    is_measure,
    layer_loads,
    log_values,
    params_sha256,
    write_json,
)
from moe.models import Batch, Model, Objective, Variables, make_model
from moe.optim import make_optimizer
from moe.parallel import hosts
from moe.parallel.mesh import (
    batch_sharding,
    batch_shards,
    constrain_batch,
    local_rows,
    make_mesh,
    param_shardings,
    replicated,
    to_global,
)
from moe.plan.rates import Rates
from moe.profile import Profile, parse_steps
from moe.saves import Saves
from moe.tasks import TASKS, Task, caution, shortage
from moe.tracking import Tracker
from moe.types import PyTree
from moe.unstacked import Loop, make_loop, stack
from moe.watch import Watch
from moe.watchdog import Watchdog
from moe.workdir import open_workdir

DEFAULT_CONFIG = "configs/digits.py"


class TrainState(NamedTuple):
    """Everything that a checkpoint holds besides the position in the data. key: raw data of the run's random key."""

    step: jax.Array
    variables: Variables
    opt_state: PyTree
    guard: GuardState
    key: jax.Array


class Step(NamedTuple):
    """The programs of a run, jitted for its mesh.

    model: what they are made of. init(key) -> state, born sharded. train(state, batch) -> state, metrics.
    predict(variables, batch) -> scores, for evaluation, of a batch that every process has whole. loop: `train` for a
    run of many steps, see `Loop`.
    compiler_options: what `train` is best compiled with, `.lower(…).compile(compiler_options)`.
    gradients(state, batch) -> gradient, (metrics, router state): what `train` applies, not jitted.
    abstract_state, abstract_batch: shapes, types and shardings of what `train` takes.
    """

    model: Model
    init: Any
    train: Any
    loop: Loop
    compiler_options: dict[str, Any]
    gradients: Callable[[TrainState, Batch], tuple[PyTree, tuple[PyTree, PyTree]]]
    predict: Callable[[Variables, Batch], PyTree]
    abstract_state: TrainState
    abstract_batch: dict[str, jax.ShapeDtypeStruct]


def make_step(config: Config, mesh: Mesh) -> Step:
    """Builds the programs without running anything. Raises ValueError where config, batch and mesh don't fit."""
    check_micro_batch(config, mesh)
    model = make_model(config.model, config.moe, config.router)
    optimizer = make_optimizer(config.optimizer, config.steps)
    objective = Objective(config.loss, config.label_smoothing)

    def init(key: jax.Array) -> TrainState:
        key_variables, key_run = jax.random.split(key)
        variables = model.init(key_variables)
        opt_state = optimizer.init(variables.params)
        step = jnp.zeros((), jnp.int32)
        return TrainState(step, variables, opt_state, init_guard(config.guard), jax.random.key_data(key_run))

    def loss_fn(
        params: PyTree, router_state: PyTree, batch: Batch, keys: jax.Array, terms: jax.Array
    ) -> tuple[jax.Array, PyTree]:
        variables = Variables(stack(params), router_state)
        output = model.loss(variables, batch, keys=keys, mesh=mesh, objective=objective)
        router_losses = {name: jnp.sum(values) for name, values in output.routers.losses.items()}
        loss = output.loss / terms + sum(router_losses.values())
        scalars = {"loss": loss, **{name: value / terms for name, value in output.scalars.items()}}
        metrics = {"train": scalars, "router": router_losses, "moe": output.routers.metrics}
        return loss, (metrics | {"blocks": {"rms": output.rms}}, output.routers.state)

    def gradients(state: TrainState, batch: Batch) -> tuple[PyTree, tuple[PyTree, PyTree]]:
        # Noise belongs to an example's place in the global batch, whatever the mesh and the micro-batches.
        step_key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(step_key, jnp.arange(config.batch_size))
        params, router_state = state.variables
        count = config.accumulation_steps
        # The share of a micro-batch in the whole batch's terms: micro-batches of text may differ in theirs, and the
        # loss is the mean over all terms, not the mean of the micro-batches' means.
        terms = model.terms(batch) / count

        def accumulate(total: PyTree, micro: tuple[Batch, jax.Array]) -> tuple[PyTree, None]:
            examples, micro_keys = jax.tree.map(lambda x: constrain_batch(x, mesh), micro)
            return jax.tree.map(jnp.add, total, gradient_fn(params, router_state, examples, micro_keys, terms)), None

        gradient_fn = jax.grad(loss_fn, has_aux=True)
        if count == 1:
            return gradient_fn(params, router_state, batch, keys, terms)
        # Router losses and metrics are means over groups, of which every micro-batch has as many.
        micros = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), (batch, keys))
        shapes = jax.eval_shape(gradient_fn, params, router_state, *jax.tree.map(lambda x: x[0], micros), terms)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        total, _ = jax.lax.scan(accumulate, zeros, micros)
        return jax.tree.map(lambda x: x / count, total)

    def train(state: TrainState, batch: Batch) -> tuple[TrainState, PyTree]:
        gradient, (metrics, router_state) = gradients(state, batch)
        norm = optax.tree.norm(gradient)
        verdict = judge(config.guard, state.guard, metrics["train"]["loss"], norm)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.variables.params)
        params = optax.apply_updates(state.variables.params, updates)
        variables, opt_state = keep_unless(
            verdict.is_good, (Variables(params, router_state), opt_state), (state.variables, state.opt_state)
        )
        metrics["train"]["gradient_norm"] = norm
        metrics["guard"] = verdict.metrics
        return TrainState(state.step + 1, variables, opt_state, verdict.state, state.key), metrics

    abstract = jax.eval_shape(init, jax.random.key(config.seed))
    shardings = state_shardings(abstract, model.axes, optimizer, mesh)
    rows = batch_sharding(mesh)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, shardings
    )

    def jitted(abstract_state: TrainState) -> Any:
        laid = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
        return jax.jit(train, donate_argnums=0, in_shardings=(laid, rows), out_shardings=(laid, replicated(mesh)))

    device = mesh.devices.flat[0]
    apart = device.platform == "cpu" and not config.model.scan_layers
    return Step(
        model=model,
        init=jax.jit(init, out_shardings=shardings),
        train=jitted(abstract),
        loop=make_loop(jitted, abstract, model.axes.params, optimizer, apart=apart),
        compiler_options=compiler_options(config.compiler, device),
        gradients=gradients,
        predict=make_predict(model.score, config.model.scored, shardings.variables, mesh),
        abstract_state=abstract,
        abstract_batch=jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rows),
            config.model.train_batch(config.batch_size, config.data),
        ),
    )


def check_micro_batch(config: Config, mesh: Mesh) -> None:
    """Raises ValueError where devices or groups can't share a micro-batch."""
    shards, micro_batch = batch_shards(mesh), config.batch_size // config.accumulation_steps
    if micro_batch % shards:
        raise ValueError(
            f"a micro-batch of {micro_batch} examples (batch_size / accumulation_steps) can't be shared by the "
            f"{shards} devices along data × fsdp × expert: choose a multiple of {shards}."
        )
    group_count(micro_batch, config.moe.group_size)


def make_predict(
    function: Callable[..., PyTree], names: Sequence[str], shardings: PyTree, mesh: Mesh
) -> Callable[[PyTree, Batch], PyTree]:
    """`Step.predict`, or another function(variables, batch, mesh=…) of an evaluation batch, jitted.

    It is given the named arrays of the batch, of which each process takes its rows, and every process has its result.
    shardings: of the variables.
    """

    def run(variables: PyTree, batch: Batch) -> PyTree:
        return function(variables, batch, mesh=mesh)

    jitted = jax.jit(run, in_shardings=(shardings, batch_sharding(mesh)), out_shardings=replicated(mesh))

    def predict(variables: PyTree, batch: Batch) -> PyTree:
        rows = np.array(local_rows(mesh, len(batch["mask"])))
        return jitted(variables, to_devices({name: np.asarray(batch[name])[rows] for name in names}, names, mesh))

    return predict


def state_shardings(
    abstract: TrainState, axes: Variables, optimizer: optax.GradientTransformation, mesh: Mesh
) -> PyTree:
    """A TrainState of shardings: the optimizer's moments lie where their parameters lie, the rest everywhere."""
    variables = Variables(*(param_shardings(*pair, mesh) for pair in zip(abstract.variables, axes, strict=True)))
    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        abstract.opt_state,
        variables.params,
        transform_non_params=lambda _: replicated(mesh),
    )
    everywhere: Any = replicated(mesh)
    guard = jax.tree.map(lambda _: everywhere, abstract.guard)
    return TrainState(step=everywhere, variables=variables, opt_state=opt_state, guard=guard, key=everywhere)


def to_devices(batch: Batch, names: Sequence[str], mesh: Mesh) -> dict[str, jax.Array]:
    """The named arrays of this process's rows (`local_rows`), as rows of global arrays."""
    return {name: to_global(batch[name], mesh) for name in names}


class Run(NamedTuple):
    """What a run is made of, checked, with nothing written yet but the workdir's own files.

    facts: see `Task.check_data`. lowered: the step's program, to be compiled. initial: what it begins with instead of
    random weights. lock: of the workdir, in the first process.
    """

    mesh: Mesh
    task: Task
    facts: dict[str, str]
    step: Step
    examples: Any
    test_batches: Iterable[Batch]
    lowered: Any
    initial: Initial | None
    lock: WorkdirLock | None


def prepare(config: Config, table: ml_collections.ConfigDict, workdir: AnyPath) -> Run:
    """Checks config, data and workdir, in this order, and says what is to be known before a run."""
    config.wandb.check()
    mesh = make_mesh(config.mesh)
    task = TASKS[config.model.task]
    facts = task.check_data(config.data, config.model)
    notices = [shortage(config.data, config.batch_size, jax.process_count())]
    step = make_step(config, mesh)
    rows = local_rows(mesh, config.batch_size)
    examples = task.make_train_iterator(config.data, config.batch_size, config.seed, rows=rows)
    test_batches = task.make_eval_batches(config.data, config.data.test_split, config.batch_size)
    lowered = step.loop.train.lower(step.loop.abstract_state, step.abstract_batch)
    initial = plan_start(config, step.abstract_state.variables, workdir)
    differences, lock = open_workdir(workdir, table)
    notices.append(caution(config.model, config.moe, config.router))
    hosts.say(*(f"the config differs from the one that began this run: {difference}" for difference in differences))
    hosts.say(*(f"{name}: {value}" for name, value in facts.items()), *filter(None, notices))
    return Run(mesh, task, facts, step, examples, test_batches, lowered, initial, lock)


def train(
    config: Config, table: ml_collections.ConfigDict, workdir: AnyPath, profile_steps: range = range(0)
) -> dict[str, Any]:
    """Trains from the newest checkpoint of the workdir to the last step; returns what result.json holds.

    table: the config as config.json keeps it. profile_steps: those that are recorded for xprof. Nothing is written
    before everything has been checked. Raises cli.Stopped where SIGTERM ended it, and cli.Failure where too many
    updates were left out, both with everything saved.
    """
    clock = Clock()
    keep_programs(config.compiler)
    with cli.usage_errors():
        run = prepare(config, table, workdir)
        train_step = compile_step(run.lowered, run.step.compiler_options)
    task, step, examples, test_batches = run.task, run.step, run.examples, run.test_batches
    if hosts.is_first():
        write_json(workdir / "environment.json", environment(run.mesh))

    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep)
    state, is_resumed = begin(config, step, checkpoints, examples, run.initial)
    start = index = int(state.step)
    state = step.loop.enter(state)

    tracker = Tracker(config.wandb, table.to_dict(), workdir)
    writer, progress = MetricsWriter(workdir, start, tracker), Progress(config.steps, start)
    profile, rates = (
        Profile(profile_steps, workdir / "profile"),
        Rates(config, step.abstract_state.variables, run.mesh, start),
    )
    saves = Saves(checkpoints, config.checkpoint, start if is_resumed else None)
    watch = Watch(config, workdir, examples.indices)
    blocks, test = config.model.moe_blocks, dict[str, float]()
    is_stopping, gave_up = False, ""
    clock.resume(writer.last)
    with hosts.StopSignal() as stop, Watchdog(config.watchdog_minutes, workdir) as watchdog:
        for index in range(start + 1, config.steps + 1):
            profile.begin(index)
            watchdog.hear(f"waiting for the examples of step {index}")
            place, batch = examples.get_state(), next(examples)
            watchdog.hear(f"running step {index}")
            with jax.profiler.StepTraceAnnotation("train", step_num=index):
                state, metrics = train_step(state, to_devices(batch, tuple(step.abstract_batch), run.mesh))
            watch.add(index, place, metrics)
            if profile.end(index, metrics):
                hosts.say(f"profile written: xprof --logdir={workdir / 'profile'}")
            progress.advance()
            is_stopping = stop.is_due() and index < config.steps
            is_logged = is_stopping or is_due(index, config.log_every, config.steps)
            if is_logged:
                metrics = jax.device_get(metrics)
                values = log_values(metrics, blocks) | rates.since_last(index) | clock.values()
                values |= {"data/skipped": examples.skipped} if examples.skipped else {}
                writer.write(index, values, layer_loads(metrics["moe"], blocks.start, blocks.step))
                progress.log(index, values["train/loss"], values["examples_per_second"])
                gave_up = watch.look(values)
            if is_stopping or gave_up:
                break
            if saves.is_due(index, is_logged) or index == config.steps:
                jax.block_until_ready(state)
                with clock.spent("checkpoint"):
                    saves.save(index, step.loop.leave(state), examples.get_state())
            if is_due(index, config.evaluate_every, config.steps):
                with clock.spent("evaluation"):
                    batches = stop.during(watchdog.over(test_batches, f"evaluating after step {index}"))
                    try:
                        test = task.evaluate(step.predict, step.loop.leave(state.variables), batches)
                    except hosts.Interrupted:
                        is_stopping = True
                        break
                writer.write(index, flatten(test, "test"))
                if saves.rate(index, test):
                    with clock.spent("checkpoint"):
                        saves.save(index, step.loop.leave(state), examples.get_state())
        if saves.whole != index:
            jax.block_until_ready(state)
            with clock.spent("checkpoint"):
                saves.complete(index, step.loop.leave(state), examples.get_state())
            writer.write(index, clock.values())
    for part in (profile, progress, writer, examples, checkpoints, *([] if run.lock is None else [run.lock])):
        part.close()
    if gave_up:
        raise cli.Failure(gave_up)
    if is_stopping:
        raise cli.Stopped(f"told to stop: saved after step {index} of {config.steps}; the same command goes on.")

    return finish(run, config, workdir, int(state.step), step.loop.leave(state.variables), test)


def finish(
    run: Run, config: Config, workdir: AnyPath, step: int, variables: Variables, test: dict[str, float]
) -> dict[str, Any]:
    """Writes and returns what result.json holds, and writes the report. test: measures after this step, if known."""
    result = {
        "step": step,
        **flatten(test or run.task.evaluate(run.step.predict, variables, run.test_batches), "test"),
        **run.facts,
        "params/sha256": params_sha256(variables.params),
    }
    if hosts.is_first():
        write_json(workdir / "result.json", result)
    write_report(config, workdir, variables, run.test_batches, run.mesh)
    return result


def begin(
    config: Config, step: Step, checkpoints: Checkpoints, examples: Any, initial: Initial | None
) -> tuple[TrainState, bool]:
    """The state to go on from, and whether it is a checkpoint's, whose place in the data `examples` then go to."""
    if (restored := checkpoints.restore_newest(step.abstract_state)) is not None:
        state, position = restored
        try:
            examples.set_state(position)
        except ValueError as error:
            raise CheckpointError(
                f"checkpoint {int(state.step)} in {checkpoints.folder} is damaged: {error}."
            ) from error
        hosts.say(f"resuming from step {int(state.step)}")
        return state, True
    state = step.init(jax.random.key(config.seed))
    if initial is None:
        return state, False
    hosts.say(*describe(initial))
    return state._replace(variables=load_initial(initial, state.variables)), False


def is_due(step: int, every: int, last: int) -> bool:
    """Every so many steps, and after the last; only then if `every` is 0."""
    return step == last or (every > 0 and step % every == 0)


def main(argv: Sequence[str]) -> None:
    """The command line."""
    parser = cli.make_parser(__doc__ or "", DEFAULT_CONFIG)
    parser.add_argument(
        "--config", default=DEFAULT_CONFIG, help="config FILE, or FILE:SLICE for its mesh there (default: %(default)s)"
    )
    parser.add_argument("--workdir", help="folder of the run (default: runs/ and the config's name)")
    parser.add_argument("--profile-steps", default="", help="steps to record for xprof, FIRST:LAST, such as 10:15")
    arguments, overrides = cli.parse(parser, argv)
    with cli.usage_errors():
        table = config_lib.load_file(arguments.config)
        config_lib.override(table, overrides)
        config = config_lib.resolve(table)
        workdir = open_path(arguments.workdir or f"runs/{Path(arguments.config).stem}")
        profile_steps = parse_steps(arguments.profile_steps) if arguments.profile_steps else range(0)
        hosts.initialize()
    result = train(config, table, workdir, profile_steps)
    tests = (f"{name.replace('/', ' ')} {value:.4f}" for name, value in result.items() if is_measure(name))
    hosts.say(
        ", ".join(tests),
        f"checkpoint: {workdir / 'checkpoints' / str(result['step'])}",
        f"report: {workdir / 'report.html'}",
        f"evaluate it: {os.path.relpath(sys.executable)} evaluate.py --workdir={workdir}",
    )


if __name__ == "__main__":
    cli.run(main)

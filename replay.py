"""Looks into one step of a training run again: what its loss, gradient and blocks were, and of which examples.

    python replay.py --workdir=runs/digits [--step=N] [--debug-nans]

Without --step: the first of the last row of updates that were left out (bad_steps.jsonl). The step is computed
from the state that it had: that of a checkpoint behind it, where all updates in between were left out, or else of one
before it, with the steps from there run again. Nothing is written. --debug-nans looks for the line of code where the
first number is made that isn't finite, operation by operation.
"""

import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe import cli
from moe import config as config_lib
from moe.checkpoint import Checkpoints
from moe.checksums import name_leaves
from moe.config import Config
from moe.files import AnyPath, open_path, read_lines
from moe.initial import load_initial, plan_initial
from moe.layers.block import stacked_blocks
from moe.parallel import hosts
from moe.parallel.mesh import local_rows, make_mesh
from moe.tasks import TASKS
from moe.types import PyTree
from moe.workdir import fit_mesh, read_config
from train import DEFAULT_CONFIG, Step, TrainState, make_step, to_devices


class Before(NamedTuple):
    """The state before a step, the place of its batch, and what they were taken from."""

    state: TrainState
    position: dict[str, Any]
    origin: str


def last_bad_step(workdir: AnyPath) -> int:
    """The first of the last row of updates that were left out. Raises cli.Failure where there is none."""
    steps = [line["step"] for line in read_lines(workdir / "bad_steps.jsonl")]
    if not steps:
        raise cli.Failure(f"no update of {workdir} was left out: say which step to look at with --step.")
    first = steps[-1]
    while first - 1 in steps:
        first -= 1
    return first


def restore_before(config: Config, step: Step, checkpoints: Checkpoints, wanted: int) -> Before:
    """What step `wanted` began with, or an earlier one from which the steps have to be run again."""
    saved = checkpoints.steps()
    after = [number for number in saved if number >= wanted]
    if after:
        state, position = checkpoints.restore(after[0], step.abstract_state)
        steps_back = after[0] - wanted + 1
        if int(state.guard.in_a_row) >= steps_back:
            count = jax.device_put(np.int32(wanted - 1), step.abstract_state.step.sharding)
            examples = position["examples"] - steps_back * config.batch_size
            return Before(state._replace(step=count), position | {"examples": examples}, f"checkpoint {after[0]}")
    before = [number for number in saved if number < wanted]
    if before:
        state, position = checkpoints.restore(before[-1], step.abstract_state)
        return Before(state, position, f"checkpoint {before[-1]}")
    state = step.init(jax.random.key(config.seed))
    if config.init_from:
        initial = plan_initial(config, step.abstract_state.variables)
        state = state._replace(variables=load_initial(initial, state.variables))
    return Before(state, {"examples": 0}, "the beginning")


def gradient_norms(config: Config, gradient: PyTree) -> dict[str, jax.Array]:
    """The norm of the gradient of each block, and of each array around the blocks, by name."""
    parts: dict[str, list[jax.Array]] = {f"block {index}": [] for index in range(config.model.depth)}
    for name, leaf in name_leaves(gradient).items():
        stacked = stacked_blocks(config.model, tuple(name.split("/")))
        if stacked is None:
            parts[name] = [leaf]
        else:
            for row, block in enumerate(stacked[0]):
                parts[f"block {block}"].append(leaf[row])
    return {name: optax.tree.norm(leaves) for name, leaves in parts.items()}


def report(config: Config, metrics: PyTree, norms: Mapping[str, jax.Array], batch: Mapping[str, Any]) -> Iterator[str]:
    """Lines that say what a step was, and what went bad first."""
    for name, values in batch.items():
        numbers = np.asarray(values, np.float64)
        yield (
            f"  {name:<12} {numbers.min():.6g} to {numbers.max():.6g}, "
            f"{np.count_nonzero(~np.isfinite(numbers))} not finite"
        )
    values = jax.device_get(metrics)
    rms = values["blocks"]["rms"]
    first = {name: values["train"][name] for name in ("loss", "gradient_norm")}
    scalars = first | values["train"] | {f"router {name}": value for name, value in values["router"].items()}
    yield ", ".join(f"{name} {float(value):.6g}" for name, value in scalars.items())
    yield f"{'':<32} {'rms of output':>14} {'gradient norm':>14}"
    for name, norm in norms.items():
        index = name.removeprefix("block ")
        output = f"{rms[int(index)]:14.6g}" if index.isdecimal() else f"{'':>14}"
        yield f"{name:<32} {output} {float(norm):14.6g}"
    yield first_bad(rms, norms)


def first_bad(rms: np.ndarray, norms: Mapping[str, jax.Array]) -> str:
    """The sentence that says where numbers stop to be finite."""
    forward = np.flatnonzero(~np.isfinite(rms))
    if len(forward):
        return f"the first output that isn't finite is that of block {forward[0]}"
    backward = [name for name, norm in norms.items() if not np.isfinite(norm)]
    if backward:
        # The gradient travels from the last block to the first.
        blocks = [name for name in backward if name.startswith("block ")]
        return f"all outputs are finite; on the way back the gradient ceases to be at {(blocks or backward)[-1]}"
    return "everything is finite"


def find_line(step: Step, state: TrainState, batch: Any) -> str:
    """Where in the code the first number is made that isn't finite."""
    jax.config.update("jax_debug_nans", True)
    jax.config.update("jax_debug_infs", True)
    here = Path(__file__).parent
    try:
        # Not the program from before, which doesn't look.
        jax.block_until_ready(jax.jit(lambda state, batch: step.gradients(state, batch))(state, batch))
    except FloatingPointError as error:
        frames = [
            frame for frame in traceback.extract_tb(error.__traceback__) if here / "moe" in Path(frame.filename).parents
        ]
        if frames:
            frame = frames[-1]
            return f"{Path(frame.filename).relative_to(here)}, line {frame.lineno}, in {frame.name}: {frame.line}"
        return f"outside of this project's code: {error}"
    finally:
        jax.config.update("jax_debug_nans", False)
        jax.config.update("jax_debug_infs", False)
    return "no operation gives a number that isn't finite"


def replay(config: Config, workdir: AnyPath, wanted: int, *, debug_nans: bool) -> None:
    """Prints what step `wanted` of the run is made of."""
    with cli.usage_errors():
        mesh = make_mesh(config.mesh)
        task = TASKS[config.model.task]
        step = make_step(config, mesh)
        rows = local_rows(mesh, config.batch_size)
        examples = task.make_train_iterator(config.data, config.batch_size, config.seed, rows=rows)
    if not 1 <= wanted <= config.steps:
        raise cli.UsageError(f"--step={wanted} must be one of the run's steps, 1 to {config.steps}.")
    state, position, origin = restore_before(config, step, Checkpoints(workdir / "checkpoints"), wanted)
    examples.set_state(position)
    names = tuple(step.abstract_batch)
    begin = int(state.step) + 1
    hosts.say(
        f"step {wanted}, from {origin}" + (f", steps {begin} to {wanted - 1} run again" if begin < wanted else "")
    )
    state = step.loop.enter(state)
    for _ in range(begin, wanted):
        state, _ = step.loop.train(state, to_devices(next(examples), names, mesh))
    place, host_batch = examples.get_state()["examples"], next(examples)
    batch = to_devices(host_batch, names, mesh)
    state = step.loop.leave(state)
    gradient, (metrics, _) = jax.jit(step.gradients)(state, batch)
    norms = jax.device_get(jax.jit(lambda gradient: gradient_norms(config, gradient))(gradient))
    metrics["train"]["gradient_norm"] = jnp.sqrt(sum(jnp.square(norm) for norm in norms.values()))
    indices = examples.indices(place)
    hosts.say("examples: " + ", ".join(task.name_example(config.data, index) for index in indices))
    hosts.say(*report(config, metrics, norms, {name: host_batch[name] for name in names}))
    if debug_nans:
        hosts.say(f"made at: {find_line(step, state, batch)}")
    examples.close()


def main(argv: Sequence[str]) -> None:
    """The command line."""
    parser = cli.make_parser(__doc__ or "", DEFAULT_CONFIG)
    parser.add_argument("--workdir", required=True, help="folder of the training run")
    parser.add_argument("--step", type=int, help="which step (default: the first of the last row of bad ones)")
    parser.add_argument("--debug-nans", action="store_true", help="look for the line of code")
    arguments, overrides = cli.parse(parser, argv)
    with cli.usage_errors():
        workdir = open_path(arguments.workdir)
        hosts.initialize()
    table = read_config(workdir)
    wanted = arguments.step if arguments.step is not None else last_bad_step(workdir)
    with cli.usage_errors():
        config_lib.override(table, overrides)
        if notice := fit_mesh(table, overrides):
            hosts.say(notice)
        config = config_lib.resolve(table)
    replay(config, workdir, wanted, debug_nans=arguments.debug_nans)


if __name__ == "__main__":
    cli.run(main)

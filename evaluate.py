"""Evaluates a checkpoint of a training run, without dropping a token.

    python evaluate.py --workdir=runs/digits [--step=N] [--config.router.name=sparse_topk …]

The model is rebuilt from the workdir's own config; an override evaluates the same weights under another setting.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections

from moe import cli
from moe import config as config_lib
from moe.checkpoint import CheckpointError, Checkpoints
from moe.config import Config
from moe.data.pipeline import make_eval_batches
from moe.evaluation import evaluate
from moe.metrics import flatten, params_sha256, write_json
from moe.parallel.mesh import make_mesh
from moe.workdir import read_config
from train import DEFAULT_CONFIG, check_data, make_step


def choose_step(checkpoints: Checkpoints, wanted: int | None) -> int:
    """The newest step, or the wanted one. Raises CheckpointError if it doesn't exist."""
    steps = checkpoints.steps()
    if not steps:
        raise CheckpointError(f"there is no complete checkpoint in {checkpoints.folder}.")
    if wanted is None:
        return steps[-1]
    if wanted not in steps:
        raise CheckpointError(f"there is no checkpoint of step {wanted}: there are {', '.join(map(str, steps))}.")
    return wanted


def fit_mesh(table: ml_collections.ConfigDict) -> None:
    """Puts a run from another number of devices on all devices here, copied, and says so: only speed depends on it."""
    mesh = config_lib.resolve(table).mesh
    try:
        make_mesh(mesh)
    except ValueError as error:
        config_lib.override(table, ["mesh.data=-1", "mesh.fsdp=1", "mesh.expert=1", "mesh.tensor=1"])
        print(f"{error} Evaluating with a copy on each device.")


def evaluate_checkpoint(config: Config, workdir: Path, wanted: int | None) -> dict[str, Any]:
    """What evaluation.json holds: the same keys as the run's own result.json."""
    checkpoints = Checkpoints(workdir / "checkpoints")
    chosen = choose_step(checkpoints, wanted)
    with cli.usage_errors():
        mesh = make_mesh(config.mesh)
        check_data(config)
        hosts = (jax.process_index(), jax.process_count())
        batches = make_eval_batches(config.data, config.data.test_split, config.batch_size, *hosts)
        step = make_step(config, mesh)
    state, _ = checkpoints.restore(chosen, step.abstract_state)
    measures = evaluate(step.predict, state.variables, batches)
    return {
        "step": chosen,
        **flatten(measures, "test"),
        "params/sha256": params_sha256(state.variables.params),
    }


def main(argv: Sequence[str]) -> None:
    """The command line."""
    parser = cli.make_parser(__doc__ or "", DEFAULT_CONFIG)
    parser.add_argument("--workdir", required=True, help="folder of the training run")
    parser.add_argument("--step", type=int, help="step of the checkpoint (default: the newest)")
    arguments, overrides = cli.parse(parser, argv)
    workdir = Path(arguments.workdir)
    table = read_config(workdir)
    with cli.usage_errors():
        config_lib.override(table, overrides)
        if not any(assignment.startswith("mesh.") for assignment in overrides):
            fit_mesh(table)
        config = config_lib.resolve(table)
    result = evaluate_checkpoint(config, workdir, arguments.step)
    print("\n".join(f"{name:<16} {value}" for name, value in result.items()))
    write_json(workdir / "evaluation.json", result)


if __name__ == "__main__":
    cli.run(main)

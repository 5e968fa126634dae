"""Evaluates a checkpoint of a training run, without dropping a token.

    python evaluate.py --workdir=runs/digits [--step=N] [--report] [--config.router.name=sparse_topk …]

The model is rebuilt from the workdir's own config; an override evaluates the same weights under another setting.
--report writes report.html anew.
"""

from collections.abc import Sequence
from typing import Any

from moe import cli
from moe import config as config_lib
from moe.checkpoint import Checkpoints
from moe.config import Config
from moe.evaluation.report import write_report
from moe.files import AnyPath, open_path
from moe.metrics import flatten, params_sha256, write_json
from moe.parallel import hosts
from moe.parallel.mesh import make_mesh
from moe.tasks import TASKS, caution
from moe.workdir import fit_mesh, read_config
from train import DEFAULT_CONFIG, make_step


def evaluate_checkpoint(
    config: Config, workdir: AnyPath, wanted: int | None, with_report: bool = False
) -> dict[str, Any]:
    """What evaluation.json holds: the same keys as the run's own result.json; with_report: writes report.html, too."""
    checkpoints = Checkpoints(workdir / "checkpoints")
    chosen = checkpoints.choose(wanted)
    with cli.usage_errors():
        mesh = make_mesh(config.mesh)
        task = TASKS[config.model.task]
        facts = task.check_data(config.data, config.model)
        batches = task.make_eval_batches(config.data, config.data.test_split, config.batch_size)
        step = make_step(config, mesh)
    variables = checkpoints.restore_variables(chosen, step.abstract_state.variables)
    measures = task.evaluate(step.predict, variables, batches)
    result = {
        "step": chosen,
        **flatten(measures, "test"),
        **facts,
        "params/sha256": params_sha256(variables.params),
    }
    if with_report:
        write_report(config, workdir, variables, batches, mesh, evaluation=result)
    return result


def main(argv: Sequence[str]) -> None:
    """The command line."""
    parser = cli.make_parser(__doc__ or "", DEFAULT_CONFIG)
    parser.add_argument("--workdir", required=True, help="folder of the training run")
    parser.add_argument("--step", type=int, help="step of the checkpoint (default: the newest)")
    parser.add_argument("--report", action="store_true", help="write report.html of the run and this checkpoint")
    arguments, overrides = cli.parse(parser, argv)
    with cli.usage_errors():
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
    result = evaluate_checkpoint(config, workdir, arguments.step, arguments.report)
    hosts.say(*(f"{name:<16} {value}" for name, value in result.items()))
    if hosts.is_first():
        write_json(workdir / "evaluation.json", result)


if __name__ == "__main__":
    cli.run(main)

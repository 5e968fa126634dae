"""Does a differentiable router train a better mixture of experts than softmax top-k?

    python -m experiments.routers [--seeds=5] [--steps=3000] [--json FILE] [--markdown FILE]

Sander et al. 2023 (arXiv 2302.01425, "Sparse MoEs") put sparse p-norm top-k in the place of a vision transformer's
router; successive halving (Pietruszka et al. 2020, arXiv 2010.15552) was not made for one: that is this project's own.
Here `train.py` runs configs/digits.py with each router and seed, all else equal, one after the other; a run that has
ended with this very config is not run again, and one that was stopped goes on: the same command finishes what it began.
As sparse top-k gives a token more than k = 2 experts, softmax with k = 3 runs beside it.

An error over seeds says nothing of other test images, since all runs see the same. So a paired bootstrap over these,
of the share of seeds that are right about an image, stands beside.

Two x86-64 cores, a minute a run where nothing else runs, 5 seeds: sparse top-k is above softmax by .0078 ± .0010 of
test accuracy, successive halving by .0000 ± .0023, softmax with k = 3 by -.0006 ± .0030.
`experiments/results/routers.md` has all figures.
"""

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import logging as absl_logging
from jaxtyping import Bool

import evaluate
import sweep
from experiments import common
from experiments.common import Sample
from moe import config as config_lib
from moe.files import read_lines
from moe.workdir import read_config

ROOT = Path(__file__).parents[1]
# What runs, by name: a router, and further fields.
ARMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "softmax": ("softmax", ()),
    "softmax, k = 3": ("softmax", ("router.k=3",)),
    "sparse_topk": ("sparse_topk", ()),
    "successive_halving": ("successive_halving", ()),
}
BASELINE = "softmax"
UNITS = {"test/accuracy": "accuracy", "test/loss": "loss"}
# Of metrics.jsonl, the mean over layers and the second half of the log points.
ROUTING = {"experts_per_token": "experts per token", "overflow": "share of choices dropped in training"}
DRAWS = 10_000


def make_arms(
    seeds: int, steps: int, config: str, folder: Path, overrides: Sequence[str] = ()
) -> dict[str, list[sweep.Job]]:
    """The runs of every arm, by seed. overrides: further fields, "batch_size=32".

    Raises ValueError for a wrong config.
    """
    # Compiled programs are the same for all seeds, and only the last step is of interest.
    changes = [*overrides, f"steps={steps}", "evaluate_every=0", f"compiler.cache={folder / 'programs'}"]
    arms = {}
    for name, (router, more) in ARMS.items():
        where = folder / "-".join([Path(config).stem, str(steps), *(field.replace("=", "") for field in more)])
        arms[name] = sweep.make_jobs(config, [router], range(seeds), [*changes, *more], where)
    return arms


def train(arms: dict[str, list[sweep.Job]]) -> None:
    """Runs what hasn't finished, all arms of a seed before the next seed. Raises CalledProcessError."""
    for jobs in zip(*arms.values(), strict=True):
        for name, job in zip(arms, jobs, strict=True):
            if not job.is_finished():
                subprocess.run(job.command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            print(f"{name}, {job.workdir.name}: {result(job)['test/accuracy']:.4f}", flush=True)


def result(job: sweep.Job) -> dict:
    """What result.json of a finished run holds."""
    return json.loads((job.workdir / "result.json").read_text())


def samples(arms: dict[str, list[sweep.Job]], case: str) -> list[Sample]:
    """Measures of the test set, and of the routing while training."""
    found = [
        Sample(name, case, unit, [result(job)[key] for job in jobs])
        for key, unit in UNITS.items()
        for name, jobs in arms.items()
    ]
    return found + [
        Sample(name, case, unit, [logged(job.workdir, key) for job in jobs])
        for key, unit in ROUTING.items()
        for name, jobs in arms.items()
    ]


def logged(workdir: Path, metric: str) -> float:
    """The mean of a metric of routing over layers and the second half of the log points; NaN where it isn't logged."""
    lines = [line for line in read_lines(workdir / "metrics.jsonl") if "train/loss" in line]
    values = [value for line in lines[len(lines) // 2 :] for key, value in line.items() if key.endswith(f"/{metric}")]
    return statistics.fmean(values) if values else math.nan


def right(jobs: Sequence[sweep.Job]) -> Bool[np.ndarray, "S N"]:
    """Of every run of an arm and every test image, whether the run is right about it."""
    evaluation = evaluate.Evaluation(
        config_lib.resolve(read_config(jobs[0].workdir)), jobs[0].workdir, evaluate.Wanted()
    )
    found = []
    for job in jobs:
        evaluation.workdir = job.workdir
        variables = evaluation.load(result(job)["step"])
        parts = []
        for batch in evaluation.batches:
            logits_BV = np.asarray(evaluation.predicts["test"](variables, batch))
            parts.append((logits_BV.argmax(axis=1) == batch["label"])[batch["mask"]])
        found.append(np.concatenate(parts))
    return np.stack(found)


def interval(right_SN: Bool[np.ndarray, "S N"], other_SN: Bool[np.ndarray, "S N"]) -> tuple[float, float, float]:
    """Mean difference in accuracy, and the ends of its 95 % interval by a paired bootstrap over the images."""
    difference_N = right_SN.mean(axis=0) - other_SN.mean(axis=0)
    rows = np.random.default_rng(0).integers(len(difference_N), size=(DRAWS, len(difference_N)))
    low, high = np.quantile(difference_N[rows].mean(axis=1), [0.025, 0.975])
    return float(difference_N.mean()), float(low), float(high)


def intervals(arms: dict[str, list[sweep.Job]]) -> list[str]:
    """A sentence for each arm but the baseline."""
    found = {name: right(jobs) for name, jobs in arms.items()}
    sentences = []
    for name in found.keys() - {BASELINE}:
        mean, low, high = interval(found[name], found[BASELINE])
        sentences.append(f"{name}, accuracy over {BASELINE}: {mean:+.4f}, over test images {low:+.4f} to {high:+.4f}")
    return sorted(sentences)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    options = common.parser(__doc__)
    options.add_argument("--steps", type=int, default=3000, help="of each run (default: %(default)s)")
    options.add_argument("--config", default="configs/digits.py", help="what to train (default: %(default)s)")
    options.add_argument("--folder", type=Path, default=Path("runs/routers"), help="of the runs (default: %(default)s)")
    arguments = common.parse(options, argv)
    absl_logging.set_verbosity(absl_logging.FATAL)  # Orbax, of its own workings
    begin = time.perf_counter()
    seeds, steps, config = arguments.seeds, arguments.steps, arguments.config
    try:
        arms = make_arms(seeds, steps, config, arguments.folder.absolute())
        train(arms)
    except subprocess.CalledProcessError as error:  # train.py has said in a sentence why
        sys.exit(error.returncode)
    except (ValueError, OSError) as error:
        options.error(str(error))
    found = samples(arms, f"{Path(config).stem}, {steps} steps")
    common.report(found, [BASELINE], arguments, "routers", begin, intervals(arms))


if __name__ == "__main__":
    main()

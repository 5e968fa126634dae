"""Trains every router with every seed, each as a run of its own, and compares them.

    python sweep.py --config=configs/digits.py --routers=softmax,sparse_topk,successive_halving --seeds=5 [--jobs=2]

Runs go to ROUTER-SEED in the folder of --workdir, what they say to ROUTER-SEED.log beside. The same command again goes
on: what has finished is skipped, the rest continues from its checkpoints. Where one fails, the others go on, the end of
its log is shown, and the exit code is 1; 75 where runs were told to stop. In the end compare.html compares what has
finished.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from compare import compare_runs
from moe import cli
from moe import config as config_lib
from moe.compare.page import html_page, text_page
from moe.files import write_whole
from moe.metrics import is_measure
from train import DEFAULT_CONFIG

TRAIN = Path(__file__).with_name("train.py")
# Of the log of a run that failed so many lines are shown.
_TAIL = 8


class Job(NamedTuple):
    """A run of the grid: its folder, its config as config.json keeps it, and the command that trains it."""

    workdir: Path
    config: str
    command: tuple[str, ...]

    @property
    def log(self) -> Path:
        """Where what the run says is kept."""
        return self.workdir.with_name(f"{self.workdir.name}.log")

    def is_finished(self) -> bool:
        """Whether the run has the result of its last step, with this very config."""
        try:
            result = json.loads((self.workdir / "result.json").read_text())
            same = (self.workdir / "config.json").read_text() == self.config
            return same and result["step"] == json.loads(self.config)["steps"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return False


def make_jobs(
    config: str, routers: Sequence[str], seeds: Sequence[int], overrides: Sequence[str], folder: Path
) -> list[Job]:
    """The grid, seed by seed, so that what is compared is trained together. Raises ValueError for a wrong config."""
    for path in ("seed", "router.name"):
        if any(assignment.startswith(f"{path}=") for assignment in overrides):
            raise ValueError(f"config.{path} is what the sweep goes over: give --seeds and --routers instead.")
    jobs = []
    for seed in seeds:
        for router in routers:
            table = config_lib.load_file(config)
            changes = [*overrides, f"router.name={router}", f"seed={seed}"]
            config_lib.override(table, changes)
            config_lib.resolve(table)
            workdir = folder / f"{router}-{seed}"
            flags = [f"--config={config}", f"--workdir={workdir}", *(f"--config.{change}" for change in changes)]
            command = (sys.executable, str(TRAIN), *flags)
            jobs.append(Job(workdir, config_lib.to_json(table), command))
    return jobs


class Pool:
    """Runs jobs in processes, `width` at a time. SIGTERM and Ctrl-C reach them, and no further ones begin."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()
        self._is_stopping = False
        self._done = 0

    def run(self, jobs: Sequence[Job]) -> dict[Job, int]:
        """The exit code of every job; `cli.STOPPED` for those that didn't begin."""
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            with ThreadPoolExecutor(self._width) as threads:
                codes = list(threads.map(lambda job: self._run(job, len(jobs)), jobs))
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return dict(zip(jobs, codes, strict=True))

    def _run(self, job: Job, total: int) -> int:
        with job.log.open("ab") as log:
            with self._lock:
                if self._is_stopping:
                    return cli.STOPPED
                # In a session of its own, so that Ctrl-C doesn't reach it twice, and it saves.
                process = subprocess.Popen(
                    job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
                self._running[process.pid] = process
            if self._is_stopping:  # since a moment ago, and the handler didn't see this process
                process.send_signal(signal.SIGTERM)
            print(f"{job.workdir.name}: training, log in {job.log}", flush=True)
            code = process.wait()
        if self._is_stopping and code == -signal.SIGTERM:  # before it could listen to the signal
            code = cli.STOPPED
        with self._lock:
            del self._running[process.pid]
            self._done += 1
            print(f"{job.workdir.name}: {_outcome(job, code)} ({self._done} of {total})", flush=True)
        return code

    def _stop(self, number: int, frame: FrameType | None) -> None:
        # No lock: the handler may interrupt the thread that holds it.
        self._is_stopping = True
        for process in list(self._running.values()):
            process.send_signal(signal.SIGTERM)


def _outcome(job: Job, code: int) -> str:
    if code == cli.STOPPED:
        return "stopped, and goes on by the same command"
    if code != 0:
        return f"failed with exit code {code}"
    result = json.loads((job.workdir / "result.json").read_text())
    return "done, " + ", ".join(f"{n.removeprefix('test/')} {v:.4g}" for n, v in result.items() if is_measure(n))


def default_width() -> int:
    """Two cores a run; one run where there is an accelerator, which one process has for itself."""
    devices = Path("/dev")
    if os.environ.get("JAX_PLATFORMS") != "cpu" and any(
        any(devices.glob(name)) for name in ("accel[0-9]*", "vfio/[0-9]*", "nvidia[0-9]*")
    ):
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // 2)


def parse_seeds(text: str) -> list[int]:
    """ "3" is 0, 1, 2; "4,7" is these. Raises ValueError for anything else."""
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"--seeds={text} must be a number of seeds, such as 5, or a list of them, such as 0,3."
        ) from None
    seeds = list(range(seeds[0])) if "," not in text else seeds
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds={text} must name at least one seed, none twice and none below 0.")
    return seeds


def parse_routers(text: str) -> list[str]:
    """The names of a list with commas. Raises ValueError where one is empty or there twice."""
    routers = [name.strip() for name in text.split(",")]
    twice = [name for name, count in Counter(routers).items() if count > 1]
    if twice or "" in routers:
        raise ValueError(f"--routers={text} must be names with commas between them, each of them once.")
    return routers


def tail(job: Job) -> str:
    """The last lines of a job's log, indented."""
    lines = job.log.read_text(errors="replace").splitlines()[-_TAIL:]
    return "\n".join(f"    {line}" for line in lines)


def main(argv: Sequence[str]) -> None:
    """The command line."""
    parser = cli.make_parser(__doc__ or "", DEFAULT_CONFIG)
    parser.add_argument("--config", default=DEFAULT_CONFIG, help="config FILE of all runs (default: %(default)s)")
    parser.add_argument("--routers", required=True, metavar="NAME,…", help="routers, with commas between them")
    parser.add_argument(
        "--seeds", default="3", metavar="N", help="number of seeds, or a list: 0,3 (default: %(default)s)"
    )
    parser.add_argument("--workdir", help="folder of all runs (default: runs/sweep- and the config's name)")
    parser.add_argument("--jobs", type=int, default=0, metavar="N", help="runs at a time (default: one for two cores)")
    arguments, overrides = cli.parse(parser, argv)
    folder = Path(arguments.workdir or f"runs/sweep-{Path(arguments.config).stem}")
    with cli.usage_errors():
        if "://" in str(arguments.workdir):
            raise ValueError(f"--workdir={arguments.workdir} must be a folder of this machine, where the runs are.")
        if arguments.jobs < 0:
            raise ValueError(f"--jobs={arguments.jobs} must not be negative.")
        seeds, routers = parse_seeds(arguments.seeds), parse_routers(arguments.routers)
        jobs = make_jobs(arguments.config, routers, seeds, overrides, folder)
    folder.mkdir(parents=True, exist_ok=True)
    sweep(jobs, folder, arguments.jobs or default_width())


def sweep(jobs: Sequence[Job], folder: Path, width: int) -> None:
    """Runs what hasn't finished, and compares. Raises Failure where a run failed, Stopped where one was stopped."""
    waiting = [job for job in jobs if not job.is_finished()]
    if len(waiting) < len(jobs):
        print(f"{len(jobs) - len(waiting)} of {len(jobs)} runs have finished before", flush=True)
    codes = Pool(width).run(waiting)
    finished = [job.workdir for job in jobs if codes.get(job) == 0 or job.is_finished()]
    if finished:
        comparison = compare_runs(finished)
        write_whole(folder / "compare.html", html_page(comparison))
        print(f"\n{text_page(comparison)}\n\npage: {folder / 'compare.html'}", flush=True)
    failed = [job for job, code in codes.items() if code not in (0, cli.STOPPED)]
    for job in failed:
        print(f"{job.workdir} failed with exit code {codes[job]}; its log {job.log} ends\n{tail(job)}", file=sys.stderr)
    if failed:
        names = ", ".join(job.workdir.name for job in failed)
        raise cli.Failure(f"{len(failed)} of {len(jobs)} runs failed ({names}): the same command tries them again.")
    if stopped := [job for job, code in codes.items() if code == cli.STOPPED]:
        raise cli.Stopped(f"{len(stopped)} of {len(jobs)} runs were told to stop; the same command goes on.")


if __name__ == "__main__":
    cli.run(main)

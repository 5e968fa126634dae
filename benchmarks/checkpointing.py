"""How much of a run do its checkpoints cost, at the default schedule?

    python -m benchmarks.checkpointing [--config FILE] [--pairs N] [--json FILE] [--markdown FILE] [-- --config.FIELD=…]

Whole runs of train.py in turns: with the config's own checkpoints (`saves`), and with the last one alone (`none`), each
from a start of its own, over kept programs. `share` is what the run's own clock counts as spent on checkpoints
(time/checkpoint_seconds over time in the loop of steps), the wait for the last one included; `steps` is the time in the
loop of steps, whose ratio also sees what is written in the background beside them.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # for a call by path, which finds no packages beside this folder

from benchmarks import common
from benchmarks.common import Row

REPOSITORY = Path(__file__).parents[1]


def run(folder: Path, name: str, overrides: Sequence[str]) -> tuple[float, float]:
    """Seconds in the loop of steps, and of them on checkpoints."""
    workdir = folder / name
    command = [sys.executable, "train.py", f"--workdir={workdir}", f"--config.compiler.cache={folder / 'programs'}"]
    subprocess.run([*command, *overrides], cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "time/elapsed_seconds" in line][-1]
    spent = {part: last[f"time/{part}_seconds"] for part in ("training", "checkpoint", "evaluation")}
    return sum(spent.values()), spent["checkpoint"]


def main() -> None:
    """The command line."""
    parser = common.parser(__doc__)
    parser.add_argument("--config", default="configs/digits.py", help="default: %(default)s")
    parser.add_argument("--pairs", type=int, default=5, help="default: %(default)s")
    arguments, overrides = parser.parse_known_args()
    overrides = [f"--config={arguments.config}", *(word for word in overrides if word != "--")]
    times: dict[str, list[tuple[float, float]]] = {"none": [], "saves": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.pairs):
            for kind in times:
                extra = ["--config.checkpoint.every=0"] if kind == "none" else []
                times[kind].append(run(Path(folder), f"{kind}-{number}", [*overrides, *extra]))
    case = Path(arguments.config).stem
    steps = {kind: statistics.median(total for total, _ in values) for kind, values in times.items()}
    ratio = statistics.median(one / other for (one, _), (other, _) in zip(times["saves"], times["none"], strict=True))
    share = statistics.median(spent / total for total, spent in times["saves"])
    rows = [
        Row(name="share", case=case, value=100 * share, unit="% of the run", ratio=None),
        Row(name="steps, none", case=case, value=steps["none"], unit="s", ratio=1.0),
        Row(name="steps, saves", case=case, value=steps["saves"], unit="s", ratio=ratio),
    ]
    common.report(rows, arguments)


if __name__ == "__main__":
    main()

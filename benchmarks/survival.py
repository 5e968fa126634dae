"""What does a run survive? Kills, corruptions, signals and random inputs, in full numbers.

    python -m benchmarks.survival [--only KIND …] [--keep FILE] [--json FILE] [--markdown FILE]

Kinds are kills, corruptions, processes and fuzz.
Runs the tests of these, marked `nightly` where they take long, and keeps the figures that they record. --keep: rows of
an earlier call, to be kept unless they are measured again. All of it takes about two hours of two cores. There is no
baseline: ratios are empty.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # for a call by path, which finds no packages beside this folder

from benchmarks import common
from benchmarks.common import Row
from tests import fuzz

REPOSITORY = Path(__file__).parents[1]
TESTS = {
    "kills": ["tests/test_chaos.py", "-m", "nightly"],
    "corruptions": ["tests/test_damage.py", "-m", "nightly"],
    "processes": ["tests/test_processes.py", "tests/test_watchdog.py"],
    "fuzz": ["tests/fuzz", "-m", "nightly"],
}


def run(kind: str, rows: dict[tuple[str, str], Row]) -> None:
    """Adds the rows of one kind of tests; ends the program where one fails."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "SURVIVAL_JSON": str(path)}
        command = [sys.executable, "-m", "pytest", "-q", *TESTS[kind]]
        if subprocess.run(command, cwd=REPOSITORY, env=environment, check=False).returncode:
            sys.exit(f"survival: the tests of {kind} fail, as above; their figures are not kept.")
        found = json.loads(path.read_text()) if path.exists() else []
    if kind == "fuzz":
        found = [
            Row(name="fuzz inputs, each at most", case=what, value=count, unit="inputs", ratio=None)
            for what, (_, count) in fuzz.EXAMPLES.items()
        ]
    rows.update({(row["name"], row["case"]): row for row in found})


def main() -> None:
    """The command line."""
    parser = common.parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=list(TESTS), default=list(TESTS))
    parser.add_argument("--keep", type=Path, help="rows of an earlier call")
    options = parser.parse_args()
    kept = json.loads(options.keep.read_text()) if options.keep else []
    rows = {(row["name"], row["case"]): row for row in kept}
    for kind in options.only:
        run(kind, rows)
    common.report(list(rows.values()), options)


if __name__ == "__main__":
    main()

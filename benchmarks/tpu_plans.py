"""What large models can reach on TPU slices: `plan.py --sweep` for each, beside what MaxText publishes.

    python -m benchmarks.tpu_plans --json benchmarks/results/tpu_plans.json --markdown benchmarks/results/tpu_plans.md

Needs libtpu and no TPU (pip install 'moe-jax[tpu-aot]'); five to ten minutes a model and slice on two cores. Plans are
kept in --keep, and made only where they aren't there, so that a run can be cut short and go on.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moe.plan import program
from moe.plan.chips import GIB

if __package__:
    from benchmarks import common
else:
    import common  # type: ignore[no-redef]

ROOT = Path(__file__).parents[1]


class Case(NamedTuple):
    """A config on a slice. accumulation: its micro-batches there. published: MFU of MaxText for that model and chip."""

    name: str
    config: str
    topology: str
    accumulation: int
    published: float | None = None

    @property
    def arguments(self) -> list[str]:
        return [
            f"--config=configs/{self.config}",
            f"--topology={self.topology}",
            f"--config.accumulation_steps={self.accumulation}",
            "--sweep",
        ]


# MaxText's figures: README of AI-Hypercomputer/maxtext, "Performance results"; 54.9 % is its best for Mixtral on v5p.
CASES = {
    case.name: case
    for case in (
        Case("mixtral_v5p64", "mixtral_8x7b.py:v5p-128", "v5p:4x4x4", 8, 0.549),
        Case("mixtral_v6e256", "mixtral_8x7b.py:v6e-256", "v6e:16x16", 4, 0.352),
        Case("mixtral_v5e256", "mixtral_8x7b.py:v5e-256", "v5e:16x16", 4),
        Case("olmoe_v5p64", "olmoe_1b_7b.py:v5p-128", "v5p:4x4x4", 8),
        Case("olmoe_v6e256", "olmoe_1b_7b.py:v6e-256", "v6e:16x16", 1),
        Case("olmoe_v5e256", "olmoe_1b_7b.py:v5e-256", "v5e:16x16", 1),
    )
}


def planned(name: str, arguments: Sequence[str], keep: Path) -> dict[str, Any]:
    """What plan.py says, from `keep` where it has said so before; with seconds and memory of that process."""
    file = keep / f"{name}.json"
    if not file.exists():
        keep.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        begin = time.monotonic()
        command = [sys.executable, "plan.py", *arguments, "--json", str(part)]
        subprocess.run(command, cwd=ROOT, env=os.environ | program.ENVIRONMENT, check=False, stdout=sys.stderr)
        if not part.exists():
            raise SystemExit(f"no plan of {name}: see above.")
        facts = json.loads(part.read_text())
        facts["plan_seconds"] = time.monotonic() - begin
        # The largest of all processes so far: an upper bound.
        facts["plan_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        file.write_text(json.dumps(facts))
        part.unlink()
    return json.loads(file.read_text())


def mesh(facts: dict[str, Any]) -> str:
    """The mesh's axes that are larger than one."""
    return " × ".join(f"{axis} {size}" for axis, size in facts["mesh"].items() if size > 1)


def line(case: Case, facts: dict[str, Any]) -> str:
    """A line of the table: of one mesh."""
    head = f"| {case.config.partition('.')[0]} | {case.topology} | {mesh(facts)} "
    held = f"| {facts['hbm/peak_bytes'] / GIB:.1f} of {facts['hbm/limit_bytes'] / GIB:.1f} "
    if not facts["fits"]:
        return f"{head}{held}| | | | doesn't fit | |"
    seconds = (f"{facts[f'bound/{part}_seconds']:.2f}" for part in ("compute", "hbm", "interconnect"))
    above = (
        "" if case.published is None else f"{100 * case.published:.1f} %, {facts['bound/mfu'] / case.published:.2f} ×"
    )
    return f"{head}{held}| {' | '.join(seconds)} | {100 * facts['bound/mfu']:.1f} % by {facts['bound/by']} | {above} |"


HEAD = """| config | slice | mesh | GiB at the peak | compute, s | memory, s | links, s | MFU at best | MaxText, room |
|---|---|---|---|---|---|---|---|---|"""


def rows_of(case: Case, facts: dict[str, Any]) -> list[common.Row]:
    """Figures of the best mesh: memory over what there is, bounds over the step, MFU over the published one."""
    where = f"{case.config.partition('.')[0]} on {case.topology}, {mesh(facts)}"

    def row(name: str, value: float, unit: str, baseline: float | None) -> common.Row:
        return common.Row(name=name, case=where, value=value, unit=unit, ratio=baseline and value / baseline)

    limit, step = facts["hbm/limit_bytes"] / GIB, facts["bound/step_seconds"]
    parts = ("compute", "hbm", "interconnect")
    return [
        row("hbm peak", facts["hbm/peak_bytes"] / GIB, "GiB", limit),
        *(row(f"bound by {part}", facts[f"bound/{part}_seconds"], "s", step) for part in parts),
        row("mfu at best", facts["bound/mfu"], "", case.published),
        row("tokens per second and chip at best", facts["bound/tokens_per_second_per_chip"], "1/s", None),
    ]


def main() -> None:
    """Parse the command line, plan, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument(
        "--keep", type=Path, default=ROOT / "build" / "plans", help="folder of plans (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file, with its circumstances")
    options = parser.parse_args()
    lines, rows = [HEAD], []
    for name in options.only:
        case = CASES[name]
        facts = planned(name, case.arguments, options.keep)
        lines += [line(case, one) for one in facts["sweep"]]
        rows += rows_of(case, facts)
    print("\n".join(lines))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.markdown:
        head = "\n".join(f"* {name}: {value}" for name, value in common.circumstances().items())
        options.markdown.write_text(f"{head}\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

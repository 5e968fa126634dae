"""What grows with the chips where each has the same work: plans of one model on slices from 16 to 4 096 chips of v5p.

    python -m benchmarks.tpu_scaling --json benchmarks/results/tpu_scaling.json \
        --markdown benchmarks/results/tpu_scaling.md --plot benchmarks/results/tpu_scaling.png

OLMoE, 16 rows of 4 096 tokens a chip and step in 8 micro-batches, parameters cut in 4 and copied along `data`, or along
`dcn` between slices. Needs libtpu and no TPU; about two minutes a slice on two cores. --keep as in tpu_plans.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from moe.plan.chips import CHIPS, GIB, parse_slice

if __package__:
    from benchmarks import common
    from benchmarks.tpu_plans import ROOT, planned
else:
    import common  # type: ignore[no-redef]
    from tpu_plans import ROOT, planned  # type: ignore[no-redef]

ROWS, MICRO_BATCHES, FSDP = 16, 8, 4
# Parameters and two moments, in float32, are what a checkpoint holds.
_SAVED_BYTES = 12


class Where(NamedTuple):
    """A slice, or several."""

    topology: str
    slices: int = 1

    @property
    def chips(self) -> int:
        return parse_slice(self.topology, self.slices).chips

    @property
    def label(self) -> str:
        return f"{self.slices} × {self.topology}" if self.slices > 1 else self.topology

    @property
    def arguments(self) -> list[str]:
        fields = {
            "batch_size": ROWS * self.chips,
            "accumulation_steps": MICRO_BATCHES,
            "mesh.dcn": self.slices,
            "mesh.data": self.chips // self.slices // FSDP,
            "mesh.fsdp": FSDP,
            "mesh.expert": 1,
            "mesh.tensor": 1,
        }
        return [
            "--config=configs/olmoe_1b_7b.py:v5p-128",
            f"--topology={self.topology}",
            f"--slices={self.slices}",
            "--quick",
            *(f"--config.{name}={value}" for name, value in fields.items()),
        ]


PLACES = [Where(f"v5p:{shape}") for shape in ("2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "16x16x16")]
PLACES.insert(6, Where("v5p:4x8x8", slices=2))


def figures(where: Where, facts: dict[str, Any]) -> dict[str, float]:
    """Of a chip, but for what hosts do: four chips have one."""
    hosts = where.chips / 4
    return {
        "chips": where.chips,
        "parameters, GiB": facts["hbm/parameters_bytes"] / GIB,
        "optimizer, GiB": facts["hbm/optimizer_bytes"] / GIB,
        "peak, GiB": facts["hbm/peak_bytes"] / GIB,
        "PFLOP": facts["flops/compiled"] / 1e15,
        "to and from memory, TB": facts["hbm/moved_bytes"] / 1e12,
        "received, GB": sum(one["bytes"] for one in facts["collectives"]) / 1e9,
        "of it between slices, GB": sum(one["bytes"] for one in facts["collectives"] if "dcn" in one["axes"]) / 1e9,
        "compute, s": facts["bound/compute_seconds"],
        "memory, s": facts["bound/hbm_seconds"],
        "links, s": facts["bound/interconnect_seconds"],
        "step at least, s": facts["bound/step_seconds"],
        "rows a host": ROWS * where.chips / hosts,
        "checkpoint a host, GiB": facts["parameters/all"] * _SAVED_BYTES / hosts / GIB,
        "compiled in, s": facts["compile_seconds"],
        "memory to plan, GiB": facts["plan_bytes"] / GIB,
    }


def plot(found: dict[str, dict[str, float]], file: Path) -> None:
    """Cost of a chip over that on the smallest slice."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    single = [one for label, one in found.items() if "×" not in label]
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    chips = [one["chips"] for one in single]
    lines = {"PFLOP": "o-", "to and from memory, TB": "s-", "received, GB": "^-", "peak, GiB": "d-"}
    lines["step at least, s"] = "k--"
    for name, style in lines.items():
        axes.plot(chips, [one[name] / single[0][name] for one in single], style, label=name.partition(",")[0])
    axes.axhspan(0.9, 1.1, color="0.9", label="within 10 %")
    axes.set(xscale="log", xlabel="chips of v5p", ylabel=f"of a chip, over that of {chips[0]:.0f}", ylim=(0, None))
    axes.set_xticks(chips, [f"{count:.0f}" for count in chips])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(file, dpi=120)


def table(found: dict[str, dict[str, float]]) -> str:
    """A line for each figure, a column for each slice."""
    lines = ["| | " + " | ".join(found) + " |", "|---|" + "---:|" * len(found)]
    for name in next(iter(found.values())):
        lines.append(f"| {name} | " + " | ".join(f"{one[name]:.4g}" for one in found.values()) + " |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, plan, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=4096, help="chips of the largest slice (default: %(default)s)")
    parser.add_argument(
        "--keep", type=Path, default=ROOT / "build" / "plans", help="folder of plans (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file, with its circumstances")
    parser.add_argument("--plot", type=Path, help="draw it into this file; needs the extra bench")
    options = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    for where in PLACES:
        if where.chips <= options.most:
            name = f"scaling_{where.topology.replace(':', '_')}_{where.slices}"
            found[where.label] = figures(where, planned(name, where.arguments, options.keep))
    print(table(found))
    if options.json:
        first = next(iter(found.values()))
        rows = [
            common.Row(name=name, case=label, value=value, unit="", ratio=value / first[name] if first[name] else None)
            for label, one in found.items()
            for name, value in one.items()
        ]
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.markdown:
        head = "\n".join(f"* {name}: {value}" for name, value in common.circumstances().items())
        options.markdown.write_text(f"{head}\n* peaks: {CHIPS['v5p'].source}\n\n{table(found)}\n")
    if options.plot:
        plot(found, options.plot)


if __name__ == "__main__":
    main()

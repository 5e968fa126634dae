"""A plan as one readable page."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moe.plan.chips import GIB


def page(facts: Mapping[str, Any]) -> str:
    """The page for what `plan.plan` returns."""
    parts = [_head(facts), _memory(facts)]
    if "flops/compiled" in facts:
        parts += [_work(facts), _bounds(facts)]
    return "\n\n".join("\n".join(part) for part in (*parts, _faults(facts))).rstrip()


def ranking(plans: Sequence[Mapping[str, Any]]) -> str:
    """Plans of several meshes, a line for each."""
    lines = ["best meshes that were compiled:"]
    for facts in plans:
        if "bound/step_seconds" in facts:
            figures = (
                f"{facts['bound/step_seconds']:.3g} s by {facts['bound/by']}, MFU {100 * facts['bound/mfu']:.1f} %"
            )
        else:
            figures = "doesn't fit"
        lines.append(f"  {_mesh(facts):<44} {facts['hbm/peak_bytes'] / GIB:7.2f} GiB  {figures}")
    return "\n".join(lines)


def _mesh(facts: Mapping[str, Any]) -> str:
    return " × ".join(f"{axis} {size}" for axis, size in facts["mesh"].items() if size > 1) or "one device"


def _head(facts: Mapping[str, Any]) -> Iterator[str]:
    slices = f"{facts['slices']} slices of " if facts["slices"] > 1 else ""
    yield f"{facts['config']} on {slices}{facts['topology']}: {facts['chips']} chips, mesh {_mesh(facts)}"
    yield (
        f"{facts['parameters/all'] / 1e9:.2f} B parameters, {facts['parameters/active'] / 1e9:.2f} B of them for each "
        f"token; {facts['tokens_per_step']:,} tokens a step; compiled in {facts['compile_seconds']:.0f} s by libtpu "
        f"{facts['libtpu']}"
    )


def _memory(facts: Mapping[str, Any]) -> Iterator[str]:
    peak, limit = facts["hbm/peak_bytes"], facts["hbm/limit_bytes"]
    verdict = "fits" if facts["fits"] else f"does NOT fit, by {(peak - limit) / GIB:.2f} GiB"
    yield f"memory of a device: {verdict}: {peak / GIB:.2f} GiB at its peak, of {limit / GIB:.2f}"
    for part in ("parameters", "optimizer", "activations", "temporaries"):
        if f"hbm/{part}_bytes" in facts:
            yield f"  {part:<12} {facts[f'hbm/{part}_bytes'] / GIB:8.2f} GiB"
    if "batch/largest" in facts:
        largest = facts["batch/largest"]
        found = f"the largest batch that fits is {largest:,}" if largest else "no batch fits"
        yield f"  batch_size is {facts['batch_size']:,}; with this mesh and as many micro-batches {found}"


def _work(facts: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"FLOPs of a device: {facts['flops/compiled']:.3g} compiled, {facts['flops/active']:.3g} that the model needs: "
        f"{facts['flops/ratio']:.2f} times as many"
    )
    yield f"bytes to and from memory, about: {facts['hbm/moved_bytes']:.3g}"
    yield "bytes between devices, of one, a step:" if facts["collectives"] else "nothing is sent between devices"
    for one in facts["collectives"]:
        yield f"  {one['kind']:<20} {'+'.join(one['axes']):<20} {one['bytes'] / 1e9:9.3f} GB"


def _bounds(facts: Mapping[str, Any]) -> Iterator[str]:
    yield "a step takes at least, by"
    for part in ("compute", "hbm", "interconnect"):
        mark = "  <- binds" if part == facts["bound/by"] else ""
        yield f"  {part:<14} {1e3 * facts[f'bound/{part}_seconds']:10.1f} ms{mark}"
    yield (
        f"so at best {facts['bound/step_seconds']:.3g} s a step, {facts['bound/tokens_per_second_per_chip']:,.0f} "
        f"tokens/s for a chip, {100 * facts['bound/mfu']:.1f} % MFU; peaks from {facts['source']}"
    )


def _faults(facts: Mapping[str, Any]) -> Iterator[str]:
    for fault in facts["faults"]:
        yield f"! {fault}"

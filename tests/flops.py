"""Floating-point operations of a compiled program, counted from its text: loops as often as they run."""

import math
import re
from collections.abc import Callable


def compiled_flops(hlo: str, choose: Callable[[list[float]], float] = max) -> float:
    """2 x the multiplications of every `dot` in optimised HLO, times the trip counts of the loops around it.

    A conditional counts as its dearest branch, or what `choose` makes of its branches' counts. Raises ValueError for a
    loop whose trip count XLA doesn't state, and for a custom call, whose cost can't be read.
    """
    computations = {
        name: body.splitlines()
        for name, body in re.findall(r"^(?:ENTRY )?%(\S+) \(.*?\{\n(.*?)^\}", hlo, flags=re.MULTILINE | re.DOTALL)
    }
    shapes = {
        name: [int(size) for size in sizes.split(",") if size]
        for name, sizes in re.findall(r"^\s+(?:ROOT )?%(\S+) = \w+\[([\d,]*)\]", hlo, flags=re.MULTILINE)
    }
    known: dict[str, float] = {}

    def cost(computation: str) -> float:
        if computation not in known:
            known[computation] = sum(instruction(line) for line in computations[computation])
        return known[computation]

    def instruction(line: str) -> float:
        if re.search(r" dot\(", line):
            return _dot(line, shapes)
        if " while(" in line:
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            if trips is None:
                raise ValueError(f"a loop without a stated trip count: {line.strip()[:200]}")
            return int(trips[1]) * cost(re.search(r"body=%([^,\s]+)", line)[1])
        if " conditional(" in line:
            names = re.findall(r"(?:true_computation|false_computation)=%([^,\s]+)", line)
            names += re.findall(r"%([^,\s}]+)", (re.search(r"branch_computations=\{([^}]*)\}", line) or ["", ""])[1])
            return choose([cost(name) for name in names])
        if re.search(r" custom-call\(", line) and not re.search(r'custom_call_target="(?:TopK|Sharding)"', line):
            raise ValueError(f"a custom call: {line.strip()[:200]}")
        called = re.search(r" (?:fusion|call)\(.*(?:calls|to_apply)=%([^,\s]+)", line)
        return cost(called[1]) if called else 0.0

    return cost(re.search(r"^ENTRY %(\S+)", hlo, flags=re.MULTILINE)[1])


def _dot(line: str, shapes: dict[str, list[int]]) -> float:
    out = re.search(r"= \w+\[([\d,]*)\]", line)[1]
    left = re.search(r" dot\((?:\w+\[[\d,]*\]\S* )?%([^,\s)]+)", line)[1]
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line)[1]
    sizes = [shapes[left][int(axis)] for axis in contracted.split(",") if axis]
    return 2.0 * math.prod(int(size) for size in out.split(",") if size) * math.prod(sizes)

"""What a compiled program moves: between devices, by collective and axes of the mesh, and between memory and chip."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from moe.plan.program import Branch, Instruction, array_bytes, computations, match, total

# What a device receives from others, over the bytes of the largest array, among n devices: an all-reduce is taken as
# a reduce-scatter and an all-gather.
_RECEIVED: Mapping[str, Callable[[int], float]] = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}


class Transfer(NamedTuple):
    """All collectives of a kind over the same axes of the mesh. devices: that take part in each.

    bytes: that a device receives from others in a step. times: that they run in a step.
    """

    kind: str
    axes: tuple[str, ...]
    devices: int
    bytes: float
    times: float


def transfers(hlo: str, mesh: Mapping[str, int], branch: Branch = max) -> list[Transfer]:
    """The collectives of a program over a mesh of these axes and sizes, most bytes first.

    Of a ragged all-to-all the lesser of what is sent from and what it comes to: no more rows can travel. branch: of
    conditionals. Raises ValueError where groups are written in an unknown way.
    """
    table = dict(_collectives(hlo, mesh))

    def of(which: tuple[str, tuple[str, ...]], part: int) -> float:
        def cost(each: Instruction) -> float:
            kind, axes, size = table.get(each.name, ("", (), 0.0))
            return (size, 1.0)[part] if (kind, axes) == which else 0.0

        return total(hlo, cost, branch=branch, enter=_has_its_own)

    found = []
    for which in sorted({(kind, axes) for kind, axes, _ in table.values()}):
        kind, axes = which
        devices = math.prod(mesh[axis] for axis in axes)
        if devices > 1 and (times := of(which, 1)):
            found.append(Transfer(kind, axes, devices, of(which, 0) * _RECEIVED[kind](devices), times))
    return sorted(found, key=lambda one: -one.bytes)


def _collectives(hlo: str, mesh: Mapping[str, int]) -> Iterator[tuple[str, tuple[str, tuple[str, ...], float]]]:
    """Name, and kind, axes and bytes of the largest array, of every collective; a reduce-scatter is a fusion around an
    all-reduce. What goes between slices is handed to the hosts, by a `send`, and comes back, by a `recv`.
    """
    parts = computations(hlo)
    for part in parts.values():
        for each in part:
            between = re.search(r'_xla_megascale_transfer_type="(\w+)"', each.text)
            if between and each.operation == "recv":
                kind = between[1].lower().replace("_", "-")
                kind = kind if kind in _RECEIVED else "collective-permute"
                yield each.name, (kind, ("dcn",), max(array_bytes(_result(each.text))))
                continue
            scatter = re.search(r"calls=%(all-reduce-scatter[^,\s)]*)", each.text)
            inner = next(one for one in parts[scatter[1]] if one.operation == "all-reduce") if scatter else each
            kind = "reduce-scatter" if scatter else each.operation.removesuffix("-start")
            if kind in _RECEIVED:
                axes = axes_of(first_group(inner.text), mesh)
                size = _size(inner)
                if each.operation == "reduce-scatter":
                    size *= math.prod(mesh[axis] for axis in axes)
                yield each.name, (kind, axes, size)


def _has_its_own(fusion: Instruction) -> bool:
    """Whether the collectives inside a fusion are counted there.

    One that overlaps with fusions stands in each of them, and where it starts and ends: it is counted where it starts.
    """
    inside = re.search(r"calls=%(async_collective_fusion|all-reduce-scatter)", fusion.text)
    return not inside and not fusion.name.startswith("async-collective-done")


def _size(each: Instruction) -> float:
    """Bytes of what a collective returns; what starts asynchronously returns its operands, too."""
    results = array_bytes(each.text[: each.text.index(f" {each.operation}(")])
    if not each.operation.endswith("-start"):
        return sum(results, 0.0)
    return min(results[:2]) if each.operation.startswith("ragged") else max(results)


# Groups ---------------------------------------------------------------------------------------------------------------


def axes_of(members: np.ndarray, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes of the mesh along which these devices, by their number in it, differ."""
    if members.size == 0:
        return tuple(axis for axis, size in mesh.items() if size > 1)
    places = np.array(np.unravel_index(members, tuple(mesh.values())))
    return tuple(axis for axis, line in zip(mesh, places, strict=True) if len(set(line.tolist())) > 1)


def first_group(text: str) -> np.ndarray:
    """The devices of a collective's first group, in any of the ways in which XLA writes groups; none: all devices.

    Of a permutation all that send. Raises ValueError for a form that isn't known.
    """
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", text):
        return np.array(sorted({int(n) for n in re.findall(r"\d+", pairs[1])}))
    if listed := re.search(r"replica_groups=\{(?:\{([\d,]*)\}.*?)?\}", text):
        return np.array([int(n) for n in (listed[1] or "").split(",") if n], int)
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return _iota(iota[2]).reshape(_sizes(iota[1]))[0]
    if named := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        ids = _iota(named[2]) if named[2] else np.arange(math.prod(sizes.values()))
        wanted = re.findall(r"'(\w+)'", named[3])
        if "(" not in named[3]:
            return ids.reshape(tuple(sizes.values()))[
                tuple(slice(None) if name in wanted else 0 for name in sizes)
            ].ravel()
    raise ValueError(f"the groups of a collective can't be read: {text[:300]}.")


def _iota(text: str) -> np.ndarray:
    """[4,2]T(1,0): the numbers from 0 on in that shape, transposed."""
    shape, _, order = text.partition("T")
    sizes = _sizes(shape.strip("[]"))
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    return numbers.transpose(_sizes(order.strip("()"))) if order else numbers


def _sizes(text: str) -> Sequence[int]:
    return tuple(int(size) for size in text.split(","))


# Memory ---------------------------------------------------------------------------------------------------------------

# What neither reads nor writes by itself.
_FREE = {
    "", "bitcast", "call", "conditional", "constant", "get-tuple-element", "parameter", "tuple", "while",
    "after-all", "partition-id", "copy-done", "slice-done", "async-done", "optimization-barrier",
}  # fmt: skip


def moved_bytes(hlo: str, branch: Branch = max) -> float:
    """About how many bytes a program reads from and writes to a device's memory (HBM).

    What every fusion, kernel and single operation takes and gives, except what the compiler keeps on the chip; of an
    array from which a part is taken or in which one is replaced, that part.
    """
    parts = computations(hlo)
    shapes = {each.name: each.text for part in parts.values() for each in part}

    def size(name: str) -> float:
        return sum(array_bytes(_result(shapes[name]), on_chip=False), 0.0) if name in shapes else 0.0

    def cost(each: Instruction) -> float:
        if each.operation in _FREE or each.operation.endswith("-done"):
            return 0.0
        inside = re.search(r"calls=%([^,\s)]+)", each.text) if each.operation == "fusion" else None
        operands = operand_names(each)
        if inside:
            return _fusion_bytes(parts[inside[1]], operands, size, size(each.name))
        if each.operation in ("dynamic-slice", "slice", "gather"):
            return 2 * size(each.name)
        if each.operation == "dynamic-update-slice":
            return 2 * size(operands[1])
        return size(each.name) + sum(map(size, operands))

    return total(hlo, cost, inside_fusions=False, branch=branch)


def _fusion_bytes(
    part: list[Instruction], operands: Sequence[str], size: Callable[[str], float], result: float
) -> float:
    """Of a fusion with these operands and bytes of its result.

    Arrays of a collective that overlaps with the fusion are handed through it, and are neither read nor written.
    """
    named = {each.name: each for each in part}
    inputs = [each for each in part if each.operation == "parameter"]
    whole, sliced = {each.name: False for each in inputs}, {each.name: 0.0 for each in inputs}
    moved = 0.0
    for each in part:
        if each.operation in ("tuple", *_RECEIVED):
            continue
        for index, name in enumerate(operand_names(each)):
            if name not in whole:
                continue
            if index == 0 and each.operation in ("dynamic-slice", "slice", "gather"):
                sliced[name] += sum(array_bytes(_result(each.text)))
            elif index == 0 and each.operation == "dynamic-update-slice":
                # In place: what is replaced is written, and nothing else of the result.
                moved += sum(array_bytes(_result(named[operand_names(each)[1]].text)))
                result -= min(result, sum(array_bytes(_result(each.text))))
            else:
                whole[name] = True
    for each in inputs:
        full = size(operands[int(match(r"parameter\((\d+)\)", each.text)[1])])
        moved += full if whole[each.name] else min(sliced[each.name], full)
    root = part[-1]
    if root.operation == "tuple":
        handed = [named[name] for name in operand_names(root) if name in named]
        handed = [each for each in handed if each.operation in ("parameter", *_RECEIVED)]
        result -= sum(sum(array_bytes(_result(each.text), on_chip=False)) for each in handed)
    return moved + max(result, 0.0)


def operand_names(each: Instruction) -> list[str]:
    """Names of an instruction's operands, in order."""
    start = each.text.index(f" {each.operation}(") + len(each.operation) + 2
    depth, end = 1, start
    while depth:
        depth += {"(": 1, ")": -1}.get(each.text[end], 0)
        end += 1
    return re.findall(r"%([^,\s)]+)", each.text[start:end])


def _result(text: str) -> str:
    """The part of an instruction's text that says its shape."""
    return re.split(r" [a-z][\w-]*\(", text, maxsplit=1)[0]

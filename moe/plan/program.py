"""What a program compiled for TPUs costs, read from its optimised text: FLOPs, and the compiler's own cycles."""

import base64
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

# Makes libtpu compile where there is no TPU, also beside another process that does.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_ACCELERATOR_TYPE": "v5e-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# How Mosaic writes a grid dimension that is known only when the program runs.
_DYNAMIC = -(2**63)
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}


class Instruction(NamedTuple):
    """name = shape operation(…), attributes; `text` is all of that from the shape on."""

    name: str
    operation: str
    text: str


class Kernel(NamedTuple):
    """A Pallas kernel as it was compiled, not as it declares itself.

    step_flops: 2 x the multiplications of one grid step, of its dearest branches. steps: product of the grid's known
    dimensions. dynamic: whether another one is known only at run time (megablox: how many tiles of rows are visited).
    rows: of a tile of its first operand. listed: entries in megablox's list of visits, tiles + groups - 1, which the
    dynamic dimension can't exceed. module: its text, the same for kernels that the compiler schedules but once.
    """

    name: str
    step_flops: float
    steps: int
    dynamic: bool
    rows: int
    listed: int
    module: str


Visits = Callable[[Kernel], float]
Cost = Callable[[Instruction], float]
Branch = Callable[[Iterable[float]], float]


def match(pattern: str, text: str) -> re.Match[str]:
    """Where the pattern is in an instruction's text. Raises ValueError if it isn't."""
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"this text of the compiler's has no {pattern}: {text[:200]}.")
    return found


def listed_visits(kernel: Kernel) -> float:
    """What a dynamic grid dimension can be at most, whatever the groups' sizes."""
    return kernel.listed


def most_visits(rows: int, groups: int, block: int) -> Visits:
    """The same where so many rows fall to so many groups in any way, each padded to whole blocks.

    A tile is visited once for each group with rows in it: S rows in use take ⌈S / tile⌉ visits, and one more for each
    group but the first unless tiles end where groups do.
    """
    used = (rows // block + groups) * block
    return lambda kernel: -(-used // kernel.rows) + (0 if block % kernel.rows == 0 else groups - 1)


def visited(sizes: Sequence[int], tile: int) -> int:
    """The visits that groups of these sizes take."""
    ends = list(itertools.accumulate(sizes, initial=0))
    return sum(-(-stop // tile) - start // tile for start, stop in itertools.pairwise(ends) if stop > start)


@functools.lru_cache(maxsize=2)
def computations(hlo: str) -> dict[str, list[Instruction]]:
    """Instructions of each computation, the entry's under "ENTRY"."""
    # What a kernel says of itself may go over several lines.
    hlo = re.sub(r'\n(?="|\}\})', " ", hlo)
    found = {}
    for entry, name, body in re.findall(r"^(ENTRY )?%(\S+) \(.*?\{\n(.*?)^\}", hlo, flags=re.MULTILINE | re.DOTALL):
        lines = re.findall(r"^\s+(?:ROOT )?%(\S+) = (.*)$", body, flags=re.MULTILINE)
        found["ENTRY" if entry else name] = [
            Instruction(each, (re.search(r" ([a-z][\w-]*)\(", text) or ["", ""])[1], text) for each, text in lines
        ]
    return found


def total(
    hlo: str,
    cost: Cost,
    *,
    inside_fusions: bool = True,
    branch: Branch = max,
    enter: Callable[[Instruction], bool] = lambda _: True,
) -> float:
    """Sum of the cost of every instruction times how often it runs; of a conditional, the dearest or cheapest branch.

    enter: whether what stands inside a fusion counts, where `inside_fusions` lets any.
    Raises ValueError for a loop whose trip count isn't one constant in its condition.
    """
    parts = computations(hlo)

    @functools.cache
    def of(computation: str) -> float:
        return sum(cost(each) + called(each) for each in parts[computation])

    def called(each: Instruction) -> float:
        names = dict(re.findall(r"(body|condition|calls|to_apply)=%([^,\s)]+)", each.text))
        if each.operation == "while":
            return _trips(parts[names["condition"]], each.name) * of(names["body"])
        if each.operation == "conditional":
            branches = (re.search(r"branch_computations=\{([^}]*)\}", each.text) or ["", ""])[1]
            found = re.findall(r"(?:true|false)_computation=%([^,\s]+)", each.text)
            return branch(of(name) for name in found or re.findall(r"%([^,\s]+)", branches))
        if each.operation in ("call", "async-start") or (each.operation == "fusion" and inside_fusions and enter(each)):
            return of(names.get("calls") or names["to_apply"])
        return 0.0

    return of("ENTRY")


def _trips(condition: list[Instruction], loop: str) -> int:
    limits = {int(n) for each in condition for n in re.findall(r"^[su]32\[\]\S* constant\((\d+)\)", each.text)}
    if len(limits) != 1:
        raise ValueError(f"the condition of {loop} holds the constants {sorted(limits)}, not one trip count.")
    return limits.pop()


# FLOPs ----------------------------------------------------------------------------------------------------------------


def flops(hlo: str, visits: Visits = listed_visits, branch: Branch = max) -> float:
    """2 x the multiplications of every convolution, dot, and product in a Pallas kernel.

    TPU programs write matrix products as convolutions, and a batch as a spatial dimension of which each output meets
    one entry. Integer ones, XLA's cumulative sums, count too. A kernel counts what its steps multiply, masked or not,
    times its grid; `visits` says what its dynamic dimension is. branch: of conditionals, `max` or `min`.
    """
    shapes = {each.name: _sizes(each.text) for part in computations(hlo).values() for each in part}

    def cost(each: Instruction) -> float:
        if each.operation == "convolution":
            return _convolution(each.text, shapes)
        if each.operation == "dot":
            left = shapes[match(r" dot\((?:\w+\[[\d,]*\]\S* )?%([^,\s)]+)", each.text)[1]]
            axes = match(r"lhs_contracting_dims=\{([\d,]*)\}", each.text)[1]
            return 2.0 * math.prod(_sizes(each.text)) * math.prod(left[int(axis)] for axis in axes.split(",") if axis)
        if _is_kernel(each):
            kernel = read_kernel(each)
            return kernel.step_flops * kernel.steps * (visits(kernel) if kernel.dynamic else 1)
        return 0.0

    return total(hlo, cost, branch=branch)


def _sizes(text: str) -> list[int]:
    """Of the first array in the text."""
    found = re.search(r"\w+\[([\d,]*)\]", text)
    return [int(size) for size in found[1].split(",") if size] if found else []


def _convolution(text: str, shapes: dict[str, list[int]]) -> float:
    names = match(r" convolution\((?:\w+\[[\d,]*\]\S* )?%([^,\s)]+), (?:\w+\[[\d,]*\]\S* )?%([^,\s)]+)\)", text)
    labels = match(r"dim_labels=(\w+)_(\w+)->(\w+)", text)
    left, right, out = (
        dict(zip(label, sizes, strict=True))
        for label, sizes in zip(labels.groups(), (shapes[names[1]], shapes[names[2]], _sizes(text)), strict=True)
    )
    window = re.search(r"window=\{([^}]*)\}", text)
    fields = dict(field.split("=") for field in window[1].split()) if window else {}
    pairs = 1
    for index, axis in enumerate(sorted(label for label in out if label.isdigit())):
        one = {name: value.split("x")[index] for name, value in fields.items()}
        low = int(one.get("pad", "0_0").split("_")[0])
        stride, spread, gap = (int(one.get(name, 1)) for name in ("stride", "lhs_dilate", "rhs_dilate"))
        # Output i and window entry j meet at this place of the padded and dilated operand, and often at no entry of it.
        places = (i * stride + j * gap - low for i, j in itertools.product(range(out[axis]), range(right[axis])))
        pairs *= sum(place % spread == 0 and 0 <= place // spread < left[axis] for place in places)
    return 2.0 * out["b"] * out["f"] * right["i"] * pairs


def _is_kernel(instruction: Instruction) -> bool:
    return 'custom_call_target="tpu_custom_call"' in instruction.text


def read_kernel(instruction: Instruction) -> Kernel:
    """Reads the Mosaic module inside a call. Raises ValueError if it isn't bytecode, or multiplies in a loop."""
    # Only the package that compiled the module can read it; there is no public way in.
    from jax._src.interpreters import mlir
    from jax._src.lib import tpu

    body = base64.b64decode(match(r'"body":"([^"]*)"', instruction.text)[1])
    if not body.startswith(b"ML\xefR"):
        raise ValueError(f"the kernel {instruction.name} isn't kept as Mosaic bytecode: its cost can't be read.")
    context = mlir.make_ir_context()
    context.allow_unregistered_dialects = True
    tpu.register_dialect(context)
    module = mlir.ir.Module.parse(body, context=context)
    main = module.body.operations[0]
    attributes = {name: str(main.attributes[name]) for name in ("iteration_bounds", "window_params")}
    grid = [int(size) for size in re.findall(r"-?\d+", attributes["iteration_bounds"].split(":")[1])]
    operands = match(r"operand_layout_constraints=\{(.*?\})\}", instruction.text)[1]
    lists = [int(size) for size in re.findall(r"s32\[(\d+)\]", operands)]
    return Kernel(
        instruction.name,
        _multiplied(main),
        math.prod(size for size in grid if size != _DYNAMIC),
        _DYNAMIC in grid,
        int(match(r"window_bounds = array<i64: (\d+)", attributes["window_params"])[1]),
        max(lists, default=1),
        str(module),
    )


def _multiplied(operation: Any) -> float:
    """FLOPs of one operation of a kernel and of what is nested in it."""
    if operation.name.endswith("tpu.matmul"):
        arrays = [*list(operation.operands)[:2], operation.results[0]]
        sizes = [math.prod(map(int, re.findall(r"(\d+)x", str(array.type)))) for array in arrays]
        return 2.0 * math.isqrt(math.prod(sizes))
    regions = [sum(_multiplied(each.operation) for block in region for each in block) for region in operation.regions]
    if operation.name.endswith("scf.if"):
        return float(max(regions, default=0))
    if sum(regions) and operation.name.endswith(("scf.for", "scf.while")):
        raise ValueError(f"a kernel multiplies inside {operation.name}, whose trips aren't counted.")
    return float(sum(regions))


# Arrays and cycles ----------------------------------------------------------------------------------------------------


def array_bytes(text: str, *, on_chip: bool = True) -> list[float]:
    """Bytes of every array whose shape stands in the text; without `on_chip` only of those in memory (HBM)."""
    arrays = re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", text)
    return [
        float(_BYTES.get(dtype, 4)) * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims, layout in arrays
        if on_chip or not re.search(r"S\([1-9]\d*\)", layout)
    ]


def fusion_cycles(hlo: str, branch: Branch = max) -> float:
    """The compiler's own estimates, which it makes for fusions and single operations: not for kernels, sorts,
    collectives. branch: of conditionals."""

    def cost(each: Instruction) -> float:
        found = re.search(r'"estimated_cycles":"(\d+)"', each.text)
        return float(found[1]) if found else 0.0

    return total(hlo, cost, inside_fusions=False, branch=branch)


def kernel_total(hlo: str, cost: Callable[[Kernel], float], branch: Branch = max) -> float:
    """Sum of the cost of every Pallas kernel times how often it is called."""
    return total(hlo, lambda each: cost(read_kernel(each)) if _is_kernel(each) else 0.0, branch=branch)


def kernels(hlo: str) -> list[Kernel]:
    """Every Pallas kernel in the text, each once."""
    return [read_kernel(each) for part in computations(hlo).values() for each in part if _is_kernel(each)]

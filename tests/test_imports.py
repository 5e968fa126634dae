"""Imports go one way, so that each part can be read, tested and replaced without what stands on it."""

import ast
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
# Each place may import those in earlier rows, and others of its own row where it is a package.
ORDER = [
    ["moe.types"],
    ["moe.isotonic", "moe.ops"],
    ["moe.topk"],
    ["moe.routers"],
    ["moe.parallel"],
    ["moe.layers"],
    ["moe.models"],
    ["moe.files"],
    [
        "moe.data",
        "moe.evaluation",
        "moe.optim",
        "moe.checkpoint",
        "moe.checksums",
        "moe.guard",
        "moe.saves",
        "moe.lock",
        "moe.watchdog",
        "moe.events",
        "moe.metrics",
        "moe.tracking",
        "moe.unstacked",
        "moe.compiler",
        "moe.profile",
    ],
    ["moe.tasks"],
    ["moe.config"],
    ["moe.workdir", "moe.cli", "moe.evaluation.report"],
    ["moe.generate", "moe.convert", "moe.inspection"],
    ["moe.initial", "moe.plan", "moe.compare", "moe.harness"],
    ["moe.watch"],
    ["train"],
    ["evaluate", "plan", "replay", "compare"],
    ["sweep"],
]
RANK = {place: rank for rank, places in enumerate(ORDER) for place in places}
# Plain JAX up to the layers, and no mesh before there is one.
WITHOUT_FLAX = RANK["moe.layers"]
WITHOUT_MESH = RANK["moe.parallel"]


def place_of(module: str) -> str | None:
    """The row entry that a module belongs to."""
    places = [place for place in RANK if module == place or module.startswith(f"{place}.")]
    return max(places, key=len, default=None)


def imported(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def sources() -> list[tuple[str, Path]]:
    programs = ("train", "evaluate", "plan", "replay", "compare", "sweep")
    files = [*(REPOSITORY / "moe").rglob("*.py"), *(REPOSITORY / f"{name}.py" for name in programs)]
    dotted = [".".join(path.relative_to(REPOSITORY).with_suffix("").parts) for path in files]
    named = [(name.removesuffix(".__init__"), path) for name, path in zip(dotted, files, strict=True)]
    return [(name, path) for name, path in named if name != "moe"]


def test_every_module_has_its_place() -> None:
    assert [name for name, _ in sources() if place_of(name) is None] == []


def test_imports_go_one_way() -> None:
    wrong = []
    for name, path in sources():
        place = place_of(name) or ""
        for other in imported(ast.parse(path.read_text())):
            target = place_of(other)
            if target and target != place and RANK[target] > RANK[place]:
                wrong.append(f"{name} imports {other}")
    assert wrong == []


def test_the_mathematics_knows_neither_flax_nor_a_mesh() -> None:
    wrong = []
    for name, path in sources():
        rank = RANK[place_of(name) or ""]
        for other in imported(ast.parse(path.read_text())):
            if rank < WITHOUT_FLAX and other.split(".")[0] == "flax":
                wrong.append(f"{name} imports {other}")
            if rank < WITHOUT_MESH and other.startswith("jax.sharding"):
                wrong.append(f"{name} imports {other}")
    assert wrong == []


def test_the_package_imports_no_config() -> None:
    for name, path in sources():
        if name.startswith("moe"):
            assert not any(other.split(".")[0] == "configs" for other in imported(ast.parse(path.read_text()))), name

"""The pages of docs/: that their code runs, their messages exist, and the docstrings they show say what they should."""

import ast
import dataclasses
import functools
import importlib
import inspect
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moe import config as config_lib
from moe import isotonic, routers, topk
from moe.routers import ROUTERS

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
PROGRAMS = ["train.py", "evaluate.py", "compare.py", "sweep.py", "plan.py", "replay.py"]


def documented() -> list[str]:
    """Dotted names of what the API pages show."""
    text = "\n".join(path.read_text() for path in sorted((DOCS / "api").glob("*.md")))
    return re.findall(r"^\.\. auto(?:function|class):: (\S+)$", text, re.MULTILINE)


def find(dotted: str) -> Any:
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)


def parameters(thing: Any) -> list[str]:
    """What a docstring has to speak of; a letter suffix (`logits_TE`) belongs to the name of the shape."""
    if dataclasses.is_dataclass(thing):
        names = [field.name for field in dataclasses.fields(thing) if field.name in vars(thing)["__annotations__"]]
    elif inspect.isclass(thing):
        names = list(getattr(thing, "_fields", ()))
    else:
        names = list(inspect.signature(thing).parameters)
    return [name.partition("_")[0] if re.fullmatch(r"[a-z]+_[A-Z]\w*", name) else name for name in names]


# Docstrings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dotted", documented())
def test_a_docstring_says_what_it_should(dotted: str) -> None:
    thing = find(dotted)
    text = thing.__doc__ or ""
    # Of a data class without a docstring Python makes one of its signature.
    assert text
    assert not text.startswith(f"{thing.__name__}(")
    # Elsewhere names such as num_experts are what `moe.types` says.
    if inspect.isclass(thing) or dotted.startswith(("moe.topk", "moe.isotonic", "moe.inspection")):
        missing = [name for name in parameters(thing) if not re.search(rf"(?<!\w){name}(?!\w)", text)]
        assert missing == []
    if inspect.isfunction(thing) and "raise ValueError" in inspect.getsource(thing):
        assert "Raises" in text


@pytest.mark.parametrize("package", [topk, isotonic, routers])
def test_the_pages_show_all_that_a_package_exports(package: Any) -> None:
    exported = {name for name in package.__all__ if callable(getattr(package, name)) and name != "Solver"}
    assert {f"{package.__name__}.{name}" for name in exported} - set(documented()) == set()


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_names_its_source(name: str) -> None:
    if not ROUTERS[name].__module__.startswith("moe.routers"):  # an example of the pages
        return
    assert re.search(r"\d{4}\.\d{4,5}", ROUTERS[name].__doc__ or "")


# Code -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def kept_routers() -> Iterator[None]:
    before = dict(ROUTERS)
    yield
    ROUTERS.clear()
    ROUTERS.update(before)


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda path: path.stem)
def test_the_code_of_a_page_runs(page: Path, kept_routers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"^```(py|python)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(REPOSITORY)
    # Dataclasses look their module up by name.
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    for kind, source in blocks:
        code = compile(source, f"{page.name}", "exec")
        # What is marked "py" needs a run.
        if kind == "python":
            exec(code, module.__dict__)


def test_a_page_names_only_fields_and_files_that_exist() -> None:
    text = "\n".join(path.read_text() for path in [*DOCS.glob("*.md")])
    tables = [config_lib.load_file(f"configs/{name}.py") for name in ("digits", "stdlib_lm")]
    for field in set(re.findall(r"--config\.([a-z0-9_.]+)=", text)) - {"router.top_p"}:
        found = [functools.reduce(lambda table, name: (table or {}).get(name), field.split("."), t) for t in tables]
        assert any(value is not None for value in found) or field == "router.top_p", field
    targets = set(re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([\w-]+)`", text)) <= targets
    named = set(re.findall(r"`((?:configs|tests|moe|notebooks|benchmarks)/[\w/]+\.\w+)`", text))
    assert [name for name in named if "top_p" not in name and not (REPOSITORY / name).exists()] == []


def test_the_messages_of_troubleshooting_exist() -> None:
    """The words of every message between its variable parts, which stand as ellipses."""
    sources = [*(REPOSITORY / "moe").rglob("*.py"), *(REPOSITORY / name for name in PROGRAMS)]
    written = "\n".join(
        "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        for path in sources
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.JoinedStr)
    )
    headings = re.findall(r"^\*\*.*?\*\*", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    messages = [message for heading in headings for message in re.findall(r"`([^`]*…[^`]*)`", heading)]
    assert len(messages) >= 12
    pieces = [piece.strip() for message in messages for piece in message.split("…")]
    assert [piece for piece in pieces if piece not in written] == []

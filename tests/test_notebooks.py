"""Notebooks: that they could run (`make test`), and that they do (`make test-notebook`)."""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.notebooks import code_cells
from tests.test_imports import imported

REPOSITORY = Path(__file__).parents[1]
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


def test_what_a_notebook_imports_is_there(notebook: Path) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    optional = {re.split("[<>=]", line)[0] for line in project["optional-dependencies"]["bench"]}
    names = {name for _, source in code_cells(notebook) for name in imported(ast.parse(source))}
    assert names
    for name in sorted(name for name in names if name.split(".")[0] not in optional):
        try:
            importlib.import_module(name)
        except ImportError:
            module, _, attribute = name.rpartition(".")
            assert hasattr(importlib.import_module(module), attribute), name


def test_a_notebook_is_kept_without_outputs(notebook: Path) -> None:
    cells = json.loads(notebook.read_text())["cells"]
    assert [cell["id"] for cell in cells if cell.get("outputs") or cell.get("execution_count")] == []


@pytest.mark.notebook
def test_a_notebook_runs_from_its_folder(notebook: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"TFDS_DATA_DIR": str(tmp_path / "data"), "TMPDIR": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "tests.notebooks", notebook.name, f"--figures={tmp_path / 'figures'}"]
    done = subprocess.run(
        command, cwd=notebook.parent, env=environment, capture_output=True, text=True, timeout=1800, check=False
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-5000:]
    assert len(list((tmp_path / "figures").glob("*.png"))) >= 5

"""What a release would hold; `make build` makes it and looks into it."""

import subprocess
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


def test_every_module_is_in_a_package() -> None:
    folders = {path.parent for path in (REPOSITORY / "moe").rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_the_source_archive_takes_every_folder() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if listed.returncode or not listed.stdout:
        pytest.skip("this is not a checkout of git")
    names = [Path(name) for name in listed.stdout.splitlines()]
    words = (REPOSITORY / "MANIFEST.in").read_text().split()
    assert {path.parts[0] for path in names if len(path.parts) > 1} - {"moe"} - set(words) == set()
    # setuptools adds these by itself, and a program is a "*.py".
    known = {"LICENSE", "README.md", "pyproject.toml", "MANIFEST.in", ".gitignore"}
    files = {path.name for path in names if len(path.parts) == 1 and path.suffix != ".py"}
    assert files - known - set(words) == set()


def test_the_version_has_its_heading_in_the_changelog() -> None:
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    headings = [line for line in (REPOSITORY / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    assert headings[0].startswith(f"## {version}, ")

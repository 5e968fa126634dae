"""Looks into the archives of a release, and uses the wheel where nothing else of ours is.

    python tests/archives.py dist

The archives have to hold what docs/release.md says. The wheel is installed into an empty environment, at the versions
of constraints.txt; there every module is imported, and the package's own programs answer --help.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path, PurePosixPath

REPOSITORY = Path(__file__).parents[1]

IMPORT_ALL = """
import importlib, pkgutil, sys
import moe
names = [info.name for info in pkgutil.walk_packages(moe.__path__, "moe.") if not info.name.endswith("__main__")]
for name in names:
    importlib.import_module(name)
assert "site-packages" in moe.__file__, moe.__file__
print(f"{len(names)} modules of {moe.__file__} on Python {sys.version.split()[0]}")
"""


def tracked() -> set[str]:
    """The files that git knows; without git none, and nothing is compared."""
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    return set(listed.stdout.splitlines())


def check_wheel(path: Path) -> None:
    """The package alone, every file of it, and what pip needs to know."""
    names = {name for name in zipfile.ZipFile(path).namelist() if not name.endswith("/")}
    package = {name for name in names if not PurePosixPath(name).parts[0].endswith(".dist-info")}
    expected = {name for name in tracked() if name.startswith("moe/")}
    if expected and package != expected:
        sys.exit(f"{path.name} differs from moe/ in {sorted(package ^ expected)}")
    if any(not name.startswith("moe/") for name in package):
        sys.exit(f"{path.name} holds more than moe/: {sorted(name for name in package if not name.startswith('moe/'))}")
    print(f"{path.name}: {len(package)} files of moe/")


def check_source(path: Path) -> None:
    """Every file of the repository, but for those that only git and editors need."""
    with tarfile.open(path) as archive:
        names = {str(PurePosixPath(*PurePosixPath(member.name).parts[1:])) for member in archive if member.isfile()}
    if missing := {name for name in tracked() - names if name != ".gitignore"}:
        sys.exit(f"{path.name} lacks {sorted(missing)}")
    made = {name for name in names if name.startswith("moe_jax.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    if tracked() and (more := names - tracked() - made):
        sys.exit(f"{path.name} holds what git doesn't know: {sorted(more)}")
    print(f"{path.name}: {len(names)} files")


def use_wheel(path: Path) -> None:
    """In an environment and a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder) / "bin" / "python")
        pins = str(REPOSITORY / "constraints.txt")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        environment["JAX_PLATFORMS"] = "cpu"
        quiet = ["--quiet", "--disable-pip-version-check"]
        install = [python, "-m", "pip", "install", *quiet, "--constraint", pins, str(path.absolute())]
        for command in (
            install,
            [python, "-c", "import moe.routers"],
            [python, "-c", IMPORT_ALL],
            [python, "-m", "moe.convert", "--help"],
            [python, "-m", "moe.generate", "--help"],
            [python, "-m", "moe.harness", "--help"],
        ):
            silent = command[-1] == "--help"
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=silent, check=False)
            if done.returncode:
                sys.exit(f"in an empty environment this fails: {' '.join(command)}")


def main() -> None:
    """The command line."""
    folder = Path(sys.argv[1])
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    check_wheel(wheel)
    check_source(source)
    use_wheel(wheel)
    print(f"{wheel}\n{source}")


if __name__ == "__main__":
    main()

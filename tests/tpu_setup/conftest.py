"""A cloud of its own for each test, and the scripts run in it."""

import json
import os
import shlex
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
# What hosts have in place of Python and uv; what they install is not what these tests are about.
STUBS = {
    "python3": """
mkdir -p "$HOME/.local/bin"
cp "{bin}/uv" "$HOME/.local/bin/uv"
echo "$@" >> "$HOME/installed"
""",
    "uv": """
echo "$@" >> "$HOME/installed"
[ "$1" != venv ] || {{ mkdir -p .venv/bin; cp "{bin}/venv-python" .venv/bin/python; }}
""",
    "venv-python": """
if [ "$1" = -c ]; then echo "installed: jax"; exit; fi
shift
exec "{python}" "{here}/train_stub.py" "$@"
""",
    "hostname": 'basename "$HOME"',
}


class World:
    """The cloud as gcloud's stand-in has it, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("MOE_")}
        self.environment |= {"FAKE_CLOUD": str(folder), "PATH": f"{folder / 'local'}:{os.environ['PATH']}"}
        self._write("local/gcloud", f'exec "{sys.executable}" "{HERE / "gcloud.py"}" "$@"')
        for name, text in STUBS.items():
            self._write(f"bin/{name}", text.format(bin=folder / "bin", python=sys.executable, here=HERE))
        self.plan(steps=5)

    def _write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def plan(self, **values: Any) -> None:
        """What the stand-in for train.py does."""
        (self.folder / "bucket").mkdir(exist_ok=True)
        (self.folder / "bucket" / "plan.json").write_text(json.dumps(values))

    def scenario(self, **values: Any) -> None:
        """What gcloud's stand-in does."""
        (self.folder / "scenario.json").write_text(json.dumps(values))

    def start(self, script: str, *arguments: str, place: bool = True, **environment: str) -> subprocess.Popen:
        where = ("--project=p", "--zone=z") if place else ()
        command = [str(REPOSITORY / "tpu_setup" / script), *where, *arguments]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        # Where the tests themselves run in the background, SIGINT is ignored, and a shell can't undo that.
        return subprocess.Popen(
            ["env", "--default-signal=INT", *command], env={**self.environment, **environment}, **pipes
        )

    def run(self, script: str, *arguments: str, code: int = 0, **options: Any) -> str:
        """What the script prints, if it ends with this exit code."""
        process = self.start(script, *arguments, **options)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, (out, err)
        return out + err

    def calls(self) -> list[list[str]]:
        """Every call of gcloud so far, but for those that read its configuration."""
        file = self.folder / "calls.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [call for call in map(json.loads, lines) if call[1:3] != ["config", "get-value"]]

    def left(self) -> dict[str, Any]:
        """What is billed."""
        state = json.loads((self.folder / "cloud.json").read_text())
        return {**state["requests"], **state["nodes"]}

    def hosts(self) -> list[Path]:
        return sorted((self.folder / "hosts").glob("*"))

    def close(self) -> None:
        for pid in self.folder.glob("hosts/*/moe/run.pid"):
            subprocess.run(["kill", "-9", pid.read_text().strip()], check=False, capture_output=True)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    found = World(tmp_path)
    yield found
    found.close()


def shown(text: str) -> list[list[str]]:
    """The commands of a dry run, of which some go over several lines."""
    commands, begun = [], ""
    for line in text.splitlines(keepends=True):
        begun += line
        try:
            words = shlex.split(begun)
        except ValueError:  # a quotation that is still open
            continue
        begun = ""
        commands += [words] if words[:1] == ["gcloud"] else []
    assert begun == ""
    return commands

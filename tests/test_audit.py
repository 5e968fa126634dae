"""What `make audit` makes of pip-audit's answers."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import audit

PINS = "a==1\nb==2 ; python_full_version < '3.12'\nb==3 ; python_full_version >= '3.12'\n"


def command(folder: Path, reports: dict[str, Any], error: str = "") -> list[str]:
    """A stand-in for pip-audit that has a report for each list of pins; for others it says what is wrong."""
    script = folder / "pip_audit.py"
    script.write_text(
        "import json, sys\n"
        "wanted, report = (word.partition('=')[2] for word in sys.argv[1:])\n"
        f"found = {reports!r}.get(open(wanted).read())\n"
        f"found is None and sys.exit({error!r})\n"
        "json.dump({'dependencies': found}, open(report, 'w'))\n"
        "sys.exit(any(entry.get('vulns') for entry in found))\n"
    )
    return [sys.executable, str(script)]


def sound(name: str, version: str, *vulns: dict) -> dict:
    return {"name": name, "version": version, "vulns": list(vulns)}


BAD = {"id": "PYSEC-1", "fix_versions": ["4"], "aliases": [], "description": ""}
FIRST, SECOND = "a==1\nb==2\n", "b==3\n"
UNREACHED = "requests.exceptions.ConnectionError: Failed to resolve"


@pytest.mark.parametrize(
    ("reports", "error", "code", "said"),
    [
        (
            {FIRST: [sound("a", "1"), sound("b", "2")], SECOND: [sound("b", "3")]},
            "",
            0,
            "0 vulnerabilities are known; 3 of 3",
        ),
        (
            {FIRST: [sound("a", "1"), sound("b", "2")], SECOND: [sound("b", "3", BAD)]},
            "",
            1,
            "b 3: PYSEC-1, fixed in 4",
        ),
        # What was found before the connection broke is said.
        ({FIRST: [sound("a", "1", BAD), sound("b", "2")]}, UNREACHED, 1, "1 vulnerabilities are known; 2 of 3"),
        ({}, UNREACHED, 0, "can't be reached from here, so no pin"),
        # Such is the answer of an index that has packages alone.
        ({FIRST: [{"name": "a", "skip_reason": "not found"}], SECOND: []}, "", 0, "can't be reached from here"),
        ({FIRST: [sound("a", "1"), {"name": "b", "skip_reason": "x"}], SECOND: []}, "", 0, "not in the database: b"),
        ({}, "usage: no such option", 1, "pip-audit failed: usage: no such option"),
    ],
)
def test_answers(
    reports: dict, error: str, code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pins = tmp_path / "constraints.txt"
    pins.write_text(PINS)
    assert audit.main(str(pins), command(tmp_path, reports, error)) == code
    assert said in capsys.readouterr().out


def test_every_pin_is_looked_up_whatever_its_python() -> None:
    assert audit.split(PINS) == [FIRST, SECOND]
    text = (Path(__file__).parents[1] / "constraints.txt").read_text()
    lists = audit.split(text)
    assert sum(pins.count("\n") for pins in lists) == len(text.splitlines())
    for pins in lists:
        names = [line.partition("==")[0] for line in pins.splitlines()]
        assert len(names) == len(set(names))
    assert json.dumps(lists).count("jaxlib==") == 2

"""Looks constraints.txt up in the database of known vulnerabilities: `make audit`.

    python tests/audit.py constraints.txt

Pins of every Python are looked up, whichever runs this. Exit code 0 where nothing is known against them, or where the
database can't be reached, which is said; 1 where something is.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Of pins alone, as they stand: nothing is resolved, installed or asked of an index.
COMMAND = (sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "--progress-spinner=off", "--format=json")
_UNREACHED = re.compile(r"requests\.exceptions\.|ConnectionError|ServiceError|network may be blocking|not connect")


class Unreachable(Exception):
    """The database didn't answer."""


def split(text: str) -> list[str]:
    """The pins without their markers, in lists that have none of a package twice."""
    lists: list[dict[str, str]] = []
    for line in text.splitlines():
        pin = line.partition(";")[0].strip()
        name = pin.partition("==")[0]
        if not pin or pin.startswith("#"):
            continue
        target = next((each for each in lists if name not in each), None)
        if target is None:
            lists.append(target := {})
        target[name] = pin
    return ["\n".join(each.values()) + "\n" for each in lists]


def look_up(pins: str, command: Sequence[str]) -> list[dict[str, Any]]:
    """What pip-audit says of each. Raises Unreachable, or RuntimeError for what else is wrong with it."""
    with tempfile.TemporaryDirectory() as folder:
        wanted, report = Path(folder, "pins.txt"), Path(folder, "report.json")
        wanted.write_text(pins)
        done = subprocess.run(
            [*command, f"--requirement={wanted}", f"--output={report}"], capture_output=True, text=True, check=False
        )
        if report.exists() and report.stat().st_size:
            return json.loads(report.read_text())["dependencies"]
    if _UNREACHED.search(done.stderr):
        raise Unreachable
    raise RuntimeError(f"audit: pip-audit failed: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}")


def main(path: str, command: Sequence[str] = COMMAND) -> int:
    """Prints what is known, and returns the exit code."""
    lists = split(Path(path).read_text())
    count = sum(pins.count("\n") for pins in lists)
    found: list[dict[str, Any]] = []
    try:
        for pins in lists:
            found += look_up(pins, command)
    except Unreachable:
        pass
    except RuntimeError as error:
        print(error)
        return 1
    # An index without the database knows no package, and says so of each of them.
    audited = [entry for entry in found if "skip_reason" not in entry]
    if not audited:
        print(f"audit: the database of vulnerabilities can't be reached from here, so no pin of {path} was looked up.")
        return 0
    bad = [(entry, each) for entry in audited for each in entry["vulns"]]
    for entry, each in bad:
        fixed = f"fixed in {', '.join(each['fix_versions'])}" if each["fix_versions"] else "no version fixes it"
        print(f"{entry['name']} {entry['version']}: {each['id']}, {fixed}")
    if skipped := sorted(entry["name"] for entry in found if "skip_reason" in entry):
        print(f"not in the database: {', '.join(skipped)}")
    print(f"audit: {len(bad)} vulnerabilities are known; {len(audited)} of {count} pins were looked up.")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

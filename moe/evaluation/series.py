"""Files with a line of JSON for each checkpoint of a run that was evaluated."""

import json
from typing import Any

from moe.files import AnyPath, write_whole
from moe.parallel import hosts

Line = dict[str, Any]


class Series:
    """Lines by file, each file written whole whenever a step is added: nothing can be appended to on a bucket.

    settings: under which all lines are made; where there are any, they stand in each line.
    """

    def __init__(self, workdir: AnyPath, files: dict[str, str], settings: list[str], *, goes_on: bool) -> None:
        """files: by the names that `add` is given. goes_on: keep the lines of files that are there.

        Raises ValueError where these can't be read, or were made under other settings.
        """
        self._paths = {name: workdir / file for name, file in files.items()}
        self._settings = settings
        self._lines = {name: self._read(path) if goes_on else [] for name, path in self._paths.items()}

    def steps(self, name: str, **values: Any) -> set[int]:
        """The steps that a file has lines of, with these values."""
        return {line["step"] for line in self._lines[name] if all(line.get(key) == values[key] for key in values)}

    def add(self, results: dict[str, Line]) -> None:
        """A line with a "step" for each of some files, in the order of steps, instead of one of the same step."""
        for name, line in results.items():
            self._lines[name] = [one for one in self._lines[name] if one["step"] != line["step"]]
            self._lines[name].append(line | ({"settings": self._settings} if self._settings else {}))
            self._lines[name].sort(key=lambda one: one["step"])
            if hosts.is_first():
                write_whole(self._paths[name], "".join(json.dumps(one) + "\n" for one in self._lines[name]))

    def _read(self, path: AnyPath) -> list[Line]:
        if not path.exists():
            return []
        try:
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found = {int(line["step"]): line.get("settings", []) for line in lines}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} can't be read ({type(error).__name__}): remove it to start anew.") from None
        for step, settings in found.items():
            if settings != self._settings:
                raise ValueError(
                    f"{path} has step {step} under settings {settings}, and this command asks for {self._settings}: "
                    "remove it to start anew."
                )
        return lines

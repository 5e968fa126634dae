"""Files of runs, on disks and on object storage (gs://, through etils' epath and gcsfs), and lines of JSON in them."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any, TypeAlias

from etils import epath

AnyPath: TypeAlias = Path | epath.Path


def open_path(name: str) -> AnyPath:
    """The path of that name, as given. Raises ValueError where what reads its kind isn't installed."""
    kind, separator, _ = name.partition("://")
    if separator and kind != "gs":
        raise ValueError(f"path '{name}' must be one of this machine or of Google Cloud Storage, gs://BUCKET/….")
    if separator and importlib.util.find_spec("gcsfs") is None:
        raise ValueError(f"path '{name}' needs gcsfs, which isn't installed: pip install 'moe-jax[gcs]'.")
    return epath.Path(name) if separator else Path(name)


def is_remote(path: Any) -> bool:
    """Whether a path is on object storage: an object appears whole, can't be appended to, and folders come for free."""
    return "://" in str(path)


def write_whole(path: AnyPath, text: str) -> None:
    """Writes the file whole or not at all; where its name is a link, the link is replaced. Raises OSError naming it."""
    if is_remote(path):
        path.write_text(text)
        return
    temporary = path.with_suffix(".tmp")
    try:
        # What is left of a killed process, or a link that leads elsewhere.
        temporary.unlink(missing_ok=True)
        with open(temporary, "x") as file:
            file.write(text)
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def read_lines(path: AnyPath) -> list[dict[str, Any]]:
    """The tables in a file of one JSON a line; [] where there is no file, and without what a crash has cut off."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    lines = []
    for line in data.splitlines():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) and isinstance(value.get("step"), int):
            lines.append(value)
    return lines


def is_number(value: Any) -> bool:
    """Whether a value is a finite number that a float can hold."""
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def describe(error: Exception) -> str:
    """An exception of a library in one line; of a long one begin and end, where the system's own words stand."""
    reason = " ".join(str(error).split())
    reason = reason if len(reason) <= 240 else f"{reason[:110]} … {reason[-125:]}"
    return f"{type(error).__name__}: {reason}".removesuffix(".")

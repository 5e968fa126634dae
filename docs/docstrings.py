"""The docstrings of this project as reStructuredText.

They are prose to be read in an editor: `code` in single backticks, fields and arguments as "name: what it is", several
in a line or one over several lines, tables indented. Everything else is escaped, since none of it is markup.
"""

import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Set
from typing import Any

_ARXIV = re.compile(r"(?<![\w.])(\d{4}\.\d{4,5})(?![\w.]\d)")
_CODE = re.compile(r"(`[^`]+`)")


def field_names(thing: Any) -> set[str]:
    """What a docstring may describe as "name: …": arguments, fields of what is returned, and entries of a tuple."""
    names = set(getattr(thing, "_fields", ()))
    if dataclasses.is_dataclass(thing):
        names |= {field.name for field in dataclasses.fields(thing)}
    function = thing.__init__ if inspect.isclass(thing) else thing
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return names
    names |= set(signature.parameters) | set(getattr(signature.return_annotation, "_fields", ()))
    if inspect.isclass(thing) and inspect.isfunction(vars(thing).get("__call__")):
        names |= set(inspect.signature(thing.__call__).parameters)
    return names


def to_rst(text: str, names: Set[str] = frozenset(), thing: Any = None) -> list[str]:
    """The lines of the docstring of `thing` in reStructuredText; `names` begin items of a list."""
    lines: list[str] = []
    for block in re.split(r"\n\s*\n", textwrap.dedent(text).strip("\n")):
        if not block.strip():
            continue
        if all(line.startswith("    ") for line in block.split("\n")):
            lines += ["::", "", *block.split("\n"), ""]
            continue
        for part in _items(re.sub(r"\s+", " ", block).strip(), block, names):
            name, _, rest = part.partition(": ") if part.startswith("\0") else ("", "", part)
            if name:
                quoted = ", ".join(f"``{word}``" for word in name[1:].split(", "))
                lines += [f"* {quoted}: {_inline(rest, thing)}", ""]
            else:
                lines += [_inline(rest, thing), ""]
    return lines


def _items(flat: str, block: str, names: Set[str]) -> list[str]:
    """The block's paragraphs and its items; an item begins with a null character and its name."""
    one = "|".join(sorted(map(re.escape, names), key=len, reverse=True)) or r"(?!)"
    item = rf"(?:{one})(?:, (?:{one}))*(?:\([^()]*\))?: "
    choice = r"\w+ = \"\w+\": "
    pieces = re.split(rf"(?:^|(?<=[.:)…] ))(?=(?:{item})|(?:{choice})|Raises |Returns )", flat)
    starts = re.compile(rf"{item}|{choice}")
    return [("\0" if starts.match(piece) else "") + piece.strip() for piece in pieces if piece.strip()]


def _inline(text: str, thing: Any) -> str:
    parts = []
    for part in _CODE.split(text):
        if part.startswith("`") and part.endswith("`") and len(part) > 2:
            parts.append(_code(part[1:-1], thing))
        else:
            escaped = re.sub(r"([\\*|_`])", r"\\\1", part)
            parts.append(_ARXIV.sub(r"`\1 <https://arxiv.org/abs/\1>`__", escaped))
    # Markup has to stand apart from the letters around it.
    return "\\ ".join(part for part in parts if part) if len(parts) > 1 else parts[0]


def _code(code: str, thing: Any) -> str:
    """A reference where the code names a part of this project, otherwise code."""
    if not re.fullmatch(r"[A-Za-z_][\w.]*", code):
        return f"``{code}``"
    module = getattr(thing, "__module__", None) or getattr(thing, "__name__", "")
    for candidate in (code, f"moe.{code}", f"{module}.{code}"):
        if full := _full_name(candidate):
            return f":py:obj:`{code} <{full}>`"
    return f"``{code}``"


def _full_name(dotted: str) -> str:
    """The name under which pages show it: that of the nearest package that exports it. Empty where there is none."""
    if not dotted.startswith("moe."):
        return ""
    module, attributes = dotted, []
    while module:
        try:
            found: Any = importlib.import_module(module)
            break
        except ImportError:
            module, _, last = module.rpartition(".")
            attributes.insert(0, last)
    try:
        for attribute in attributes:
            found = getattr(found, attribute)
    except AttributeError:
        return ""
    if not attributes:
        return module
    package = module.rpartition(".")[0]
    exported = (
        package and package != "moe" and attributes[0] in getattr(importlib.import_module(package), "__all__", ())
    )
    return ".".join([package if exported else module, *attributes])

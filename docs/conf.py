"""How Sphinx makes the pages: `make docs`, from the Markdown here and the docstrings of `moe`."""

import ast
import inspect
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

_project = tomllib.loads((DOCS.parent / "pyproject.toml").read_text())["project"]
project, release = _project["name"], _project["version"]
extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"{project} {release}"
# Readers are told apart by nothing, and nothing is fetched from elsewhere: formulas are MathML.
html_math_renderer = "mathml"
smartquotes = False  # code stands in docstrings without markup too
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
add_module_names = False
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 100


def _docstring(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    from docstrings import field_names, to_rst

    lines[:] = to_rst("\n".join(lines), field_names(thing), thing)


def _signature(app: Sphinx, what: str, name: str, thing: Any, options: Any, given: str, returned: str) -> Any:
    """The signature as the source has it, where shapes have their letters and types their short names."""
    if inspect.isclass(thing) and issubclass(thing, BaseException):
        return None
    try:
        node = ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]
    except (OSError, TypeError, IndentationError):
        return None
    if isinstance(node, ast.ClassDef):
        init = next((part for part in node.body if getattr(part, "name", "") == "__init__"), None)
        if init is None:
            if any(getattr(base, "id", "") == "Protocol" for base in node.bases):
                return "", None
            fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
            return f"({', '.join(map(ast.unparse, fields))})", None
        node = init
    if not isinstance(node, ast.FunctionDef):
        return None
    for arguments in (node.args.posonlyargs, node.args.args):
        arguments[:] = [argument for argument in arguments if argument.arg not in ("self", "cls")]
    returns = ast.unparse(node.returns) if node.returns and node.name != "__init__" else None
    return f"({ast.unparse(node.args)})", returns


def _skip(app: Sphinx, what: str, name: str, thing: Any, skip: bool, options: Any) -> bool:
    """Fields of tuples, which the tuple's own docstring explains."""
    return skip or type(thing).__name__ == "_tuplegetter"


def _mathml(node: nodes.Element, *, as_block: bool) -> str:
    try:
        return tex2mathml(node.astext(), as_block=as_block)
    except MathError as error:
        logging.getLogger(__name__).warning("%s in %s", error, node.astext(), location=node)
        return ""


def _inline_math(self: Any, node: nodes.Element) -> None:
    self.body.append(_mathml(node, as_block=False))
    raise nodes.SkipNode


def _block_math(self: Any, node: nodes.Element) -> None:
    self.body.append(f'<div class="math">{_mathml(node, as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """What Sphinx calls."""
    app.connect("autodoc-process-docstring", _docstring)
    app.connect("autodoc-process-signature", _signature)
    app.connect("autodoc-skip-member", _skip)
    app.add_html_math_renderer("mathml", (_inline_math, None), (_block_math, None))

"""Runs the code cells of a notebook, one after the other in one namespace, as `Restart and run all` would.

    python -m tests.notebooks notebooks/routers.ipynb [--figures FOLDER]

Plain Python, without a kernel: cells hold no magics. What cells print goes to the terminal with the seconds they took;
the figures they show are saved in the folder, or thrown away. Ends with the traceback of the first cell that fails.
"""

import argparse
import json
import time
import types
from pathlib import Path
from typing import Any


def code_cells(path: Path) -> list[tuple[int, str]]:
    """The number and the source of every cell of code."""
    cells: list[dict[str, Any]] = json.loads(path.read_text())["cells"]
    return [(number, "".join(cell["source"])) for number, cell in enumerate(cells) if cell["cell_type"] == "code"]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--figures", type=Path, help="folder for the figures")
    arguments = parser.parse_args()

    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figures = arguments.figures and arguments.figures.absolute()
    if figures:
        figures.mkdir(parents=True, exist_ok=True)
    shown = 0

    def show(*_: Any, **__: Any) -> None:
        nonlocal shown
        for figure in map(plt.figure, plt.get_fignums()):
            figure.canvas.draw()
            if figures:
                figure.savefig(figures / f"{shown}.png")
            shown += 1
        plt.close("all")

    plt.show = show
    module = types.ModuleType("__main__")
    for number, source in code_cells(arguments.notebook):
        start = time.monotonic()
        exec(compile(source, f"{arguments.notebook}, cell {number}", "exec"), module.__dict__)
        print(f"[cell {number}: {time.monotonic() - start:.1f} s]", flush=True)
    print(f"{shown} figures")


if __name__ == "__main__":
    main()

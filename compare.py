"""Compares finished runs of one task: means over seeds, paired differences, the fields of the configs that differ.

    python compare.py runs/softmax-0 runs/softmax-1 runs/sparse-0 runs/sparse-1 [--baseline runs/softmax-0]

Runs that differ in nothing but the seed belong together. A table goes to the terminal, a page to compare.html in the
current folder; --page FILE puts it elsewhere. The baseline is the config of the first run, or of the one named.
"""

import json
from collections.abc import Sequence

from moe import cli
from moe.compare.page import html_page, text_page
from moe.compare.runs import Run, check_comparable, group_runs, read_run
from moe.compare.statistics import Comparison, compare
from moe.files import AnyPath, is_remote, open_path, write_whole
from train import DEFAULT_CONFIG


def compare_runs(paths: Sequence[AnyPath], baseline: AnyPath | None = None) -> Comparison:
    """The comparison of the runs in these folders, each counted once; the baseline is one of them, or joins them.

    Raises CheckpointError or Failure where one is no finished run, UsageError where they don't compare.
    """
    runs: dict[str, Run] = {}
    for path in (*paths, *([] if baseline is None else [baseline])):
        runs.setdefault(_key(path), read_run(path))
    with cli.usage_errors():
        check_comparable(list(runs.values()))
    groups, differing = group_runs(list(runs.values()))
    wanted = next(iter(runs.values())) if baseline is None else runs[_key(baseline)]
    return compare(groups, differing, next(group for group in groups if wanted in group.runs))


def _key(path: AnyPath) -> str:
    return str(path.resolve())


def _open_target(flag: str, name: str) -> AnyPath:
    """The file that a flag names. Raises ValueError where none can be written there."""
    path = open_path(name)
    if not is_remote(path) and path.is_dir():
        raise ValueError(f"{flag}={name} must name a file, and it is a folder.")
    if not is_remote(path) and not path.parent.is_dir():
        raise ValueError(f"{flag}={name} can't be written, as there is no folder {path.parent}: make it first.")
    return path


def main(argv: Sequence[str]) -> None:
    """The command line."""
    parser = cli.make_parser(__doc__ or "", DEFAULT_CONFIG)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="workdir of a finished run")
    parser.add_argument("--baseline", metavar="RUN", help="differences are from this run's config (default: the first)")
    parser.add_argument(
        "--page", default="compare.html", metavar="FILE", help="where the page goes (default: %(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", help="writes the same figures")
    arguments, overrides = cli.parse(parser, argv)
    if overrides:
        raise cli.UsageError("compare.py takes no config fields: the configs are those of the runs.")
    with cli.usage_errors():
        paths = [open_path(name) for name in arguments.runs]
        baseline = open_path(arguments.baseline) if arguments.baseline is not None else None
        page = _open_target("--page", arguments.page)
        figures = None if arguments.json is None else _open_target("--json", arguments.json)
    comparison = compare_runs(paths, baseline)
    write_whole(page, html_page(comparison))
    if figures is not None:
        write_whole(figures, json.dumps(comparison.json(), indent=2) + "\n")
    print(f"{text_page(comparison)}\n\npage: {page}")


if __name__ == "__main__":
    cli.run(main)

"""A comparison as text and as a page."""

from collections.abc import Mapping, Sequence
from typing import Any

from moe.compare.runs import Group
from moe.compare.statistics import Comparison, Estimate
from moe.evaluation.charts import Dots, Series, dot_chart, line_chart
from moe.evaluation.page import details, page, section, side_by_side, table
from moe.files import is_number

# What is drawn over steps, where the runs have it and this measure compares.
_CURVES = {"train/loss": "test/loss"} | {n: n for n in ("test/loss", "test/accuracy", "test/bits_per_byte")}
_NOTE = (
    "Mean ± standard error over seeds (the standard deviation over √seeds); a single seed has none. Differences are of "
    "runs with the same seed, so that what a seed does to both drops out."
)


def measure_name(name: str) -> str:
    """test/bits_per_byte -> test bits per byte."""
    return name.replace("/", " ").replace("_", " ")


def estimate_rows(comparison: Comparison) -> list[list[str]]:
    """Group, seeds, and the measures' means."""
    return _rows(comparison.estimates, comparison.measures, ["config", "seeds"])


def difference_rows(comparison: Comparison) -> list[list[str]]:
    """Group, pairs, and the measures' differences from the baseline; [] where no seed is shared."""
    if not comparison.differences:
        return []
    return _rows(comparison.differences, comparison.measures, [f"minus {comparison.baseline.name}", "pairs"], "+")


def text_page(comparison: Comparison) -> str:
    """The comparison in lines for a terminal."""
    parts = [_summary(comparison), _align(estimate_rows(comparison))]
    if rows := difference_rows(comparison):
        parts.append(_align(rows))
    elif len(comparison.groups) > 1:
        parts.append(f"no run has a seed of {comparison.baseline.name}: there are no paired differences")
    if comparison.differing:
        parts.append("the configs differ in\n" + _align(differing_rows(comparison)))
    return "\n\n".join(parts)


def differing_rows(comparison: Comparison) -> list[list[str]]:
    """Field, and its value in each group."""
    head = ["field", *(group.name for group in comparison.groups)]
    return [head, *([name, *map(str, values)] for name, values in comparison.differing.items())]


def html_page(comparison: Comparison) -> str:
    """The comparison as a page of its own."""
    groups, measures = comparison.groups, comparison.measures
    dots = [_dots(comparison, name) for name in measures]
    shown = {name: _curves(groups, name) for name, of in _CURVES.items() if of in measures}
    # What was measured once is no curve.
    curves = [line_chart(measure_name(n), series) for n, series in shown.items() if any(len(s.x) > 1 for s in series)]
    means, *rows = estimate_rows(comparison)
    pairs = difference_rows(comparison)
    config = differing_rows(comparison)
    return page(
        "Comparison of runs",
        _summary(comparison),
        (
            section("Means", table(means, rows), note=_NOTE),
            section("Paired differences", table(pairs[0], pairs[1:]) if pairs else ""),
            section("Seeds", side_by_side(dots), note="A dot is a run; the cross is the mean and its standard error."),
            section("Learning curves", side_by_side(curves), note="Faint: every seed. Strong: their mean."),
            section("Fields that differ", table(config[0], config[1:]) if comparison.differing else ""),
            section("Runs", table(*_runs(comparison))),
            details("As text", text_page(comparison)),
        ),
    )


def _summary(comparison: Comparison) -> str:
    """image: digits, test; 6 runs of 2 configs."""
    counts = {"run": sum(len(group.runs) for group in comparison.groups), "config": len(comparison.groups)}
    words = (f"{count} {what}{'' if count == 1 else 's'}" for what, count in counts.items())
    return f"{comparison.task}; {' of '.join(words)}"


def _rows(
    tables: Mapping[str, Mapping[str, Estimate]], measures: Sequence[str], head: list[str], sign: str = ""
) -> list[list[str]]:
    rows = [head + [measure_name(name) for name in measures]]
    for group, values in tables.items():
        counts = {one.number for one in values.values()}
        texts = [f"{sign if values[name].mean > 0 else ''}{values[name]}" for name in measures]
        rows.append([group, str(max(counts, default=0)), *texts])
    return rows


def _align(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _dots(comparison: Comparison, name: str) -> str:
    rows = []
    for index, group in enumerate(comparison.groups):
        one = comparison.estimates[group.name][name]
        rows.append(Dots(group.name, [run.measures()[name] for run in group.runs], one.mean, one.error, index))
    return dot_chart(measure_name(name), rows)


def _curves(groups: Sequence[Group], name: str) -> list[Series]:
    """Of each group the runs, faint, and their mean at the steps that all of them have."""
    series = []
    for index, group in enumerate(groups):
        curves = [curve for run in group.runs if (curve := _curve(run.lines, name))]
        series += [Series(group.name, list(c), list(c.values()), index, faint=True) for c in curves if len(curves) > 1]
        shared = [step for step in curves[0] if all(step in curve for curve in curves)] if curves else []
        means = [sum(curve[step] for curve in curves) / len(curves) for step in shared]
        series.append(Series(group.name, shared, means, index))
    return series


def _curve(lines: Sequence[Mapping[str, Any]], name: str) -> dict[int, float]:
    return {line["step"]: float(line[name]) for line in lines if is_number(line.get(name))}


def _runs(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    head = ["config", "seed", "folder", "step", *map(measure_name, comparison.measures)]
    rows = []
    for group in comparison.groups:
        for run in group.runs:
            values = run.measures()
            numbers = [f"{values[name]:.4g}" for name in comparison.measures]
            rows.append([group.name, str(run.seed), str(run.path), str(run.result["step"]), *numbers])
    return head, rows

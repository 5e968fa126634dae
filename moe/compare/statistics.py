"""Means over seeds with their standard errors, and differences between runs of the same seed."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from moe.compare.runs import Group, Run
from moe.evaluation.charts import number

# Of values about 1: what differs by less is equal but for the rounding of float64.
_ROUNDING = 1e-12


class Estimate(NamedTuple):
    """A mean of `number` values, and its standard error: their standard deviation, of n - 1, over √number.

    That of a single value is NaN.
    """

    mean: float
    error: float
    number: int

    def __str__(self) -> str:
        """0.9694 ± 0.0016: as many places as the error has with two digits."""
        if not math.isfinite(self.error):
            return number(self.mean)
        if self.error <= _ROUNDING * max(1.0, abs(self.mean)):
            return f"{number(self.mean)} ± 0"
        places = max(0, 1 - math.floor(math.log10(self.error)))
        return f"{self.mean:,.{places}f} ± {self.error:,.{places}f}"


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of values, of which there is at least one, and its standard error; NaN where one isn't finite."""
    if not all(map(math.isfinite, values)):
        return Estimate(sum(values) / len(values), math.nan, len(values))
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(statistics.fmean(values), error, len(values))


class Comparison(NamedTuple):
    """What is said of groups of runs.

    measures: names. estimates: by group and measure, means over its seeds. differences: of every group but the baseline
    from it, by measure, over the seeds that both have; a group without such seeds isn't there.
    differing: fields in which the groups' configs differ, with a value for each group.
    """

    task: str
    groups: list[Group]
    baseline: Group
    measures: list[str]
    estimates: dict[str, dict[str, Estimate]]
    differences: dict[str, dict[str, Estimate]]
    differing: dict[str, list[Any]]

    def json(self) -> dict[str, Any]:
        """All of it as plain values; null for the error of a single seed and for what isn't finite."""

        def plain(tables: Mapping[str, Mapping[str, Estimate]]) -> dict[str, Any]:
            return {
                group: {
                    name: {"mean": _finite(one.mean), "error": _finite(one.error), "count": one.number}
                    for name, one in table.items()
                }
                for group, table in tables.items()
            }

        return {
            "task": self.task,
            "baseline": self.baseline.name,
            "runs": {group.name: {str(run.seed): str(run.path) for run in group.runs} for group in self.groups},
            "estimates": plain(self.estimates),
            "differences": plain(self.differences),
            "differing": self.differing,
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def compare(groups: Sequence[Group], differing: Mapping[str, list[Any]], baseline: Group) -> Comparison:
    """The statistics of all measures that every run has; of runs whose tokenizers differ, without those of a token."""
    runs = [run for group in groups for run in group.runs]
    table = {id(run): run.measures() for run in runs}
    measures = [name for name in table[id(runs[0])] if all(name in values for values in table.values())]
    task = runs[0].task
    if len({run.tokenizer for run in runs}) > 1:
        measures = [name for name in measures if name == "test/bits_per_byte" or not name.startswith("test/")]
        task += ", by tokenizers that differ: what is measured by token doesn't compare, and is left out"

    def values(runs: Sequence[Run], name: str) -> list[float]:
        return [table[id(run)][name] for run in runs]

    estimates = {group.name: {name: estimate(values(group.runs, name)) for name in measures} for group in groups}
    differences = {}
    base = {run.seed: run for run in baseline.runs}
    for group in groups:
        both = [run for run in group.runs if run.seed in base]
        if group is baseline or not both:
            continue
        against = [base[run.seed] for run in both]
        differences[group.name] = {
            name: estimate([x - y for x, y in zip(values(both, name), values(against, name), strict=True)])
            for name in measures
        }
    return Comparison(task, list(groups), baseline, measures, estimates, differences, dict(differing))

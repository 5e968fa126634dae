"""Random inputs through hypothesis: the same few in every `make test`, many new ones every night."""

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings

# How many inputs a test draws, of each kind: in `make test`, where all of them take a minute of one core, and at night.
EXAMPLES = {
    "config": (10, 1000),
    "changed config": (10, 1000),
    "mistake": (60, 1000),
    "table": (100, 10_000),
    "router": (30, 40),  # for each of them; at length with twenty inputs each
    "routing": (60, 2000),  # for each way to dispatch
}
_CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]


def quickly(kind: str) -> settings:
    """The first few examples, always the same."""
    few, _ = EXAMPLES[kind]
    return settings(
        max_examples=few, derandomize=True, deadline=None, database=None, suppress_health_check=_CHECKS, print_blob=True
    )


def at_length(kind: str) -> Callable[[Callable], Callable]:
    """Many examples, others every night; a failure prints how to have its example again."""
    _, many = EXAMPLES[kind]
    chosen = settings(max_examples=many, deadline=None, database=None, suppress_health_check=_CHECKS, print_blob=True)
    return lambda test: pytest.mark.nightly(chosen(test))

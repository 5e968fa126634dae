"""Capacity, queues, and the way into slots and back, against the float64 oracle and by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Array

from moe.ops.permute import (
    Queues,
    capacity,
    fill_queues,
    from_slots,
    group_rows,
    into_slots,
    places,
    seat,
    send_queues,
)
from moe.types import Assignments, Slots
from tests.oracles import routing as oracle
from tests.oracles.routing import Rows

TOKENS, EXPERTS, ROWS, WIDTH = 6, 3, 12, 4


@pytest.mark.parametrize(
    ("factor", "num_tokens", "k", "num_experts", "expected"),
    [
        (1.05, 32, 2, 8, 12),  # 8.4, then up to 9, then to 12
        (1.0, 32, 2, 8, 8),  # exact, and a multiple of 4
        (1.1, 100, 1, 1, 100),  # never more than T
        (1.1, 100, 4, 10, 44),  # 44 exactly, where floating point says 44.00000000000001
        (0.01, 8, 1, 8, 4),  # never less than 4
        (1.0, 3, 1, 1, 3),
    ],
)
def test_capacity_by_hand(factor: float, num_tokens: int, k: int, num_experts: int, expected: int) -> None:
    assert capacity(factor, num_tokens, k, num_experts) == expected
    assert min(oracle.capacity(num_tokens, num_experts, k, factor), num_tokens) == expected


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
def test_capacity_must_be_positive_and_finite(factor: float) -> None:
    with pytest.raises(ValueError, match=rf"capacity_factor = {factor} must be positive and finite"):
        capacity(factor, 8, 1, 2)


class Case:
    """An arbitrary routing: twelve rows of six tokens over three experts, as the oracle and the code take it."""

    def __init__(self, rng: np.random.Generator, expert_p: list[float] | None = None, valid_p: float = 0.8) -> None:
        token, expert = rng.integers(0, TOKENS, ROWS), rng.choice(EXPERTS, ROWS, p=expert_p)
        weight, valid = rng.normal(size=ROWS).astype(np.float32), rng.uniform(size=ROWS) < valid_p
        self.rows = Rows(token, expert, weight, valid, choices=int(valid.sum()) + int(rng.integers(3)))
        self.assignments = Assignments(
            jnp.asarray(token, jnp.int32),
            jnp.asarray(expert, jnp.int32),
            jnp.asarray(weight),
            jnp.asarray(valid),
            jnp.int32(self.rows.choices),
        )
        self.x_TD = rng.normal(size=(TOKENS, WIDTH)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=2)
def there_and_back(assignments: Assignments, x_TD: Array, num_places: int) -> tuple[Queues, Array, Array, Array]:
    """The queues, how many rows were seated, what the slots hold, and what comes back when slot s multiplies by s + 1.

    The factors tell the slots apart.
    """
    queues, kept = fill_queues(assignments, TOKENS, EXPERTS, num_places)
    x_SD = into_slots(x_TD, queues)
    scale_S1 = 1.0 + jnp.arange(x_SD.shape[0], dtype=jnp.float32)[:, None]
    return queues, kept, x_SD, from_slots(x_SD * scale_S1, queues, TOKENS)


def check(case: Case, num_places: int) -> None:
    """Every output against the oracle's queues and plain loops over its rows."""
    rows, expected = case.rows, oracle.dispatch(case.rows, EXPERTS, num_places)
    queues, kept, x_SD, y_TD = jax.tree.map(np.asarray, there_and_back(case.assignments, case.x_TD, num_places))
    row_S = expected.buffer_EC.reshape(-1)
    held_S = row_S >= 0
    np.testing.assert_array_equal(queues.token, np.where(held_S, rows.token[row_S], TOKENS))
    np.testing.assert_array_equal(queues.weight, np.where(held_S, rows.weight[row_S], 0))
    assert kept == expected.kept_N.sum() == held_S.sum()
    # No choice is lost without being counted.
    assert 1 - kept / max(rows.choices, 1) == pytest.approx(expected.overflow if rows.choices else 1)
    y_expected_TD = np.zeros((TOKENS, WIDTH))
    for s, row in enumerate(row_S):
        held_D = case.x_TD[rows.token[row]] if row >= 0 else np.zeros(WIDTH)
        np.testing.assert_array_equal(x_SD[s], held_D)
        if row >= 0:
            y_expected_TD[rows.token[row]] += float(rows.weight[row]) * (s + 1) * held_D.astype(np.float64)
    np.testing.assert_allclose(y_TD, y_expected_TD, rtol=1e-5, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_places=st.sampled_from([1, 3, ROWS]))
def test_any_routing_fills_the_queues_of_the_oracle(seed: int, num_places: int) -> None:
    check(Case(np.random.default_rng(seed)), num_places)


@pytest.mark.parametrize(
    "case",
    [
        Case(np.random.default_rng(0), expert_p=[1.0, 0.0, 0.0]),
        Case(np.random.default_rng(1), expert_p=[0.0, 0.5, 0.5]),
        Case(np.random.default_rng(2), valid_p=0.0),
        Case(np.random.default_rng(3), valid_p=1.0),
    ],
    ids=["one expert gets everything", "an expert gets nothing", "no row is valid", "every row is valid"],
)
def test_extreme_queues(case: Case) -> None:
    check(case, 3)


def test_rows_are_grouped_in_whole_blocks() -> None:
    expert_N, valid_N = jnp.array([2, 0, 2, 1, 0, 2]), jnp.array([True, True, False, True, True, True])
    grouped = group_rows(expert_N, valid_N, 4, 2)
    np.testing.assert_array_equal(grouped.sizes, [2, 2, 2, 0])
    np.testing.assert_array_equal(grouped.source, [1, 4, 3, 6, 0, 5] + [6] * 4)
    np.testing.assert_array_equal(grouped.place, [4, 0, 10, 2, 1, 5])


def test_rows_wait_where_a_shard_has_no_place_for_them_yet() -> None:
    """Two places at each of two shards; the third row for shard 1 has place 2, which is place 0 of the next round."""
    shard_N, valid_N = jnp.array([1, 0, 1, 1, 0], jnp.int32), jnp.array([True, True, True, True, False])
    place_N = places(shard_N, valid_N, 2)
    now, later = (send_queues(shard_N, place_N - first, valid_N, 2, 2) for first in (0, 2))
    np.testing.assert_array_equal(now.source, [1, 5, 0, 2])
    np.testing.assert_array_equal(now.place, [2, 0, 3, 4, 4])
    np.testing.assert_array_equal(now.sizes, [1, 2])
    np.testing.assert_array_equal(later.source, [5, 5, 3, 5])
    np.testing.assert_array_equal(later.place, [4, 4, 4, 2, 4])
    np.testing.assert_array_equal(later.sizes, [0, 1])


def test_places_by_hand() -> None:
    """Rows to experts 0 0 1 0 1 0, the second not in use: it takes no place, and those behind it move up."""
    expert_N = jnp.array([0, 0, 1, 0, 1, 0], jnp.int32)
    valid_N = jnp.array([True, False, True, True, True, True])
    place_N = np.asarray(places(expert_N, valid_N, 3))
    np.testing.assert_array_equal(place_N[valid_N], [0, 0, 1, 1, 2])


def test_earlier_rows_win_the_places() -> None:
    """One place at expert 1: token 5 queues before token 0 and has it, as priority put it there."""
    rows = Assignments(
        jnp.array([5, 0, 2], jnp.int32),
        jnp.array([1, 1, 0], jnp.int32),
        jnp.array([0.5, 0.9, 0.7]),
        jnp.ones(3, bool),
        jnp.int32(3),
    )
    queues, kept = fill_queues(rows, num_tokens=6, num_experts=2, num_places=1)
    np.testing.assert_array_equal(queues.token, [2, 5])
    np.testing.assert_allclose(queues.weight, [0.7, 0.5])
    assert kept == 2


def test_gradients_reach_weights_and_tokens_of_seated_rows_only() -> None:
    """y = Σ rows weight · (slot + 1) · x: both gradients follow from the oracle's queues."""
    case, num_places = Case(np.random.default_rng(8)), 3
    expected = oracle.dispatch(case.rows, EXPERTS, num_places)
    assert 0 < expected.kept_N.sum() < case.rows.valid.sum()
    g_TD = np.random.default_rng(9).normal(size=(TOKENS, WIDTH)).astype(np.float32)

    def total(weight_N: Array, x_TD: Array) -> Array:
        assignments = case.assignments._replace(weight=weight_N)
        return jnp.sum(g_TD * there_and_back(assignments, x_TD, num_places)[3])

    weight_gradient_N, x_gradient_TD = jax.grad(total, argnums=(0, 1))(case.assignments.weight, jnp.asarray(case.x_TD))
    expected_N, expected_TD = np.zeros(ROWS), np.zeros((TOKENS, WIDTH))
    for s, row in enumerate(expected.buffer_EC.reshape(-1)):
        if row >= 0:
            t = case.rows.token[row]
            expected_N[row] = (s + 1) * (g_TD[t] @ case.x_TD[t])
            expected_TD[t] += (s + 1) * case.rows.weight[row] * g_TD[t]
    np.testing.assert_allclose(weight_gradient_N, expected_N, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(x_gradient_TD, expected_TD, rtol=1e-4, atol=1e-5)


def test_bf16_tokens_add_up_in_float32() -> None:
    """256 + 1 + 1 is 258 in float32, and 256 when every partial sum is rounded to bfloat16."""
    queues = Queues(jnp.array([0, 0, 0], jnp.int32), jnp.ones(3))
    y_SD = jnp.array([[256.0], [1.0], [1.0]], jnp.bfloat16)
    got = from_slots(y_SD, queues, num_tokens=1)
    assert got.dtype == jnp.bfloat16
    assert got[0, 0] == 258


def test_soft_slots_are_seats_already() -> None:
    """Into slots and back by the dispatch and combine weights; nothing is dropped."""
    rng = np.random.default_rng(5)
    dispatch_TEC, combine_TEC = rng.uniform(size=(2, TOKENS, EXPERTS, 2))
    x_TD, y_SD = rng.normal(size=(TOKENS, WIDTH)), rng.normal(size=(EXPERTS * 2, WIDTH))
    slots = Slots(jnp.asarray(dispatch_TEC, jnp.float32), jnp.asarray(combine_TEC, jnp.float32))
    seats, kept = seat(slots, TOKENS, EXPERTS, 2)
    assert kept == TOKENS * EXPERTS
    x_ECD = np.einsum("tec,td->ecd", dispatch_TEC, x_TD)
    got_SD = into_slots(jnp.asarray(x_TD, jnp.float32), seats)
    np.testing.assert_allclose(got_SD, x_ECD.reshape(-1, WIDTH), rtol=1e-5, atol=1e-6)
    y_TD = np.einsum("tec,ecd->td", combine_TEC, y_SD.reshape(EXPERTS, 2, WIDTH))
    got_TD = from_slots(jnp.asarray(y_SD, jnp.float32), seats, TOKENS)
    np.testing.assert_allclose(got_TD, y_TD, rtol=1e-5, atol=1e-6)

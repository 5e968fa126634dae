"""Isotonic solvers against a float64 PAV, scipy's isotonic regression, and their own promises; soft sort and rank."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import isotonic_regression

from moe import isotonic, topk
from tests.oracles import operators as oracle

SOLVERS = [isotonic.Pav(), isotonic.Dykstra(steps=400, tol=0.0)]
CASES = [(2.0, False), (1.5, False), (4 / 3, False), (2.0, True), (4 / 3, True), (1.2, True)]


@functools.cache
def jitted(solver, p, magnitude=False):
    return jax.jit(functools.partial(isotonic.solve, p=p, magnitude=magnitude, solver=solver))


def problems(magnitude, n=7, count=6, seed=0):
    """Descending s, and w that descend, ascend, and are top-k's."""
    rng = np.random.default_rng(seed)
    s = rng.normal(size=(count, n))
    s = -np.sort(-np.abs(s) if magnitude else -s, axis=-1)
    w = -np.sort(-rng.uniform(0, 2, (count, n)), axis=-1)
    w[1] = w[1, ::-1]
    w[2] = np.arange(n) < 3
    return s.astype(np.float32), w.astype(np.float32)


@pytest.mark.parametrize("solver", SOLVERS, ids=["pav", "dykstra"])
@pytest.mark.parametrize(("p", "magnitude"), CASES)
def test_general_problems(solver, p, magnitude):
    s, w = problems(magnitude)
    for strength in (0.05, 1.0, 5.0):
        found = jitted(solver, p, magnitude)(s, w, strength=strength)
        expected = np.stack([oracle.pav(a, b, np.float32(strength), p, magnitude) for a, b in zip(s, w, strict=True)])
        # What float32 multipliers can't resolve for small p, the residual names.
        atol = 5e-6 * max(1.0, strength) + (np.asarray(found.residual).max() if p < 1.25 else 0)
        np.testing.assert_allclose(found.value, expected, atol=atol)
        assert (np.diff(found.value, axis=-1) <= atol).all()
        assert found.steps.shape == found.residual.shape == (6,)


@pytest.mark.parametrize(("p", "magnitude"), [(1.1, True), (1.2, True), (1.25, True), (4 / 3, True)])
def test_the_residual_of_dykstra_bounds_its_error_where_it_has_not_converged(p, magnitude):
    solver = isotonic.Dykstra(steps=400, tol=0.0)
    unconverged = 0
    for seed in range(10):
        s, w = problems(magnitude, seed=seed)
        found = jitted(solver, p, magnitude)(s, w, strength=5.0)
        expected = np.stack([oracle.pav(a, b, 5.0, p, magnitude) for a, b in zip(s, w, strict=True)])
        error = np.abs(found.value - expected).max(axis=-1)
        unconverged += int((error > 5e-6).sum())
        assert (error <= 2.5e-5 + 2 * np.asarray(found.residual)).all()
    assert unconverged > 0


@pytest.mark.parametrize("p", [1.2, 1.1, 1.05])
def test_the_mask_of_dykstra_is_exact_for_small_p(p):
    x = np.random.default_rng(0).normal(size=(32, 12)).astype(np.float32)
    for strength in (0.1, 1.0, 5.0):
        y = topk.mask(jnp.asarray(x), 2, p=p, strength=strength, solver=isotonic.Dykstra(steps=400, tol=0.0))
        expected = np.stack([oracle.mask_by_bisection(row, 2, float(np.float32(strength)), p) for row in x])
        np.testing.assert_allclose(y, expected, atol=2e-5)


@pytest.mark.parametrize(("p", "magnitude"), CASES)
def test_threshold_solves_topk_problems_of_every_strength(p, magnitude):
    s, _ = problems(magnitude)
    w = jnp.array([1, 1, 1, 0, 0, 0, 0], jnp.float32)
    for strength in (1e-4, 0.3, 100.0):
        found = jitted(isotonic.Threshold(), p, magnitude)(s, w, strength=strength)
        expected = np.stack([oracle.pav(a, w, np.float32(strength), p, magnitude) for a in s])
        np.testing.assert_allclose(found.value, expected, atol=1e-6 * max(1.0, strength))
        assert (found.residual <= 1e-4 * strength).all()


@pytest.mark.parametrize("solver", SOLVERS, ids=["pav", "dykstra"])
def test_isotonic_regression_of_unsorted_values(solver):
    s = np.random.default_rng(0).normal(size=(4, 12)).astype(np.float32)
    value = jitted(solver, 2.0)(s, jnp.zeros(12), strength=1.0).value
    expected = np.stack([isotonic_regression(row.astype(np.float64), increasing=False).x for row in s])
    np.testing.assert_allclose(value, expected, atol=2e-6)


@pytest.mark.parametrize("p", [2.0, 4 / 3])
@pytest.mark.parametrize("magnitude", [False, True])
def test_derivatives_in_s_w_and_strength(p, magnitude):
    s, w = (a[0].astype(np.float64) for a in problems(magnitude))
    step, strength = 1e-6, 0.7
    for solver in (isotonic.Pav(), isotonic.Dykstra(steps=400, tol=0.0)):
        solve = jitted(solver, p, magnitude)
        by_s, by_w, by_strength = jax.jit(jax.jacrev(lambda *a, f=solve: f(*a[:2], strength=a[2]).value, (0, 1, 2)))(
            *(jnp.asarray(a, jnp.float32) for a in (s, w, strength))
        )
        expected = oracle.numerical_jacobian(lambda s: oracle.pav(s, w, strength, p, magnitude), s)
        np.testing.assert_allclose(by_s, expected, atol=2e-4)
        expected = oracle.numerical_jacobian(lambda w: oracle.pav(s, w, strength, p, magnitude), w)
        np.testing.assert_allclose(by_w, expected, atol=2e-4)
        ends = [oracle.pav(s, w, strength + h, p, magnitude) for h in (step, -step)]
        np.testing.assert_allclose(by_strength, (ends[0] - ends[1]) / (2 * step), atol=2e-4)


def test_dykstra_stops_at_tol_for_each_problem_and_reports_its_residual():
    # The second problem pools nothing, and its neighbour's work leaves it alone.
    s = jnp.array([[1, 0.9, 0.8, 0.7, 0.6, 0.5], [9, 7, 5, 3, 1, 0]], jnp.float32)
    w = jnp.array([1, 1, 0, 0, 0, 0], jnp.float32)
    found = jitted(isotonic.Dykstra(steps=500, tol=1e-5), 2.0)(s, w, strength=1.0)
    assert 2 < found.steps[0] < 500
    assert found.steps[1] == 1
    assert 0 < found.residual[0] <= 1e-5
    alone = jitted(isotonic.Dykstra(steps=500, tol=1e-5), 2.0)(s[:1], w, strength=1.0)
    np.testing.assert_array_equal(alone.value[0], found.value[0])

    few = jitted(isotonic.Dykstra(steps=2, tol=1e-5), 2.0)(s, w, strength=1.0)
    exact = oracle.pav(s[0], w, 1.0, 2.0)
    assert few.steps[0] == 2
    # A value that is still off by this much is not reported as done.
    assert few.residual[0] > 0.1 * np.abs(few.value[0] - exact).max() > 1e-3


def test_one_sweep_is_both_published_projections():
    s, w, strength = np.array([1, 0.9, 0.8, 0.7, 0.6]), np.array([1.0, 1, 1, 0, 0]), 1.0

    def project(v, start):
        v = v.copy()
        for i in range(start, len(v) - 1, 2):
            if v[i] < v[i + 1]:
                v[i : i + 2] = v[i : i + 2].mean()
        return v

    v, a, b = s - strength * w, 0.0, 0.0
    for sweeps in (1, 2, 3):
        y = project(v + a, 0)
        a = v + a - y
        v = project(y + b, 1)
        b = y + b - v
        solver = isotonic.Dykstra(steps=sweeps, tol=0.0)
        found = jitted(solver, 2.0)(jnp.asarray(s, jnp.float32), jnp.asarray(w, jnp.float32), strength=strength)
        np.testing.assert_allclose(found.value, v, atol=1e-6)


def test_nan_stays_in_its_row():
    s = jnp.array([[3, jnp.nan, 1], [3, 2, 1]], jnp.float32)
    for solver in (*SOLVERS, isotonic.Threshold()):
        value = jitted(solver, 2.0)(s, jnp.array([1.0, 0, 0]), strength=2.0).value
        assert np.isnan(value[0]).all()
        np.testing.assert_allclose(value[1], oracle.pav([3, 2, 1], [1, 0, 0], 2.0, 2.0), atol=1e-6)


def test_the_table_of_solvers_and_the_default():
    names = {name: solver.__name__ for name, solver in isotonic.SOLVERS.items()}
    assert names == {"threshold": "Threshold", "dykstra": "Dykstra", "pav": "Pav"}
    s = jnp.array([3.0, 2, 1])
    for w in ([1.0, 0, 0], [2.0, 1, 0]):
        value = isotonic.solve(s, jnp.array(w), strength=2.0, p=2.0).value
        np.testing.assert_allclose(value, oracle.pav(s, w, 2.0, 2.0), atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: isotonic.solve(s, jnp.ones(2), strength=1.0, p=2.0), r"w\.shape is \(2,\), but must be \(3,\)"),
        (lambda s: isotonic.solve(s, jnp.ones(3), strength=1.0, p=1.0), r"p is 1\.0"),
        (lambda s: isotonic.solve(s, jnp.ones(3), strength=0.0, p=2.0), r"strength is 0\.0"),
        (lambda s: isotonic.solve(s.astype(int), jnp.ones(3), strength=1.0, p=2.0), r"s\.dtype is int32"),
        (
            lambda s: isotonic.solve(s, jnp.array([2.0, 1, 0]), strength=1.0, p=2.0, solver=isotonic.Threshold()),
            "must be Dykstra or Pav",
        ),
        (lambda s: isotonic.Dykstra(steps=0), "steps is 0, but must be an integer >= 1"),
        (lambda s: isotonic.Dykstra(tol=-1.0), r"tol is -1\.0"),
        (lambda s: isotonic.Threshold(steps=0), "steps is 0"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.array([3.0, 2, 1]))


def _soft(x, strength, p, rank):
    """Soft sort or rank of one vector by the oracle's PAV."""
    steps = np.arange(len(x), 0, -1.0)
    order = np.argsort(x)
    s, w = (-x[order], steps) if rank else (steps, np.sort(x)[::-1])
    distance = (s - oracle.pav(s, w, strength, p)) / strength
    y = np.sign(distance) * np.abs(distance) ** (1 / (p - 1))
    out = np.empty_like(y)
    out[order if rank else slice(None)] = y
    return out


@pytest.mark.parametrize("p", [2.0, 4 / 3])
def test_soft_sort_and_rank(p):
    x = np.random.default_rng(0).normal(size=(3, 6))
    for name, rank in (("soft_sort", False), ("soft_rank", True)):
        run = jax.jit(functools.partial(getattr(topk, name), p=p, axis=0))
        for strength in (0.5, 5.0):
            y = run(jnp.asarray(x.T, jnp.float32), strength=strength)
            expected = np.stack([_soft(row, strength, p, rank) for row in x], axis=1)
            np.testing.assert_allclose(y, expected, atol=3e-5)
        gradient = jax.jit(jax.jacrev(lambda x, run=run: run(x, strength=0.5)[:, 0]))(jnp.asarray(x.T, jnp.float32))
        expected = oracle.numerical_jacobian(lambda v, rank=rank: _soft(v, 0.5, p, rank), x[0])
        np.testing.assert_allclose(gradient[:, :, 0], expected, atol=2e-3)
    hard = functools.partial(jnp.round, decimals=2)
    np.testing.assert_array_equal(hard(topk.soft_rank(jnp.array([0.1, 3, 2]), strength=0.01)), [3, 1, 2])
    np.testing.assert_allclose(topk.soft_sort(jnp.array([0.1, 3, 2]), strength=0.01), [3, 2, 0.1], atol=1e-4)

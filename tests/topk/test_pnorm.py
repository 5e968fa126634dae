"""The p-norm operators against published goldens, the float64 oracle, and the definitions of their derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from moe import isotonic, topk
from tests.oracles import operators as oracle

X10 = np.array(
    [
        -1.6836294,
        0.617691,
        0.09659418,
        -1.5587047,
        -0.76370925,
        -0.77612925,
        -0.09819217,
        0.5910671,
        1.0190237,
        -0.16765739,
    ],
    np.float32,
)
X6 = jnp.array([3, 1, 0.5, 2.9, -2.95, 0.1], jnp.float32)


@functools.cache
def jitted(name, k, p, **options):
    """One compiled program per operator and static arguments: eager calls would compile piece by piece."""
    return jax.jit(lambda x, strength: getattr(topk, name)(x, k, strength=strength, p=p, **options))


@pytest.mark.parametrize("solver", [isotonic.Threshold(), isotonic.Dykstra(steps=200, tol=0.0), isotonic.Pav()])
def test_goldens(solver):
    run = functools.partial(jitted, solver=solver)
    x4 = jnp.array([-5.0, -2, 3, 1])
    np.testing.assert_array_equal(run("mask", 2, 4 / 3)(x4, 0.01), [0, 0, 1, 1])
    np.testing.assert_array_equal(run("magnitude", 2, 4 / 3)(x4, 0.01), [-5, 0, 3, 0])
    for strength, p, expected in [
        (0.5, 2.0, [2.3625, 0, 0, 2.0625, -2.2125, 0]),
        (0.5, 4 / 3, [2.625465, 0, 0, 1.717405, -2.136663, 0]),
        (0.1, 2.0, [2.578125, 0, 0, 1.478125, -2.028125, 0]),
        (0.1, 4 / 3, [3, 0, 0, 0.623771, -2.407774, 0]),
    ]:
        np.testing.assert_allclose(run("magnitude", 2, p)(X6, strength), expected, atol=2e-6)
    np.testing.assert_allclose(run("mask", 3, 1.5)(X6, 1.0), [1, 0.83063, 0.169241, 1, 0, 0.00013], atol=1e-6)
    tied = jnp.array([0.0, 0, -5, 5])
    np.testing.assert_allclose(run("mask", 2, 4 / 3)(tied, 0.01), [0.5, 0.5, 0, 1], atol=1e-6)


def test_golden_gradient():
    def loss(x):
        run = functools.partial(topk.mask, k=4, strength=0.5)
        return jnp.mean((run(x) + run(x**2)) ** 2)

    expected = [0, 0.09063222, 0.23230663, 0, 0.12527114, 0.0595789, -0.1392387, 0.05559961, 0, -0.09306789]
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(jnp.array(X10)), expected, atol=2e-7)


@pytest.mark.parametrize(("p", "k"), [(4 / 3, 1), (4 / 3, 3), (4 / 3, 9), (1.5, 3), (2.0, 3), (1.2, 3)])
def test_matches_oracle_at_every_strength(p, k):
    rng = np.random.default_rng(k)
    x = np.concatenate([rng.normal(size=(6, 9)), rng.integers(-2, 3, (6, 9))]).astype(np.float32)
    for strength in np.float32([1e-4, 1e-2, 0.3, 3, 100]):
        y = np.asarray(jitted("mask", k, p)(x, strength))
        expected = np.stack([oracle.mask(row, k, strength, p) for row in x])
        np.testing.assert_allclose(y, expected, atol=3e-6)
        # Away from a boundary by rounding, zeros and ones are exact.
        np.testing.assert_array_equal(y[expected == 0], 0)
        np.testing.assert_allclose(y.sum(-1), k, atol=9 * 1.2e-7 * k)
        for rescale in (True, False):
            out = jitted("magnitude", k, p, rescale=rescale)(x, strength)
            expected = np.stack([oracle.magnitude(row, k, strength, p, rescale) for row in x])
            np.testing.assert_allclose(out, expected, atol=3e-6 * np.abs(x).max())


@pytest.mark.parametrize("p", [4 / 3, 1.5, 2.0])
@pytest.mark.parametrize("name", ["mask", "magnitude", "plain magnitude"])
def test_derivatives_are_those_of_the_oracle(name, p):
    strength, k = 0.8, 4
    options = {"rescale": False} if name.startswith("plain") else {}
    name = name.split()[-1]
    run = functools.partial(jitted, name, k, p, **options)()
    reference = functools.partial(getattr(oracle, name), k=k, p=p, **options)
    jacobian, in_strength = jax.jit(jax.jacrev(run, argnums=(0, 1)))(jnp.array(X10), strength)
    expected = oracle.numerical_jacobian(lambda x: reference(x, strength=strength), X10)
    np.testing.assert_allclose(jacobian, expected, atol=2e-5)
    step = 1e-6
    slope = (reference(X10, strength=strength + step) - reference(X10, strength=strength - step)) / (2 * step)
    np.testing.assert_allclose(in_strength, slope, atol=2e-5)

    forward = jax.jit(jax.jacfwd(run, argnums=(0, 1)))(jnp.array(X10), strength)
    np.testing.assert_allclose(forward[0], jacobian, atol=1e-6)
    np.testing.assert_allclose(forward[1], in_strength, atol=1e-6)


@pytest.mark.parametrize("name", ["mask", "magnitude"])
def test_second_derivatives(name):
    run, weights = jitted(name, 4, 4 / 3), jnp.arange(10.0)
    gradient = jax.grad(lambda x: jnp.vdot(run(x, 0.8), weights))
    hessian = np.asarray(jax.jit(jax.jacfwd(gradient))(jnp.array(X10)))
    step = 1e-3
    shifts = step * np.eye(10, dtype=np.float32)
    numerical = (jax.vmap(gradient)(X10 + shifts) - jax.vmap(gradient)(X10 - shifts)) / (2 * step)
    np.testing.assert_allclose(hessian, numerical, atol=5e-3 * np.abs(hessian).max())
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-4)


@pytest.mark.parametrize("solver", [isotonic.Threshold(steps=30), isotonic.Pav()])
@pytest.mark.parametrize("name", ["mask", "magnitude"])
def test_forward_and_reverse_mode_agree_with_finite_differences_to_second_order(name, solver):
    with jax.enable_x64(True):
        run = jitted(name, 4, 4 / 3, solver=solver)
        check_grads(run, (jnp.asarray(X10, jnp.float64), jnp.float64(0.5)), order=2, atol=1e-4, rtol=1e-4)


def test_unselected_entries_of_the_magnitude_have_gradient_zero_not_nan():
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(topk.magnitude(x, 2, strength=0.5))))(X6)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[np.array([1, 2, 5])], 0)


@pytest.mark.parametrize("strength", [1e-5, 4.6e-4, 1e-3])
def test_unpooled_entries_of_the_magnitude_come_back_exactly(strength):
    x = jnp.array([100.0, -7, 3, 1])
    np.testing.assert_array_equal(jitted("magnitude", 2, 4 / 3)(x, strength), [100, -7, 0, 0])


@pytest.mark.parametrize("p", [1.5, 1.7])
def test_any_p_is_free_of_nan(p):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(200, 8)), jnp.float32)
    for name in ("mask", "magnitude"):
        run = jitted(name, 2, p)
        assert np.isfinite(run(x, 0.3)).all()
        assert np.isfinite(jax.jit(jax.grad(lambda x, run=run: jnp.sum(run(x, 0.3) ** 2)))(x)).all()


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.floats(-8, 8, width=16).map(lambda v: round(v, 1)), min_size=6, max_size=6),
    st.sampled_from([1e-6, 1.0, 1e6]),
    st.permutations(range(6)),
)
def test_properties(values, scale, permutation):
    x = np.float32(values) * np.float32(scale)
    run = jitted("mask", 2, 4 / 3)
    y = np.asarray(run(x, scale))
    assert abs(y.sum() - 2) <= 6 * 2.4e-7
    assert ((y >= 0) & (y <= 1)).all()
    assert (np.diff(y[np.argsort(x, kind="stable")]) >= 0).all()
    np.testing.assert_allclose(run(x[list(permutation)], scale), y[list(permutation)], atol=5e-7)
    np.testing.assert_allclose(y, oracle.mask(x, 2, scale, 4 / 3), atol=3e-6)
    out = np.asarray(jitted("magnitude", 2, 4 / 3)(x, scale))
    np.testing.assert_allclose(out, oracle.magnitude(x, 2, scale, 4 / 3), atol=3e-6 * max(scale, np.abs(x).max()))


def test_gaps_as_long_as_the_strength():
    """Where one entry leaves 1 as another leaves 0, Newton's method alone goes to and fro between the two."""
    rng = np.random.default_rng(0)
    for scale in (1e-2, 1e-3, 1e-4):
        x = (rng.integers(0, 3, (300, 8)) + scale * rng.normal(size=(300, 8))).astype(np.float32)
        for p in (2.0, 4 / 3):
            expected = np.stack([oracle.mask_by_bisection(row, 2, 1.0, p) for row in x])
            np.testing.assert_allclose(jitted("mask", 2, p)(x, 1.0), expected, atol=3e-6)


def test_limits():
    x = jnp.array(X10)
    np.testing.assert_array_equal(jitted("mask", 4, 4 / 3)(x, 1e-6), topk.hard_mask(x, 4))
    np.testing.assert_array_equal(jitted("magnitude", 4, 4 / 3)(x, 1e-6), topk.hard_magnitude(x, 4))
    np.testing.assert_allclose(jitted("mask", 4, 4 / 3)(x, 1e5), 0.4, atol=1e-4)


def test_nan_stays_in_its_row_and_infinities_act_as_the_largest_number():
    inf, nan = np.inf, np.nan
    x = jnp.array([[1, nan, 3], [1, 2, 3], [inf, 2, 1.9], [-inf, -inf, 1], [-inf, 1, 2]], jnp.float32)
    for solver in (isotonic.Threshold(), isotonic.Dykstra(), isotonic.Pav()):
        y = np.asarray(jitted("mask", 2, 2.0, solver=solver)(x, 1.0))
        assert np.isnan(y[0]).all()
        np.testing.assert_allclose(y[1:], [[0, 1, 1], [1, 0.55, 0.45], [0.5, 0.5, 1], [0, 1, 1]], atol=1e-6)
        assert np.isnan(jitted("magnitude", 2, 2.0, solver=solver)(x, 1.0)[0]).all()
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(topk.mask(x, 2, p=2.0) ** 2)))(x[1:])
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtype_axis_and_batch(dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 7, 2)), dtype)
    y = topk.mask(x, 2, axis=1)
    assert y.dtype == dtype
    exact = np.asarray(x, np.float64)
    expected = np.apply_along_axis(lambda row: oracle.mask(row, 2, 1.0, 4 / 3), 1, exact)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, atol=float(jnp.finfo(dtype).eps) + 3e-6)
    assert topk.magnitude(x, 2, axis=1).dtype == dtype


def test_float64_is_computed_in_float64():
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 9)))
        expected = np.stack([oracle.mask(row, 3, 0.5, 4 / 3) for row in np.asarray(x)])
        np.testing.assert_allclose(topk.mask(x, 3, strength=0.5), expected, atol=1e-9)


def test_strength_and_k_compile_once():
    x = jnp.array(X10)
    run = jax.jit(lambda x, k, strength: topk.mask(x, k, strength=strength))
    for k, strength in [(2, 0.5), (4, 0.1), (9, 3.0)]:
        np.testing.assert_allclose(run(x, k, strength), oracle.mask(X10, k, strength, 4 / 3), atol=3e-6)
    assert run._cache_size() == 1


def test_vmap_over_everything_is_a_loop():
    x, strengths = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)), jnp.float32), jnp.array([0.1, 1, 5])
    for solver in (isotonic.Threshold(), isotonic.Dykstra()):
        run = functools.partial(topk.mask, k=2, solver=solver)
        together = jax.jit(jax.vmap(lambda x, strength, run=run: run(x, strength=strength)))(x, strengths)
        for row, strength, y in zip(x, strengths, together, strict=True):
            np.testing.assert_allclose(jitted("mask", 2, 4 / 3, solver=solver)(row, strength), y, atol=1e-6)


@pytest.mark.parametrize("name", ["mask", "magnitude"])
def test_batches_shard_without_communication(name):
    mesh = Mesh(np.array(jax.devices()), ("data",))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 12)), jnp.float32)

    def value_and_gradient(x):
        run = functools.partial(getattr(topk, name), k=3, strength=0.3)
        return run(x), jax.vjp(run, x)[1](jnp.cos(x))[0]

    expected = jax.jit(value_and_gradient)(x)
    sharded = jax.device_put(x, NamedSharding(mesh, P("data")))
    compiled = jax.jit(value_and_gradient).lower(sharded).compile()
    text = compiled.as_text()
    assert not any(op in text for op in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))
    mapped = jax.jit(jax.shard_map(value_and_gradient, mesh=mesh, in_specs=P("data"), out_specs=P("data")))(sharded)
    for result in (compiled(sharded), mapped):
        for ours, theirs in zip(result, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-6)
            assert ours.sharding.is_equivalent_to(sharded.sharding, 2)


@pytest.mark.parametrize(("n", "k"), [(5000, 500), (700, 90)])
def test_long_vectors(n, k):
    x = np.random.default_rng(0).normal(size=n).astype(np.float32)
    for strength in (1e-3, 0.2, 30.0):
        y = np.asarray(jitted("mask", k, 2.0)(x, strength), np.float64)
        np.testing.assert_allclose(y, oracle.mask_by_bisection(x, k, np.float32(strength), 2.0), atol=3e-6)
        assert abs(y.sum() - k) <= 1e-5 * k


def test_hard_operators():
    x = jnp.array([[1, 2, 2, 2, 0], [5, np.nan, 1, 0, 0]], jnp.float32)
    np.testing.assert_array_equal(topk.hard_mask(x, 2), [[0, 1, 1, 0, 0], [np.nan] * 5])
    signed = jnp.array([1.0, 2, -3, 2, 0])
    np.testing.assert_array_equal(topk.hard_magnitude(signed, 2), [0, 2, -3, 0, 0])
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(topk.hard_magnitude(x, 2)))(signed), [0, 1, 1, 0, 0])
    random = np.random.default_rng(0).integers(-3, 4, (20, 7)).astype(np.float32)
    expected = np.stack([oracle.hard_mask(row, 3) for row in random])
    np.testing.assert_array_equal(topk.hard_mask(jnp.array(random), 3), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: topk.mask(x, 0), r"k is 0, but must be in 1\.\.6"),
        (lambda x: topk.magnitude(x, 7), r"k is 7, but must be in 1\.\.6"),
        (lambda x: topk.hard_mask(x, 7), r"k is 7, but must be in 1\.\.6"),
        (lambda x: topk.mask(x, 2, p=1.0), r"p is 1\.0, but must be a Python number in \(1, 2\]"),
        (lambda x: topk.mask(x, 2, p=2.5), r"p is 2\.5"),
        (lambda x: topk.mask(x, 2, strength=0.0), r"strength is 0\.0, but must be positive"),
        (lambda x: topk.magnitude(x, 2, strength=-1), r"strength is -1, but must be positive"),
        (lambda x: topk.mask(x, 2, strength=jnp.ones(3)), r"strength is of shape \(3,\), but must be a scalar"),
        (lambda x: topk.mask(x.astype(jnp.int32), 2), r"x\.dtype is int32, but must be a floating dtype"),
        (lambda x: topk.mask(x, 2, axis=1), r"axis is 1, but must be in -1\.\.0"),
        (lambda x: topk.soft_rank(x, strength=0.0), r"strength is 0\.0"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(X6)

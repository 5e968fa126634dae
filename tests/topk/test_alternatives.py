"""LapSum, entropic transport, perturbed and straight-through masks: definitions, limits, derivatives."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy import optimize, stats

from moe import topk
from tests.oracles import operators as oracle

DISTRIBUTIONS = {topk.lapsum: stats.laplace, topk.entropic: stats.logistic}
by_operator = pytest.mark.parametrize("operator", DISTRIBUTIONS, ids=lambda f: f.__name__)


def entries(n: int = 12, batch: tuple[int, ...] = (), seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (*batch, n))


@by_operator
def test_two_entries_by_hand(operator: Callable) -> None:
    # By symmetry tau is the midpoint, one strength away from both.
    low = {"lapsum": 0.5 / np.e, "entropic": 1 / (1 + np.e)}[operator.__name__]
    np.testing.assert_allclose(operator(jnp.array([3.0, -1.0]), 1, strength=2.0), [1 - low, low], rtol=1e-6)


@by_operator
@pytest.mark.parametrize("strength", [1e-2, 1.0, 1e2])
def test_values_agree_with_a_root_in_float64(operator: Callable, strength: float) -> None:
    x = entries()
    f = DISTRIBUTIONS[operator].cdf
    x64 = np.asarray(x, np.float64)
    got = jax.jit(lambda x, strength: jnp.stack([operator(x, k, strength=strength) for k in (1, 5, 11)]))(x, strength)
    for k, y in zip((1, 5, 11), got, strict=True):
        span = 20 * strength
        tau = optimize.brentq(lambda t, k=k: f((x64 - t) / strength).sum() - k, x64.min() - span, x64.max() + span)
        np.testing.assert_allclose(y, f((x64 - tau) / strength), atol=2e-6)


@by_operator
def test_small_strength_is_hard_and_k_equal_n_is_ones(operator: Callable) -> None:
    x = entries(batch=(2,))
    np.testing.assert_allclose(operator(x, 3, strength=1e-5), topk.hard_mask(x, 3), atol=1e-6)
    np.testing.assert_array_equal(operator(x, 12), np.ones_like(x))


@by_operator
def test_derivatives(operator: Callable) -> None:
    x = entries(7)
    check_grads(
        jax.jit(lambda x, strength: operator(jnp.asarray(x), 3, strength=jnp.asarray(strength))),
        (x, jnp.float32(0.7)),
        order=2,
        atol=3e-2,
        rtol=3e-2,
    )
    jacobian = jax.jit(jax.jacrev(lambda x: operator(x, 3)))(x)
    np.testing.assert_allclose(jacobian, jacobian.T, atol=1e-6)
    np.testing.assert_allclose(jnp.sum(jacobian, axis=0), 0, atol=1e-6)


@by_operator
def test_axis_dtype_batch_and_nan(operator: Callable) -> None:
    x = entries(batch=(3, 2)).astype(jnp.bfloat16)
    moved = operator(jnp.moveaxis(x, -1, 0).at[4, 1, 0].set(jnp.nan), 3, axis=0)
    assert moved.dtype == jnp.bfloat16
    got = np.moveaxis(np.asarray(moved, np.float32), 0, -1)
    assert np.isnan(got[1, 0]).all()
    want = np.array(operator(x.astype(jnp.float32), 3))
    want[1, 0] = np.nan
    np.testing.assert_allclose(got, want, atol=4e-3)


def test_perturbed_is_the_mean_of_hard_masks_and_follows_its_expectation() -> None:
    # Of two entries the first is taken when x0 - x1 + z0 - z1 > 0; Gumbel differences are logistic.
    x = jnp.array([0.3, -0.2])
    smooth = jax.jit(functools.partial(topk.perturbed, k=1, strength=0.5, samples=20_000))
    y = smooth(x, key=jax.random.key(0))
    np.testing.assert_allclose(y, [1 / (1 + np.exp(-1.0)), 1 / (1 + np.exp(1.0))], atol=0.02)
    slope = jax.grad(lambda x: smooth(x, key=jax.random.key(1))[0])(x)
    expected = np.exp(-1.0) / (1 + np.exp(-1.0)) ** 2 / 0.5
    np.testing.assert_allclose(slope, [expected, -expected], atol=0.06)


def test_perturbed_rows_sum_to_k_and_draw_their_own_noise() -> None:
    x = jnp.broadcast_to(entries(8), (2, 8))
    y = topk.perturbed(x, 3, key=jax.random.key(0), samples=50)
    np.testing.assert_allclose(jnp.sum(y, axis=-1), 3, rtol=1e-6)
    assert not np.array_equal(y[0], y[1])


def test_straight_through_is_hard_with_a_soft_derivative() -> None:
    x, weights = entries(9), jnp.arange(9.0)
    for relaxed in (topk.mask, topk.lapsum):
        hard = functools.partial(topk.straight_through, k=4, strength=2.0, relaxed=relaxed)
        np.testing.assert_array_equal(hard(x), oracle.hard_mask(x, 4))
        got = jax.grad(lambda x, hard=hard: jnp.vdot(weights, hard(x)))(x)
        want = jax.grad(lambda x, relaxed=relaxed: jnp.vdot(weights, relaxed(x, 4, strength=2.0)))(x)
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_bad_input_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # it would forestall our own checks
    x = entries(5)
    perturbed = functools.partial(topk.perturbed, key=jax.random.key(0))
    for operator in (topk.lapsum, topk.entropic, perturbed):
        with pytest.raises(ValueError, match=r"^k is 6, but must be a Python integer in 1\.\.5"):
            operator(x, 6)
        with pytest.raises(ValueError, match=r"^strength is 0\.0, "):
            operator(x, 2, strength=0.0)
        with pytest.raises(ValueError, match=r"^x\.dtype is int32"):
            operator(jnp.arange(5), 2)
    with pytest.raises(ValueError, match="samples is 0, but must be at least 1"):
        perturbed(x, 2, samples=0)
    with pytest.raises(ValueError, match=r"^k is 0"):
        topk.straight_through(x, 0)


@pytest.mark.parity
def test_entropic_is_the_fixed_point_of_sinkhorn() -> None:
    geometry = pytest.importorskip("ott.geometry.geometry", reason="ott-jax is not installed")
    linear = pytest.importorskip("ott.solvers.linear")
    x, k, epsilon = entries(), 4, 0.6
    cost = (x[:, None] - jnp.array([[0.0, 1.0]])) ** 2
    with jax.numpy_rank_promotion("allow"):  # for the other library's own arithmetic
        problem = geometry.Geometry(cost, epsilon=epsilon)
        plan = linear.solve(problem, b=jnp.array([12.0 - k, k]) / 12, threshold=1e-5).matrix
    np.testing.assert_allclose(12 * plan[:, 1], topk.entropic(x, k, strength=epsilon / 2), atol=1e-3)

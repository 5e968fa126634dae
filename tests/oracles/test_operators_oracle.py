"""The operator oracles against published values, hand computation, scipy, and the conditions of optimality."""

import numpy as np
import pytest
from scipy.optimize import isotonic_regression

from tests.oracles import operators

EXPONENTS = (2.0, 1.5, 4 / 3, 1.1)
SIX = [3, 1, 0.5, 2.9, -2.95, 0.1]
TEN = np.array(
    [
        *(-1.6836294, 0.617691, 0.09659418, -1.5587047, -0.76370925),
        *(-0.77612925, -0.09819217, 0.5910671, 1.0190237, -0.16765739),
    ]
)


@pytest.mark.parametrize("p", [2.0, 4 / 3])
def test_small_strength_gives_the_hard_operators(p):
    x = [-5, -2, 3, 1]
    np.testing.assert_array_equal(operators.mask(x, 2, 0.01, p), [0, 0, 1, 1])
    magnitude = operators.magnitude(x, 2, 0.01, p)
    np.testing.assert_allclose(magnitude, [-5, 0, 3, 0], rtol=1e-15)
    assert np.count_nonzero(magnitude) == 2


@pytest.mark.parametrize(
    ("strength", "p", "expected"),
    [
        (0.5, 2, [2.3625, 0, 0, 2.0625, -2.2125, 0]),
        (0.5, 4 / 3, [2.625465, 0, 0, 1.717405, -2.136663, 0]),
        (0.1, 2, [2.578125, 0, 0, 1.478125, -2.028125, 0]),
        (0.1, 4 / 3, [3, 0, 0, 0.623771, -2.407774, 0]),
    ],
)
def test_magnitude_golden(strength, p, expected):
    out = operators.magnitude(SIX, 2, strength, p)
    np.testing.assert_allclose(out, expected, atol=5e-7)
    np.testing.assert_array_equal(out == 0, np.asarray(expected) == 0)


def test_mask_golden():
    np.testing.assert_allclose(operators.mask(SIX, 3, 1.0, 1.5), [1, 0.83063, 0.169241, 1, 0, 0.00013], atol=5e-7)


def test_tied_entries_share_the_mask():
    np.testing.assert_allclose(operators.mask([0, 0, -5, 5], 2, 0.01, 4 / 3), [0.5, 0.5, 0, 1], atol=1e-14)


def test_gradient_golden():
    def loss(x):
        return np.mean((operators.mask(x, 4, 0.5, 4 / 3) + operators.mask(x**2, 4, 0.5, 4 / 3)) ** 2)

    expected = [0, 0.09063222, 0.23230663, 0, 0.12527114, 0.0595789, -0.1392387, 0.05559961, 0, -0.09306789]
    np.testing.assert_allclose(operators.numerical_jacobian(loss, TEN), expected, atol=2e-7)


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("strength", [0.01, 0.7, 30.0])
def test_pav_agrees_with_scipy_at_p_2(magnitude, strength):
    rng = np.random.default_rng(0)
    s, w = rng.normal(size=40), rng.uniform(size=40)
    curvature = 1 + strength * w if magnitude else np.ones(40)
    target = s / curvature if magnitude else s - strength * w
    expected = isotonic_regression(target, weights=curvature, increasing=False).x
    np.testing.assert_allclose(operators.pav(s, w, strength, 2.0, magnitude), expected, atol=1e-13)


@pytest.mark.parametrize("p", EXPONENTS)
@pytest.mark.parametrize("magnitude", [False, True])
def test_pav_meets_the_conditions_of_optimality(p, magnitude):
    """v is feasible; the gradient's partial sums are ≥ 0, 0 where v strictly falls, and 0 at the end (KKT)."""
    rng = np.random.default_rng(1)
    s, w, strength = np.linspace(4, 0, 30) + rng.normal(size=30), rng.uniform(size=30), 0.6
    q = p / (p - 1)
    v = operators.pav(s, w, strength, p, magnitude)
    falls = np.diff(v)
    gradient = np.sign(v - s) * np.abs(v - s) ** (q - 1) / strength ** (q - 1) + w * (v if magnitude else 1)
    multiplier = np.cumsum(gradient)
    scale = np.abs(gradient).max()
    assert np.all(falls <= 0)
    assert 5 < np.sum(falls < 0) < 25  # neither one block nor all apart: the example tests pooling
    assert np.all(multiplier >= -1e-12 * scale)
    np.testing.assert_allclose(multiplier[:-1][falls < 0], 0, atol=1e-12 * scale)
    assert abs(multiplier[-1]) <= 1e-12 * scale


@pytest.mark.parametrize("p", EXPONENTS)
@pytest.mark.parametrize("strength", [1e-4, 0.3, 2.0, 100.0])
def test_two_forms_of_the_mask_agree(p, strength):
    rng = np.random.default_rng(2)
    for scale in (1.0, 1e6):
        x = (scale * rng.normal(size=32)).astype(np.float32)
        x[3] = x[17]
        for k in (1, 2, 8, 31, 32):
            y = operators.mask(x, k, strength, p)
            np.testing.assert_allclose(y, operators.mask_by_bisection(x, k, strength, p), atol=2e-12)
            assert abs(y.sum() - k) < 1e-11
            assert np.all((y >= 0) & (y <= 1 + 1e-15))


def test_mask_is_invariant_to_a_shift():
    """In units of 2^-22: x = (0, -1, -1024), λ = 2048, k=1, p=2 pool at τ = (-1025 - 2048)/3.

    On top of 3·2^29 the unit is the last bit, where the pool of the first two, at -1024.5, cannot be told from -1024.
    """
    x, strength = np.array([0, -1, -1024]) / 2**22, 2048 / 2**22
    expected = np.array([3073 / 3, 3070 / 3, 1 / 3]) / 2048
    np.testing.assert_allclose(operators.mask(x, 1, strength, 2.0), expected, rtol=1e-12)
    np.testing.assert_allclose(operators.mask(x + 3 * 2.0**29, 1, strength, 2.0), expected, rtol=1e-12)


def test_magnitude_at_extreme_ratios():
    """(λ/x)^10 overflows where x = 10^-30, λ = 100, p = 1.1; the selected entry still returns exactly."""
    np.testing.assert_allclose(operators.magnitude([1e-30, 0], 1, 100.0, 1.1), [1e-30, 0], rtol=1e-14)


def test_magnitude_by_hand():
    """p=2, λ=1, x=(3, -2), k=1. Unpooled v = (3/2, 2) violates, so one block: v = 5/3 and y = (4/3, 1/3).

    Rescaled, sign(x) (y + λ y) = (8/3, -2/3). At λ=0.1 nothing pools: v_1 = 3/1.1 and the rescaled entry is x itself.
    """
    np.testing.assert_allclose(operators.magnitude([3, -2], 1, 1.0, 2.0), [8 / 3, -2 / 3], rtol=1e-15)
    np.testing.assert_allclose(operators.magnitude([3, -2], 1, 1.0, 2.0, rescale=False), [4 / 3, -1 / 3], rtol=1e-15)
    np.testing.assert_allclose(operators.magnitude([3, -2], 1, 0.1, 2.0), [3, 0], rtol=1e-15)
    np.testing.assert_allclose(operators.magnitude([3, -2], 1, 0.1, 2.0, rescale=False), [3 / 1.1, 0], rtol=1e-15)


def test_magnitude_keeps_large_entries_at_small_strength():
    """Where the released implementation is wrong: s/λ from 10^5 to 10^10 at p=4/3; unselected entries exactly 0."""
    for strength in (1e-4, 1e-3):
        np.testing.assert_allclose(operators.magnitude([100, 2, -1e6], 2, strength, 4 / 3), [100, 0, -1e6], rtol=1e-14)


@pytest.mark.parametrize("p", [2.0, 1.5, 4 / 3])
def test_jacobian_of_the_mask_is_diag_minus_outer(p):
    """d_i = (q-1)/λ z_i^(q-2) inside (0, 1), J = diag(d) - d dᵀ/Σd: implicit differentiation of Σ y = k."""
    x, k, strength = TEN, 4, 0.5
    q = p / (p - 1)
    z = operators.mask(x, k, strength, p) ** (1 / (q - 1))
    inside = (z > 0) & (z < 1 - 1e-12)
    d = np.where(inside, (q - 1) / strength * np.where(inside, z, 1) ** (q - 2), 0)
    jacobian = operators.numerical_jacobian(lambda x: operators.mask(x, k, strength, p), x)
    assert inside.sum() >= 3
    np.testing.assert_allclose(jacobian, np.diag(d) - np.outer(d, d) / d.sum(), atol=1e-7)


def test_successive_halving_by_hand():
    """n=4, k=1, weights w = (3/4, 1/4) to the stronger: pairs (.8, .2) and (.6, .4), then their mixtures.

    .75·.8 + .25·.2 = .65 against .75·.6 + .25·.4 = .55; the last round mixes them to .625.
    """
    scores, embeddings = [0.4, 0.8, 0.2, 0.6], np.eye(4)
    mixed, values, matrix = operators.successive_halving(embeddings, scores, 1, weight=lambda a, b: (0.75, 0.25))
    np.testing.assert_allclose(values, [0.625], rtol=1e-15)
    np.testing.assert_allclose(matrix, [[0.0625, 0.5625, 0.1875, 0.1875]], rtol=1e-15)
    np.testing.assert_array_equal(mixed, matrix)
    _, values, matrix = operators.successive_halving(embeddings, scores, 2, weight=lambda a, b: (0.75, 0.25))
    np.testing.assert_allclose(values, [0.65, 0.55], rtol=1e-15)
    np.testing.assert_allclose(matrix, [[0, 0.75, 0.25, 0], [0.25, 0, 0, 0.75]], rtol=1e-15)


def test_released_weights_by_hand():
    """b=20: softmax(20^1, 20^0) gives the loser 1/(1 + e^19); softmax(20^.5, 20^0) gives it 1/(1 + e^(√20 - 1))."""
    _, _, matrix = operators.successive_halving(np.eye(2), [1.0, 0.0], 1)
    np.testing.assert_allclose(matrix, [[1 / (1 + np.exp(-19)), 1 / (1 + np.exp(19))]], rtol=1e-14)
    _, _, matrix = operators.successive_halving(np.eye(2), [0.0, 0.5], 1)
    np.testing.assert_allclose(matrix[0, 0], 1 / (1 + np.exp(np.sqrt(20) - 1)), rtol=1e-14)
    np.testing.assert_allclose(operators.power_softmax(20)(1.0, 0.0), [20 / 21, 1 / 21], rtol=1e-14)
    np.testing.assert_allclose(operators.scaled_softmax(2)(1.0, 0.0)[1], 1 / (1 + np.exp(2)), rtol=1e-14)


def test_byes_go_to_the_best():
    """n=5, k=2: filled up to 8, so ranks 0..2 get a bye and ranks 3, 4 meet; n=3, k=1: rank 0 gets the bye."""

    def even(a, b):
        return 0.5, 0.5

    _, values, matrix = operators.successive_halving(np.eye(5), [1, 5, 3, 2, 4], 2, weight=even)
    # After round one: 5, 4, 3 and (2 + 1)/2; then (5 + 1.5)/2 and (4 + 3)/2.
    np.testing.assert_allclose(values, [3.25, 3.5])
    np.testing.assert_allclose(matrix, [[0.25, 0.5, 0, 0.25, 0], [0, 0, 0.5, 0, 0.5]])
    _, _, matrix = operators.successive_halving(np.eye(3), [1, 3, 2], 1, weight=even)
    np.testing.assert_allclose(matrix, [[0.25, 0.5, 0.25]])


def test_successive_halving_gives_exactly_k_rows():
    """Row-stochastic, each input in exactly one row, for every 1 ≤ k ≤ n; k = n returns the input."""
    rng = np.random.default_rng(3)
    for n in range(1, 14):
        scores = rng.uniform(size=n)
        for k in range(1, n + 1):
            mixed, values, matrix = operators.successive_halving(rng.normal(size=(n, 2)), scores, k)
            assert (mixed.shape, values.shape, matrix.shape) == ((k, 2), (k,), (k, n))
            np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-14)
            np.testing.assert_array_equal((matrix > 0).sum(0), 1)
            np.testing.assert_allclose(matrix @ scores, values, atol=1e-14)
        np.testing.assert_array_equal(matrix, np.eye(n))


def test_a_list_of_weights_is_one_per_round():
    """n=4, k=1 by shares 1 then 1/2: round one keeps the stronger (.8, .6), round two halves them."""
    rounds = [lambda a, b: (1.0, 0.0), lambda a, b: (0.5, 0.5)]
    _, values, matrix = operators.successive_halving(np.eye(4), [0.4, 0.8, 0.2, 0.6], 1, weight=rounds)
    np.testing.assert_allclose(matrix, [[0, 0.5, 0, 0.5]])
    np.testing.assert_allclose(values, [0.7])


def test_iterative_softmax_by_hand():
    """v = (0, 1), α = 2: weights (1, e²)/(1 + e²); then the winner is out and the other has all the weight."""
    mixed, values, matrix = operators.iterative_softmax([[1.0], [3.0]], [0, 1], 2, sharpness=2.0)
    loser = 1 / (1 + np.exp(2))
    np.testing.assert_allclose(matrix, [[loser, 1 - loser], [1, 0]], atol=1e-15)
    np.testing.assert_allclose(mixed, [[3 - 2 * loser], [1]], rtol=1e-14)
    np.testing.assert_allclose(values, [1 - loser, 0], atol=1e-15)


def test_numerical_jacobian_of_a_quadratic():
    """f(x) = (x_0 x_1, x_0²) at (2, 5): [[5, 2], [4, 0]]."""
    jacobian = operators.numerical_jacobian(lambda x: np.array([x[0] * x[1], x[0] ** 2]), [2.0, 5.0])
    np.testing.assert_allclose(jacobian, [[5, 2], [4, 0]], atol=1e-8)


def test_ties_go_to_the_earlier_entry():
    np.testing.assert_array_equal(operators.hard_mask([1, 2, 2, 2], 2), [False, True, True, False])
    np.testing.assert_array_equal(operators.top_indices([1, 2, 3, 2], 3), [2, 1, 3])

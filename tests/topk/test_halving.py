"""Successive halving and iterative softmax against hand-computed cases and float64 oracles written from the paper."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe import topk
from moe.topk.order import descending_order
from tests.oracles import operators as oracle

WEIGHTS = [topk.BoostedSoftmax(), topk.BoostedNormalised(50.0), topk.Softmax(7.0), topk.CentredBoost()]


def oracle_pair(weights: topk.PairWeights) -> oracle.PairWeights:
    """The oracle's weights for one of the three that the paper and its code define."""
    if isinstance(weights, topk.BoostedSoftmax):
        return oracle.boosted_softmax(weights.base)
    if isinstance(weights, topk.BoostedNormalised):
        return oracle.power_softmax(weights.base)
    assert isinstance(weights, topk.Softmax)
    return oracle.scaled_softmax(weights.sharpness)


def centred_pair(weights: topk.CentredBoost, n: int, k: int) -> list[oracle.PairWeights]:
    """`CentredBoost`, a round at a time, from its definition."""

    def in_round(number: int) -> oracle.PairWeights:
        entrants = n if number == 0 else k * 2 ** (oracle.halving_rounds(n, k) - number)

        def weight(a: float, b: float) -> tuple[float, float]:
            u = min(n * (a - b) / (weights.ranks + weights.field * entrants), 1)
            g = u * ((1 + weights.linear**2) / (u**2 + weights.linear**2)) ** 0.25
            return (1 + g) / 2, (1 - g) / 2

        return weight

    return [in_round(number) for number in range(oracle.halving_rounds(n, k))]


def sample(n: int, d: int = 3, batch: tuple[int, ...] = (), seed: int = 0) -> tuple[jax.Array, jax.Array]:
    e_key, v_key = jax.random.split(jax.random.key(seed))
    return jax.random.normal(e_key, (*batch, n, d)), jax.random.uniform(v_key, (*batch, n))


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' type checker off: it would forestall the operators' own checks."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@functools.partial(jax.jit, static_argnames=("k", "weights"))
def select(embeddings: jax.Array, scores: jax.Array, k: int, weights: topk.PairWeights) -> topk.Selection:
    """One compilation instead of one per operation, which the tests' time goes to."""
    return topk.successive_halving(embeddings, scores, k, weights=weights)


@functools.partial(jax.jit, static_argnames=("k", "weights"))
def matrix_of(scores: jax.Array, k: int, weights: topk.PairWeights = WEIGHTS[0]) -> jax.Array:
    return topk.successive_halving_matrix(scores, k, weights=weights)


def test_two_rounds_by_hand() -> None:
    # Softmax with sharpness ln 3: odds 3^(difference). Round 1 pairs (3, 0) and (2, 1) with odds 27 and 3, giving the
    # scores 81/28 and 7/4; round 2 pairs these.
    v = jnp.array([1.0, 3.0, 0.0, 2.0])
    first = 1 / (1 + 3.0 ** -(81 / 28 - 7 / 4))
    expected = [(1 - first) / 4, first * 27 / 28, first / 28, (1 - first) * 3 / 4]
    matrix = matrix_of(v, 1, weights=topk.Softmax(float(np.log(3))))
    np.testing.assert_allclose(matrix, [expected], rtol=1e-6)


def test_released_weights_by_hand() -> None:
    selection = select(jnp.eye(2), jnp.array([0.5, 1.0]), 1, weights=topk.BoostedSoftmax(base=4.0))
    strong = 1 / (1 + np.exp(-2.0))  # 4^1 - 4^0.5 = 2
    np.testing.assert_allclose(selection.embeddings, [[1 - strong, strong]], rtol=1e-6)
    np.testing.assert_allclose(selection.scores, [0.5 + 0.5 * strong], rtol=1e-6)


def test_an_odd_field_gives_the_strongest_a_bye() -> None:
    matrix = matrix_of(jnp.array([0.1, 0.9, 0.5]), 2, weights=topk.Softmax(float(np.log(16))))
    strong = 1 / (1 + 16**-0.4)
    np.testing.assert_allclose(matrix, [[0, 1, 0], [1 - strong, 0, strong]], rtol=1e-6)


@jax.jit
def select_every_k(embeddings: jax.Array, scores: jax.Array) -> list[tuple[topk.Selection, jax.Array]]:
    """Selection and matrix for k = 1 .. n, in one compilation; the weights take turns."""
    n = scores.shape[-1]
    selections = [topk.successive_halving(embeddings, scores, k, weights=WEIGHTS[k % 3]) for k in range(1, n + 1)]
    return [(selection, selection.weights.matrix(k)) for k, selection in enumerate(selections, start=1)]


@pytest.mark.parametrize("n", range(1, 10))
def test_every_k_agrees_with_the_oracle(n: int) -> None:
    embeddings, scores = (np.asarray(x) for x in sample(n, batch=(2,), seed=n))
    scores = np.round(scores, 1)  # ties: the earlier entry ranks first
    for k, (got, matrix) in enumerate(select_every_k(embeddings, scores), start=1):
        assert got.embeddings.shape == (2, k, 3)
        np.testing.assert_array_equal(np.sum(np.asarray(matrix) > 0, axis=1), 1)  # each input in exactly one slot
        np.testing.assert_allclose(np.sum(matrix, axis=2), 1, rtol=2e-6)
        for row in range(2):
            want = oracle.successive_halving(embeddings[row], scores[row], k, oracle_pair(WEIGHTS[k % 3]))
            for value, expected in zip((got.embeddings[row], got.scores[row], matrix[row]), want, strict=True):
                np.testing.assert_allclose(value, expected, atol=1e-5)


@pytest.mark.parametrize(("n", "k"), [(16, 2), (13, 3), (64, 1)])
def test_centred_boost_agrees_with_its_definition(n: int, k: int) -> None:
    embeddings, scores = sample(n, seed=n)
    weights = topk.CentredBoost(ranks=2.0, field=0.2, linear=0.5)
    got = select(embeddings, scores, k, weights=weights)
    want, want_scores, _ = oracle.successive_halving(embeddings, scores, k, centred_pair(weights, n, k))
    np.testing.assert_allclose(got.embeddings, want, atol=2e-5)
    np.testing.assert_allclose(got.scores, want_scores, atol=1e-5)


def test_k_equal_n_is_the_identity() -> None:
    embeddings, scores = sample(5)
    selection = select(embeddings, scores, 5, WEIGHTS[0])
    np.testing.assert_array_equal(selection.embeddings, embeddings)
    np.testing.assert_array_equal(selection.scores, scores)


def test_permuting_the_inputs_permutes_only_the_columns() -> None:
    embeddings, scores = sample(21)
    order = jax.random.permutation(jax.random.key(9), 21)
    plain = select(embeddings, scores, 4, WEIGHTS[0])
    permuted = select(embeddings[order], scores[order], 4, WEIGHTS[0])
    np.testing.assert_allclose(permuted.embeddings, plain.embeddings, atol=1e-6)
    np.testing.assert_allclose(permuted.weights.matrix(4), plain.weights.matrix(4)[:, order], atol=1e-7)


@pytest.mark.parametrize("weights", WEIGHTS, ids=lambda w: type(w).__name__)
def test_gradients_are_those_of_the_oracle(weights: topk.PairWeights) -> None:
    n, k = 11, 3
    embeddings, scores = sample(n, seed=2)
    cotangent = np.asarray(jax.random.normal(jax.random.key(3), (k, 3)))
    pair = centred_pair(weights, n, k) if isinstance(weights, topk.CentredBoost) else oracle_pair(weights)

    def loss(embeddings: jax.Array, scores: jax.Array) -> jax.Array:
        selection = select(embeddings, scores, k, weights=weights)
        return jnp.sum(selection.embeddings * cotangent) + jnp.sum(selection.scores**2)

    def reference(embeddings: np.ndarray, scores: np.ndarray) -> float:
        rows, values, _ = oracle.successive_halving(embeddings, scores, k, pair)
        return float(np.sum(rows * cotangent) + np.sum(values**2))

    gradients = jax.grad(loss, (0, 1))(embeddings, scores)
    e64, v64 = np.asarray(embeddings, np.float64), np.asarray(scores, np.float64)
    of_scores = oracle.numerical_jacobian(lambda v: reference(e64, v), v64)
    of_embeddings = oracle.numerical_jacobian(lambda e: reference(e.reshape(n, 3), v64), e64.ravel())
    np.testing.assert_allclose(gradients[1], of_scores, atol=2e-4 * np.abs(of_scores).max())
    np.testing.assert_allclose(gradients[0].ravel(), of_embeddings, atol=1e-5)


@pytest.mark.parametrize("weights", WEIGHTS, ids=lambda w: type(w).__name__)
def test_forward_and_reverse_derivatives_agree_twice(weights: topk.PairWeights) -> None:
    embeddings, scores = sample(9, seed=4)

    def f(v: jax.Array) -> jax.Array:
        return select(embeddings, v, 2, weights=weights).embeddings.ravel()

    np.testing.assert_allclose(jax.jit(jax.jacfwd(f))(scores), jax.jit(jax.jacrev(f))(scores), rtol=1e-4, atol=1e-4)
    direction = jnp.arange(9.0)
    gradient = jax.grad(lambda v: jnp.sum(f(v) ** 2))
    forward = jax.jit(lambda v: jax.jvp(gradient, (v,), (direction,))[1])(scores)
    reverse = jax.jit(jax.grad(lambda v: jnp.vdot(gradient(v), direction)))(scores)
    np.testing.assert_allclose(forward, reverse, rtol=1e-3, atol=1e-3 * np.abs(reverse).max())


@pytest.mark.parametrize("weights", WEIGHTS, ids=lambda w: type(w).__name__)
@pytest.mark.parametrize("scale", [1e-6, 1e6, 1e30])
def test_any_finite_scores_give_finite_values_and_gradients(weights: topk.PairWeights, scale: float) -> None:
    embeddings = jnp.eye(6)
    scores = scale * jnp.array([1.0, -1.0, 1.0, 0.5, 0.0, -0.0])  # tied at the top

    def loss(v: jax.Array) -> jax.Array:
        return jnp.sum(select(embeddings, v, 2, weights=weights).embeddings ** 2)

    value, gradient = jax.value_and_grad(loss)(scores)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))
    if scale > 1:  # the two best survive, whole
        matrix = matrix_of(scores, 2, weights=weights)
        np.testing.assert_array_equal(matrix[:, [0, 2]], np.eye(2))


def test_equal_scores_share_equally() -> None:
    for weights in WEIGHTS:
        matrix = matrix_of(jnp.full(8, 0.25), 2, weights=weights)
        np.testing.assert_allclose(np.sort(matrix, axis=None)[8:], 0.25, rtol=1e-6)


def test_batch_entries_are_independent_and_nan_stays_in_its_own() -> None:
    embeddings, scores = sample(8, batch=(2, 3))
    whole = select(embeddings, scores.at[1, 2, 4].set(jnp.nan), 3, WEIGHTS[0])
    one = select(embeddings[0, 1], scores[0, 1], 3, WEIGHTS[0])
    np.testing.assert_allclose(whole.embeddings[0, 1], one.embeddings, rtol=1e-6)
    assert np.isnan(whole.embeddings[1, 2]).any()
    assert np.isfinite(np.delete(whole.embeddings.reshape(6, -1), 5, axis=0)).all()
    mapped = jax.jit(jax.vmap(jax.vmap(functools.partial(topk.successive_halving, k=3))))(embeddings, scores)
    np.testing.assert_allclose(mapped.embeddings[0], whole.embeddings[0], rtol=1e-6)


def test_narrow_dtypes_are_computed_wide_and_returned_narrow() -> None:
    embeddings, scores = sample(16)
    narrow = embeddings.astype(jnp.bfloat16), scores.astype(jnp.float16)
    selection = select(*narrow, 2, WEIGHTS[0])
    assert (selection.embeddings.dtype, selection.scores.dtype) == (jnp.bfloat16, jnp.float16)
    wide = select(*(x.astype(jnp.float32) for x in narrow), 2, WEIGHTS[0])
    np.testing.assert_array_equal(selection.embeddings, wide.embeddings.astype(jnp.bfloat16))


def test_batches_shard_without_communication() -> None:
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    embeddings, scores = sample(32, batch=(4, 2))
    sharded = [jax.device_put(x, NamedSharding(mesh, PartitionSpec("a", "b"))) for x in (embeddings, scores)]

    @jax.jit
    def gradient(embeddings: jax.Array, scores: jax.Array) -> tuple[jax.Array, jax.Array]:
        def rows(e: jax.Array, v: jax.Array) -> jax.Array:
            return topk.successive_halving(e, v, 4).embeddings

        value, pull = jax.vjp(rows, embeddings, scores)
        return pull(value)

    compiled = gradient.lower(*sharded).compile()
    text = compiled.as_text()
    assert not [name for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute") if name in text]
    for got, want in zip(compiled(*sharded), gradient(embeddings, scores), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n", [7, 200])
def test_order_sorts_like_a_stable_comparison(n: int) -> None:
    x = jnp.round(jax.random.normal(jax.random.key(n), (3, n)), 1)
    x = x.at[0, :5].set(jnp.array([jnp.nan, -0.0, 0.0, jnp.inf, -jnp.inf]))
    # NaN sorts after -inf.
    expected = np.argsort(np.where(np.isnan(x), np.inf, -np.asarray(x)), axis=-1, kind="stable")
    expected[0] = [*[i for i in expected[0] if i != 0], 0]
    np.testing.assert_array_equal(descending_order(x), expected)


@pytest.mark.parametrize(("n", "k"), [(9, 4), (5, 5), (6, 1)])
@pytest.mark.parametrize("sharpness", [2.0, 50.0])
def test_iterative_softmax_agrees_with_the_oracle(n: int, k: int, sharpness: float) -> None:
    embeddings, scores = sample(n, batch=(2,))
    got = topk.iterative_softmax(embeddings, scores, k, sharpness=sharpness)
    for row in range(2):
        want = oracle.iterative_softmax(embeddings[row], scores[row], k, sharpness)
        for value, expected in zip(got, want, strict=True):
            np.testing.assert_allclose(value[row], expected, atol=1e-5)


def quality(embeddings: jax.Array, scores: jax.Array, rows: jax.Array) -> np.ndarray:
    """nCCS per batch entry: mean, over the true top k, of the largest cosine with any selected row."""
    k = rows.shape[-2]
    best = jnp.take_along_axis(embeddings, jnp.argsort(-scores, axis=-1)[..., :k, None], axis=-2)
    unit = [x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (best, rows)]
    return np.asarray(jnp.mean(jnp.max(jnp.einsum("...id,...jd->...ij", *unit), axis=-1), axis=-1))


@pytest.mark.parametrize(("n", "k", "published"), [(32, 2, 0.9595), (256, 4, 0.9075)])
def test_published_quality_is_reached_and_centred_boost_keeps_it_high(n: int, k: int, published: float) -> None:
    e_key, v_key = jax.random.split(jax.random.key(n))
    samples = 2**15 // n
    embeddings = jax.random.uniform(e_key, (samples, n, 32), minval=-1.0)
    scores = jax.random.uniform(v_key, (samples, n))

    cotangent = jax.random.normal(jax.random.key(0), (samples, k, 32))
    norms = {}
    for name, weights in (("released", topk.BoostedSoftmax()), ("centred", topk.CentredBoost())):

        def rows_of(v: jax.Array, weights: topk.PairWeights = weights) -> jax.Array:
            return select(embeddings, v, k, weights=weights).embeddings

        rows, pull = jax.vjp(rows_of, scores)
        measured = quality(embeddings, scores, rows)
        standard_error = measured.std() / np.sqrt(samples)
        assert measured.mean() > (0.97 if name == "centred" else published) - 3 * standard_error
        norms[name] = np.median(np.linalg.norm(pull(cotangent)[0], axis=-1))
    assert norms["centred"] > norms["released"]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("k", [0, 6, 2.0])
def test_k_out_of_range_is_an_error(k: object) -> None:
    embeddings, scores = sample(5)
    for operator in (topk.successive_halving, topk.iterative_softmax):
        with pytest.raises(ValueError, match=rf"^k is {k}, but must be a Python integer in 1\.\.5"):
            operator(embeddings, scores, k)
    with pytest.raises(ValueError, match=rf"^k is {k}, "):
        topk.successive_halving_matrix(scores, k)


@pytest.mark.usefixtures("unchecked")
def test_bad_inputs_are_named() -> None:
    embeddings, scores = sample(5)
    for operator in (topk.successive_halving, topk.iterative_softmax):
        with pytest.raises(ValueError, match=r"scores\.shape is \(4,\).*\(5,\)"):
            operator(embeddings, scores[:4], 2)
        with pytest.raises(ValueError, match=r"scores\.dtype is int32"):
            operator(embeddings, jnp.arange(5), 2)
        with pytest.raises(ValueError, match=r"embeddings\.dtype is int32"):
            operator(jnp.ones((5, 3), jnp.int32), scores, 2)
    with pytest.raises(ValueError, match="sharpness is 0, but must be positive"):
        topk.iterative_softmax(embeddings, scores, 2, sharpness=0)
    for weights in (topk.BoostedSoftmax, topk.BoostedNormalised):
        with pytest.raises(ValueError, match=r"base is 1\.0, but must be greater than 1"):
            weights(base=1.0)
    with pytest.raises(ValueError, match=r"sharpness is -1\.0, but must be positive"):
        topk.Softmax(sharpness=-1.0)
    for name in ("ranks", "field", "linear"):
        with pytest.raises(ValueError, match=rf"{name} is 0, but must be positive"):
            topk.CentredBoost(**{name: 0})

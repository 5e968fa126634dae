"""The loss over a vocabulary, in chunks, against float64; and that no array holds all logits."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.ops.vocabulary import VocabularyLoss, vocabulary_loss, vocabulary_scores
from tests.compiling import AS_USERS
from tests.oracles import decoder, routing
from tests.routers.helpers import COMPILER_OPTIONS

BATCH, LENGTH, WIDTH, VOCABULARY = 3, 7, 4, 11
SETTINGS = {
    "plain": VocabularyLoss(chunk=64),
    "chunks": VocabularyLoss(chunk=3),
    "everything": VocabularyLoss(chunk=2, cap=1.5, label_smoothing=0.2, z_weight=0.3),
}


def make_arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(BATCH, LENGTH, WIDTH)).astype(np.float32)
    head = rng.normal(size=(WIDTH, VOCABULARY)).astype(np.float32)
    mask = rng.uniform(size=(BATCH, LENGTH)) < 0.7
    return x, head, rng.integers(0, VOCABULARY, (BATCH, LENGTH)).astype(np.int32), mask


def oracle(x: np.ndarray, head: np.ndarray, target: np.ndarray, mask: np.ndarray, one: VocabularyLoss) -> list[float]:
    """loss, cross_entropy, z, correct."""
    logits = x.astype(np.float64) @ head
    if one.cap:
        logits = one.cap * np.tanh(logits / one.cap)
    kept = list(zip(logits[mask], target[mask], strict=True))
    cross_entropy = sum(decoder.token_loss(row, t, one.label_smoothing) for row, t in kept)
    z = one.z_weight * sum(np.log(np.exp(row).sum()) ** 2 for row, _ in kept)
    return [cross_entropy + z, cross_entropy, z, float(sum(row.argmax() == t for row, t in kept))]


@pytest.mark.parametrize("name", SETTINGS)
def test_value_and_gradient(name: str) -> None:
    settings, (x, head, target, mask) = SETTINGS[name], make_arrays()

    def loss(x: jax.Array, head: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        sums = vocabulary_loss(x, head, jnp.asarray(target), jnp.asarray(mask), settings)
        return 2.0 * sums.loss, sums

    run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), compiler_options=COMPILER_OPTIONS)
    gradient, sums = run(jnp.asarray(x), jnp.asarray(head))
    np.testing.assert_allclose(sums, oracle(x, head, target, mask, settings), rtol=1e-5)
    value = vocabulary_loss(*(jnp.asarray(a) for a in (x, head, target, mask)), settings)
    np.testing.assert_allclose(value, sums, rtol=1e-6)
    rng, step = np.random.default_rng(1), 1e-5
    direction = rng.normal(size=x.shape), rng.normal(size=head.shape)
    ends = [oracle(x + s * direction[0], head + s * direction[1], target, mask, settings)[0] for s in (step, -step)]
    slope = sum(np.sum(np.asarray(g, np.float64) * d) for g, d in zip(gradient, direction, strict=True))
    assert slope == pytest.approx(2 * (ends[0] - ends[1]) / (2 * step), rel=1e-4)


def test_scores() -> None:
    x, head, target, _ = make_arrays()
    scores = vocabulary_scores(jnp.asarray(x), jnp.asarray(head), jnp.asarray(target), SETTINGS["everything"])
    logits = 1.5 * np.tanh(x.astype(np.float64) @ head / 1.5)
    expected = -np.log(np.take_along_axis(routing.softmax(logits), target[..., None], axis=-1)[..., 0])
    np.testing.assert_allclose(scores.nll, expected, rtol=1e-5)
    np.testing.assert_array_equal(scores.correct, logits.argmax(axis=-1) == target)
    np.testing.assert_allclose(scores.confidence, routing.softmax(logits).max(axis=-1), rtol=1e-5)
    best = np.argsort(-logits, axis=-1, kind="stable")[..., :5]
    np.testing.assert_array_equal(scores.top5, (best == target[..., None]).any(axis=-1))
    assert 0 < np.mean(scores.top5) < 1


def test_among_equal_logits_the_lower_ids_are_the_top_five() -> None:
    target = jnp.arange(8, dtype=jnp.int32)[None]
    scores = vocabulary_scores(jnp.zeros((1, 8, 2)), jnp.zeros((2, 8)), target, VocabularyLoss())
    np.testing.assert_array_equal(scores.top5[0], np.arange(8) < 5)
    np.testing.assert_array_equal(scores.correct[0], np.arange(8) == 0)


@pytest.mark.parametrize("what", ["gradient", "scores"])
def test_no_array_holds_all_logits(what: str) -> None:
    """Of 4 × 32 × 500 logits, the largest array of the compiled program has a chunk of 4 × 8 × 500, in any type."""
    batch, length, width, vocabulary, settings = 4, 32, 8, 500, VocabularyLoss(chunk=8)
    x, head = jnp.ones((batch, length, width)), jnp.ones((width, vocabulary))
    target = jnp.zeros((batch, length), jnp.int32)

    def loss(x: jax.Array, head: jax.Array) -> jax.Array:
        return vocabulary_loss(x, head, target, target == 0, settings).loss

    def scores(x: jax.Array, head: jax.Array) -> tuple[jax.Array, ...]:
        return vocabulary_scores(x, head, target, settings)

    function = jax.grad(loss, argnums=(0, 1)) if what == "gradient" else scores
    text = jax.jit(function).lower(x, head).compile(AS_USERS).as_text()
    sizes = [np.prod([int(n) for n in shape.split(",")]) for shape in re.findall(r"\w\[(\d[\d,]*)\]", text)]
    assert batch * 8 * vocabulary in sizes
    assert max(sizes) == batch * 8 * vocabulary

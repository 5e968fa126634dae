"""The hash and random routers against the float64 oracle, and the properties that are their own."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from moe.routers import Hash, Random
from moe.routers.unlearned import hashed_experts
from moe.types import Layout, RouterInputs
from tests.oracles import unlearned
from tests.routers.helpers import (
    EXAMPLES,
    EXPERTS,
    TOKENS,
    Expected,
    assert_matches_oracle,
    example_keys,
    route,
    unbalanced_logits,
    with_and_without_padding,
)

IDS_T = np.random.default_rng(8).integers(0, 50_000, TOKENS).astype(np.int32)


def ask_hash(router: Hash, logits_TE: np.ndarray, noise_TE: np.ndarray | None, *, ids_T: np.ndarray) -> Expected:
    expert_TK = unlearned.hashed_experts(ids_T, router.k, EXPERTS, router.seed)
    return Expected(unlearned.rows_of(expert_TK, logits_TE), {}, {})


def ask_random(router: Random, logits_TE: np.ndarray, noise_TE: np.ndarray) -> Expected:
    return Expected(unlearned.rows_of(unlearned.highest(noise_TE, router.k), logits_TE), {}, {})


@with_and_without_padding
def test_hash_matches_the_oracle(mask_T: np.ndarray) -> None:
    asked = functools.partial(ask_hash, ids_T=IDS_T[mask_T])
    assert_matches_oracle(Hash(k=3, seed=5), asked, unbalanced_logits(), mask_T, example_keys(), ids_T=IDS_T)


@with_and_without_padding
def test_random_matches_the_oracle(mask_T: np.ndarray) -> None:
    assert_matches_oracle(Random(k=3), ask_random, unbalanced_logits(), mask_T, example_keys())


@pytest.mark.parametrize("num_experts", [1, 6, 8, 64])
def test_each_run_of_ids_meets_every_expert_equally_often(num_experts: int) -> None:
    """40 runs of E ids: k distinct experts per id, and every expert k times per run; another seed, another hash."""
    k, ids_T = min(3, num_experts), jnp.arange(40 * num_experts, dtype=jnp.int32)
    expert_TK = np.asarray(hashed_experts(ids_T, k, num_experts, 0))
    for run_EK in expert_TK.reshape(40, num_experts, k):
        np.testing.assert_array_equal(np.bincount(run_EK.reshape(-1), minlength=num_experts), k)
        assert all(len(set(expert_K)) == k for expert_K in run_EK.tolist())
    other_TK = np.asarray(hashed_experts(ids_T, k, num_experts, 1))
    assert num_experts == 1 or (other_TK != expert_TK).any()
    pairs = np.unique(expert_TK.reshape(40, -1), axis=0)
    assert num_experts < 8 or len(pairs) > 10  # runs differ


def test_hash_without_ids_is_refused() -> None:
    with pytest.raises(ValueError, match="router hash chooses by token id: give ids"):
        Hash()({}, RouterInputs(jnp.zeros((TOKENS, EXPERTS))), {}, None)


def test_random_in_evaluation_depends_on_the_position_alone() -> None:
    """All examples get the same experts, positions don't; another seed gives others. In training all differ."""
    inputs = RouterInputs(jnp.zeros((EXAMPLES * 40, EXPERTS)), layout=Layout(EXPERTS, EXAMPLES))

    def experts(router: Random, training: bool = False) -> np.ndarray:
        routing = route(router, {}, inputs, {}, example_keys() if training else None)[0].routing
        return np.asarray(routing.expert).reshape(router.k, EXAMPLES, 40)

    expert_KBL = experts(Random(k=2))
    np.testing.assert_array_equal(expert_KBL, expert_KBL[:, :1].repeat(EXAMPLES, axis=1))
    assert len(np.unique(expert_KBL[0, 0])) == EXPERTS
    assert (experts(Random(k=2, seed=1)) != expert_KBL).any()
    trained = experts(Random(k=2), training=True)
    assert (trained[:, 0] != trained[:, 1]).any()


def test_random_chooses_all_experts_equally_often() -> None:
    """Of 24 000 choices each of five experts gets a fifth; five standard deviations are .013."""
    inputs = RouterInputs(jnp.zeros((EXAMPLES * 3000, EXPERTS)))
    routing = route(Random(k=2), {}, inputs, {}, example_keys())[0].routing
    shares = np.bincount(np.asarray(routing.expert), minlength=EXPERTS) / len(routing.expert)
    np.testing.assert_allclose(shares, 1 / EXPERTS, atol=0.013)

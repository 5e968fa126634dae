"""What holds of every router: one that is added to `moe.routers.ROUTERS` is tested here without an edit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.routers import ROUTERS, Router
from moe.types import Assignments, Keys, Layout, PyTree, RouterInputs, Slots
from tests.routers.helpers import (
    BELOW_K,
    COMPILER_OPTIONS,
    EXAMPLES,
    EXPERTS,
    LENGTH,
    TOKENS,
    WITHOUT_LOGITS,
    Run,
    example_keys,
    readout_for,
    route,
    run,
    unbalanced_logits,
)

every_router = pytest.mark.parametrize("name", ROUTERS)
PADDED = np.repeat([True, True, False, True], LENGTH)  # the third example is padding
BALANCED = 2.0 * np.eye(EXPERTS, dtype=np.float32)[np.arange(TOKENS) % EXPERTS]
TIED = np.array([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 1]], np.float32)[np.arange(TOKENS) % 3]
HUGE = np.sign(unbalanced_logits(3)) * np.float32(1e4)
# Where router gradients of other projects became NaN, or where a float32 rounds or overflows.
EXTREME = {
    "zeros": 0 * BALANCED,
    "balanced": BALANCED,
    "tied": TIED,
    "huge": HUGE,
    "far apart": 1e3 * unbalanced_logits(),
}


def make(name: str, k: int | None = None) -> Router:
    """The router's defaults with all of its losses switched on, and with another k where it has one."""
    router = ROUTERS[name]()
    fields = [field.name for field in dataclasses.fields(router)]
    changes = {field: 0.5 for field in fields if field.endswith("_weight")}
    if k is not None and "k" in fields:
        changes["k"] = k
    return dataclasses.replace(router, **changes)


def inputs_for(
    router: Router, logits: np.ndarray, mask_T: np.ndarray | None = None, order_T: np.ndarray | None = None
) -> RouterInputs:
    """Logits, repeated to as many as the router wants, with what some routers look at beside them: representations and
    ids, which `order_T` rearranges.
    """
    num_tokens, num_experts = logits.shape
    logits = logits[:, np.arange(router.num_logits(num_experts)) % num_experts]
    tokens_TD = np.random.default_rng(4).normal(size=(num_tokens, 6)).astype(np.float32)
    ids_T = np.arange(num_tokens, dtype=np.int32) % 7
    order_T = np.arange(num_tokens) if order_T is None else order_T
    mask_T = np.ones(num_tokens, bool) if mask_T is None else mask_T
    arrays = (jnp.asarray(a) for a in (logits, tokens_TD[order_T], ids_T[order_T], mask_T))
    return RouterInputs(*arrays, layout=Layout(num_experts, EXAMPLES))


@functools.cache
def variables(router: Router, num_experts: int) -> tuple:
    return router.init(num_experts)


def ask(
    name: str,
    logits: np.ndarray,
    keys: Keys | None = None,
    mask_T: np.ndarray | None = None,
    k: int | None = None,
    order_T: np.ndarray | None = None,
) -> Run:
    router = make(name, k)
    params, state = variables(router, logits.shape[1])
    inputs = inputs_for(router, logits, mask_T, order_T)
    return run(router, params, inputs, state, keys, readout_for(np.asarray(logits, np.float32)))


def assert_finite(got: Run) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(got):
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)


def assert_same(a: PyTree, b: PyTree, rtol: float = 1e-5) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6), a, b)


@every_router
def test_a_router_is_a_frozen_value_with_bounded_k(name: str) -> None:
    router = make(name)
    assert isinstance(router, Router)
    assert hash(router) == hash(make(name))
    for k in (0, EXPERTS + 1):
        impossible = make(name, k)
        if impossible.k == k:
            with pytest.raises(ValueError, match=rf"k = {k} .* 1\.\.{EXPERTS}"):
                impossible.init(EXPERTS)


@every_router
@pytest.mark.parametrize("training", [True, False])
def test_what_it_returns_has_static_shapes_and_stays_in_range(name: str, training: bool) -> None:
    got = ask(name, unbalanced_logits(), example_keys() if training else None, PADDED)
    routing = got.routed.routing
    assert_finite(got)
    for value in (*got.routed.losses.values(), *got.routed.metrics.values()):
        assert (value.shape, value.dtype) == ((), jnp.float32)
    if isinstance(routing, Slots):
        assert routing.dispatch.shape == routing.combine.shape
        assert routing.dispatch.shape[:2] == (TOKENS, EXPERTS)
        assert (got.weights >= 0).all()
        return
    assert isinstance(routing, Assignments)
    num_rows = routing.token.shape[0]
    assert [leaf.shape for leaf in routing] == [(num_rows,)] * 4 + [()]
    assert [leaf.dtype for leaf in routing] == [jnp.int32, jnp.int32, jnp.float32, jnp.bool_, jnp.int32]
    token, expert, weight, valid = (np.asarray(leaf) for leaf in routing[:4])
    assert token.min() >= 0
    assert token.max() < TOKENS
    assert expert.min() >= 0
    assert expert.max() < EXPERTS
    assert (weight >= 0).all()
    assert routing.choices >= valid.sum() > 0
    pairs = list(zip(token[valid], expert[valid], strict=True))
    assert len(set(pairs)) == len(pairs), "a token chose an expert twice"


@every_router
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", EXTREME)
def test_nothing_is_nan_at_extremes(name: str, training: bool, case: str) -> None:
    assert_finite(ask(name, EXTREME[case], example_keys() if training else None))


@every_router
@pytest.mark.parametrize(("num_experts", "k"), [(1, 1), (EXPERTS, EXPERTS)])
def test_one_expert_or_all_of_them(name: str, num_experts: int, k: int) -> None:
    """With k = E every token has every expert."""
    for logits in (unbalanced_logits(num_experts=num_experts), np.zeros((TOKENS, num_experts), np.float32)):
        got = ask(name, logits, example_keys(), k=k)
        assert_finite(got)
        if make(name, k).k == k and name not in BELOW_K:
            assert (got.weights.sum(axis=-1) > 0).all()


@every_router
def test_bf16_logits_are_routed_in_float32(name: str) -> None:
    router, rounded, keys = make(name), jnp.asarray(unbalanced_logits(), jnp.bfloat16), example_keys()
    params, state = variables(router, EXPERTS)
    low, low_weights = route(router, params, inputs_for(router, rounded), state, keys)
    full = ask(name, np.asarray(rounded, np.float32), keys)
    assert_same((low, low_weights), (full.routed, full.weights), rtol=1e-6)


@pytest.mark.parametrize("name", [name for name in ROUTERS if name not in WITHOUT_LOGITS])
def test_permuting_experts_permutes_the_result(name: str) -> None:
    logits, order = unbalanced_logits(), np.array([3, 0, 4, 1, 2])
    plain, permuted = ask(name, logits), ask(name, logits[:, order])
    np.testing.assert_allclose(permuted.weights, plain.weights[:, order], rtol=1e-5, atol=1e-6)
    assert_same((permuted.routed.losses, permuted.routed.metrics), (plain.routed.losses, plain.routed.metrics))


@every_router
def test_an_example_keeps_its_noise_wherever_it_stands(name: str) -> None:
    """Reordering the examples of a group with their keys reorders the result, and changes no loss."""
    order = np.array([2, 0, 3, 1])
    order_T = (order[:, None] * LENGTH + np.arange(LENGTH)).reshape(-1)
    logits, keys = unbalanced_logits(), example_keys()
    plain, moved = ask(name, logits, keys), ask(name, logits[order_T], keys[order], order_T=order_T)
    np.testing.assert_allclose(moved.weights, plain.weights[order_T], rtol=1e-5, atol=1e-6)
    assert_same(moved.routed.losses, plain.routed.losses)


@every_router
def test_evaluation_is_deterministic_and_leaves_the_state(name: str) -> None:
    first, second = ask(name, unbalanced_logits()), ask(name, unbalanced_logits())
    jax.tree.map(np.testing.assert_array_equal, first, second)
    jax.tree.map(np.testing.assert_array_equal, first.routed.state, variables(make(name), EXPERTS)[1])


@every_router
@pytest.mark.parametrize("training", [True, False])
def test_padding_is_not_routed_and_changes_nothing(name: str, training: bool) -> None:
    keys = example_keys() if training else None
    other = np.where(PADDED[:, None], unbalanced_logits(), HUGE)
    plain, changed = ask(name, unbalanced_logits(), keys, PADDED), ask(name, other, keys, PADDED)
    np.testing.assert_array_equal(plain.weights[~PADDED], 0)
    np.testing.assert_array_equal(plain.gradient[~PADDED], 0)
    np.testing.assert_array_equal(changed.weights, plain.weights)
    assert_same((changed.routed.losses, changed.routed.metrics), (plain.routed.losses, plain.routed.metrics))
    nobody = ask(name, unbalanced_logits(), keys, np.zeros(TOKENS, bool))
    assert_finite(nobody)
    np.testing.assert_array_equal(nobody.weights, 0)


@every_router
def test_groups_side_by_side_are_groups_one_by_one(name: str) -> None:
    router, keys = make(name), jnp.stack([example_keys(), example_keys()[::-1]])
    params, state = variables(router, EXPERTS)
    groups = [inputs_for(router, unbalanced_logits(seed), mask_T) for seed, mask_T in ((0, None), (1, PADDED))]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *groups)
    side_by_side = jax.vmap(router, in_axes=(None, 0, None, 0))
    together = jax.jit(side_by_side, compiler_options=COMPILER_OPTIONS)(params, stacked, state, keys)
    for index, one in enumerate(groups):
        alone = run(router, params, one, state, keys[index], readout_for(unbalanced_logits())).routed
        assert_same(jax.tree.map(lambda leaf, index=index: leaf[index], together), alone)


@every_router
def test_state_keeps_its_shape_and_carries_no_gradient(name: str) -> None:
    got, (_, state) = ask(name, unbalanced_logits(), example_keys()), variables(make(name), EXPERTS)
    np.testing.assert_array_equal(got.state_gradient, 0)
    assert jax.tree.structure(got.routed.state) == jax.tree.structure(state)
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(got.routed.state), strict=True):
        assert (before.shape, before.dtype) == (after.shape, after.dtype)

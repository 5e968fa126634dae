"""The sparse transport router against the float64 oracle, and the plan's own properties."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.routers import SparseTransport
from moe.routers.sparse_transport import columns, dual_variables, token_masses, unsorted_masses
from moe.types import RouterInputs
from tests.oracles import routing as oracle
from tests.oracles import sparse_gates, transport
from tests.routers.helpers import (
    COMPILER_OPTIONS,
    EXPERTS,
    TOKENS,
    Expected,
    assert_matches_oracle,
    example_keys,
    route,
    unbalanced_logits,
    with_and_without_padding,
)

ROUTER = SparseTransport(k=2, strength=0.6, iterations=4, z_weight=0.2)


def asker(mask_T: np.ndarray) -> Callable[..., Expected]:
    """Asks with the dual variables of the tests' logits: they are constants to the gradient."""
    duals_T = transport.sparse_transport_duals(
        np.log(oracle.softmax(unbalanced_logits()[mask_T])), ROUTER.k, ROUTER.strength, ROUTER.iterations
    )

    def ask(router: SparseTransport, logits_TE: np.ndarray, noise_TE: np.ndarray | None) -> Expected:
        probs_TE = oracle.softmax(logits_TE)
        scores_TE = np.log(probs_TE) + duals_T[:, None]
        plan_TE = transport.sparse_columns(scores_TE, router.k, router.strength)
        # An expert's tokens stand in the order of their masses.
        most = -(-len(logits_TE) * router.k // EXPERTS)
        rows = sparse_gates.queue_of_experts(plan_TE, plan_TE > 0, most)
        rows = rows._replace(weight=rows.weight * probs_TE[rows.token, rows.expert])
        mass_T, z = plan_TE.sum(axis=1), oracle.z_loss(logits_TE)
        metrics = {"z": z, "plan_error": np.mean(np.abs(mass_T - 1)), "unchosen": np.mean(mass_T == 0)}
        return Expected(rows, {"z": router.z_weight * z}, metrics)

    return ask


@with_and_without_padding
def test_plan_and_gradient_match_the_oracle(mask_T: np.ndarray) -> None:
    assert_matches_oracle(ROUTER, asker(mask_T), unbalanced_logits(), mask_T, example_keys())


def test_the_plan_converges_to_its_masses_with_at_most_a_capacity_of_tokens() -> None:
    """Experts' masses are exact from the first iteration on; loads that were up to 125 of 200 tokens are at most 80."""
    scores_TE = jax.nn.log_softmax(jnp.asarray(unbalanced_logits(num_tokens=200)))
    mask_T = jnp.ones(200, bool)

    def solve(iterations: int) -> tuple[jax.Array, jax.Array]:
        dual_T = dual_variables(scores_TE, mask_T, k=2, strength=0.5, iterations=iterations)
        plan = columns(scores_TE + dual_T[:, None], mask_T, 2, 0.5)
        return plan.mass, token_masses(plan, 200)

    error = []
    for iterations in (1, 20, 200):
        mass_EC, mass_T = jax.jit(solve, static_argnums=0, compiler_options=COMPILER_OPTIONS)(iterations)
        assert mass_EC.shape == (EXPERTS, 80)
        np.testing.assert_allclose(np.sum(mass_EC, axis=1), 40, rtol=1e-4)
        error.append(np.mean(np.abs(mass_T - 1)))
    assert error[0] > error[1] > error[2]
    assert error[2] < 0.02


@pytest.mark.parametrize("case", ["spread", "wide", "ties", "padded", "only padding"])
@pytest.mark.parametrize("k", [1, 2, EXPERTS])
def test_masses_without_sorting_are_those_of_the_columns(case: str, k: int) -> None:
    """Whether the capacity binds, the threshold does, or entries tie at the last place."""
    num_tokens = 60
    scores_TE = unbalanced_logits(num_tokens=num_tokens, spread=30.0 if case == "wide" else 1.0)
    if case == "ties":
        scores_TE = np.round(scores_TE) + np.float32(0)  # no -0, which a sort tells from 0
    mask_T = np.arange(num_tokens) % 3 != 1 if case == "padded" else np.full(num_tokens, case != "only padding")

    def both(scores_TE: jax.Array, mask_T: jax.Array) -> tuple[jax.Array, jax.Array]:
        plan = columns(scores_TE, mask_T, k, 0.5)
        return token_masses(plan, num_tokens), unsorted_masses(scores_TE, mask_T, k, 0.5)

    expected, got = jax.jit(both, compiler_options=COMPILER_OPTIONS)(jnp.asarray(scores_TE), jnp.asarray(mask_T))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_equal_tokens_are_spread_evenly_where_there_is_room_for_all() -> None:
    """k = E lets every expert match every token, with mass 1/E of each."""
    inputs = RouterInputs(jnp.zeros((TOKENS, EXPERTS)))
    routed, weights_TE1 = route(SparseTransport(k=EXPERTS), {}, inputs, {}, None)
    np.testing.assert_allclose(weights_TE1, 1 / EXPERTS**2, rtol=1e-5)
    np.testing.assert_allclose(routed.metrics["plan_error"], 0, atol=1e-5)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"strength = 0.0 must be positive"):
        SparseTransport(strength=0.0)
    with pytest.raises(ValueError, match=r"iterations = 0 must be at least 1"):
        SparseTransport(iterations=0)


def test_padding_is_matched_with_nobody_where_logits_are_huge() -> None:
    """Then log softmax(logits) of real tokens is as low as a large number that stands for padding might be."""
    logits_TE = np.repeat([[1e30, -1e30, 0.0]], 6, axis=0).astype(np.float32)
    mask_T = np.array([False, True, True, False, True, False])
    inputs = RouterInputs(jnp.asarray(logits_TE), mask=jnp.asarray(mask_T))
    rows = jax.device_get(SparseTransport(k=1)({}, inputs, {}, None)).routing
    assert mask_T[rows.token[rows.valid]].all()
    assert np.bincount(rows.expert[rows.valid], minlength=3).all()

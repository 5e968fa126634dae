"""What every router test needs: a router compiled together with its gradient, and its rows beside an oracle's."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Bool, Float

from moe.routers import Router
from moe.routers.base import example_noise
from moe.types import Assignments, Keys, Layout, PyTree, Routed, RouterInputs, Slots
from tests.oracles import operators
from tests.oracles import routing as oracle

EXAMPLES, LENGTH, EXPERTS = 4, 3, 5
TOKENS = EXAMPLES * LENGTH

# A group without padding, and one where some tokens of most examples are.
with_and_without_padding = pytest.mark.parametrize(
    "mask_T", [np.ones(TOKENS, bool), np.arange(TOKENS) % 5 != 1], ids=["full", "padded"]
)


# Half of a test's time would go into optimising programs that run for microseconds.
COMPILER_OPTIONS = {"xla_backend_optimization_level": 0}


# Where who gets which expert doesn't follow a logit per expert, or where one token's experts depend on its neighbours.
WITHOUT_LOGITS = {"hash", "random", "dselect_k"}
ACROSS_TOKENS = {"expert_choice", "soft", "sparse_transport"}
# Which may give a token fewer than k experts, so that k = E isn't a mixture of all.
BELOW_K = {"relu", "dselect_k", "sparse_transport"}


class Run(NamedTuple):
    """What a router returned, the gradient of its losses + Σ readout × weights in the logits, and that of its state."""

    routed: Routed
    weights: Float[Array, "T E X"]
    gradient: Float[Array, "T E"]
    state_gradient: Float[Array, "T E"]


def effective_weights(routing: Assignments | Slots, num_tokens: int, num_experts: int) -> Float[Array, "T E X"]:
    """Everything by which a token reaches an expert: its combine weight, or its weights in all slots of the expert."""
    if isinstance(routing, Slots):
        return jnp.concatenate([routing.dispatch, routing.combine], axis=-1)
    weight_N = jnp.where(routing.valid, routing.weight, 0.0)
    weights_TE = jnp.zeros((num_tokens, num_experts)).at[routing.token, routing.expert].add(weight_N)
    return weights_TE[..., None]


def _forward(
    router: Router, params: PyTree, inputs: RouterInputs, state: PyTree, key: Keys | None
) -> tuple[Routed, Array]:
    routed = router(params, inputs, state, key)
    num_tokens, num_logits = inputs.logits.shape
    num_experts = num_logits if inputs.layout is None else inputs.layout.num_experts
    return routed, effective_weights(routed.routing, num_tokens, num_experts)


# Routes one group, without gradients.
route = jax.jit(_forward, static_argnums=0, compiler_options=COMPILER_OPTIONS)


@functools.partial(jax.jit, static_argnums=0, compiler_options=COMPILER_OPTIONS)
def run(router: Router, params: PyTree, inputs: RouterInputs, state: PyTree, key: Keys | None, readout: Array) -> Run:
    """Routes one group, with gradients; `readout` has a number for every token and expert."""

    def totals(logits: Array) -> tuple[tuple[Array, Array], tuple[Routed, Array]]:
        routed, weights = _forward(router, params, inputs._replace(logits=logits), state, key)
        total = sum(routed.losses.values(), jnp.sum(weights * readout[..., None]))
        floats = [leaf for leaf in jax.tree.leaves(routed.state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        return (total, sum((jnp.sum(leaf) for leaf in floats), jnp.float32(0))), (routed, weights)

    (total, state_total), pull_back, (routed, weights) = jax.vjp(totals, inputs.logits, has_aux=True)
    one, zero = jnp.ones_like(total), jnp.zeros_like(state_total)
    return Run(routed, weights, pull_back((one, zero))[0], pull_back((0 * one, zero + 1))[0])


def unbalanced_logits(
    seed: int = 0, num_tokens: int = TOKENS, num_experts: int = EXPERTS, spread: float = 1.0
) -> Float[np.ndarray, "T E"]:
    """Float32 logits that favour the last experts."""
    noise_TE = np.random.default_rng(seed).normal(size=(num_tokens, num_experts))
    return (spread * (noise_TE + np.linspace(-1, 1.5, num_experts)[None])).astype(np.float32)


def example_keys(num_examples: int = EXAMPLES) -> Keys:
    return jax.random.split(jax.random.key(11), num_examples)


def readout_for(logits: np.ndarray) -> Float[np.ndarray, "T E"]:
    return np.random.default_rng(99).normal(size=logits.shape).astype(np.float32)


class Expected(NamedTuple):
    """An oracle's answer for the tokens that are not padding; losses are weighted."""

    rows: oracle.Rows
    losses: dict[str, float]
    metrics: dict[str, float]

    def total(self, readout_TE: np.ndarray) -> float:
        return sum(self.losses.values()) + float(
            np.sum(oracle.dense_weights(self.rows, *readout_TE.shape) * readout_TE)
        )


def assert_matches_oracle(
    router: Any,
    ask: Any,
    logits_TE: np.ndarray,
    mask_T: Bool[np.ndarray, "T"],
    keys: Keys | None,
    *,
    num_examples: int = 1,
    ids_T: np.ndarray | None = None,
    state: PyTree | None = None,
) -> None:
    """Rows, losses, metrics and gradient of one group are those of `ask(router, logits, noise)` without the padding.

    `noise` is standard normal, or None in evaluation. The oracle's gradient is taken by central differences.
    """
    readout_TE = readout_for(logits_TE)
    ids = None if ids_T is None else jnp.asarray(ids_T)
    layout = Layout(logits_TE.shape[1], num_examples)
    inputs = RouterInputs(jnp.asarray(logits_TE), ids=ids, mask=jnp.asarray(mask_T), layout=layout)
    got = run(router, {}, inputs, {} if state is None else state, keys, readout_TE)
    real_T = np.flatnonzero(mask_T)
    noise_TE = None if keys is None else np.asarray(example_noise(keys, *logits_TE.shape), np.float64)[real_T]
    expected: Expected = ask(router, logits_TE[real_T], noise_TE)

    assert isinstance(got.routed.routing, Assignments)
    rows = jax.tree.map(np.asarray, got.routed.routing)
    used, wanted = rows.valid, expected.rows.valid
    np.testing.assert_array_equal(rows.token[used], real_T[expected.rows.token[wanted]])
    np.testing.assert_array_equal(rows.expert[used], expected.rows.expert[wanted])
    np.testing.assert_allclose(rows.weight[used], expected.rows.weight[wanted], rtol=1e-4, atol=1e-6)
    assert rows.choices == expected.rows.choices
    for values, wants in ((got.routed.losses, expected.losses), (got.routed.metrics, expected.metrics)):
        assert set(values) == set(wants)
        for name, want in wants.items():
            np.testing.assert_allclose(values[name], want, rtol=2e-5, atol=1e-6, err_msg=name)

    # Along a few random directions, as each costs two runs of the oracle.
    directions = np.random.default_rng(7).normal(size=(6, len(real_T), logits_TE.shape[1]))

    def total(steps: np.ndarray) -> float:
        moved_TE = logits_TE[real_T] + np.tensordot(steps, directions, axes=1)
        return ask(router, moved_TE, noise_TE).total(readout_TE[real_T])

    numerical = operators.numerical_jacobian(total, np.zeros(len(directions)))
    gradient_TE = np.asarray(got.gradient, np.float64)
    along = np.tensordot(directions, gradient_TE[real_T], axes=2)
    np.testing.assert_allclose(along, numerical, rtol=0, atol=2e-4 * np.linalg.norm(gradient_TE))
    np.testing.assert_array_equal(gradient_TE[~mask_T], 0)

"""Every router on any logits and any padding: what it returns is finite, in range, and no more than it may."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, note
from hypothesis import strategies as st
from jaxtyping import Array

from moe import config as config_lib
from moe.routers import ROUTERS, Router
from moe.types import Assignments, Layout, Routed, RouterInputs, Slots
from tests import compiling
from tests.fuzz import at_length, configs, quickly
from tests.routers.helpers import COMPILER_OPTIONS, effective_weights, example_keys

WIDTH = 3
# The square of the logits, which the z loss is made of, is beyond float32 above.
LARGEST_SQUARED = 1e18
LOGITS = {
    "spread": lambda rng, shape: rng.normal(size=shape),
    "tied": lambda rng, shape: rng.integers(0, 2, shape),
    "constant rows": lambda rng, shape: np.broadcast_to(rng.normal(size=(shape[0], 1)), shape),
    "constant columns": lambda rng, shape: np.broadcast_to(rng.normal(size=(1, shape[1])), shape),
    "one above all": lambda rng, shape: np.eye(shape[1])[rng.integers(0, shape[1], shape[0])],
    "signs": lambda rng, shape: rng.choice([-1, 1], shape),
    "few": lambda rng, shape: rng.normal(size=shape) * (rng.uniform(size=shape) < 0.2),
    "every size": lambda rng, shape: rng.choice([-1, 1], shape) * 10.0 ** rng.uniform(-30, 0, shape),
}
LARGEST = [1e-30, 1.0, 10.0, 1e4, LARGEST_SQUARED, 1e30]
PADDING = [0.0, 0.3, 0.9, 1.0]
EXACTLY_K = ("softmax", "sigmoid", "sinkhorn", "hash", "random", "successive_halving")


class Setup(NamedTuple):
    """A router, and the sizes of what it is asked. overrides: its settings."""

    name: str
    overrides: tuple[str, ...]
    examples: int
    length: int
    experts: int
    training: bool


@st.composite
def setups(draw: st.DrawFn, name: str) -> Setup:
    experts = draw(st.sampled_from([1, 2, 5, 8]))
    fields = configs.router_fields(lambda *options: draw(st.sampled_from(options)), name, experts)
    overrides = tuple(f"{path}={value}" for path, value in fields.items())
    sizes = (draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 3, 7])))
    return Setup(name, overrides, *sizes, experts, draw(st.booleans()))


def inputs() -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "seed": st.integers(0, 2**32 - 1),
            "kind": st.sampled_from(list(LOGITS)),
            "largest": st.sampled_from(LARGEST),
            "padding": st.sampled_from(PADDING),
        }
    )


@functools.cache
def make_router(name: str, overrides: tuple[str, ...]) -> Router:
    """Overrides of the config file, or none: the defaults, with all of the router's losses."""
    if overrides:
        table = configs.base("vit")
        config_lib.override(table, overrides)
        return config_lib.resolve(table).router
    router = ROUTERS[name]()
    weights = {field.name: 0.5 for field in dataclasses.fields(router) if field.name.endswith("_weight")}
    return dataclasses.replace(router, **weights)


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=COMPILER_OPTIONS)
def route(router: Router, layout: Layout, arrays: RouterInputs, keys: Any) -> tuple[Routed, Array]:
    """What the router returns and, in training, the gradient of losses and weights in the logits."""
    params, state = router.init(layout.num_experts)

    def total(logits: Array) -> tuple[Array, Routed]:
        routed = router(params, arrays._replace(logits=logits, layout=layout), state, keys)
        weights = effective_weights(routed.routing, len(logits), layout.num_experts)
        return sum(routed.losses.values(), jnp.sum(weights)), routed

    if keys is None:
        return total(arrays.logits)[1], jnp.zeros(())
    gradient, routed = jax.grad(total, has_aux=True)(arrays.logits)
    return routed, gradient


def check(setup: Setup, seed: int, kind: str, largest: float, padding: float) -> None:
    compiling.make_room()
    router, rng = make_router(setup.name, setup.overrides), np.random.default_rng(seed)
    note(f"{router}")
    tokens = setup.examples * setup.length
    gate_DX = rng.normal(size=(WIDTH, router.num_logits(setup.experts)))
    logits_TX = largest * LOGITS[kind](rng, (tokens, gate_DX.shape[1]))
    mask_T = rng.uniform(size=tokens) >= padding
    floats = (jnp.asarray(a, jnp.float32) for a in (logits_TX, rng.normal(size=(tokens, WIDTH)), gate_DX))
    logits, representations, gate = floats
    ids = jnp.asarray(rng.integers(0, 2**31, tokens), jnp.int32)
    arrays = RouterInputs(logits, representations, ids, jnp.asarray(mask_T), gate)
    keys = example_keys(setup.examples) if setup.training else None
    routed, gradient = jax.device_get(route(router, Layout(setup.experts, setup.examples), arrays, keys))

    squared = {"z"} if largest > LARGEST_SQUARED else set()
    assert squared or np.isfinite(gradient).all()
    for part in (routed.losses, routed.metrics):
        for name in part.keys() - squared:
            assert np.isfinite(part[name]), name
    for path, leaf in jax.tree_util.tree_leaves_with_path((routed.routing, routed.state)):
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)
    if isinstance(routed.routing, Slots):
        check_slots(routed.routing, mask_T)
    else:
        check_rows(routed.routing, mask_T, setup, router)


def check_slots(slots: Slots, mask_T: np.ndarray) -> None:
    """Slots hold averages of tokens, if any; padding is in none, and reads none."""
    for weights_TEC in slots:
        assert (weights_TEC >= 0).all()
        np.testing.assert_array_equal(weights_TEC[~mask_T], 0)
    held_EC = slots.dispatch.sum(axis=0)
    assert (np.isclose(held_EC, 1, atol=1e-4) | (held_EC == 0)).all()


def check_rows(rows: Assignments, mask_T: np.ndarray, setup: Setup, router: Router) -> None:
    """In range, also where they aren't in use; of real tokens, each with an expert once, and with no more than due."""
    tokens, experts = len(mask_T), setup.experts
    assert rows.token.min() >= 0
    assert rows.token.max() < tokens
    assert rows.expert.min() >= 0
    assert rows.expert.max() < experts
    assert (rows.weight[rows.valid] >= 0).all()
    assert rows.valid.sum() <= rows.choices <= tokens * experts
    count_TE = np.zeros((tokens, experts), int)
    np.add.at(count_TE, (rows.token[rows.valid], rows.expert[rows.valid]), 1)
    assert count_TE.max() <= 1
    count_T = count_TE.sum(axis=1)
    assert (count_T[~mask_T] == 0).all()
    if setup.name in EXACTLY_K:
        assert (count_T[mask_T] == router.k).all()
    most = getattr(router, "max_experts", 0)
    if setup.training and most and getattr(router, "choice", "token") == "token":
        assert count_T.max() <= most


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ROUTERS)
@quickly("router")
@given(how=inputs())
def test_any_logits_give_what_the_contract_says(name: str, training: bool, how: dict[str, Any]) -> None:
    check(Setup(name, (), examples=2, length=5, experts=6, training=training), **how)


@pytest.mark.parametrize("name", ROUTERS)
@at_length("router")
@given(data=st.data())
def test_any_logits_give_what_the_contract_says_at_length(name: str, data: st.DataObject) -> None:
    setup = data.draw(setups(name))
    # A program takes a second to compile, and nothing to run.
    for how in data.draw(st.lists(inputs(), min_size=10, max_size=30)):
        check(setup, **how)

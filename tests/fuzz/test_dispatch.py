"""Every way to dispatch, with any routing at all, against the definition in float64."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import Array

from moe.parallel import dispatch as dispatch_module
from moe.parallel.dispatch import IMPLEMENTATIONS, dispatch
from moe.parallel.mesh import MeshConfig, make_mesh
from moe.types import Assignments
from tests.fuzz import at_length, quickly
from tests.parallel.helpers import emulated_ragged_all_to_all
from tests.routers.helpers import COMPILER_OPTIONS

TOKENS, ROWS, EXPERTS, WIDTH = 5, 12, 4, 2
ONE, MANY = MeshConfig(data=1), MeshConfig(data=2, expert=4)
# On which mesh, and of how many groups; three aren't dealt out evenly.
PLACES = {"one device": (ONE, 2), "expert axis": (MANY, 8), "expert axis, groups left over": (MANY, 3)}
# How, with how many places in a queue or, on an expert axis, how much room for rows over an even share of them.
WAYS: dict[str, dict[str, Any]] = {
    **{name: {"implementation": name, "capacity": None if name == "dropless" else 2} for name in IMPLEMENTATIONS},
    "capacity for all": {"implementation": "capacity", "capacity": None},
    "dropless in rounds": {"implementation": "dropless", "capacity": None, "receive_factor": 0.1},
    "dropless, ragged": {"implementation": "dropless", "capacity": None, "receive_factor": 0.4},
}
every_way = pytest.mark.parametrize(
    ("way", "place"),
    [(way, place) for way in WAYS for place in PLACES if place != "one device" or "dropless," not in way],
)
WEIGHTS = {
    "w_in": np.random.default_rng(1).normal(size=(EXPERTS, WIDTH, 3)).astype(np.float32),
    "w_out": np.random.default_rng(2).normal(size=(EXPERTS, 3, WIDTH)).astype(np.float32),
}


class Case(NamedTuple):
    """Tokens and what a router made of them. unique: no token has an expert twice."""

    x_GTD: np.ndarray
    routing: Assignments
    unique: bool


def make_case(
    groups: int, seed: int, evenness: float, alike: bool, tokens: int, used: float, padded: float, unique: bool
) -> Case:
    """Rows that name any token and expert, in any order.

    evenness: of experts, from almost always the same (the same in all groups: alike) to all. tokens: that are named at
    all. used: share of the rows. padded: share of the groups without any in use.
    """
    rng = np.random.default_rng(seed)
    share_GE = rng.dirichlet(np.full(EXPERTS, evenness), size=groups)
    expert_GN = np.stack([rng.choice(EXPERTS, ROWS, p=share_GE[0 if alike else g]) for g in range(groups)])
    token_GN = rng.integers(0, tokens, (groups, ROWS))
    valid_GN = (rng.uniform(size=(groups, ROWS)) < used) & (rng.uniform(size=(groups, 1)) >= padded)
    for pair_N, valid_N in zip(token_GN * EXPERTS + expert_GN, valid_GN, strict=True):
        if unique:
            before = [pair_N[n] in pair_N[:n][valid_N[:n]] for n in range(ROWS)]
            valid_N &= ~np.array(before)
    weight_GN = rng.choice([-2.0, 0.0, 1e-3, 1.0, 3.0], (groups, ROWS))
    choices_G = valid_GN.sum(axis=1) + rng.integers(0, 3, groups)
    types = (np.int32, np.int32, np.float32, bool, np.int32)
    rows = (token_GN, expert_GN, weight_GN, valid_GN, choices_G)
    routing = Assignments(*(jnp.asarray(a.astype(kind)) for a, kind in zip(rows, types, strict=True)))
    return Case(rng.normal(size=(groups, TOKENS, WIDTH)).astype(np.float32), routing, unique)


def settings_of_case() -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "seed": st.integers(0, 2**32 - 1),
            "evenness": st.sampled_from([0.01, 0.3, 100.0]),
            "alike": st.booleans(),
            "tokens": st.sampled_from([1, 2, TOKENS]),
            "used": st.sampled_from([0.0, 0.3, 1.0]),
            "padded": st.sampled_from([0.0, 0.5]),
            "unique": st.booleans(),
        }
    )


@functools.cache
def compiled(way: str, place: str) -> Any:
    """y, kept choices per group, and the gradient of Σ y in x."""
    config, _ = PLACES[place]
    mesh = make_mesh(config, jax.devices()[: 1 if config == ONE else 8])

    def total(x_GTD: Array, routing: Assignments) -> tuple[Array, tuple[Array, Array]]:
        y_GTD, kept_G = dispatch(
            lambda weights, x, product: product.feed_forward(x, (weights["w_in"],), weights["w_out"], lambda up: up),
            jax.tree.map(jnp.asarray, WEIGHTS),
            {"w_in": ("expert", "embed", "mlp"), "w_out": ("expert", "mlp", "embed")},
            x_GTD,
            routing,
            num_experts=EXPERTS,
            mesh=mesh,
            **WAYS[way],
        )
        return jnp.sum(y_GTD), (y_GTD, kept_G)

    with pytest.MonkeyPatch.context() as patch:
        if way == "dropless, ragged":
            patch.setattr(dispatch_module, "_RAGGED_ALL_TO_ALL", {"cpu"})
            patch.setattr(jax.lax, "ragged_all_to_all", emulated_ragged_all_to_all)
            patch.setattr(jax.lax, "empty", lambda shape, dtype: jnp.full(shape, jnp.nan, dtype))
        example = make_case(PLACES[place][1], 0, 1.0, True, TOKENS, 1.0, 0.0, True)
        lowered = jax.jit(jax.value_and_grad(total, has_aux=True)).lower(example.x_GTD, example.routing)
        return lowered.compile(COMPILER_OPTIONS)


def by_definition(case: Case, places: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `compiled` returns: Σ weight · expert(x) over the rows that find a place.

    A row finds one unless `places` valid rows for its expert stand before it.
    """
    matrix_EDD = np.asarray(WEIGHTS["w_in"], np.float64) @ np.asarray(WEIGHTS["w_out"], np.float64)
    x_GTD, rows = np.asarray(case.x_GTD, np.float64), jax.tree.map(np.asarray, case.routing)
    y_GTD, dx_GTD, kept_G = np.zeros_like(x_GTD), np.zeros_like(x_GTD), np.zeros(len(x_GTD), int)
    for g in range(len(x_GTD)):
        taken_E = [0] * EXPERTS
        for n in np.flatnonzero(rows.valid[g]):
            t, e, weight = rows.token[g, n], rows.expert[g, n], float(rows.weight[g, n])
            if places is not None and taken_E[e] == places:
                continue
            taken_E[e] += 1
            kept_G[g] += 1
            y_GTD[g, t] += weight * x_GTD[g, t] @ matrix_EDD[e]
            dx_GTD[g, t] += weight * matrix_EDD[e].sum(axis=1)
    return y_GTD, dx_GTD, kept_G


def check(way: str, place: str, how: dict[str, Any]) -> None:
    case = make_case(PLACES[place][1], **how)
    (_, (y_GTD, kept_G)), dx_GTD = jax.device_get(compiled(way, place)(case.x_GTD, case.routing))
    # Queues without a capacity are as long as a group.
    places = TOKENS if way == "capacity for all" else WAYS[way]["capacity"]
    y, dx, kept = by_definition(case, places)
    assert np.isfinite(y_GTD).all()
    if way.startswith("dropless") and not case.unique and (kept_G != kept).any():
        # Only room for a token at an expert once is promised; what finds none is not counted as kept.
        assert (kept_G <= kept).all()
        return
    np.testing.assert_array_equal(kept_G, kept)
    np.testing.assert_allclose(y_GTD, y, rtol=0, atol=1e-5 * max(1, np.abs(y).max()))
    np.testing.assert_allclose(dx_GTD, dx, rtol=0, atol=1e-5 * max(1, np.abs(dx).max()))


@every_way
@quickly("routing")
@given(how=settings_of_case())
def test_outputs_are_the_sums_over_what_is_kept(way: str, place: str, how: dict[str, Any]) -> None:
    check(way, place, how)


@every_way
@at_length("routing")
@given(how=settings_of_case())
def test_outputs_are_the_sums_over_what_is_kept_at_length(way: str, place: str, how: dict[str, Any]) -> None:
    check(way, place, how)

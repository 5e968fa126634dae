"""Every way to dispatch, on every mesh, against float64 experts run one by one; what it costs; its mistakes."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.parallel import dispatch as dispatch_module
from moe.parallel.dispatch import IMPLEMENTATIONS, sorts_fast
from moe.parallel.mesh import MeshConfig, make_mesh
from moe.types import Assignments, Slots
from tests.jaxprs import equations_of
from tests.parallel.helpers import (
    EXPERTS,
    GROUPS,
    HIDDEN,
    MESHES,
    TOKENS,
    WIDTH,
    Case,
    Result,
    assert_same,
    by_oracle,
    emulated_ragged_all_to_all,
    mesh_of,
    run,
)

# How, and with how many places. Rounds: half of an even share at a time.
WAYS: dict[str, dict[str, Any]] = {
    "einsum": {"implementation": "einsum", "capacity": 2},
    "capacity": {"implementation": "capacity", "capacity": 2},
    "dropless": {"implementation": "dropless", "capacity": None},
    "dropless in rounds": {"implementation": "dropless", "capacity": None, "receive_factor": 0.5},
}
# From uniform to everything at one expert.
SKEWS = [0.0, 0.3, 0.7, 1.0]


@pytest.fixture(autouse=True)
def compile_fast() -> Iterator[None]:
    """These tests compile much and compute little."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def compiled(mesh: jax.sharding.Mesh, **how: Any) -> Any:
    return jax.jit(lambda x, weights, routing: run(Case(x, weights, routing), mesh, **how))


@functools.cache
def expected(skew: float, capacity: int | None, groups: int = GROUPS) -> Result:
    return by_oracle(Case.make(skew, groups=groups), capacity)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("way", WAYS)
def test_values_and_gradients_are_the_oracle_s_at_every_imbalance(way: str, mesh: str) -> None:
    call = compiled(mesh_of(mesh), **WAYS[way])
    for skew in SKEWS:
        assert_same(call(*Case.make(skew)), expected(skew, WAYS[way]["capacity"]))


@pytest.mark.parametrize("way", ["einsum", "capacity", "dropless"])
def test_fewer_groups_than_devices_give_the_same_numbers(way: str) -> None:
    """Three groups on eight devices: 36 rows, which don't divide either."""
    call = compiled(mesh_of("data=2,expert=4"), **WAYS[way])
    assert_same(call(*Case.make(0.3, groups=3)), expected(0.3, WAYS[way]["capacity"], 3))


@pytest.mark.parametrize("way", ["einsum", "capacity"])
def test_queues_without_a_capacity_drop_nothing(way: str) -> None:
    call = compiled(mesh_of("one device"), implementation=way, capacity=None)
    assert_same(call(*Case.make(1.0)), expected(1.0, None))


@pytest.mark.parametrize("receive_factor", [0.5, 2.0])
def test_ragged_pieces_are_those_of_fixed_size(receive_factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the collective that XLA has on GPU and TPU made of all-gathers: offsets and sizes, there and back.

    What isn't received is NaN, and does no harm.
    """
    calls = []

    def counted(*arguments: Any, **options: Any) -> jax.Array:
        calls.append(options)
        return emulated_ragged_all_to_all(*arguments, **options)

    monkeypatch.setattr(dispatch_module, "_RAGGED_ALL_TO_ALL", {"cpu"})
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", counted)
    monkeypatch.setattr(jax.lax, "empty", lambda shape, dtype: jnp.full(shape, jnp.nan, dtype))
    call = compiled(mesh_of("data=2,expert=4"), implementation="dropless", capacity=None, receive_factor=receive_factor)
    for skew in SKEWS:
        assert_same(call(*Case.make(skew)), expected(skew, None))
    assert calls


def test_what_is_chosen_by_itself() -> None:
    """Sorted rows without a capacity, queues by index with one."""
    mesh, case = mesh_of("one device"), Case.make(0.3)

    def program(**how: Any) -> str:
        return str(jax.make_jaxpr(functools.partial(run, case, mesh, **how))())

    for capacity, name in ((None, "dropless"), (2, "capacity")):
        assert program(capacity=capacity) == program(capacity=capacity, implementation=name)
    assert program(capacity=2) != program(capacity=2, implementation="einsum")


def test_training_sorts_rows_where_a_kernel_makes_that_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = make_mesh(MeshConfig(data=2, expert=4))
    monkeypatch.setattr(dispatch_module, "_platform", lambda mesh: "gpu")
    assert not sorts_fast(mesh, num_rows=1 << 20, num_experts=8)
    for platform, rows_per_expert in (("tpu", 512), ("cpu", 256)):
        monkeypatch.setattr(dispatch_module, "_platform", lambda mesh, name=platform: name)
        # 2 x 4 devices with 4 x 2 experts: so many rows for each of a device's two experts are 8 x 2 x as many in all.
        assert sorts_fast(mesh, num_rows=16 * rows_per_expert, num_experts=8)
        assert not sorts_fast(mesh, num_rows=16 * rows_per_expert - 8, num_experts=8)


# Memory ---------------------------------------------------------------------------------------------------------------


def largest_array(way: str, num_tokens: int, num_experts: int, places: int) -> int:
    """Entries of the largest array in the program of value and gradient, one group on one device."""
    weights = {
        name: np.zeros((num_experts, *shape), np.float32)
        for name, shape in {"w_in": (WIDTH, HIDDEN), "w_gate": (WIDTH, HIDDEN), "w_out": (HIDDEN, WIDTH)}.items()
    }
    token = jnp.arange(num_tokens, dtype=jnp.int32)[None]
    routing = Assignments(
        token, token % num_experts, token + 1.0, token >= 0, jnp.full((1,), num_tokens, dtype=jnp.int32)
    )
    case = Case(np.zeros((1, num_tokens, WIDTH), np.float32), weights, routing)
    capacity = None if way == "dropless" else places
    mesh = mesh_of("one device")
    program = jax.make_jaxpr(lambda: run(case, mesh, implementation=way, capacity=capacity))()
    outputs = [out.aval for equation in equations_of(program.jaxpr) for out in equation.outvars]
    return max(int(np.prod(aval.shape)) for aval in outputs if hasattr(aval, "shape"))


@pytest.mark.parametrize("way", IMPLEMENTATIONS)
def test_only_einsum_holds_a_weight_for_every_token_and_slot(way: str) -> None:
    num_tokens, num_experts, places = 256, 16, 16
    assert (largest_array(way, num_tokens, num_experts, places) >= num_tokens * num_experts * places) == (
        way == "einsum"
    )


def test_later_rounds_keep_nothing_for_the_backward_pass() -> None:
    """Six rounds of two places for each sender, five of them in a loop: no array of numbers is stacked along it."""
    how = {"implementation": "dropless", "capacity": None, "receive_factor": 0.5}
    program = jax.make_jaxpr(functools.partial(run, Case.make(1.0), mesh_of("data=2,expert=4"), **how))()
    loops = [one for one in equations_of(program.jaxpr) if one.primitive.name == "scan" and one.params["length"] == 5]
    assert len(loops) == 2  # there and back
    outputs = [out.aval for loop in loops for out in loop.outvars if jnp.issubdtype(out.aval.dtype, jnp.floating)]
    assert [aval for aval in outputs if aval.shape[:1] == (5,)] == []


# Mistakes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"implementation": "sorted", "capacity": 2}, r"'sorted' must be None or one of einsum, capacity, dropless\."),
        ({"implementation": "capacity", "capacity": 0}, r"capacity = 0 places per expert must be at least 1"),
        ({"implementation": "einsum", "capacity": -1}, r"capacity = -1 places per expert must be at least 1"),
        ({"implementation": "dropless", "capacity": 4}, r"has no queues: capacity = 4 must be None\."),
        ({"capacity": None, "receive_factor": 0.0}, r"receive_factor = 0\.0 must be positive"),
    ],
)
def test_a_wrong_choice_is_one_sentence(how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(Case.make(0.0), mesh_of("one device"), **how)


def test_shapes_that_do_not_fit_are_named() -> None:
    case, mesh = Case.make(0.0), mesh_of("one device")
    with pytest.raises(ValueError, match=rf"routing of \[{GROUPS}\] groups doesn't fit .* \[7, {TOKENS}, {WIDTH}\]"):
        run(case._replace(x=case.x[:7]), mesh, capacity=2)
    fewer = {**case.weights, "w_out": case.weights["w_out"][:5]}
    with pytest.raises(ValueError, match=rf"'w_out': 5.* must be of num_experts = {EXPERTS}\."):
        run(case._replace(weights=fewer), mesh, capacity=2)
    slots = jnp.zeros((GROUPS, TOKENS, EXPERTS + 1, 2))
    with pytest.raises(ValueError, match=rf"slots \[{GROUPS}, {TOKENS}, {EXPERTS + 1}, 2\] must be \[G, T, E, C\]"):
        dispatch_module.dispatch(
            lambda weights, x, product: x,
            jax.tree.map(jnp.asarray, case.weights),
            {},
            jnp.asarray(case.x),
            Slots(slots, slots),
            num_experts=EXPERTS,
            capacity=None,
            mesh=mesh,
        )

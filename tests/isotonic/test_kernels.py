"""The TPU kernels: numerics in Pallas's interpret mode against float64, and compilation by the real TPU compiler."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from moe import isotonic, topk
from moe.isotonic import implementation, networks
from moe.isotonic.kernels import dykstra, threshold
from moe.isotonic.kernels.tiles import Tiling
from moe.plan.program import ENVIRONMENT
from tests.compiling import AS_USERS
from tests.oracles import operators

PS = (4 / 3, 3 / 2, 2.0)
ROWS = 90  # in most tests, which then share what they compile


def make_rows(rng: np.random.Generator, rows: int, n: int) -> np.ndarray:
    """Gaussian rows, rows of ties, and near-ties of all sizes on a large offset, in equal parts."""
    third = rows // 3
    gaussian = rng.normal(size=(rows - 2 * third, n))
    ties = rng.integers(-2, 3, size=(third, n))
    near = 100 + rng.normal(size=(third, n)) * np.exp(rng.uniform(-12, 2, size=(third, n)))
    return np.concatenate([gaussian, ties, near]).astype(np.float32)


# Merging the thousands of operations of an unrolled network takes XLA minutes, and running them then, too. Without the
# fusion emitters, jaxlib 0.10 compiles what isn't merged wrongly.
COMPILER_OPTIONS = {
    **AS_USERS,
    "xla_backend_optimization_level": 0,
    "xla_disable_hlo_passes": "fusion,cpu-instruction-fusion",
}


@functools.partial(jax.jit, static_argnames=("k", "p", "interpret"), compiler_options=COMPILER_OPTIONS)
def interpreted_mask(x, k, strength, p, interpret=True):
    return threshold.mask(x, strength, k=k, p=p, interpret=interpret)


@functools.partial(jax.jit, static_argnames=("k", "steps", "interpret"), compiler_options=COMPILER_OPTIONS)
def interpreted_dykstra(x, k, strength, steps, interpret=True):
    return dykstra.crossing(x, strength, k=k, steps=steps, interpret=interpret)


# Networks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 8, 11])
def test_sorting_networks_sort_all_zero_one_inputs(n: int) -> None:
    inputs = np.array(list(itertools.product((0.0, 1.0), repeat=n)), np.float32).T
    ordered = np.stack(networks.sort(n).apply(list(jnp.asarray(inputs))))
    np.testing.assert_array_equal(ordered, -np.sort(-inputs, axis=0))


@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 2), (8, 1), (8, 7), (11, 4), (11, 11)])
def test_selection_networks_rank_the_boundary_and_part_the_rest(n: int, k: int) -> None:
    inputs = np.array(list(itertools.product((0.0, 1.0), repeat=n)), np.float32).T
    found = np.stack(networks.select(n, k).apply(list(jnp.asarray(inputs))))
    expected = -np.sort(-inputs, axis=0)
    np.testing.assert_array_equal(found[k - 1 : k + 1], expected[k - 1 : k + 1])
    np.testing.assert_array_equal(found[:k].sum(axis=0), expected[:k].sum(axis=0))
    np.testing.assert_array_equal(found.sum(axis=0), expected.sum(axis=0))


def test_selection_needs_fewer_comparators_than_sorting() -> None:
    assert len(networks.sort(32).comparators) == 191
    assert len(networks.select(32, 2).comparators) == 75


# Tiles ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("problems", "n"), [(3, 1), (1030, 12), (130, 128)])
def test_tiles_load_and_store_entries(problems: int, n: int) -> None:
    """A kernel that doubles some entries and sums them per problem, in both memory layouts."""
    some = sorted({0, n // 3, n // 2, n - 1})
    x = jnp.asarray(np.random.default_rng(0).normal(size=(problems, n)), jnp.float32)
    tiling = Tiling.of(x)

    def double(scale, block, doubled, total, *staging):
        staged = tiling.stage(block, staging[:1])
        target = staging[1] if tiling.transposes else doubled
        entries = [tiling.load(staged, i) for i in some]
        for i, entry in zip(some, entries, strict=True):
            tiling.store(target, i, scale[0] * entry)
        tiling.unstage(target, doubled)
        total[...] = sum(entries)

    run = functools.partial(tiling.run, double, arrays=1, scalars=1, scratch=[], name="double", interpret=True)
    doubled, total = jax.jit(run)(x, jnp.float32(0.5))
    picked = np.asarray(x)[:, some]
    np.testing.assert_array_equal(np.asarray(doubled)[:, some], 2 * picked)
    np.testing.assert_allclose(total, picked.sum(axis=1), rtol=1e-5, atol=1e-5)


# Threshold -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", PS)
def test_mask_agrees_with_float64_at_every_strength(p: float) -> None:
    n, k = 8, 2
    x = make_rows(np.random.default_rng(n), ROWS, n)
    for strength in (1e-4, 1e-2, 0.3, 1.0, 10.0, 100.0):
        found, crossing = jax.tree.map(np.asarray, interpreted_mask(x, k, strength, p))
        expected = np.stack([operators.mask_by_bisection(row, k, float(np.float32(strength)), p) for row in x])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(crossing.center, -np.sort(-x, axis=1)[:, k - 1])
        levels = ((x - crossing.center[:, None]) + crossing.offset[:, None]) / np.float32(strength)
        np.testing.assert_allclose(np.clip(levels, 0, 1) ** round(1 / (p - 1)), found, rtol=0, atol=1e-6)
        assert crossing.residual.max() <= 1e-3 * strength


@pytest.mark.parametrize(
    ("n", "k", "p"),
    [(32, 2, 4 / 3), (64, 8, 2.0)]
    + [pytest.param(n, k, p, marks=pytest.mark.nightly) for n, k in ((32, 8), (64, 2), (128, 2), (128, 8)) for p in PS],
)
def test_long_masks_agree_with_float64(n: int, k: int, p: float) -> None:
    x = make_rows(np.random.default_rng(n), 24, n)
    for strength in (1e-3, 0.3, 10.0):
        found, _ = interpreted_mask(x, k, strength, p)
        expected = np.stack([operators.mask_by_bisection(row, k, float(np.float32(strength)), p) for row in x])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("p", PS)
def test_mask_is_hard_exactly_where_the_gap_exceeds_the_strength(p: float) -> None:
    rows = [[-5, -2, 3, 1, -np.inf, 0, -1, 0.5], [7, 7, -1, 0, 0, 0, -8, 6.5]]
    x = np.tile(np.array(rows, np.float32), (ROWS // 2, 1))
    found, crossing = interpreted_mask(x, 2, 0.01, p)
    np.testing.assert_array_equal(found[:2], [[0, 0, 1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(crossing.residual, 0)


def test_nan_stays_in_its_row() -> None:
    x = make_rows(np.random.default_rng(1), ROWS, 8)
    clean = np.asarray(interpreted_mask(x, 2, 0.3, 2.0)[0])
    for entry in range(8):
        dirty = x.copy()
        dirty[entry, entry] = np.nan
        found = np.asarray(interpreted_mask(dirty, 2, 0.3, 2.0)[0])
        assert np.isnan(found[entry]).all()
        np.testing.assert_array_equal(np.delete(found, entry, 0), np.delete(clean, entry, 0))


def test_tpu_interpret_mode_agrees() -> None:
    x = make_rows(np.random.default_rng(2), 9, 5)
    simulated, _ = interpreted_mask(x, 2, 0.5, 4 / 3, interpret=pltpu.InterpretParams())
    np.testing.assert_allclose(simulated, interpreted_mask(x, 2, 0.5, 4 / 3)[0], rtol=0, atol=3e-7)


# Dykstra -------------------------------------------------------------------------------------------------------------


def float64_sweeps(row: np.ndarray, k: int, strength: float, steps: int) -> tuple[np.ndarray, float]:
    """Dykstra in its primal form, as published: the value after `steps` sweeps, and how far the last sets are apart."""
    v = -np.sort(-row.astype(np.float64)) - strength * (np.arange(len(row)) < k)
    corrections = [np.zeros_like(v), np.zeros_like(v)]
    for _ in range(steps):
        halves = []
        for start in (0, 1):
            moved = v + corrections[start]
            projected = moved.copy()
            for i in range(start, len(v) - 1, 2):
                if moved[i] < moved[i + 1]:
                    projected[i : i + 2] = moved[i : i + 2].mean()
            corrections[start] = moved - projected
            v = projected
            halves.append(v)
    return v, np.abs(halves[1] - halves[0]).max()


@pytest.mark.parametrize(("n", "k", "steps"), [(5, 1, 1), (8, 2, 2), (5, 4, 6)])
def test_dykstra_makes_the_published_sweeps(n: int, k: int, steps: int) -> None:
    x = make_rows(np.random.default_rng(n), 30, n)[:20]
    strength = 0.7
    found = interpreted_dykstra(x, k, strength, steps)
    parts = (found.center, found.offset, found.residual)
    for row, center, offset, residual in zip(x, *map(np.asarray, parts), strict=True):
        value, apart = float64_sweeps(row, k, strength, steps)
        boundary = value[k - 1 : k + 1].mean()
        low, high = center - strength, -np.sort(-row)[k]
        expected = low if center - high >= strength else np.clip(boundary, low, high)
        assert center - offset == pytest.approx(expected, abs=2e-6)
        assert residual == pytest.approx(apart, abs=2e-6)


def test_dykstra_converges_to_the_mask_and_says_so() -> None:
    x = make_rows(np.random.default_rng(3), 60, 8)
    strength = np.float32(0.3)
    found = jax.tree.map(np.asarray, interpreted_dykstra(x, 2, strength, 100))
    mask = np.clip(((x - found.center[:, None]) + found.offset[:, None]) / strength, 0, 1)
    expected = np.stack([operators.mask(row, 2, float(strength), 2.0) for row in x])
    np.testing.assert_allclose(mask, expected, rtol=0, atol=1e-6)
    assert found.residual.max() <= 1e-6


@pytest.mark.parametrize("n", [32, pytest.param(128, marks=pytest.mark.nightly)])
def test_long_dykstra_converges_to_the_mask(n: int) -> None:
    x = make_rows(np.random.default_rng(n), 24, n)
    strength = np.float32(0.3)
    found = jax.tree.map(np.asarray, interpreted_dykstra(x, 2, strength, 100))
    mask = np.clip(((x - found.center[:, None]) + found.offset[:, None]) / strength, 0, 1)
    expected = np.stack([operators.mask(row, 2, float(strength), 2.0) for row in x])
    error = np.abs(mask - expected).max(axis=1)
    # Blocks of many near ties take more sweeps, and say so.
    assert ((error <= 3e-6) | (found.residual > 1e-5 * strength)).all()
    assert (error[:8] <= 3e-6).all()


# Which implementation runs --------------------------------------------------------------------------------------------

SOLVERS = (isotonic.Threshold, isotonic.Dykstra)


@pytest.mark.parametrize("solver", SOLVERS)
def test_off_tpu_none_is_xla(solver: type) -> None:
    x = jnp.asarray(make_rows(np.random.default_rng(4), 12, 8)).reshape(3, 4, 8)
    problem = {"strength": jnp.float32(0.3), "p": 2.0}
    expected = solver(implementation="xla").topk(x, 2, **problem)
    assert_same(solver().topk(x, 2, **problem), expected)
    batched = jax.vmap(lambda row: solver().topk(row, 2, **problem), in_axes=1, out_axes=1)(x)
    assert_same(batched, expected)
    strengths = jnp.array([0.3, 0.7])
    each = jax.vmap(lambda strength: solver().topk(x, 2, strength=strength, p=2.0))(strengths)
    assert_same(jax.tree.map(lambda a: a[0], each), expected)


def test_none_runs_without_jit() -> None:
    def answer(x, strength, name):
        return implementation.Crossing(*[jnp.full(x.shape[:-1], strength) + len(name)] * 4)

    kernel, reference = (implementation.Bound(answer, (("name", name),)) for name in ("kernel", "reference"))
    with jax.disable_jit():
        found = implementation.choose(None, kernel, reference, None, jnp.zeros((2, 3)), jnp.float32(0.5))
    np.testing.assert_array_equal(found.value, [9.5, 9.5])


def assert_same(found, expected) -> None:
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), found, expected)


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_reach_their_kernels(solver: type) -> None:
    x = jnp.asarray(make_rows(np.random.default_rng(5), 6, 8)).reshape(2, 3, 8)
    with pltpu.force_tpu_interpret_mode():
        y = topk.mask(x, 2, strength=0.3, p=2.0, solver=solver(implementation="pallas_tpu"))
    expected = topk.mask(x, 2, strength=0.3, p=2.0, solver=solver(implementation="xla"))
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-6)


def test_a_kernel_asked_for_by_name_runs_or_raises() -> None:
    x, solver = jnp.zeros((4, 300)), isotonic.Threshold(implementation="pallas_tpu")
    problem = {"strength": jnp.float32(1.0), "p": 2.0}
    with pytest.raises(NotImplementedError, match="n <= 256, not 300: use implementation='xla'"):
        solver.topk(x, 2, **problem)
    with pytest.raises(NotImplementedError, match=r"p in \(2.0, 1.5, 1.33.*\), not 1.7"):
        solver.topk(x[:, :8], 2, strength=problem["strength"], p=1.7)
    with pytest.raises(NotImplementedError, match="float32, not bfloat16"):
        solver.topk(x[:, :8].astype(jnp.bfloat16), 2, **problem)
    with pytest.raises(NotImplementedError, match="at least one problem"):
        solver.topk(x[:0, :8], 2, **problem)
    with pytest.raises(NotImplementedError, match="not the magnitude"):
        solver.topk(x[:, :8], 2, **problem, magnitude=True)
    with pytest.raises(NotImplementedError, match="k as a Python integer"):
        jax.jit(lambda k: isotonic.Dykstra(implementation="pallas_tpu").topk(x[:, :8], k, **problem))(2)
    with pytest.raises(ValueError, match="implementation is triton, but must be one of"):
        isotonic.Dykstra(implementation="triton")


# The real compiler ---------------------------------------------------------------------------------------------------


@pytest.fixture
def v5e(monkeypatch: pytest.MonkeyPatch) -> Mesh:
    """Four devices that this machine doesn't have."""
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install 'moe-jax[tpu-aot]'")
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    return Mesh(np.array(topology.devices), ("data",))


def compile_for(function, x_sharding, strength_sharding, n: int) -> str:
    """The optimised program, as text, for 4096 rows."""
    x = jax.ShapeDtypeStruct((4096, n), jnp.float32, sharding=x_sharding)
    strength = jax.ShapeDtypeStruct((), jnp.float32, sharding=strength_sharding)
    return jax.jit(function).trace(x, strength).lower(lowering_platforms=("tpu",)).compile().as_text()


@pytest.mark.tpu_aot
@pytest.mark.parametrize("n", [8, 32, 128])
def test_kernels_compile_for_a_tpu_without_moving_their_input(n: int, v5e: Mesh) -> None:
    def both(x, strength):
        return threshold.mask(x, strength, k=2, p=4 / 3), dykstra.crossing(x, strength, k=2, steps=4)

    one_device = SingleDeviceSharding(v5e.devices[0])
    lines = compile_for(both, one_device, one_device, n).splitlines()
    assert sum("tpu_custom_call" in line for line in lines) == 2
    assert not [line for line in lines if " transpose(" in line]


@pytest.mark.tpu_aot
def test_none_picks_the_kernel_where_one_device_holds_the_batch(v5e: Mesh) -> None:
    def mask(x, strength):
        return topk.mask(x, 2, strength=strength, p=2.0)

    one_device = SingleDeviceSharding(v5e.devices[0])
    assert compile_for(mask, one_device, one_device, 8).count("tpu_custom_call") == 1
    rows, all_devices = NamedSharding(v5e, P("data")), NamedSharding(v5e, P())
    mapped = jax.shard_map(mask, mesh=v5e, in_specs=(P("data"), P()), out_specs=P("data"))
    assert compile_for(mapped, rows, all_devices, 8).count("tpu_custom_call") == 1
    partitioned = compile_for(mask, rows, all_devices, 8)
    assert "tpu_custom_call" not in partitioned
    assert "all-gather" not in partitioned

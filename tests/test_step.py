"""The training step: the same numbers on every mesh, scanned or not, rematerialised or not, accumulated or not."""

import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import train
from moe.checkpoint import Checkpoints
from moe.config import Config
from moe.data.pipeline import DataConfig
from moe.layers.moe import MoeConfig
from moe.metrics import log_values
from moe.models import ViTConfig
from moe.optim import OptimizerConfig
from moe.parallel.mesh import MeshConfig, make_mesh
from moe.routers import ROUTERS, Router, Sigmoid, Softmax
from tests.jaxprs import equations_of

BATCH = 16
MODEL = ViTConfig(width=16, depth=2, heads=2, mlp_width=16, moe_every=1, patch_size=4)
CONFIG = Config(
    seed=3,
    steps=10,
    batch_size=BATCH,
    model=MODEL,
    moe=MoeConfig(num_experts=4, expert_width=16, group_size=2, capacity_factor=1.0),
    router=Softmax(k=2, balance_weight=0.01, z_weight=0.01),
    data=DataConfig(),
    optimizer=OptimizerConfig(warmup_steps=1),
)
MESHES = {
    "data=8": MeshConfig(data=8),
    "data=2,expert=4": MeshConfig(data=2, expert=4),
    "fsdp=2,expert=2,tensor=2": MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
    "dcn=2,fsdp=2,expert=2": MeshConfig(dcn=2, data=1, fsdp=2, expert=2),
}


def make_batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    image = rng.uniform(size=(BATCH, 8, 8, 1)).astype(np.float32)
    return {"image": image, "label": rng.integers(0, 10, BATCH).astype(np.int32)}


@pytest.fixture(autouse=True)
def compile_fast() -> Iterator[None]:
    """These tests compile much and compute little."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def run(config: Config, batch: dict[str, np.ndarray] | None = None) -> dict[str, Any]:
    """What one step from fresh variables gives, on the mesh that the config names."""
    devices = jax.devices() if np.prod([*dataclasses.asdict(config.mesh).values()]) == 8 else jax.devices()[:1]
    mesh = make_mesh(config.mesh, devices)
    step = train.make_step(config, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, step.abstract_state)
    state = jax.device_put(fresh_state(config.router, config.moe.num_experts), shardings)
    arrays = train.to_devices(batch or make_batch(), ("image", "label"), mesh)
    gradients = jax.jit(step.gradients)
    gradient, (metrics, router_state) = jax.device_get(gradients(state, arrays))
    results = {"gradient": gradient, "metrics": metrics, "router_state": router_state}
    return {**results, "program": gradients, "arguments": (state, arrays)}


@functools.cache
def fresh_state(router: Router, num_experts: int) -> train.TrainState:
    """The state that every run of a router starts from."""
    moe = dataclasses.replace(CONFIG.moe, num_experts=num_experts)
    config = dataclasses.replace(CONFIG, router=router, moe=moe, mesh=MeshConfig(data=1))
    return jax.device_get(train.make_step(config, make_mesh(config.mesh, jax.devices()[:1])).init(jax.random.key(3)))


@functools.cache
def reference(router: str) -> dict[str, Any]:
    return run(one_device(router))


def one_device(router: str) -> Config:
    chosen = CONFIG.router if router == "softmax" else ROUTERS[router]()
    return dataclasses.replace(CONFIG, router=chosen, mesh=MeshConfig(data=1))


def assert_same(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """max|Δ| of every array within `tolerance` of the largest magnitude in it, of metrics that are 0 but for rounding
    within `tolerance` of .01.
    """

    def one(path: tuple, a: np.ndarray, b: np.ndarray) -> None:
        assert np.isfinite(a).all()
        rounding = jax.tree_util.keystr(path).endswith(("['plan_error']", "['reach']"))
        scale = max(float(np.max(np.abs(b))), 1e-2 if rounding else 1e-6)
        assert np.max(np.abs(a - b)) <= tolerance * scale, jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(one, actual, expected)


# Every mesh for the main routers, one mesh for those with a state; `tests/layers/test_moe_meshes.py` has all of them.
MAIN_ROUTERS = ("softmax", "sparse_topk", "successive_halving")
WITH_STATE = [name for name, router in ROUTERS.items() if router().init(CONFIG.moe.num_experts)[1]]


@pytest.mark.parametrize(
    ("mesh", "router"),
    [(mesh, name) for mesh in MESHES for name in MAIN_ROUTERS]
    + [("data=2,expert=4", name) for name in WITH_STATE if name not in MAIN_ROUTERS],
)
def test_the_mesh_changes_neither_losses_nor_gradients(mesh: str, router: str) -> None:
    config = dataclasses.replace(one_device(router), mesh=MESHES[mesh])
    actual = run(config)
    for part in ("gradient", "metrics", "router_state"):
        assert_same(actual[part], reference(router)[part])


@functools.cache
def dropless(mesh: str | None) -> dict[str, Any]:
    moe = dataclasses.replace(CONFIG.moe, capacity_factor=0.0)
    return run(dataclasses.replace(CONFIG, moe=moe, mesh=MESHES[mesh] if mesh else MeshConfig(data=1)))


@pytest.mark.parametrize("mesh", MESHES)
def test_without_capacity_the_mesh_changes_nothing_either(mesh: str) -> None:
    for part in ("gradient", "metrics"):
        assert_same(dropless(mesh)[part], dropless(None)[part])


def test_without_capacity_is_with_more_than_enough() -> None:
    enough = dataclasses.replace(CONFIG.moe, capacity_factor=CONFIG.moe.num_experts / CONFIG.router.k)
    expected = run(dataclasses.replace(CONFIG, moe=enough, mesh=MeshConfig(data=1)))
    for part in ("gradient", "metrics"):
        assert_same(dropless(None)[part], expected[part])


@pytest.mark.parametrize("mesh", MESHES)
def test_parameters_are_born_sharded_and_stay_so(mesh: str) -> None:
    config = dataclasses.replace(CONFIG, mesh=MESHES[mesh])
    whole = make_mesh(config.mesh)
    step = train.make_step(config, whole)
    born = step.init(jax.random.key(0))
    sizes = dataclasses.asdict(config.mesh)
    before = jax.tree.map(lambda x: x.sharding, born)
    w_in = born.variables.params["blocks"]["periods"]["blocks"][0]["f"]["experts"]["w_in"]
    assert w_in.sharding.spec == PartitionSpec(None, "expert", "fsdp", "tensor")
    local = w_in.addressable_shards[0].data.shape
    periods, experts, width, hidden = w_in.shape
    assert local == (periods, experts // sizes["expert"], width // sizes["fsdp"], hidden // sizes["tensor"])

    after, _ = step.train(born, train.to_devices(make_batch(), ("image", "label"), whole))
    jax.tree.map(lambda x, sharding: _assert_equivalent(x, sharding), after, before)
    moments = after.opt_state[1][0].mu["blocks"]["periods"]["blocks"][0]["f"]["experts"]["w_in"]
    assert moments.addressable_shards[0].data.shape == local


def _assert_equivalent(x: jax.Array, sharding: jax.sharding.Sharding) -> None:
    assert x.sharding.is_equivalent_to(sharding, x.ndim)


def test_the_step_can_be_part_of_a_larger_program() -> None:
    """What it is compiled with is said beside it, since a jitted function with options of its own can't be nested."""
    step = train.make_step(CONFIG, make_mesh(CONFIG.mesh, jax.devices()[:1]))
    jax.jit(lambda state, batch: step.train(state, batch)[0]).lower(step.abstract_state, step.abstract_batch)
    assert step.compiler_options


def test_the_expert_mesh_moves_tokens_and_not_weights() -> None:
    """All-to-all in the compiled step; no all-gather as large as an expert's matrices.

    How well the compiler was to optimise each device's code makes no difference to these.
    """
    config = dataclasses.replace(CONFIG, mesh=MESHES["data=2,expert=4"])
    step = train.make_step(config, make_mesh(config.mesh))
    text = step.train.lower(step.abstract_state, step.abstract_batch).compile().as_text()
    assert re.search(r"= .*\ball-to-all(-start)?\(", text)
    gathered = re.findall(r"= \(?(\w+\[[\d,]*\]).*?\ball-gather(?:-start)?\(", text)
    experts, width, hidden = config.moe.num_experts, config.model.width, config.moe.expert_width
    for shape in gathered:
        sizes = [int(size) for size in re.search(r"\[(.*)\]", shape).group(1).split(",") if size]  # type: ignore[union-attr]
        assert np.prod(sizes) < experts * width * hidden, f"all-gather of {shape}"


@pytest.mark.parametrize(("scan_layers", "remat"), [(False, "full"), (True, "dots")])
def test_scan_and_remat_change_nothing(scan_layers: bool, remat: str) -> None:
    model = dataclasses.replace(MODEL, scan_layers=scan_layers, remat=remat)
    actual = run(dataclasses.replace(one_device("softmax"), model=model))
    assert_same(actual["gradient"], reference("softmax")["gradient"])
    assert_same(actual["metrics"], reference("softmax")["metrics"])


@pytest.mark.parametrize(
    "router",
    [
        name if name in (*MAIN_ROUTERS, *WITH_STATE) else pytest.param(name, marks=pytest.mark.nightly)
        for name in ROUTERS
    ],
)
def test_accumulation_changes_nothing_when_groups_lie_within_micro_batches(router: str) -> None:
    """Unrolled and rematerialised, so that these are seen with every router."""
    model = dataclasses.replace(MODEL, scan_layers=False, remat="full")
    actual = run(dataclasses.replace(one_device(router), model=model, accumulation_steps=4))
    expected = reference(router)
    for part in ("gradient", "router_state"):
        assert_same(actual[part], expected[part])
    for part in ("train", "router"):
        assert_same(actual["metrics"][part], expected["metrics"][part])


def test_accumulation_of_identical_micro_batches_is_one_of_them_for_a_loss_over_the_whole_batch() -> None:
    """Without noise, which would make the micro-batches differ."""
    router = Softmax(k=2, noise=0.0, load_weight=0.0, importance_weight=0.1, balance_weight=0.1)
    config = dataclasses.replace(
        one_device("softmax"), router=router, moe=dataclasses.replace(CONFIG.moe, group_size=0)
    )
    once = jax.tree.map(lambda x: x[:4], make_batch())
    four_times = jax.tree.map(lambda x: np.concatenate([x] * 4), once)
    actual = run(dataclasses.replace(config, accumulation_steps=4), four_times)
    expected = run(dataclasses.replace(config, batch_size=4), once)
    assert expected["metrics"]["router"]["importance"] > 1e-4
    assert_same(actual["gradient"], expected["gradient"])
    assert_same(actual["metrics"], expected["metrics"])


@pytest.mark.parametrize(
    "mesh",
    [mesh if mesh == "data=2,expert=4" else pytest.param(mesh, marks=pytest.mark.nightly) for mesh in MESHES],
)
def test_groups_larger_than_a_device_share_give_the_same_numbers(mesh: str) -> None:
    config = dataclasses.replace(one_device("softmax"), moe=dataclasses.replace(CONFIG.moe, group_size=0))
    actual, expected = run(dataclasses.replace(config, mesh=MESHES[mesh])), run(config)
    assert_same(actual["gradient"], expected["gradient"])
    assert_same(actual["metrics"], expected["metrics"])


def test_the_state_of_a_router_lives_from_step_to_step() -> None:
    """A first step leaves the load that it saw; a second one turns it into a bias of ± the rate, in every layer."""
    config = dataclasses.replace(one_device("softmax"), router=Sigmoid(k=2, bias_rate=0.25))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    step = train.make_step(config, mesh)
    state, batch = step.init(jax.random.key(0)), train.to_devices(make_batch(), ("image", "label"), mesh)
    seen = []
    for _ in range(2):
        state, _ = step.train(state, batch)
        seen.append(state.variables.router_state["blocks"]["periods"]["blocks"][0]["f"]["router_state"])
        seen[-1] = jax.device_get(seen[-1])
    first, second = seen
    np.testing.assert_array_equal(first["bias"], 0)
    load = first["load"]
    assert load.shape == (MODEL.depth, config.moe.num_experts)
    np.testing.assert_allclose(load.sum(axis=1), 2, rtol=1e-5)
    np.testing.assert_array_equal(second["bias"], 0.25 * np.sign(load.mean(axis=1, keepdims=True) - load))
    assert (second["bias"] != 0).any(axis=1).all()


@pytest.mark.parametrize("router", WITH_STATE)
def test_the_state_of_a_router_is_the_same_on_every_device_and_in_a_checkpoint(router: str, tmp_path: Path) -> None:
    """After a step on a mesh, from there into a checkpoint, and out of it onto another mesh."""
    config = one_device(router)
    mesh = make_mesh(MESHES["data=2,expert=4"])
    step = train.make_step(dataclasses.replace(config, mesh=MESHES["data=2,expert=4"]), mesh)
    born = step.init(jax.random.key(0))
    before = jax.device_get(born.variables.router_state)
    state, _ = step.train(born, train.to_devices(make_batch(), ("image", "label"), mesh))
    after = jax.device_get(state.variables.router_state)
    leaves = jax.tree.leaves(state.variables.router_state)
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))
    for leaf in leaves:
        assert len(leaf.addressable_shards) == 8
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, leaf)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state, {})
    checkpoints.close()
    other = train.make_step(config, make_mesh(config.mesh, jax.devices()[:1]))
    restored, _ = Checkpoints(tmp_path).restore(1, other.abstract_state)
    jax.tree.map(np.testing.assert_array_equal, restored.variables.router_state, after)


def scanned_step(dispatch: str, depth: int) -> train.Step:
    """Experts that outweigh the activations."""
    moe = dataclasses.replace(CONFIG.moe, num_experts=8, expert_width=128, dispatch=dispatch)
    model = dataclasses.replace(MODEL, width=128, depth=depth, scan_layers=True)
    config = dataclasses.replace(one_device("softmax"), model=model, moe=moe, batch_size=2)
    return train.make_step(config, make_mesh(config.mesh, jax.devices()[:1]))


@pytest.mark.parametrize("dispatch", ["einsum", "capacity", "dropless"])
def test_a_scan_over_layers_stacks_the_experts_gradients_once(dispatch: str) -> None:
    """As the result of the backward scan; the forward scan keeps no matrix of theirs for it."""
    depth = 3
    step = scanned_step(dispatch, depth)
    program = jax.make_jaxpr(step.gradients)(step.abstract_state, step.abstract_batch)
    scans = [
        one for one in equations_of(program.jaxpr) if one.primitive.name == "scan" and one.params["length"] == depth
    ]
    stacked = {
        one.params["reverse"]: sum(out.aval.shape == (depth, 8, 128, 128) for out in one.outvars) for one in scans
    }
    assert stacked == {False: 0, True: 2}


def test_more_layers_take_more_memory_for_activations_alone() -> None:
    """As compiled; the stacked gradient is the result and isn't counted."""

    def temporary_bytes(depth: int) -> int:
        step = scanned_step("capacity", depth)
        compiled = jax.jit(step.gradients).lower(step.abstract_state, step.abstract_batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    expert_gradients = 4 * 8 * 2 * 128 * 128
    assert (temporary_bytes(8) - temporary_bytes(2)) / 6 < 0.5 * expert_gradients


def test_balance_over_the_batch_is_the_same_on_a_mesh() -> None:
    """Its means go over the groups of all devices."""
    moe = dataclasses.replace(CONFIG.moe, balance_scope="batch")
    config = dataclasses.replace(one_device("softmax"), moe=moe, router=Softmax(k=2, balance_weight=0.5))
    actual, expected = run(dataclasses.replace(config, mesh=MESHES["data=2,expert=4"])), run(config)
    assert_same(actual["gradient"], expected["gradient"])
    assert_same(actual["metrics"], expected["metrics"])


def test_router_losses_reach_the_gate_of_every_layer() -> None:
    """A loss lost in a scan would leave the gate's gradient unchanged when its weight changes."""
    heavier = run(dataclasses.replace(one_device("softmax"), router=dataclasses.replace(CONFIG.router, z_weight=1.0)))
    gates = [g["gradient"]["blocks"]["periods"]["blocks"][0]["f"]["w_gate"] for g in (heavier, reference("softmax"))]
    difference = np.abs(gates[0] - gates[1]).max(axis=(1, 2))
    assert difference.shape == (2,)
    assert (difference > 1e-3).all()


def test_bf16_model_keeps_f32_parameters_and_router() -> None:
    model = dataclasses.replace(MODEL, dtype="bfloat16")
    moe = dataclasses.replace(CONFIG.moe, num_experts=7)
    f32 = dataclasses.replace(one_device("softmax"), moe=moe)
    actual, expected = run(dataclasses.replace(f32, model=model)), run(f32)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(actual["gradient"]))
    assert actual["metrics"]["train"]["loss"] == pytest.approx(expected["metrics"]["train"]["loss"], rel=0.02)
    text = actual["program"].lower(*actual["arguments"]).as_text()
    assert "bf16" in text
    assert not re.search(r"tensor<[\dx]*x7xbf16>", text), "router logits in bfloat16"


def test_a_batch_that_the_mesh_cannot_share_is_refused() -> None:
    with pytest.raises(ValueError, match=r"micro-batch of 12 .* 8 devices .* multiple of 8"):
        train.make_step(dataclasses.replace(CONFIG, batch_size=12, mesh=MESHES["data=8"]), make_mesh(MESHES["data=8"]))


def test_experts_that_the_expert_axis_does_not_divide_are_refused() -> None:
    config = dataclasses.replace(
        CONFIG, moe=dataclasses.replace(CONFIG.moe, num_experts=6), mesh=MESHES["data=2,expert=4"]
    )
    with pytest.raises(ValueError, match=r"mesh.expert = 4 doesn't divide the 6 entries of axis 'expert'"):
        train.make_step(config, make_mesh(config.mesh))


def test_the_step_is_deterministic_and_noise_differs_between_steps() -> None:
    first, again = reference("softmax"), run(one_device("softmax"))
    assert_same(first["gradient"], again["gradient"], tolerance=0.0)
    state, batch = again["arguments"]
    other, _ = again["program"](state._replace(step=jax.device_put(jnp.int32(1), state.step.sharding)), batch)
    assert any(
        np.any(np.asarray(a) != b)
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(first["gradient"]), strict=True)
    )


def test_the_sigmoid_loss_adds_up_over_the_classes() -> None:
    """A fresh head gives every class the logit of its first bias, -2."""
    model = dataclasses.replace(MODEL, head_bias=-2.0)
    config = dataclasses.replace(
        one_device("softmax"), model=model, loss="sigmoid", label_smoothing=0.3, router=ROUTERS["dense"]()
    )
    step = train.make_step(config, make_mesh(config.mesh, jax.devices()[:1]))
    state = step.init(jax.random.key(0))
    batch = train.to_devices(make_batch(), ("image", "label"), make_mesh(config.mesh, jax.devices()[:1]))
    _, (metrics, _) = jax.jit(step.gradients)(state, batch)
    positive, negative = np.log1p(np.exp(2.0)), np.log1p(np.exp(-2.0))
    targets = np.array([0.7 + 0.03, *[0.03] * 9])
    expected = np.sum(targets * positive + (1 - targets) * negative)
    np.testing.assert_allclose(metrics["train"]["cross_entropy"], expected, rtol=1e-5)


def test_metrics_are_numbered_by_the_blocks_with_experts() -> None:
    model = dataclasses.replace(MODEL, depth=7, dense_layers=3, moe_every=2)
    config = dataclasses.replace(CONFIG, model=model)
    moe = {"overflow": np.array([0.25, 0.5]), "expert_load": np.array([[0.5, 0.5], [0.75, 0.25]])}
    metrics = {"train": {}, "router": {}, "guard": {}, "moe": moe, "blocks": {}}
    assert log_values(metrics, config.model.moe_blocks) == {"moe/layer_4/overflow": 0.25, "moe/layer_6/overflow": 0.5}

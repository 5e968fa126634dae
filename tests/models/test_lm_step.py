"""The training step on text: one number on every mesh, scanned or not, rematerialised or not, accumulated or not."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train
from moe.config import Config
from moe.data.text import TextConfig
from moe.evaluation.language import evaluate
from moe.models import Objective, make_model
from moe.optim import OptimizerConfig
from moe.parallel.mesh import MeshConfig, make_mesh
from moe.plan.program import Instruction, array_bytes, computations
from moe.routers import Softmax
from tests.models.helpers import BATCH, LENGTH, MOE, ODD, ONE_DEVICE, PLAIN, make_batch
from tests.routers.helpers import COMPILER_OPTIONS
from tests.test_step import assert_same, compile_fast

__all__ = ["compile_fast"]

CONFIG = Config(
    seed=3,
    steps=10,
    batch_size=BATCH,
    model=dataclasses.replace(ODD, vocab_size=24, dense_layers=0, depth=2, z_weight=0.01),
    moe=dataclasses.replace(MOE, capacity_factor=1.0, group_size=1),
    router=Softmax(k=2, balance_weight=0.01, z_weight=0.01),
    optimizer=OptimizerConfig(warmup_steps=1),
    mesh=MeshConfig(data=1),
    data=TextConfig(length=LENGTH),
)


def run(config: Config) -> dict[str, Any]:
    """Gradient, metrics and scores of the first step, on the mesh that the config names."""
    devices = jax.devices()[: np.prod([*dataclasses.asdict(config.mesh).values()])]
    mesh = make_mesh(config.mesh, devices)
    step = train.make_step(config, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, step.abstract_state)
    state = jax.device_put(fresh_state(), shardings)
    batch = train.to_devices(make_batch(), tuple(step.abstract_batch), mesh)
    gradient, (metrics, _) = jax.device_get(jax.jit(step.gradients)(state, batch))
    scores = step.predict(state.variables, {**make_batch(), "mask": np.ones(BATCH, bool)})
    return {"gradient": gradient, "metrics": metrics, "scores": jax.device_get(scores.nll)}


@functools.cache
def fresh_state() -> train.TrainState:
    return jax.device_get(train.make_step(CONFIG, ONE_DEVICE).init(jax.random.key(3)))


@functools.cache
def reference() -> dict[str, Any]:
    return run(CONFIG)


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(MeshConfig(data=8), marks=pytest.mark.nightly),
        MeshConfig(data=2, expert=4),
        MeshConfig(data=1, fsdp=4, tensor=2),
        MeshConfig(data=1, tensor=2),
    ],
    ids=["data=8", "data=2,expert=4", "fsdp=4,tensor=2", "tensor=2"],
)
def test_the_mesh_changes_nothing(mesh: MeshConfig) -> None:
    """With two key-value heads, each with its queries, cut along the tensor axis, and the vocabulary as well."""
    actual = run(dataclasses.replace(CONFIG, mesh=mesh))
    assert_same(actual, reference(), tolerance=2e-5)


def test_the_heads_gradient_is_summed_over_devices_once() -> None:
    """And not for every chunk of positions: no collective of its size stands in a loop."""
    model = dataclasses.replace(CONFIG.model, vocab_size=1024, loss_chunk=2, depth=2, moe_every=0)
    config = dataclasses.replace(CONFIG, model=model, mesh=MeshConfig(data=4, fsdp=2))
    step = train.make_step(config, make_mesh(config.mesh))
    hlo = step.train.lower(step.abstract_state, step.abstract_batch).compile().as_text()
    parts = {name: transfers_of(part) for name, part in computations(hlo).items()}
    head = 4 * model.width * model.vocab_size
    assert max(parts["ENTRY"]) >= head / 2
    assert max((size for name, part in parts.items() if name != "ENTRY" for size in part), default=0) < head / 4


def transfers_of(part: list[Instruction]) -> list[float]:
    """Bytes that the collectives among some instructions return."""
    kinds = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all")
    return [sum(array_bytes(each.text.split(f" {each.operation}(")[0])) for each in part if each.operation in kinds]


def test_accumulation_weights_micro_batches_by_their_targets() -> None:
    """Four micro-batches with different numbers of targets that count: the mean is over all of these.

    Unrolled and rematerialised, so that these are seen too. The mean of the micro-batches' means is another number.
    """
    model = dataclasses.replace(CONFIG.model, scan_layers=False, remat="full")
    actual = run(dataclasses.replace(CONFIG, model=model, accumulation_steps=4))
    assert_same(actual["gradient"], reference()["gradient"], tolerance=2e-5)
    for part in ("train", "router"):
        assert_same(actual["metrics"][part], reference()["metrics"][part], tolerance=2e-5)

    batch, nll = make_batch(), reference()["scores"].astype(np.float64)
    keep = batch["loss_mask"]
    counts = keep.reshape(4, -1).sum(axis=1)
    assert len(set(counts)) > 1
    means = (nll * keep).reshape(4, -1).sum(axis=1) / counts
    assert abs(means.mean() - (nll * keep).sum() / keep.sum()) > 1e-3


def test_the_loss_is_the_mean_over_targets_plus_the_routers_losses() -> None:
    metrics = reference()["metrics"]
    train_metrics = metrics["train"]
    parts = train_metrics["cross_entropy"] + train_metrics["z"] + sum(metrics["router"].values())
    assert train_metrics["loss"] == pytest.approx(parts, rel=1e-5)
    assert set(metrics["router"]) == {"balance", "z", "importance", "load"}
    assert 0 <= train_metrics["accuracy"] <= 1


def test_a_batch_without_a_target_has_no_gradient_and_no_nan() -> None:
    model = make_model(PLAIN, MOE, CONFIG.router)
    variables = model.init(jax.random.key(0))
    batch = jax.tree.map(jnp.asarray, {**make_batch(), "loss_mask": np.zeros((BATCH, LENGTH), bool)})

    def loss(params: Any) -> jax.Array:
        output = model.loss(variables._replace(params=params), batch, keys=None, mesh=ONE_DEVICE, objective=Objective())
        return output.loss / model.terms(batch)

    gradient = jax.jit(jax.grad(loss), compiler_options=COMPILER_OPTIONS)(variables.params)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradient))


def test_measures_of_text() -> None:
    """Two batches; rows that the mask leaves out and targets that don't count are worth nothing."""
    from moe.ops.vocabulary import Scores

    def predict(_: Any, batch: dict[str, Any]) -> Scores:
        right = jnp.asarray(batch["right"])
        return Scores(jnp.asarray(batch["nll"], jnp.float32), right, ~right, jnp.full((2, 2), 0.5))

    ones = np.ones((2, 2), bool)
    first = {"nll": [[1.0, 2.0], [9.0, 9.0]], "right": ones, "mask": np.array([True, False])}
    first |= {"loss_mask": ones, "target_bytes": np.array([[3, 1], [5, 5]])}
    first |= {"document": np.array([[7, 7], [-1, -1]]), "source": np.array([0, -1])}
    second = {"nll": [[3.0, 9.0], [2.0, 4.0]], "right": ~ones, "mask": np.array([True, True])}
    second |= {"loss_mask": np.array([[True, False], [True, True]]), "target_bytes": np.array([[2, 0], [1, 1]])}
    second |= {"document": np.array([[7, -1], [7, 7]]), "source": np.array([0, 1])}
    measures = evaluate(predict, None, [first, second])
    expected = {"accuracy": 2 / 5, "loss": 12 / 5, "bits_per_byte": 12 / np.log(2) / 8, "perplexity": np.exp(12 / 5)}
    # All five tokens are as sure, and two of five are right.
    expected |= {"top5_accuracy": 3 / 5, "ece": 0.1}
    assert {name: measures[name] for name in expected} == pytest.approx(expected)
    # Two documents, of 3 tokens with 6 nats and of 2 with 6: resamples are one of them twice, or both.
    assert (measures["loss_low"], measures["loss_high"]) == (2, 3)
    assert evaluate(predict, None, [first]).keys() == expected.keys()  # one document says nothing of others
    with pytest.raises(ValueError, match="empty"):
        evaluate(predict, None, [])

"""Any config either trains or is refused in one sentence: never another exception, wherever the mistake shows."""

import dataclasses
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
import pytest
from hypothesis import given

import train
from moe import config as config_lib
from moe.compiler import compile_step
from moe.config import Config
from moe.models import make_model
from moe.parallel.mesh import make_mesh
from tests import compiling
from tests.fuzz import at_length, configs, quickly

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def compile_fast() -> Iterator[None]:
    """These tests compile much and compute little."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def resolve(name: str, *overrides: str) -> Config:
    table = configs.base(name)
    config_lib.override(table, overrides)
    return config_lib.resolve(table)


def make_batch(step: train.Step, config: Config) -> dict[str, np.ndarray]:
    """Whatever the model may be given."""
    rng = np.random.default_rng(0)

    def one(name: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        below = {"label": "num_classes", "tokens": "vocab_size", "targets": "vocab_size"}
        if name in below:
            return rng.integers(0, getattr(config.model, below[name]), leaf.shape).astype(leaf.dtype)
        if name == "position":
            return np.broadcast_to(np.arange(leaf.shape[1], dtype=leaf.dtype), leaf.shape).copy()
        return rng.uniform(size=leaf.shape).astype(leaf.dtype) if name == "image" else np.ones(leaf.shape, leaf.dtype)

    return {name: one(name, leaf) for name, leaf in step.abstract_batch.items()}


def lower(config: Config) -> tuple[train.Step, jax.sharding.Mesh, Any]:
    """All that happens before anything is compiled, for evaluation too."""
    sizes = [size for size in dataclasses.asdict(config.mesh).values() if size != -1]
    mesh = make_mesh(config.mesh, jax.devices()[: 1 if set(sizes) == {1} else configs.DEVICES])
    step = train.make_step(config, mesh)
    model = make_model(config.model, config.moe, config.router)
    batch = {name: step.abstract_batch[name] for name in config.model.scored if name in step.abstract_batch}
    batch["mask"] = jax.ShapeDtypeStruct((config.batch_size,), bool)
    jax.eval_shape(
        lambda variables, batch: model.score(variables, batch, mesh=mesh), step.abstract_state.variables, batch
    )
    return step, mesh, step.loop.train.lower(step.loop.abstract_state, step.abstract_batch)


def check_it_trains(overrides: tuple[str, ...]) -> None:
    compiling.make_room()
    config = resolve(*overrides)
    step, mesh, lowered = lower(config)
    program = compile_step(lowered, step.compiler_options)
    state = step.init(jax.random.key(config.seed))
    before = jax.device_get(state.variables.params)
    state = step.loop.enter(state)
    batch = make_batch(step, config)
    # The learning rate is 0 at the first step of a warm-up.
    for _ in range(1 + config.optimizer.warmup_steps):
        state, metrics = program(state, train.to_devices(batch, tuple(batch), mesh))
    after = jax.device_get(step.loop.leave(state).variables)
    for path, leaf in jax.tree_util.tree_leaves_with_path((jax.device_get(metrics), after)):
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)
    changes = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, after.params)
    assert any(jax.tree.leaves(changes))


def assert_one_sentence(error: Exception) -> None:
    """On one line, of this repository's own making, and no question."""
    where = traceback.extract_tb(error.__traceback__)[-1].filename
    text = "".join(traceback.format_exception(error))
    assert type(error) is ValueError, text
    assert Path(where).is_relative_to(REPOSITORY), text
    message = str(error)
    assert message.isprintable(), text
    assert not message.endswith("?"), text
    assert 20 < len(message) < 2000, text


def check_it_is_refused(overrides: tuple[str, ...]) -> None:
    with pytest.raises(Exception) as caught:
        lower(resolve(*overrides))
    assert_one_sentence(caught.value)


def check_it_is_traced_or_refused(overrides: tuple[str, ...]) -> None:
    compiling.make_room()
    try:
        lower(resolve(*overrides))
    except Exception as error:
        assert_one_sentence(error)


def check_a_table(name: str, edits: tuple[tuple[tuple[str, ...], Any], ...]) -> None:
    whole = configs.base(name).to_dict()
    for path, value in edits:
        table = whole
        for parent in path[:-1]:
            table = table[parent] if isinstance(table.get(parent), dict) else {}
        table[path[-1]] = value
    try:
        config_lib.resolve(ml_collections.ConfigDict(whole))
    except Exception as error:
        assert_one_sentence(error)


@quickly("config")
@given(configs.right())
def test_a_right_config_takes_a_step(overrides: tuple[str, ...]) -> None:
    check_it_trains(overrides)


@quickly("mistake")
@given(configs.mistaken())
def test_a_mistake_is_one_sentence(overrides: tuple[str, ...]) -> None:
    check_it_is_refused(overrides)


@quickly("changed config")
@given(configs.changed())
def test_fields_set_to_anything_are_traced_or_refused(overrides: tuple[str, ...]) -> None:
    check_it_is_traced_or_refused(overrides)


@quickly("table")
@given(configs.edited())
def test_any_table_is_resolved_or_refused(edited: Any) -> None:
    check_a_table(*edited)


@at_length("config")
@given(configs.right())
def test_a_right_config_takes_a_step_at_length(overrides: tuple[str, ...]) -> None:
    check_it_trains(overrides)


@at_length("mistake")
@given(configs.mistaken())
def test_a_mistake_is_one_sentence_at_length(overrides: tuple[str, ...]) -> None:
    check_it_is_refused(overrides)


@at_length("changed config")
@given(configs.changed())
def test_fields_set_to_anything_are_traced_or_refused_at_length(overrides: tuple[str, ...]) -> None:
    check_it_is_traced_or_refused(overrides)


@at_length("table")
@given(configs.edited())
def test_any_table_is_resolved_or_refused_at_length(edited: Any) -> None:
    check_a_table(*edited)


# What has been something else than one sentence, or gone unnoticed.
FOUND = [
    ("model.patch_size=0", "model.patch_size = 0 must be at least 1."),
    ("model.patch_size=-1", "model.patch_size = -1 must be at least 1."),
    ("model.num_classes=0", "model.num_classes = 0 must be at least 1."),
    ("model.image_size=(8,8,0)", "model.image_size = (8, 8, 0) must be height, width and channels, none below 1."),
    ("model.image_size=(8,8,'a')", "config field model.image_size[2] = 'a' must be of type int."),
    ("model.image_size=(8.0,8,1)", "config field model.image_size[0] = 8.0 must be of type int."),
    ("compiler.options=(3,)", "config field compiler.options[0] = 3 must be of type str."),
    ("seed=-1", "seed = -1 must lie between 0 and 4294967295."),
    ("seed=4294967296", "config field seed = 4294967296 must lie between -4294967295 and 4294967295."),
    ("evaluate_every=-1", "evaluate_every = -1 must not be negative."),
    (
        "optimizer.learning_rate=nan",
        "config field optimizer.learning_rate = nan must be 0 or, with either sign, lie between 1.2e-38 and 3.4e+38.",
    ),
    (
        "moe.receive_factor=inf",
        "config field moe.receive_factor = inf must be 0 or, with either sign, lie between 1.2e-38 and 3.4e+38.",
    ),
    (
        f"label_smoothing=1{'0' * 400}/3",
        f"config field label_smoothing = '1{'0' * 400}/3' must be of type float, like its present value 0.1.",
    ),
    ("router.softmax.expert_groups=0", "router.expert_groups = 0 must be at least 1."),
    ("router.name=dselect_k router.k=-1", "router.k = -1 experts per token must lie in 1..8, the number of experts."),
]


@pytest.mark.parametrize(("overrides", "sentence"), FOUND, ids=[one[:40] for one, _ in FOUND])
def test_mistakes_found_so_far_are_one_sentence(overrides: str, sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        lower(resolve("vit", *overrides.split()))
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        ({"softmax": 3}, "config field router.softmax = 3 must be a table."),
        ({"name": ["softmax"]}, "unknown router ['softmax']: did you mean 'softmax'? it must be one of softmax, "),
        ({"name": "softmx"}, "unknown router 'softmx': did you mean 'softmax'? it must be one of softmax, "),
    ],
)
def test_a_file_that_has_something_else_for_a_table_is_refused(edit: dict[str, Any], sentence: str) -> None:
    table = configs.base("vit").to_dict()
    table["router"] |= edit
    with pytest.raises(ValueError) as caught:
        config_lib.resolve(ml_collections.ConfigDict(table))
    assert str(caught.value).startswith(sentence)

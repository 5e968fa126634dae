"""The language model against the float64 decoder, document by document; its limits; and mistakes in one sentence."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.models import LmConfig, Objective, make_model
from moe.ops.rope import Yarn
from moe.routers import ROUTERS
from tests.models.helpers import (
    BATCH,
    LENGTH,
    MOE,
    ODD,
    OLMOE,
    ONE_DEVICE,
    PLAIN,
    ROUTER,
    VOCABULARY,
    as_float64,
    make_batch,
    make_variables,
)
from tests.oracles import decoder
from tests.routers.helpers import COMPILER_OPTIONS

CONFIGS = {
    "plain": PLAIN,
    "odd": ODD,
    "olmoe": OLMOE,
    "yarn": dataclasses.replace(
        PLAIN, depth=1, kv_heads=1, rope_scaling=Yarn(factor=4.0, fast_turns=2.0, slow_turns=0.01, original_length=40)
    ),
}


def frequencies(config: LmConfig) -> np.ndarray:
    settings = dataclasses.asdict(config.rope_scaling)
    name = {"Unscaled": "none", "Llama3": "llama3", "Yarn": "yarn"}[type(config.rope_scaling).__name__]
    return decoder.rope_frequencies(config.attention.head_width, config.rope_theta, name, **settings)


def documents(batch: dict[str, np.ndarray]) -> list[tuple[int, np.ndarray]]:
    """Row and columns of every document."""
    segment = batch["segment"]
    return [(b, np.flatnonzero(segment[b] == n)) for b in range(len(segment)) for n in range(1, segment[b].max() + 1)]


def oracle_loss(params: Any, config: LmConfig, batch: dict[str, np.ndarray], smoothing: float) -> tuple[float, ...]:
    """Loss, cross-entropy and right answers, summed over the targets that count."""
    cross_entropy = z = correct = 0.0
    for b, columns in documents(batch):
        logits = decoder.document_logits(batch["tokens"][b, columns], params, config, ROUTER.k, frequencies(config))
        for row, column in zip(logits, columns, strict=True):
            if batch["loss_mask"][b, column]:
                cross_entropy += decoder.token_loss(row, batch["targets"][b, column], smoothing)
                z += config.z_weight * np.log(np.exp(row).sum()) ** 2
                correct += row.argmax() == batch["targets"][b, column]
    return cross_entropy + z, cross_entropy, correct


@functools.cache
def run(name: str) -> Any:
    """Logits of every row as one document, and loss with gradient of the packed batch; one compiled program."""
    config = CONFIGS[name]
    model, variables = make_model(config, MOE, ROUTER), make_variables(config)
    batch = jax.tree.map(jnp.asarray, make_batch())

    def both(params: Any) -> Any:
        given = variables._replace(params=params)
        output = model.loss(given, batch, keys=None, mesh=ONE_DEVICE, objective=Objective(label_smoothing=0.1))
        return output.loss, (output, model.apply(given, batch["tokens"], keys=None, mesh=ONE_DEVICE).logits)

    return jax.jit(jax.grad(both, has_aux=True), compiler_options=COMPILER_OPTIONS)(variables.params)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_the_oracle_s(name: str) -> None:
    config = CONFIGS[name]
    _, (_, logits) = run(name)
    assert logits.dtype == jnp.float32
    params, tokens = as_float64(make_variables(config).params), make_batch()["tokens"]
    for b in range(3):
        expected = decoder.document_logits(tokens[b], params, config, ROUTER.k, frequencies(config))
        np.testing.assert_allclose(logits[b], expected, atol=2e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradient_of_packed_documents_are_the_oracle_s(name: str) -> None:
    """Documents see nothing of each other, nor of padding; the gradient is that of differences along a direction."""
    config = CONFIGS[name]
    gradient, (output, _) = run(name)
    params, batch = as_float64(make_variables(config).params), make_batch()
    expected = oracle_loss(params, config, batch, 0.1)
    scalars = output.scalars
    np.testing.assert_allclose([output.loss, scalars["cross_entropy"], scalars["accuracy"]], expected, rtol=2e-5)
    rng, step = np.random.default_rng(1), 1e-6
    # As long in every parameter, so that none hides behind the embedding.
    direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape) / np.sqrt(leaf.size), params)
    ends = [
        oracle_loss(jax.tree.map(lambda p, d, s=s: p + s * d, params, direction), config, batch, 0.1)[0]
        for s in (step, -step)
    ]
    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: np.sum(np.float64(g) * d), gradient, direction)))
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=2e-3)


def test_padding_is_never_routed_and_the_router_sees_token_ids() -> None:
    """Rows of padding only, and others: the metrics count tokens of documents. A hash router follows the ids."""
    model, variables, batch = make_model(PLAIN, MOE, ROUTER), make_variables(PLAIN), make_batch()
    batch["segment"][2:] = 0
    output = jax.jit(
        lambda batch: model.loss(variables, batch, keys=None, mesh=ONE_DEVICE, objective=Objective()),
        compiler_options=COMPILER_OPTIONS,
    )(batch)
    np.testing.assert_allclose(output.routers.metrics["experts_per_token"], [2, 2])
    hashed = make_model(PLAIN, MOE, ROUTERS["hash"](k=1))
    call = jax.jit(
        lambda tokens: hashed.apply(hashed.init(jax.random.key(0)), tokens, keys=None, mesh=ONE_DEVICE).routers.metrics,
        compiler_options=COMPILER_OPTIONS,
    )
    np.testing.assert_allclose(call(np.full((BATCH, LENGTH), 3, np.int32))["dead_experts"], [3, 3])


def test_scores_are_those_of_the_loss() -> None:
    """Of the rows that the mask keeps, which padding rows beside them don't change."""
    model, variables, batch = make_model(ODD, MOE, ROUTER), make_variables(ODD), make_batch()
    batch["mask"] = np.arange(BATCH) < 6
    score = jax.jit(lambda batch: model.score(variables, batch, mesh=ONE_DEVICE), compiler_options=COMPILER_OPTIONS)
    scores = score(batch)
    kept = jax.tree.map(lambda leaf: leaf[:6], batch)
    expected = oracle_loss(as_float64(variables.params), ODD, kept, 0.0)
    keep = batch["loss_mask"] & batch["mask"][:, None]
    sums = [np.asarray(scores.nll)[keep].sum(), np.asarray(scores.correct)[keep].sum()]
    np.testing.assert_allclose(sums, expected[1:], rtol=2e-5)


def test_bf16_activations_keep_f32_parameters_and_logits() -> None:
    """Of a dense model, since a token near a tie may get another expert."""
    config = dataclasses.replace(OLMOE, dtype="bfloat16")
    model, variables = make_model(config, MOE, ROUTER), make_variables(config)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(variables.params))
    call = jax.jit(
        lambda tokens: model.apply(variables, tokens, keys=None, mesh=ONE_DEVICE).logits,
        compiler_options=COMPILER_OPTIONS,
    )
    logits = call(make_batch()["tokens"])
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, run("olmoe")[1][1], atol=0.15)


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("vocab_size", 0, r"model.vocab_size = 0 must be at least 1"),
        ("kv_heads", 3, r"model.kv_heads = 3 must divide model.heads = 4"),
        ("kv_heads", -1, r"model.kv_heads = -1 must not be negative"),
        ("heads", 3, r"model.heads = 3 must divide model.width = 8"),
        ("head_width", 5, r"odd width, 5"),
        ("window", -1, r"model.window = -1 must not be negative"),
        ("norm_eps", 0.0, r"model.norm_eps = 0.0 must be positive"),
        ("dense_layers", 2, r"model.dense_layers = 2 must lie between 0 and model.depth - 1 = 1"),
        ("moe_every", 3, r"model.moe_every = 3 must divide model.depth - model.dense_layers = 2 - 0"),
    ],
)
def test_settings_out_of_range_are_refused(field: str, value: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(PLAIN, **{field: value})


def test_a_sequence_longer_than_the_model_s_limit_is_refused() -> None:
    model = make_model(PLAIN, MOE, ROUTER)
    with pytest.raises(ValueError, match=r"a sequence of 10 tokens exceeds model.length = 9"):
        model.apply(make_variables(PLAIN), jnp.zeros((1, LENGTH + 1), jnp.int32), keys=None, mesh=ONE_DEVICE)


def test_an_objective_of_images_is_refused() -> None:
    with pytest.raises(ValueError, match=r"loss = 'sigmoid' is for images"):
        make_model(PLAIN, MOE, ROUTER).loss(
            make_variables(PLAIN), {}, keys=None, mesh=ONE_DEVICE, objective=Objective("sigmoid")
        )


def test_the_dense_twin_has_no_router_and_no_head_where_it_is_tied() -> None:
    config = dataclasses.replace(OLMOE, tied_head=True)
    params = make_variables(config).params
    assert "head" not in params
    assert params["embedding"].shape == (VOCABULARY, 8)
    assert set(params["blocks"]["periods"]["blocks"][0]["f"]) == {"weights"}

"""The vision transformer against NumPy in float64, in the forms that its configs choose between."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.layers.moe import MoeConfig
from moe.models import Variables, ViTConfig, make_model
from moe.parallel.mesh import MeshConfig, make_mesh
from moe.routers import Softmax
from tests.routers.helpers import COMPILER_OPTIONS

MESH = make_mesh(MeshConfig(), jax.devices()[:1])
# One expert that every token has with weight 1: a mixture that is an MLP.
MOE = MoeConfig(num_experts=1, expert_width=10, group_size=2, capacity_factor=0.0)
ROUTER = Softmax(k=1, noise=0.0, load_weight=0.0)
SHAPE = {"image_size": (4, 6, 3), "patch_size": 2, "num_classes": 5, "width": 8, "heads": 2, "mlp_width": 12}
FORMS: dict[str, dict[str, Any]] = {
    "mean": {"depth": 2, "moe_every": 1},
    "class token": {"depth": 2, "moe_every": 2, "pooling": "class_token"},
    "representation": {"depth": 1, "moe_every": 0, "representation_width": 7, "head_bias": -2.5},
    "dense at first": {"depth": 4, "moe_every": 1, "dense_layers": 2, "scan_layers": False},
    "dense at first, then every second": {"depth": 3, "moe_every": 2, "dense_layers": 1, "pooling": "class_token"},
}
IMAGES = np.random.default_rng(0).normal(size=(2, 4, 6, 3)).astype(np.float32)


def norm(x: np.ndarray, p: Any) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def attention(x: np.ndarray, p: Any) -> np.ndarray:
    query, key, value = np.split(np.einsum("BLD,DHd->BLHd", x, p["w_in"]), 3, axis=-1)
    scores = np.exp(np.einsum("BqHd,BkHd->BHqk", query, key) / np.sqrt(query.shape[-1]))
    mixed = np.einsum("BHqk,BkHd->BqHd", scores / scores.sum(-1, keepdims=True), value)
    return np.einsum("BLHd,HdD->BLD", mixed, p["w_out"])


def feed_forward(x: np.ndarray, p: Any) -> np.ndarray:
    weights = p["weights"] if "weights" in p else {name: w[0] for name, w in p["experts"].items()}
    hidden = x @ weights["w_in"]
    hidden = hidden / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
    return hidden @ weights["w_out"]


def block_params(params: Any) -> list[Any]:
    """Those of each block, first block first."""
    stacks = [params["blocks"][name]["blocks"] for name in ("leading", "periods") if name in params["blocks"]]
    blocks = []
    for stack in stacks:
        periods = len(jax.tree.leaves(stack)[0])
        for period in range(periods):
            blocks += [jax.tree.map(lambda w, at=period: w[at], stack[place]) for place in sorted(stack)]
    return blocks


def oracle(params: Any, config: ViTConfig) -> np.ndarray:
    size = config.patch_size
    rows, columns = config.image_size[0] // size, config.image_size[1] // size
    tokens = [
        IMAGES[:, r * size : (r + 1) * size, c * size : (c + 1) * size].reshape(2, -1)
        for r in range(rows)
        for c in range(columns)
    ]
    x = np.stack(tokens, axis=1) @ params["w_patch"]
    if config.pooling == "class_token":
        x = np.concatenate([np.zeros((2, 1, config.width)), x], axis=1)
    x = x + params["position"]
    blocks = block_params(params)
    assert len(blocks) == config.depth
    for p in blocks:
        x = x + attention(norm(x, p["attention_norm"]), p["attention"])
        x = x + feed_forward(norm(x, p["f_norm"]), p["f"])
    x = norm(x, params["norm"])
    pooled = x[:, 0] if config.pooling == "class_token" else x.mean(axis=1)
    if config.representation_width:
        pooled = np.tanh(pooled @ params["w_representation"])
    return pooled @ params["head"]["kernel"] + params["head"]["bias"]


@pytest.mark.parametrize(
    "form", [form if form == "class token" else pytest.param(form, marks=pytest.mark.nightly) for form in FORMS]
)
def test_the_model_is_the_one_in_numpy(form: str) -> None:
    config = ViTConfig(**SHAPE, **FORMS[form])
    model = make_model(config, MOE, ROUTER)
    fresh = model.init(jax.random.key(1))
    np.testing.assert_array_equal(fresh.params["head"]["kernel"], 0)
    np.testing.assert_array_equal(fresh.params["head"]["bias"], np.float32(config.head_bias))
    # Everything off its first value, zeros and ones included.
    leaves, structure = jax.tree.flatten(fresh.params)
    rng = np.random.default_rng(2)
    params = structure.unflatten([leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])

    @jax.jit
    def logits(params: Any) -> jax.Array:
        return model.apply(Variables(params, fresh.router_state), jnp.asarray(IMAGES), keys=None, mesh=MESH).logits

    actual = logits.lower(params).compile(compiler_options=COMPILER_OPTIONS)(params)
    expected = oracle(jax.tree.map(lambda w: np.asarray(w, np.float64), params), config)
    np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=2e-4)
    every, dense = config.moe_every, config.dense_layers
    places = [at for at, p in enumerate(block_params(params)) if "experts" in p["f"]]
    assert places == (list(range(dense + every - 1, config.depth, every)) if every else [])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dense_layers": 4}, r"model.dense_layers = 4 must lie between 0 and model.depth - 1 = 3\."),
        ({"dense_layers": 1}, r"model.moe_every = 2 must divide model.depth - model.dense_layers = 4 - 1, or be 0"),
        ({"representation_width": -1}, r"model.representation_width = -1 must not be negative\."),
    ],
)
def test_a_model_that_does_not_fit_is_refused(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViTConfig(depth=4, moe_every=2, **fields)

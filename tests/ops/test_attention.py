"""Attention of packed documents against the oracle, document by document, in every form that a platform runs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.ops import attention as module
from moe.ops.attention import Places, attention
from tests.oracles import decoder
from tests.routers.helpers import COMPILER_OPTIONS

BATCH, LENGTH, HEADS, KV_HEADS, WIDTH = 2, 11, 4, 2, 3
# Two documents and padding; three documents.
SEGMENT = np.array([[1] * 4 + [2] * 5 + [0] * 2, [1] * 1 + [2] * 2 + [3] * 8])
POSITION = np.array([[*range(4), *range(5), *range(2)], [0, 0, 1, *range(8)]])


def make_arrays() -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    shapes = [(BATCH, LENGTH, heads, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)


def oracle(query: np.ndarray, key: np.ndarray, value: np.ndarray, window: int, cap: float) -> np.ndarray:
    out = np.zeros(query.shape)
    for b in range(BATCH):
        for segment in np.unique(SEGMENT[b]):
            rows = SEGMENT[b] == segment
            one = (a[b, rows].astype(np.float64) for a in (query, key, value))
            out[b, rows] = decoder.attend(*one, window=window, cap=cap)
    return out


@pytest.mark.parametrize(
    ("form", "window", "cap"),
    [("blocks", 0, 0.0), ("blocks", 3, 2.0), ("whole", 3, 2.0), ("gpu", 0, 0.0), ("gpu", 3, 0.0), ("gpu", 0, 2.0)],
)
def test_value_and_gradient(form: str, window: int, cap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of four queries leave three in the last; the gradient is that of differences along a direction."""
    monkeypatch.setattr(module, "_BLOCK", 4)
    query, key, value, readout = make_arrays()
    places = Places(jnp.asarray(POSITION), jnp.asarray(SEGMENT))
    options: dict[str, Any] = {"window": window, "cap": cap, "aligned": form == "blocks"}
    options["platform"] = "gpu" if form == "gpu" else "cpu"

    def total(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = attention(*arrays, places, places, **options)
        return jnp.sum(y * readout), y

    run = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True), compiler_options=COMPILER_OPTIONS)
    gradient, y = run(query, key, value)
    np.testing.assert_allclose(y, oracle(query, key, value, window, cap), atol=2e-6)
    rng, step = np.random.default_rng(1), 1e-5
    direction = [rng.normal(size=a.shape) for a in (query, key, value)]
    ends = [
        np.sum(oracle(*(a + s * d for a, d in zip((query, key, value), direction, strict=True)), window, cap) * readout)
        for s in (step, -step)
    ]
    slope = sum(np.sum(np.asarray(g, np.float64) * d) for g, d in zip(gradient, direction, strict=True))
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-4)


def test_bf16_scores_are_float32() -> None:
    arrays = [jnp.asarray(a, jnp.bfloat16) for a in make_arrays()[:3]]
    places = Places(jnp.asarray(POSITION), jnp.asarray(SEGMENT))
    lowered = jax.jit(lambda *a: attention(*a, places, places)).lower(*arrays)
    lines = [line for line in lowered.as_text().splitlines() if "exponential" in line]
    assert len(lines) == 1
    assert "f32" in lines[0]
    assert "bf16" not in lines[0]

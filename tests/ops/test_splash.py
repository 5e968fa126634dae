"""The TPU kernel for attention, interpreted, against the form that the oracle holds; and as the compiler makes it."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.ops.attention import Places, attention
from moe.ops.splash import fits_splash, splash_attention

BATCH, LENGTH, HEADS, KV_HEADS, WIDTH = 2, 384, 4, 2, 8


def make_case() -> tuple[tuple[jax.Array, ...], jax.Array, Places]:
    """Three tiles; two documents and padding, and one document; documents end within tiles."""
    rng = np.random.default_rng(0)
    arrays = tuple(
        jnp.asarray(rng.normal(size=(BATCH, LENGTH, heads, WIDTH)), jnp.float32)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    lengths = ([150, 200, 34], [384])
    segment = np.array([np.repeat([1, 2, 0], lengths[0]), np.repeat([1], lengths[1])])
    position = np.array([np.concatenate([np.arange(n) for n in row]) for row in lengths])
    readout = jnp.asarray(rng.normal(size=(BATCH, LENGTH, HEADS, WIDTH)), jnp.float32)
    return arrays, readout, Places(jnp.asarray(position), jnp.asarray(segment))


@pytest.mark.parametrize(("window", "cap"), [(0, 0.0), (130, 0.0), (0, 2.0)])
def test_it_is_the_attention_that_runs_elsewhere(window: int, cap: float) -> None:
    arrays, readout, places = make_case()

    def kernel(*arrays: jax.Array) -> jax.Array:
        return splash_attention(*arrays, places.segment, window=window, cap=cap, interpret=True)

    def plain(*arrays: jax.Array) -> jax.Array:
        return attention(*arrays, places, places, window=window, cap=cap, aligned=True)

    y, pull = jax.vjp(jax.jit(kernel), *arrays)
    expected, pull_plain = jax.vjp(jax.jit(plain), *arrays)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    for gradient, wanted in zip(pull(readout), pull_plain(readout), strict=True):
        np.testing.assert_allclose(gradient, wanted, atol=5e-5)


def test_other_lengths_are_refused() -> None:
    assert fits_splash(256)
    assert not fits_splash(200)
    x = jnp.zeros((1, 200, 2, 8))
    with pytest.raises(ValueError, match="a multiple of 128 tokens, not of 200"):
        splash_attention(x, x, x, None)


@pytest.mark.tpu_aot
@pytest.mark.parametrize("tensor", [1, 2])
def test_a_step_on_tpu_holds_no_scores(tensor: int) -> None:
    """Neither forward nor backward; every block's attention is the kernel's, cut by heads along the tensor axis."""
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install 'moe-jax[tpu-aot]'")
    import plan
    from moe.parallel.mesh import MeshConfig
    from moe.plan.chips import parse_slice
    from tests.plan.test_plan import CONFIG

    model = dataclasses.replace(CONFIG.model, length=1024, kv_heads=2)
    mesh = MeshConfig(data=4 // tensor, tensor=tensor)
    config = dataclasses.replace(CONFIG, model=model, data=dataclasses.replace(CONFIG.data, length=1024), mesh=mesh)
    step = plan.make_step(config, plan.slice_mesh(config, parse_slice("v5e:2x2")))
    hlo = plan.compile_step(step)["hlo"]
    assert re.search(r"\[[\d,]*1024,1024\]", hlo) is None
    assert "splash" in hlo

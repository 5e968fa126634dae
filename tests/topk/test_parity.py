"""The mask against entmax's budget projection, which is the same problem at p = 2 and strength 1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import topk

pytestmark = pytest.mark.parity


@pytest.mark.parametrize(("n", "k"), [(8, 2), (32, 5), (100, 99)])
def test_mask_and_its_gradient_equal_entmax(n: int, k: int) -> None:
    torch = pytest.importorskip("torch")
    entmax = pytest.importorskip("entmax")
    x = np.random.default_rng(0).normal(scale=2.0, size=(64, n)).astype(np.float32)
    cotangent = np.random.default_rng(1).normal(size=(64, n)).astype(np.float32)

    theirs_x = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    theirs = entmax.budget_bisect(theirs_x, budget=k, dim=-1, n_iter=60)
    theirs.backward(torch.tensor(cotangent, dtype=torch.float64))
    ours, pullback = jax.vjp(lambda x: topk.mask(x, k, strength=1.0, p=2), jnp.asarray(x))
    np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=3e-6)
    np.testing.assert_allclose(pullback(jnp.asarray(cotangent))[0], theirs_x.grad.numpy(), atol=2e-5)

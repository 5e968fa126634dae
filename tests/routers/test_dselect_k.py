"""The DSelect-k router against the float64 oracle, and the properties of its codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.routers import DSelectK
from moe.types import Layout, RouterInputs
from tests.oracles import operators, sparse_gates
from tests.oracles import routing as oracle
from tests.routers.helpers import EXPERTS, TOKENS, effective_weights, route, unbalanced_logits, with_and_without_padding

# Five experts are three bits, so that three of eight codes spell none.
ROUTER = DSelectK(k=2, width=3.0, selector_entropy_weight=0.3, reach_weight=0.2, importance_weight=0.1)
LOGITS_TX = unbalanced_logits(num_experts=8)
READOUT_TE = np.random.default_rng(4).normal(size=(TOKENS, EXPERTS))
LAYOUT = Layout(EXPERTS, num_examples=1)


def ask(logits_TX: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
    """Combine weights and unweighted losses."""
    selectors_TKE, mixture_TK = sparse_gates.dselect_k_selectors(logits_TX, ROUTER.k, EXPERTS, ROUTER.width)
    weights_TE = (mixture_TK[:, :, None] * selectors_TKE).sum(axis=1)
    entropies_T = [sum(oracle.entropy(selector_E) for selector_E in selectors_KE) for selectors_KE in selectors_TKE]
    reach_TK = np.maximum(selectors_TKE.sum(axis=2), 0.01)
    return weights_TE, {
        "selector_entropy": float(np.mean(entropies_T)),
        "reach": float(np.mean((1 / reach_TK - 1).sum(axis=1))),
        "importance": oracle.squared_variation(weights_TE.sum(axis=0)),
    }


def total(logits_TX: np.ndarray, readout_TE: np.ndarray) -> float:
    weights_TE, unweighted = ask(logits_TX)
    losses = sum(getattr(ROUTER, f"{name}_weight") * value for name, value in unweighted.items())
    return losses + float(np.sum(weights_TE * readout_TE))


@with_and_without_padding
def test_weights_losses_and_gradient_match_the_oracle(mask_T: np.ndarray) -> None:
    @jax.jit
    def run(logits_TX: jax.Array) -> tuple[jax.Array, tuple]:
        routed = ROUTER({}, RouterInputs(logits_TX, mask=jnp.asarray(mask_T), layout=LAYOUT), {}, None)
        weights_TE = effective_weights(routed.routing, TOKENS, EXPERTS)[..., 0]
        return sum(routed.losses.values(), jnp.sum(weights_TE * READOUT_TE.astype(np.float32))), (routed, weights_TE)

    (_, (routed, weights_TE)), gradient_TX = jax.value_and_grad(run, has_aux=True)(jnp.asarray(LOGITS_TX))
    expected_TE, unweighted = ask(LOGITS_TX[mask_T])
    assert 0 < (expected_TE == 0).mean() < 1
    np.testing.assert_allclose(weights_TE[mask_T], expected_TE, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(weights_TE[~mask_T], 0)
    assert routed.routing.choices == np.sum(expected_TE > 0)
    for name, value in unweighted.items():
        np.testing.assert_allclose(routed.metrics[name], value, rtol=1e-4, err_msg=name)
    shares_TE = expected_TE / expected_TE.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(routed.metrics["entropy"], oracle.mean_entropy(shares_TE), rtol=1e-4)

    direction_TX = np.random.default_rng(5).normal(size=LOGITS_TX.shape)

    def moved(step: np.ndarray) -> float:
        return total((LOGITS_TX + step[0] * direction_TX)[mask_T], READOUT_TE[mask_T])

    numerical = operators.numerical_jacobian(moved, [0.0])[0]
    along = float(np.sum(direction_TX * np.asarray(gradient_TX, np.float64)))
    assert abs(along - numerical) < 2e-4 * np.linalg.norm(gradient_TX)


def test_decided_bits_choose_k_experts_or_none() -> None:
    """Codes 001 and 101, lowest bit first, are the experts 4 and 5; of five experts there is no expert 5."""
    far = 100.0
    logits_TX = jnp.asarray([[-far, -far, far, far, -far, far, 0.0, np.log(3.0)]], jnp.float32)
    for num_experts, expected in ((5, [4]), (6, [5, 4])):
        layout = Layout(num_experts, num_examples=1)
        routed = route(DSelectK(k=2), {}, RouterInputs(logits_TX, layout=layout), {}, None)[0]
        np.testing.assert_array_equal(routed.routing.expert[np.asarray(routed.routing.valid)], expected)
        np.testing.assert_allclose(routed.metrics["selector_entropy"], 0, atol=1e-6)
        # The second selector's 1 / .01 - 1 where its code spells no expert.
        np.testing.assert_allclose(routed.metrics["reach"], 99 if num_experts == 5 else 0, rtol=1e-4, atol=1e-6)


def test_the_gate_has_bits_for_any_number_of_experts() -> None:
    router = DSelectK(k=3)
    assert [router.num_logits(num_experts) for num_experts in (1, 2, 5, 8, 9)] == [3, 6, 12, 12, 15]


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"width = 0.0 must be positive"):
        DSelectK(width=0.0)
    with pytest.raises(ValueError, match=r"dselect_k.max_experts = 1 must be 0 or at least k = 2"):
        DSelectK(max_experts=1)

"""The sparse p-norm top-k router against the float64 oracle, and the properties that are its own."""

import numpy as np
import pytest

from moe import isotonic
from moe.routers import SparseTopK
from moe.types import RouterInputs
from tests.oracles import operators
from tests.oracles import routing as oracle
from tests.routers.helpers import (
    EXPERTS,
    TOKENS,
    Expected,
    assert_matches_oracle,
    example_keys,
    route,
    unbalanced_logits,
    with_and_without_padding,
)

WEIGHTS = {"balance_weight": 0.7, "importance_weight": 0.4, "z_weight": 0.05}
TRAINED = {
    "p=2, all experts": SparseTopK(k=2, strength=0.7, p=2.0, **WEIGHTS),
    "p=3/2, at most two": SparseTopK(k=1, strength=2.5, p=1.5, max_experts=2, **WEIGHTS),
    "p=4/3, at most four": SparseTopK(k=3, strength=1.5, p=4 / 3, max_experts=4, **WEIGHTS),
}


def masks(router: SparseTopK, logits_TE: np.ndarray) -> np.ndarray:
    return np.array([operators.mask(logits_E, router.k, router.strength, router.p) for logits_E in logits_TE])


def ask(router: SparseTopK, logits_TE: np.ndarray, noise_TE: np.ndarray | None) -> Expected:
    limit = router.max_experts if noise_TE is not None else 0
    rows = oracle.sparse_topk_router(logits_TE, router.k, router.strength, router.p, limit or None)
    mask_TE, probs_TE = masks(router, logits_TE), oracle.softmax(logits_TE)
    unweighted = {
        # Switch's loss with the mask for the choice: f_e is the mean mask.
        "balance": float(EXPERTS / router.k * np.sum(mask_TE.mean(axis=0) * probs_TE.mean(axis=0))),
        "importance": oracle.squared_variation(mask_TE.sum(axis=0)),
        "z": oracle.z_loss(logits_TE),
    }
    weights = {name: getattr(router, f"{name}_weight") for name in unweighted}
    hard = float(np.isin(mask_TE, (0.0, 1.0)).all(axis=1).mean())
    losses = {name: weights[name] * value for name, value in unweighted.items()}
    return Expected(rows, losses, {**unweighted, "hard_mask_share": hard})


@with_and_without_padding
@pytest.mark.parametrize("name", TRAINED)
def test_training_matches_the_oracle(name: str, mask_T: np.ndarray) -> None:
    assert_matches_oracle(TRAINED[name], ask, unbalanced_logits(), mask_T, example_keys())


def test_evaluation_cuts_no_expert() -> None:
    router, logits_TE = TRAINED["p=3/2, at most two"], unbalanced_logits(1)
    assert ask(router, logits_TE, None).rows.choices > 2 * TOKENS  # the case would not show a cut otherwise
    assert_matches_oracle(router, ask, logits_TE, np.ones(TOKENS, bool), None)


def test_the_cases_hold_hard_and_soft_masks_and_cut_choices() -> None:
    """What makes the comparisons above worth something."""
    logits_TE = unbalanced_logits()
    shares = [ask(router, logits_TE, None).metrics["hard_mask_share"] for router in TRAINED.values()]
    assert 0 < min(shares) + max(shares) < 2
    for name in ("p=3/2, at most two", "p=4/3, at most four"):
        cut = ask(TRAINED[name], logits_TE, np.zeros_like(logits_TE)).rows
        assert 0 < cut.valid.sum() < cut.choices


def test_a_chosen_expert_whose_weight_underflows_is_still_chosen() -> None:
    """λ = .1 makes (-50, 200, 0) the hard mask (0, 1, 1); the last expert's probability is 0 in float32."""
    logits_TE = np.array([[-50.0, 200.0, 0.0]], np.float32)
    router = SparseTopK(k=2, strength=0.1, max_experts=2)
    routing = route(router, {}, RouterInputs(logits_TE), {}, example_keys(1))[0].routing
    np.testing.assert_array_equal(routing.expert, [1, 2])
    np.testing.assert_array_equal(routing.valid, [True, True])
    np.testing.assert_array_equal(routing.weight, [1, 0])


@pytest.mark.parametrize("name", isotonic.SOLVERS)
def test_every_solver_gives_the_same_routing(name: str) -> None:
    router = SparseTopK(k=2, strength=0.7, p=2.0, solver=isotonic.SOLVERS[name]())
    logits_TE = unbalanced_logits()
    _, weights_TE1 = route(router, {}, RouterInputs(logits_TE), {}, None)
    expected = oracle.sparse_topk_weights(logits_TE, 2, 0.7, 2.0)
    np.testing.assert_allclose(weights_TE1[..., 0], expected, atol=2e-6)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"strength = 0.0 must be positive"):
        SparseTopK(strength=0.0)
    for p in (1.0, 2.5):
        with pytest.raises(ValueError, match=rf"p = {p} must lie in \(1, 2\]"):
            SparseTopK(p=p)
    with pytest.raises(ValueError, match=r"max_experts = 2 must be 0 or at least k = 3"):
        SparseTopK(k=3, max_experts=2)

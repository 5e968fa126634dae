"""The successive halving router against the float64 oracle, and the properties that are its own."""

from pathlib import Path

import jax
import numpy as np
import pytest

from moe import config, topk
from moe.routers import SuccessiveHalving
from moe.types import RouterInputs
from tests.oracles import routing as oracle
from tests.routers.helpers import (
    TOKENS,
    Expected,
    assert_matches_oracle,
    example_keys,
    route,
    unbalanced_logits,
    with_and_without_padding,
)

DIGITS = Path(__file__).parents[2] / "configs" / "digits.py"
WEIGHTS = {"balance_weight": 0.7, "importance_weight": 0.4, "z_weight": 0.05}
# Of five experts three have a bye in the first of two rounds, or one in the only round.
TRAINED = {
    "two rounds": SuccessiveHalving(k=2, weights=topk.BoostedSoftmax(7.0), **WEIGHTS),
    "one round": SuccessiveHalving(k=3, weights=topk.BoostedSoftmax(3.0), **WEIGHTS),
}


def ask(router: SuccessiveHalving, logits_TE: np.ndarray, noise_TE: np.ndarray | None) -> Expected:
    rows = oracle.successive_halving_router(logits_TE, router.k, router.weights.base)
    selected_TE = oracle.dense_weights(rows, *logits_TE.shape) > 0
    unweighted = {
        "balance": oracle.load_balancing_loss(oracle.softmax(logits_TE), selected_TE, router.k),
        "importance": oracle.importance_loss(logits_TE),
        "z": oracle.z_loss(logits_TE),
    }
    left_out = oracle.mass_left_out(oracle.successive_halving_slots(logits_TE, router.k, router.weights.base))
    losses = {name: getattr(router, f"{name}_weight") * value for name, value in unweighted.items()}
    return Expected(rows, losses, {**unweighted, "mass_left_out": left_out})


@with_and_without_padding
@pytest.mark.parametrize("name", TRAINED)
def test_training_matches_the_oracle(name: str, mask_T: np.ndarray) -> None:
    assert_matches_oracle(TRAINED[name], ask, unbalanced_logits(), mask_T, example_keys())


def test_evaluation_is_the_same_as_training() -> None:
    """For k = 1 of five, with three rounds."""
    router = SuccessiveHalving(k=1, weights=topk.BoostedSoftmax(40.0), **WEIGHTS)
    assert_matches_oracle(router, ask, unbalanced_logits(1), np.ones(TOKENS, bool), None)


def test_the_heaviest_choice_queues_first_though_its_slot_is_the_second() -> None:
    """Expert 5, with a near rival in the last round, holds the first slot by .05; expert 3 the second by .24."""
    logits_TE = np.array([[1.5, 2.1, 1.5, 4.0, 2.2, 2.6, -1.1, 0.2]], np.float32)
    slots_kE = oracle.successive_halving_slots(logits_TE, 2, 3.0)[0]
    np.testing.assert_array_equal(slots_kE.argmax(axis=1), [5, 3])
    router = SuccessiveHalving(k=2, weights=topk.BoostedSoftmax(3.0))
    rows = route(router, {}, RouterInputs(logits_TE), {}, None)[0].routing
    np.testing.assert_array_equal(rows.expert, [3, 5])
    probs_E = oracle.softmax(logits_TE[0])
    np.testing.assert_allclose(rows.weight, [slots_kE[1, 3] * probs_E[3], slots_kE[0, 5] * probs_E[5]], rtol=1e-5)


@pytest.mark.parametrize("name", topk.PAIR_WEIGHTS)
def test_weights_of_every_name_can_be_configured_and_decide_what_a_slot_holds(name: str) -> None:
    table = config.load_file(str(DIGITS))
    config.override(table, ["router.name=successive_halving", f"router.successive_halving.weights.name={name}"])
    router = config.resolve(table).router
    assert isinstance(router, SuccessiveHalving)
    assert router.weights == topk.PAIR_WEIGHTS[name]()
    logits_TE = unbalanced_logits()
    routed, _ = route(router, {}, RouterInputs(logits_TE), {}, None)
    slots_TKE = topk.successive_halving_matrix(jax.nn.sigmoid(logits_TE), router.k, weights=router.weights)
    left_out = 1 - np.mean(np.max(slots_TKE, axis=-1))
    np.testing.assert_allclose(routed.metrics["mass_left_out"], left_out, rtol=1e-4)


def test_settings_out_of_range_are_refused() -> None:
    table = config.load_file(str(DIGITS))
    config.override(
        table, ["router.name=successive_halving", "router.successive_halving.weights.boosted_softmax.base=1"]
    )
    with pytest.raises(ValueError, match=r"base is 1.0, but must be greater than 1"):
        config.resolve(table)

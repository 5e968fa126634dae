"""The expert choice router against the float64 oracle, and the properties that are its own."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe.routers import ExpertChoice
from moe.types import RouterInputs
from tests.oracles import mixing
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


def ask(router: ExpertChoice, logits_TE: np.ndarray, noise_TE: np.ndarray | None) -> Expected:
    rows, z = mixing.expert_choice_router(logits_TE, router.k), oracle.z_loss(logits_TE)
    unchosen = 1 - len(set(rows.token.tolist())) / len(logits_TE)
    return Expected(rows, {"z": router.z_weight * z}, {"z": z, "unchosen": unchosen})


@with_and_without_padding
@pytest.mark.parametrize("k", [1, 2])
def test_training_matches_the_oracle(k: int, mask_T: np.ndarray) -> None:
    """Five experts take ⌈12 k / 5⌉ tokens each, or ⌈9 k / 5⌉ of those that are not padding."""
    assert_matches_oracle(ExpertChoice(k=k, z_weight=0.2), ask, unbalanced_logits(), mask_T, example_keys())


def test_the_cases_hold_tokens_without_an_expert() -> None:
    assert ask(ExpertChoice(k=1), unbalanced_logits(), None).metrics["unchosen"] > 0


def test_loads_are_equal_whatever_the_logits() -> None:
    """All tokens prefer the last expert by far, where all their other probabilities underflow."""
    logits_TE = unbalanced_logits() + np.array([0, 0, 0, 0, 300], np.float32)
    rows = route(ExpertChoice(k=2), {}, RouterInputs(jnp.asarray(logits_TE)), {}, None)[0].routing
    np.testing.assert_array_equal(np.bincount(rows.expert, minlength=EXPERTS), 5)
    for e in range(EXPERTS - 1):
        # The order of probabilities, too small for float32: that of the distances to the preferred logit.
        expected = np.argsort(logits_TE[:, -1] - logits_TE[:, e], kind="stable")[:5]
        np.testing.assert_array_equal(rows.token[rows.expert == e], expected)


def test_all_experts_take_all_tokens() -> None:
    logits_TE = unbalanced_logits()
    weights_TE1 = route(ExpertChoice(k=EXPERTS), {}, RouterInputs(jnp.asarray(logits_TE)), {}, None)[1]
    assert weights_TE1.shape == (TOKENS, EXPERTS, 1)
    np.testing.assert_allclose(weights_TE1[..., 0], oracle.softmax(logits_TE), rtol=1e-5)

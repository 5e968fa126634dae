"""The dense router, which is the float64 softmax router with k = E."""

import numpy as np
import pytest

from moe.routers import Dense, Softmax
from moe.types import RouterInputs
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


def ask(router: Dense, logits_TE: np.ndarray, noise_TE: np.ndarray | None) -> Expected:
    z = oracle.z_loss(logits_TE)
    return Expected(oracle.softmax_router(logits_TE, EXPERTS), {"z": router.z_weight * z}, {"z": z})


@with_and_without_padding
@pytest.mark.parametrize("training", [True, False])
def test_it_matches_the_oracle(training: bool, mask_T: np.ndarray) -> None:
    keys = example_keys() if training else None
    assert_matches_oracle(Dense(z_weight=0.3), ask, unbalanced_logits(), mask_T, keys)


def test_it_is_softmax_with_all_experts() -> None:
    inputs = RouterInputs(unbalanced_logits(3), mask=np.arange(TOKENS) % 4 != 2)
    dense, softmax = (route(router, {}, inputs, {}, None)[1] for router in (Dense(), Softmax(k=EXPERTS)))
    np.testing.assert_array_equal(dense, softmax)

"""Which routers look at later tokens."""

import dataclasses

import pytest

from moe.routers import ROUTERS, Router, SparseTopK, SuccessiveHalving
from moe.routers.causality import sees_later_tokens
from tests.routers.helpers import ACROSS_TOKENS


@pytest.mark.parametrize("name", ROUTERS)
def test_only_routers_across_tokens_see_later_ones(name: str) -> None:
    """By default, in evaluation: in training a transport plan balances all tokens, and noise is no token's business."""
    router = ROUTERS[name]()
    for k, num_experts in ((1, 2), (2, 8)):
        if router.k is not None:
            router = dataclasses.replace(router, k=k)  # type: ignore[type-var]
        assert sees_later_tokens(router, num_experts) == (name in ACROSS_TOKENS)


@pytest.mark.parametrize("router", [SparseTopK(choice="expert"), SuccessiveHalving(over="tokens")])
def test_settings_decide_where_a_router_has_both_ways(router: Router) -> None:
    assert sees_later_tokens(router, 8)

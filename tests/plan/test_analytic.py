"""FLOPs and parameters by hand."""

import dataclasses

import jax
import pytest

from moe.config import Config
from moe.data.pipeline import DataConfig
from moe.data.text import TextConfig
from moe.layers.moe import MoeConfig
from moe.models import LmConfig, Variables, ViTConfig, make_model
from moe.plan import analytic
from moe.routers import Dense, Soft, Softmax

D, F, E, K, V, LENGTH, BATCH, HEADS, KV, HEAD = 8, 10, 4, 2, 23, 6, 4, 4, 2, 6
LM = Config(
    seed=0,
    steps=10,
    batch_size=BATCH,
    model=LmConfig(
        vocab_size=V, length=16, width=D, depth=3, heads=HEADS, kv_heads=KV, head_width=HEAD, mlp_width=12,
        moe_every=1, dense_layers=1,
    ),
    moe=MoeConfig(num_experts=E, expert_width=F, shared_experts=1, shared_gate=True),
    router=Softmax(k=K),
    data=TextConfig(length=LENGTH),
)  # fmt: skip


def variables_of(config: Config) -> Variables:
    model = make_model(config.model, config.moe, config.router)
    return jax.eval_shape(model.init, jax.random.key(0))


def by_hand(config: Config, experts: float, seen: float, head: float) -> float:
    """Of a step: 2 FLOPs a parameter and token, 3 times for the backward pass."""
    attention = 2 * D * (HEADS + 2 * KV) * HEAD + 2 * HEADS * HEAD * D + 2 * 2 * HEADS * HEAD * seen
    dense, shared = 2 * 3 * D * 12, 2 * 3 * D * F + 2 * D
    moe = experts * 2 * 3 * D * F + 2 * D * E + shared
    return 3 * BATCH * LENGTH * (3 * attention + dense + 2 * moe + head)


def test_flops_of_a_language_model() -> None:
    seen, head = (LENGTH + 1) / 2, 2 * D * V
    assert analytic.active_flops(LM, variables_of(LM)) == pytest.approx(by_hand(LM, K, seen, head))


def test_windows_tied_heads_and_other_routers() -> None:
    tied = dataclasses.replace(LM, model=dataclasses.replace(LM.model, window=3, tied_head=True), router=Dense())
    seen = (1 + 2 + 3 * 4) / 6
    assert analytic.active_flops(tied, variables_of(tied)) == pytest.approx(by_hand(tied, E, seen, 2 * D * V))


def test_soft_slots_cost_what_they_hold() -> None:
    config = dataclasses.replace(LM, moe=dataclasses.replace(LM.moe, group_size=2), router=Soft(slots=3))
    assert analytic.experts_per_token(config) == E * 3 / (2 * LENGTH)


def test_an_image_has_one_head() -> None:
    model = ViTConfig(width=D, depth=2, heads=2, mlp_width=12, moe_every=2, patch_size=4)
    config = dataclasses.replace(LM, model=model, moe=MoeConfig(num_experts=E, expert_width=F), data=DataConfig())
    tokens = 4
    attention = 2 * 4 * D * D + 2 * 2 * D * tokens
    blocks = 2 * attention + 2 * 2 * D * 12 + 2 * 2 * D * F * K + 2 * D * E
    expected = 3 * BATCH * (tokens * (blocks + 2 * 16 * D) + 2 * D * 10)
    assert analytic.active_flops(config, variables_of(config)) == pytest.approx(expected)


def test_parameters_are_counted() -> None:
    counts = analytic.parameter_counts(LM, variables_of(LM))
    experts = 2 * E * 3 * D * F
    assert counts["experts"] == experts
    assert counts["all"] - counts["active"] == experts * (E - K) // E

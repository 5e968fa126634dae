"""Routing diagnostics against float64 loops for every router, by hand, and over batches and meshes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.evaluation import routing
from moe.layers.moe import MoeConfig
from moe.models import ViTConfig, make_model
from moe.parallel.mesh import MeshConfig, batch_sharding, make_mesh, replicated
from moe.routers import ROUTERS, Router, Softmax, SparseTopK, SuccessiveHalving
from moe.types import Assignments, Layout, Observed, RouterInputs, Slots
from tests.oracles import diagnostics as oracle
from tests.routers.helpers import COMPILER_OPTIONS

GROUPS, TOKENS, EXPERTS, VALUES = 2, 12, 5, 3
GRAM = np.eye(EXPERTS)
CASES: dict[str, Router] = {
    **{name: router() for name, router in ROUTERS.items()},
    "sparse_topk of tokens": SparseTopK(choice="expert"),
    "successive_halving of tokens": SuccessiveHalving(over="tokens"),
}


def observed_of(router: Router, mask_GT: np.ndarray) -> Observed:
    """What an MoE layer would hand over, of two groups of random tokens of four examples each."""
    rng = np.random.default_rng(0)
    x_GTD = rng.normal(size=(GROUPS, TOKENS, 6)).astype(np.float32)
    gate_DX = rng.normal(size=(6, router.num_logits(EXPERTS))).astype(np.float32)
    params, state = router.init(EXPERTS)

    def one(x_TD: jax.Array, mask_T: jax.Array) -> Any:
        ids_T = jnp.arange(TOKENS, dtype=jnp.int32) % 3
        inputs = RouterInputs(x_TD @ gate_DX, x_TD, ids_T, mask_T, jnp.asarray(gate_DX), Layout(EXPERTS, 4))
        return router(params, inputs, state, None).routing, inputs.logits

    routed, logits = jax.jit(jax.vmap(one), compiler_options=COMPILER_OPTIONS)(x_GTD, mask_GT)
    kept_G = jnp.zeros(GROUPS, jnp.int32) if isinstance(routed, Slots) else routed.choices
    return Observed(routed, logits, jnp.asarray(mask_GT), kept_G)


def dense(observed: Observed) -> tuple[np.ndarray, np.ndarray]:
    """Who has what, [G, T, E], read off row by row."""
    chosen, weight = np.zeros((GROUPS, TOKENS, EXPERTS), bool), np.zeros((GROUPS, TOKENS, EXPERTS))
    rows = observed.routing
    if isinstance(rows, Slots):
        return np.ones_like(chosen), np.asarray(rows.combine, np.float64).sum(axis=3)
    for g in range(GROUPS):
        for n in np.flatnonzero(rows.valid[g]):
            chosen[g, rows.token[g, n], rows.expert[g, n]] = True
            weight[g, rows.token[g, n], rows.expert[g, n]] += float(rows.weight[g, n])
    return chosen, weight


@pytest.mark.parametrize("name", CASES)
def test_measures_of_every_router_are_those_of_loops_over_its_tokens(name: str) -> None:
    router = CASES[name]
    mask_GT = np.arange(GROUPS * TOKENS).reshape(GROUPS, TOKENS) % 7 != 3
    observed = observed_of(router, mask_GT)
    value_GT = np.random.default_rng(1).integers(0, VALUES, (GROUPS, TOKENS)).astype(np.int32)
    attributes = {"class": (jnp.asarray(value_GT), VALUES)}
    look = functools.partial(routing.layer_sums, k=router.k, num_experts=EXPERTS, attributes=attributes)
    sums = jax.jit(look, compiler_options=COMPILER_OPTIONS)(observed)
    actual = routing.measure(sums, GRAM)

    chosen, weight = (part[mask_GT] for part in dense(observed))
    is_slots = isinstance(observed.routing, Slots)
    has_logits = not is_slots and observed.logits.shape[-1] == EXPERTS
    logits = np.asarray(observed.logits, np.float64)[mask_GT] if has_logits else None
    k = None if is_slots else router.k
    expected = oracle.measures(chosen, weight, logits, k, {"class": value_GT[mask_GT].tolist()})
    if is_slots:  # loads are dispatch weights, equal by construction, and tokens have all experts
        assert actual["load"] == pytest.approx([1 / EXPERTS] * EXPERTS)
        expected |= {"load": actual["load"], "load_cv": 0.0, "max_violation": 0.0}
        # Of 24 tokens, 4 of them padding, 10 slots a group for k = 2, and 5 for one slot an expert.
        expected |= {"rows_per_token": GROUPS * {"soft": EXPERTS}.get(name, 5 * EXPERTS) / mask_GT.sum()}
    for measure, value in expected.items():
        if isinstance(value, list):
            np.testing.assert_allclose(actual[measure], value, rtol=1e-5, atol=2e-6, err_msg=measure)
        else:
            assert actual[measure] == pytest.approx(value, rel=1e-5, abs=1e-6), measure
    if "topk_same" not in expected:
        assert actual["topk_same"] is actual["topk_jaccard"] is actual["weight_outside_topk"] is None
    assert actual["overflow"] == 0


def by_hand() -> Observed:
    """One group: tokens 0 to 3 and a token of padding; the router dropped one of five choices, two found no place."""
    rows = Assignments(
        token=jnp.array([[0, 1, 2, 0, 4]]),
        expert=jnp.array([[0, 0, 1, 1, 2]]),
        weight=jnp.array([[0.75, 0.5, 1.0, 0.25, 9.0]]),
        valid=jnp.array([[True, True, True, True, False]]),
        choices=jnp.array([5]),
    )
    logits = jnp.array([[[2.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 3.0, 0.0], [0.0, 0.0, 0.0], [9.0, 0.0, 0.0]]])
    return Observed(rows, logits, jnp.array([[True, True, True, True, False]]), jnp.array([3]))


def test_measures_by_hand() -> None:
    class_BL = jnp.array([[0, 0, 1, 1, 0]])
    sums = routing.layer_sums(by_hand(), 1, 3, {"class": (class_BL, 2)})
    measures = routing.measure(sums, np.array([[4.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))
    assert measures["load"] == [0.5, 0.5, 0.0]
    assert measures["load_cv"] == pytest.approx(np.std([2, 2, 0]) / (4 / 3))
    assert measures["max_violation"] == pytest.approx(0.5)
    assert measures["dead_experts"] == 1
    assert measures["load_entropy"] == pytest.approx(np.log(2))
    assert measures["overflow"] == pytest.approx(2 / 5)
    assert measures["experts_per_token"] == 5 / 4
    assert measures["rows_per_token"] == 3 / 4
    assert measures["experts_per_token_histogram"] == [1 / 4, 2 / 4, 1 / 4, 0]
    # Token 0 has experts 0 and 1 beside the best, 0; token 1 has 0 and not 2; 2 has the best; 3, of ties, has none.
    assert measures["topk_same"] == 1 / 4
    assert measures["topk_jaccard"] == (1 / 2 + 0 + 1 + 0) / 4
    assert measures["weight_outside_topk"] == pytest.approx((0.25 + 0.5) / 2.5)
    # Choices: class 0 has expert 0 twice and 1 once, class 1 has 1 once.
    joint = np.array([[2, 1, 0], [0, 1, 0]]) / 4
    expected = sum(p * np.log(p / (joint[v].sum() * joint[:, e].sum())) for (v, e), p in np.ndenumerate(joint) if p)
    assert measures["mutual_information"]["class"] == pytest.approx(expected)
    assert measures["mutual_information_bias"]["class"] == (3 - 2 - 2 + 1) / 8
    assert measures["choice_similarity"][0][:2] == [1.0, 0.5]
    assert measures["weight_similarity"][0][1] == pytest.approx(
        0.75 * 0.25 / np.sqrt((0.75**2 + 0.5**2) * (1 + 0.25**2)), abs=1e-6
    )
    assert measures["parameter_similarity"][0][1] == 0.5
    assert measures["parameter_similarity_mean"] == pytest.approx(1 / 6)


def test_information_is_0_of_what_tells_nothing_and_the_entropy_of_what_tells_all() -> None:
    assert routing.mutual_information(np.full((4, 3), 5.0)) == pytest.approx(0, abs=1e-12)
    assert routing.mutual_information(np.diag([2.0, 2.0, 4.0])) == pytest.approx(1.5 * np.log(2))
    assert routing.mutual_information(np.zeros((2, 2))) == 0


def test_tokens_that_change_experts_by_hand() -> None:
    before, now = by_hand(), by_hand()
    moved = now.routing._replace(expert=jnp.array([[0, 2, 1, 1, 2]]), weight=jnp.array([[0.2, 0.5, 1.0, 0.8, 9.0]]))
    pair = [
        jax.tree.map(lambda leaf: leaf[None], routing.chosen(one, 3)) for one in (before, now._replace(routing=moved))
    ]
    # Token 1 goes from expert 0 to 2; token 0 keeps its two, but the other weighs more.
    assert [int(part[0]) for part in routing.changes(*pair)] == [1, 2]
    assert [int(part[0]) for part in routing.changes(pair[0], pair[0])] == [0, 0]


VIT = ViTConfig(
    image_size=(4, 4, 1), num_classes=3, width=8, depth=4, heads=2, mlp_width=8, dense_layers=2, moe_every=1
)
MOE = MoeConfig(num_experts=4, expert_width=4, group_size=1)


def run_vit(mesh_config: MeshConfig, devices: int, router: Router, size: int, moe: MoeConfig = MOE) -> Any:
    """Sums of 11 images in batches of `size`, the last one padded, and changes against other weights."""
    mesh = make_mesh(mesh_config, jax.devices()[:devices])
    model = make_model(VIT, moe, router)
    first, other = (model.init(jax.random.key(seed)) for seed in (0, 1))
    rng = np.random.default_rng(0)
    images, labels = rng.normal(size=(11, 4, 4, 1)).astype(np.float32), rng.integers(0, 3, 11).astype(np.int32)
    run = functools.partial(routing.observe, model, VIT, k=router.k, num_experts=4, mesh=mesh)
    jitted = jax.jit(
        run,
        in_shardings=(replicated(mesh), batch_sharding(mesh)),
        out_shardings=replicated(mesh),
        compiler_options=COMPILER_OPTIONS,
    )
    total = None
    for start in range(0, 11, size):
        mask = np.arange(start, start + size) < 11
        rows = np.minimum(np.arange(start, start + size), 10)
        batch = {"image": images[rows] * mask[:, None, None, None], "label": labels[rows] * mask, "mask": mask}
        part = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), jitted((first, other), batch))
        total = part if total is None else jax.tree.map(np.add, total, part)
    grams = np.asarray(routing.parameter_gram(first), np.float64)
    return routing.measure_layers(*(total[0], grams, total[1]), VIT.moe_blocks)


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(np.float64)


def test_measures_do_not_depend_on_batches_or_devices() -> None:
    router = SparseTopK()
    alone = run_vit(MeshConfig(), 1, router, 11)
    assert list(alone) == ["layer_2", "layer_3"]
    assert set(alone["layer_2"]["mutual_information"]) == {"class", "position"}
    assert 0 < alone["layer_3"]["changed_sets"] <= 1
    spread = run_vit(MeshConfig(data=2, fsdp=2, expert=2), 8, router, 8)
    assert jax.tree.structure(alone) == jax.tree.structure(spread)
    np.testing.assert_allclose(flat(spread), flat(alone), rtol=1e-5, atol=2e-6)


def test_capacity_overflows_and_is_seen() -> None:
    tight = MoeConfig(num_experts=4, expert_width=4, group_size=0, evaluation_capacity_factor=0.5)
    layers = run_vit(MeshConfig(), 1, Softmax(load_weight=0.0, noise=0.0), 11, tight)
    # 88 choices for 4 experts of 11 places and, rounded up, 12.
    assert layers["layer_2"]["overflow"] == pytest.approx(1 - 4 * 12 / 88, abs=0.15)
    assert layers["layer_2"]["overflow"] >= 1 - 4 * 12 / 88 - 1e-9

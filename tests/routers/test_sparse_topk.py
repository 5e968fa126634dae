"""The sparse p-norm top-k router against the float64 oracle, and the properties that are its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import isotonic
from moe.routers import SparseTopK
from moe.types import PyTree, RouterInputs
from tests.oracles import operators, sparse_gates
from tests.oracles import routing as oracle
from tests.routers.helpers import (
    COMPILER_OPTIONS,
    EXPERTS,
    TOKENS,
    Expected,
    assert_matches_oracle,
    effective_weights,
    example_keys,
    readout_for,
    route,
    run,
    unbalanced_logits,
)

WEIGHTS = {"balance_weight": 0.7, "importance_weight": 0.4, "z_weight": 0.05}
PADDED = np.arange(TOKENS) % 5 != 1
FIXED_TE = unbalanced_logits()[PADDED]
TRAINED = {
    "p=2, all experts": SparseTopK(k=2, strength=0.7, p=2.0, **WEIGHTS),
    "p=3/2, at most two": SparseTopK(k=1, strength=2.5, p=1.5, max_experts=2, **WEIGHTS),
    "p=4/3, at most four": SparseTopK(k=3, strength=1.5, p=4 / 3, max_experts=4, **WEIGHTS),
    "mask": SparseTopK(k=2, composition="mask", strength=1.5, p=1.5, **WEIGHTS),
    "magnitude": SparseTopK(k=2, composition="magnitude", strength=0.05, p=4 / 3, **WEIGHTS),
    "magnitude of relu": SparseTopK(k=2, composition="magnitude", gate="relu", strength=0.6, p=2.0, **WEIGHTS),
    "experts, at most two": SparseTopK(k=1, choice="expert", strength=2.5, p=1.5, max_experts=2, **WEIGHTS),
    "experts, mask": SparseTopK(k=2, choice="expert", composition="mask", strength=0.4, p=2.0, **WEIGHTS),
    "experts, magnitude": SparseTopK(k=2, choice="expert", composition="magnitude", strength=0.05, p=1.5, **WEIGHTS),
}


def composed(router: SparseTopK, logits_TE: np.ndarray, strength: float) -> sparse_gates.Sparse:
    compose = sparse_gates.sparse_topk_of_experts if router.choice == "expert" else sparse_gates.sparse_topk
    return compose(logits_TE, router.k, strength, router.p, router.composition, router.gate)


def ask(
    router: SparseTopK, logits_TE: np.ndarray, noise_TE: np.ndarray | None, *, strength: float | None = None
) -> Expected:
    strength = router.strength if strength is None else strength
    share_TE, weight_TE = composed(router, logits_TE, strength)
    limit = EXPERTS if noise_TE is None or not router.max_experts else router.max_experts
    if router.choice == "expert":
        rows = sparse_gates.queue_of_experts(weight_TE, share_TE > 0, -(-TOKENS * limit // EXPERTS))
    else:
        rows = oracle.queue(weight_TE, share_TE > 0, limit)

    probs_TE = oracle.softmax(logits_TE)
    # A loss without a gradient through the load: the oracle's differences see the load where it was at first.
    load_TE = composed(router, FIXED_TE, strength).share_TE if router.composition == "magnitude" else share_TE
    counted_TE = weight_TE if router.composition == "magnitude" else share_TE
    unweighted = {
        # Switch's loss with the mask for the choice: f_e is the mean mask.
        "balance": float(EXPERTS / router.k * np.sum(load_TE.mean(axis=0) * probs_TE.mean(axis=0))),
        "importance": oracle.squared_variation(counted_TE.sum(axis=0)),
        "z": oracle.z_loss(logits_TE),
    }
    weights = {name: getattr(router, f"{name}_weight") for name in unweighted}
    hard_T = np.isclose(share_TE, np.round(share_TE), rtol=0, atol=1e-9).all(axis=1)
    fixed_T = hard_T if router.composition == "mask" else ~(share_TE > 0).any(axis=1)
    losses = {name: weights[name] * value for name, value in unweighted.items()}
    shares = {"hard_mask_share": hard_T.mean(), "no_gradient_share": fixed_T.mean()}
    return Expected(rows, losses, {**unweighted, **shares, "strength": strength})


@pytest.mark.parametrize("name", TRAINED)
def test_training_matches_the_oracle(name: str) -> None:
    assert_matches_oracle(TRAINED[name], ask, unbalanced_logits(), PADDED, example_keys())


def test_evaluation_cuts_no_expert() -> None:
    router, logits_TE = TRAINED["p=3/2, at most two"], unbalanced_logits(1)
    assert ask(router, logits_TE, None).rows.choices > 2 * TOKENS  # the case would not show a cut otherwise
    assert_matches_oracle(router, ask, logits_TE, np.ones(TOKENS, bool), None)


def test_the_cases_hold_hard_and_soft_masks_and_cut_choices() -> None:
    """What makes the comparisons above worth something."""
    logits_TE = FIXED_TE
    hard = {name: ask(router, logits_TE, None).metrics["hard_mask_share"] for name, router in TRAINED.items()}
    for kind in ("p=", "mag", "experts"):
        shares = [share for name, share in hard.items() if name.startswith(kind)]
        assert min(shares) < 1
        assert max(shares) > 0
    for name in ("p=3/2, at most two", "p=4/3, at most four", "experts, at most two"):
        cut = ask(TRAINED[name], logits_TE, np.zeros_like(logits_TE)).rows
        assert 0 < cut.valid.sum() < cut.choices
    unchosen = ask(TRAINED["experts, at most two"], logits_TE, None).metrics["no_gradient_share"]
    assert ask(TRAINED["mask"], logits_TE, None).metrics["no_gradient_share"] + unchosen > 0


def test_a_learned_strength_starts_where_it_is_set_and_has_the_oracles_gradient() -> None:
    router = SparseTopK(k=2, strength=0.8, p=1.5, schedule="learned", **WEIGHTS)
    logits_TE = unbalanced_logits()
    readout_TE = readout_for(logits_TE)
    params, state = router.init(EXPERTS)

    def total(params: PyTree) -> jax.Array:
        routed = router(params, RouterInputs(jnp.asarray(logits_TE)), state, example_keys())
        weights_TE = effective_weights(routed.routing, TOKENS, EXPERTS)[..., 0]
        return sum(routed.losses.values(), jnp.sum(weights_TE * readout_TE))

    value, gradient = jax.jit(jax.value_and_grad(total), compiler_options=COMPILER_OPTIONS)(params)
    np.testing.assert_allclose(value, ask(router, logits_TE, None).total(readout_TE), rtol=1e-5)
    numerical = operators.numerical_jacobian(
        lambda log: ask(router, logits_TE, None, strength=float(np.exp(log[0]))).total(readout_TE), [np.log(0.8)]
    )
    np.testing.assert_allclose(gradient["log_strength"], numerical[0], rtol=1e-3)


def test_a_scheduled_strength_falls_geometrically_with_the_steps_of_training() -> None:
    router = SparseTopK(strength=4.0, schedule="geometric", strength_end=1.0, strength_steps=2)
    inputs, state = RouterInputs(jnp.asarray(unbalanced_logits())), router.init(EXPERTS)[1]
    seen = []
    for _ in range(4):
        evaluated = route(router, {}, inputs, state, None)[0]
        np.testing.assert_array_equal(evaluated.state["step"], state["step"])
        trained = route(router, {}, inputs, state, example_keys())[0]
        state = trained.state
        seen.append([float(evaluated.metrics["strength"]), float(trained.metrics["strength"])])
    np.testing.assert_allclose(seen, np.repeat([[4.0], [2.0], [1.0], [1.0]], 2, axis=1), rtol=1e-6)


@pytest.mark.parametrize("composition", ["mask", "magnitude"])
@pytest.mark.parametrize("choice", ["token", "expert"])
def test_other_compositions_are_finite_at_ties_and_without_a_positive_gate(composition: str, choice: str) -> None:
    router = SparseTopK(composition=composition, choice=choice, gate="relu", **WEIGHTS)
    for mask_T in (np.ones(TOKENS, bool), np.zeros(TOKENS, bool)):
        for logits_TE in (np.zeros((TOKENS, EXPERTS)), np.eye(EXPERTS)[np.arange(TOKENS) % EXPERTS]):
            inputs = RouterInputs(jnp.asarray(logits_TE, jnp.float32), mask=jnp.asarray(mask_T))
            got = run(router, {}, inputs, {}, example_keys(), readout_for(logits_TE))
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got))


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
    with pytest.raises(ValueError, match=r"strength_end = -1.0 must be positive"):
        SparseTopK(strength_end=-1.0)
    with pytest.raises(ValueError, match=r"strength_steps = 0 must be at least 1"):
        SparseTopK(strength_steps=0)
    with pytest.raises(ValueError, match=r"choice = 'expert' .* only the solver 'threshold'"):
        SparseTopK(choice="expert", solver=isotonic.Dykstra())
    for p in (1.0, 2.5):
        with pytest.raises(ValueError, match=rf"p = {p} must lie in \(1, 2\]"):
            SparseTopK(p=p)
    with pytest.raises(ValueError, match=r"max_experts = 2 must be 0 or at least k = 3"):
        SparseTopK(k=3, max_experts=2)

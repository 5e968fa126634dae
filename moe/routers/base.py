"""What every router is, and the steps that most of them share, as plain functions."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe.routers import losses
from moe.types import (
    GROUP_AXIS,
    Assignments,
    BalanceScope,
    Keys,
    Layout,
    Losses,
    Metrics,
    PyTree,
    Routed,
    RouterInputs,
    Slots,
)


@runtime_checkable
class Router(Protocol):
    """A pure map from the logits of one group of T tokens to a routing.

    `router(params, inputs, state, key)` returns `Routed`. A router is a frozen dataclass of its settings; what it
    learns besides the gate is in `params`, what it adapts outside the gradient is in `state`, both made by `init`.

    key: one key per example of the group, T being a multiple of their number, so that noise belongs to an example and
        not to its place on a mesh. None means evaluation: no noise, no change of state, and no limit on the experts
        per token.
    state: every group and every micro-batch of a step starts from the same state, and the step keeps the mean of the
        states they return. A router whose rule isn't linear (the sign update of an expert bias) therefore returns
        its statistic in the state and applies the rule to it at the start of the next step.
    Losses come back weighted, metrics unweighted; both are means over the group's tokens that are not padding.
    """

    @property
    def k(self) -> int | None:
        """Experts per token (for routers that vary it: at least, or on average; each says which). None: all."""
        ...

    def num_logits(self, num_experts: int) -> int:
        """X, the logits per token that the gate has to compute: what a router learns from tokens goes through it."""
        ...

    def init(self, num_experts: int) -> tuple[PyTree, PyTree]:
        """Parameters and state of a fresh router; empty dicts where it has none.

        Neither is random nor as wide as a token, since the gate takes that part: no key and no width are needed.
        """
        ...

    def __call__(self, params: PyTree, inputs: RouterInputs, state: PyTree, key: Keys | None) -> Routed:
        """Routes one group. Raises ValueError where the inputs don't fit the settings (see `given`)."""
        ...


def one_logit_per_expert(router: Any, num_experts: int) -> int:
    """`Router.num_logits` of most routers."""
    return num_experts


def no_variables(router: Any, num_experts: int) -> tuple[PyTree, PyTree]:
    """`Router.init` of routers without parameters or state of their own."""
    check_k(router.k, num_experts)
    return {}, {}


def check_k(k: int, num_experts: int) -> None:
    """Raises ValueError unless 1 <= k <= num_experts."""
    if not 1 <= k <= num_experts:
        raise ValueError(f"router.k = {k} experts per token must lie in 1..{num_experts}, the number of experts.")


class Given(NamedTuple):
    """A router's inputs made ready.

    logits: in float32. mask: of ones where none was given. num_experts, num_examples, balance_scope: as in `Layout`.
    """

    logits: Float[Array, "T X"]
    mask: Bool[Array, "T"]
    num_experts: int
    num_examples: int
    balance_scope: BalanceScope


def given(router: Router, inputs: RouterInputs) -> Given:
    """What `router.__call__` begins with; a group without a layout is one example with a logit per expert.

    Raises ValueError where k, the width of the logits or the number of examples doesn't fit.
    """
    num_tokens, num_logits = inputs.logits.shape
    layout = inputs.layout or Layout(num_experts=num_logits, num_examples=1)
    if router.k is not None:
        check_k(router.k, layout.num_experts)
    wanted = router.num_logits(layout.num_experts)
    if num_logits != wanted:
        raise ValueError(
            f"this router wants {wanted} logits per token for {layout.num_experts} experts, not {num_logits}: make the "
            "gate that wide, and give the number of experts in RouterInputs.layout."
        )
    if num_tokens % layout.num_examples:
        raise ValueError(f"{num_tokens} tokens can't be {layout.num_examples} examples of one length.")
    mask_T = jnp.ones(num_tokens, bool) if inputs.mask is None else inputs.mask
    return Given(inputs.logits.astype(jnp.float32), mask_T, **dataclasses.asdict(layout))


def example_noise(
    key: Keys, num_tokens: int, width: int, *, draw: Callable[..., Array] = jax.random.normal
) -> Float[Array, "T X"]:
    """Noise [T, width] for the T = num_tokens tokens of `key.size` examples.

    Each example's noise depends on its own key only. draw(key, shape): the distribution, by default standard normal.
    """
    per_example = (num_tokens // key.size, width)
    return jax.vmap(lambda one: draw(one, per_example))(key).reshape(num_tokens, width)


def best(scores_TE: Float[Array, "T E"], k: int) -> Int[Array, "T K"]:
    """Each token's k highest scores, best first; ties go to the lower index. No gradient."""
    return jax.lax.top_k(jax.lax.stop_gradient(scores_TE), k)[1]


def check_expert_groups(k: int, num_experts: int, expert_groups: int, groups_per_token: int) -> None:
    """Raises ValueError unless E experts form equal groups, and those that a token may use hold k experts."""
    if expert_groups < 1:
        raise ValueError(f"router.expert_groups = {expert_groups} must be at least 1.")
    if not 1 <= groups_per_token <= expert_groups:
        raise ValueError(
            f"router.groups_per_token = {groups_per_token} must lie in 1..{expert_groups}, router.expert_groups."
        )
    if num_experts % expert_groups:
        raise ValueError(f"router.expert_groups = {expert_groups} must divide the {num_experts} experts.")
    within_reach = num_experts // expert_groups * groups_per_token
    if k > within_reach:
        raise ValueError(
            f"router.k = {k} exceeds the {within_reach} experts of groups_per_token = {groups_per_token} among "
            f"expert_groups = {expert_groups} groups: raise groups_per_token."
        )


def best_in_groups(
    scores_TE: Float[Array, "T E"], k: int, expert_groups: int, groups_per_token: int, summed: int
) -> Int[Array, "T K"]:
    """`best`, limited to the token's best groups of neighbouring experts (DeepSeek-V2, 2405.04434, section 2.2.2).

    A group is as good as the sum of its `summed` highest scores: 1 in DeepSeek-V2, 2 in DeepSeek-V3.
    """
    num_tokens, num_experts = scores_TE.shape
    check_expert_groups(k, num_experts, expert_groups, groups_per_token)
    if groups_per_token == expert_groups:
        return best(scores_TE, k)
    size = num_experts // expert_groups
    by_group = jax.lax.stop_gradient(scores_TE).reshape(num_tokens, expert_groups, size)
    group_scores = jnp.sum(jax.lax.top_k(by_group, min(summed, size))[0], axis=-1)
    within_reach = multi_hot(best(group_scores, groups_per_token), expert_groups)
    return best(jnp.where(jnp.repeat(within_reach, size, axis=1) > 0, scores_TE, -jnp.inf), k)


def multi_hot(expert_TK: Int[Array, "T K"], num_experts: int) -> Float[Array, "T E"]:
    """1 where a token has the expert, 0 elsewhere; of num_experts = E."""
    return jnp.sum(jax.nn.one_hot(expert_TK, num_experts), axis=1)


def queue(
    expert_TK: Int[Array, "T K"],
    weight_TK: Float[Array, "T K"],
    mask_T: Bool[Array, "T"],
    *,
    wanted_TK: Bool[Array, "T K"] | None = None,
    priority_T: Float[Array, "T"] | None = None,
    choices: Int[Array, ""] | None = None,
) -> Assignments:
    """Lines up each token's choices, best first, into the queue order of V-MoE (2106.05974, section 3).

    All first choices stand before all second choices. Among equals tokens stand in their own order, or by decreasing
    `priority_T` (batch priority routing). Rows of padding, where `mask_T` is False, aren't valid, nor those that
    `wanted_TK` marks False. `choices` defaults to the number of valid rows.

    expert_TK: each token's experts, best first. weight_TK: their combine weights.
    """
    num_tokens, num_choices = expert_TK.shape
    valid_TK = jnp.broadcast_to(mask_T[:, None], expert_TK.shape)
    if wanted_TK is not None:
        valid_TK &= wanted_TK
    order_T = jnp.arange(num_tokens) if priority_T is None else jnp.argsort(-priority_T)
    return Assignments(
        token=jnp.tile(order_T.astype(jnp.int32), num_choices),
        expert=expert_TK[order_T].T.reshape(-1).astype(jnp.int32),
        weight=weight_TK[order_T].T.reshape(-1),
        valid=valid_TK[order_T].T.reshape(-1),
        choices=jnp.sum(valid_TK, dtype=jnp.int32) if choices is None else choices.astype(jnp.int32),
    )


def token_choice_losses(one: Given, probs_TE: Float[Array, "T E"], choice_TE: Float[Array, "T E"], k: int) -> Losses:
    """The losses that every router of token choice offers, unweighted: balance, importance and z.

    probs_TE: what a token thinks of each expert; rows sum to 1. choice_TE: what it took; rows sum to about k.
    Only the balance loss has a scope; the others are about the group.
    """
    if one.balance_scope == "sequence":
        balance = losses.load_balancing_by_example(probs_TE, choice_TE, k, one.mask, one.num_examples)
    else:
        axis_name = GROUP_AXIS if one.balance_scope == "batch" else None
        balance = losses.load_balancing(probs_TE, choice_TE, k, one.mask, axis_name)
    return {
        "balance": balance,
        "importance": losses.importance(probs_TE, one.mask),
        "z": losses.z(one.logits, one.mask),
    }


def answer(
    router: Router, routing: Assignments | Slots, unweighted: Losses, state: PyTree, metrics: Metrics | None = None
) -> Routed:
    """What `router.__call__` ends with: losses weighted by the router's fields, and unweighted among its metrics."""
    return Routed(routing, losses.weighted(router, unweighted), unweighted | (metrics or {}), state)

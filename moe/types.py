"""The letters that name array dimensions, and the values that cross the seams between packages.

Letters (`logits_TE` has shape [T, E]; jaxtyping signatures use the same letters):

    T  tokens routed together (one group)      G  groups of tokens
    E  experts                                 K  experts per token
    C  capacity (slots per expert)             N  rows of an assignment (T * max_experts)
    X  logits per token (most routers: E)
    D  model width                             F  expert width
    B  batch (examples)                        L  length (tokens of an example)
    V  vocabulary or classes                   H  attention heads
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
from jaxtyping import Array, Bool, Float, Int, Key

Losses: TypeAlias = dict[str, Float[Array, "..."]]
Metrics: TypeAlias = dict[str, Float[Array, "..."]]
PyTree: TypeAlias = Any
BalanceScope: TypeAlias = Literal["sequence", "group", "batch"]

# The name under which an MoE layer maps its router over groups, for what is to be counted over all of them.
GROUP_AXIS = "groups"


class Solution(NamedTuple):
    """What an isotonic solver returns.

    value: the solution, of the input's shape.
    steps: iterations used (for Dykstra sweeps, of both projections each), int32, per problem.
    residual: how far `value` still moves or violates its conditions, in the input's units, per problem; 0 is exact.
    """

    value: Float[Array, "..."]
    steps: Int[Array, "..."]
    residual: Float[Array, "..."]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of a group that its arrays don't tell; static under jit, without leaves.

    num_experts: E. num_examples: the group's T tokens are so many examples of one length, one after the other.
    balance_scope: over which tokens the balance loss takes its means; "batch" needs the groups side by side, under
        `jax.vmap(router, axis_name=GROUP_AXIS)`.
    """

    num_experts: int
    num_examples: int
    balance_scope: BalanceScope = "group"


class RouterInputs(NamedTuple):
    """What a router may look at, for one group of T tokens. Only the logits are always there.

    logits: scores per token, float32; one per expert, unless the router asks the gate for another number X.
    tokens: the representations that the logits were computed from.
    ids: token ids, or positions in an example where tokens have none (hash routing).
    mask: False marks padding, which is never routed and counts in no loss or metric.
    gate: the matrix of the gate, logits = tokens · gate; the same for all groups.
    layout: number of experts and of examples; None means E = X and one example.
    """

    logits: Float[Array, "T X"]
    tokens: Float[Array, "T D"] | None = None
    ids: Int[Array, "T"] | None = None
    mask: Bool[Array, "T"] | None = None
    gate: Float[Array, "D X"] | None = None
    layout: Layout | None = None


class Assignments(NamedTuple):
    """Token-to-expert choices as N rows in queue order: where an expert's capacity ends, later rows overflow.

    token: index of the token in its group. expert: index of the expert.
    weight: combine weight, differentiable. valid: False marks a row that is not in use (its other fields are arbitrary,
    though in range).
    choices: how many choices the router made before `max_experts` cut any, >= sum(valid); what is missing is overflow.
    """

    token: Int[Array, "N"]
    expert: Int[Array, "N"]
    weight: Float[Array, "N"]
    valid: Bool[Array, "N"]
    choices: Int[Array, ""]


class Slots(NamedTuple):
    """Soft routing: every one of the E*C slots holds a mixture of tokens, and every token reads a mixture of slots.

    dispatch: weight of each token in each slot. combine: weight of each slot's output in each token.
    """

    dispatch: Float[Array, "T E C"]
    combine: Float[Array, "T E C"]


class Routed(NamedTuple):
    """What a router returns for one group.

    routing: `Assignments` or `Slots`. losses: weighted, to be added to the training loss. metrics: unweighted scalars.
    state: the router's state after this group (expert bias and the like); no gradient flows into it.
    """

    routing: Assignments | Slots
    losses: Losses
    metrics: Metrics
    state: PyTree


Keys: TypeAlias = Key[Array, "b"]


class Observed(NamedTuple):
    """What an MoE layer did with the tokens of a batch, in G groups of T; tokens in the batch's own order.

    routing: what the router returned, leaves with a leading axis G. logits: the gate's. mask: False marks padding.
    kept: choices of each group that found a place.
    """

    routing: Assignments | Slots
    logits: Float[Array, "G T X"]
    mask: Bool[Array, "G T"]
    kept: Int[Array, "G"]


# What is to be known of each MoE layer's routing, computed where it happens, inside the compiled forward pass.
Look: TypeAlias = Callable[[Observed], PyTree]

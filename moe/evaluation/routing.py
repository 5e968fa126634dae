"""What a trained router does over a whole set, layer by layer: sums in the compiled forward pass, and measures of them.

A token's experts are those that its router asks for, before any capacity. They are all E with `k` of None and with
slots, where only the combine weights say more; there the weights stand in wherever choices are counted below.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Float64, Int

from moe.models import Batch, Model, ModelConfig, Variables
from moe.routers.base import best, multi_hot
from moe.routers.metrics import expert_load
from moe.types import Assignments, Look, Observed, PyTree, Slots


class Chosen(NamedTuple):
    """What the tokens of a batch have of each expert: whether it is theirs, and its combine weight, or 0."""

    chosen: Bool[Array, "G T E"]
    weight: Float[Array, "G T E"]


class RoutingSums(NamedTuple):
    """Sums over the tokens of a batch that aren't padding, of one layer or of layers along a leading axis.

    tokens, choices, kept: how many; kept are the choices that found a place. rows: what the experts work on, kept
        choices or slots that hold something.
    load: choices of each expert; of soft slots the dispatch weight in its slots. histogram: tokens with 0 to E experts.
    entropy: of a token's distribution over experts, see `measure`. weight: all combine weights.
    same, jaccard, outside: against the k highest logits: tokens with exactly these experts; |both| / |either|; weight
        of others. All None where the gate has no logit per expert, or the router no k.
    choice_gram, weight_gram: for two experts, products of what the tokens have of them.
    joint: for each attribute of tokens, choices of an expert by tokens of a value.
    """

    tokens: Float[Array, "*N"]
    choices: Float[Array, "*N"]
    kept: Float[Array, "*N"]
    rows: Float[Array, "*N"]
    load: Float[Array, "*N E"]
    histogram: Float[Array, "*N E_1"]
    entropy: Float[Array, "*N"]
    weight: Float[Array, "*N"]
    same: Float[Array, "*N"] | None
    jaccard: Float[Array, "*N"] | None
    outside: Float[Array, "*N"] | None
    choice_gram: Float[Array, "*N E E"]
    weight_gram: Float[Array, "*N E E"]
    joint: dict[str, Float[Array, "*N V E"]]


class Changes(NamedTuple):
    """Tokens, of those that aren't padding, whose experts differ between two checkpoints.

    sets: as a set, which never changes where a token has all experts. first: the one of most weight; where weights tie,
    the first of these.
    """

    sets: Float[Array, "*N"]
    first: Float[Array, "*N"]


def chosen(observed: Observed, num_experts: int) -> Chosen:
    """The rows of a routing as what each token has of each expert; padding has nothing."""
    mask_GT1 = observed.mask[..., None]
    routing = observed.routing
    if isinstance(routing, Slots):
        weight_GTE = jnp.where(mask_GT1, jnp.sum(routing.combine, axis=-1), 0.0)
        return Chosen(jnp.broadcast_to(mask_GT1, weight_GTE.shape), weight_GTE)
    shape = (observed.mask.shape[1], num_experts)

    def one(rows: Assignments) -> Chosen:
        place = (rows.token, rows.expert)
        weight_TE = jnp.zeros(shape, jnp.float32).at[place].add(jnp.where(rows.valid, rows.weight, 0.0))
        return Chosen(jnp.zeros(shape, bool).at[place].max(rows.valid), weight_TE)

    had = jax.vmap(one)(routing)
    return Chosen(had.chosen & mask_GT1, jnp.where(mask_GT1, had.weight, 0.0))


def layer_sums(
    observed: Observed, k: int | None, num_experts: int, attributes: Mapping[str, tuple[Int[Array, "B L"], int]]
) -> RoutingSums:
    """The sums of one layer. k: the router's. attributes: a number of every token, and below which these lie."""
    had = chosen(observed, num_experts)
    mask_T = observed.mask.reshape(-1)
    chosen_TE, weight_TE = (part.reshape(-1, num_experts) for part in had)
    routing = observed.routing
    is_slots = isinstance(routing, Slots)
    choice_TE = weight_TE if k is None or is_slots else chosen_TE.astype(jnp.float32)
    tokens = jnp.sum(mask_T, dtype=jnp.float32)
    logits_TX = observed.logits.reshape(len(mask_T), -1)
    has_logits = not is_slots and logits_TX.shape[1] == num_experts
    if has_logits:
        probs_TE = jax.nn.softmax(logits_TX.astype(jnp.float32))
    else:
        probs_TE = weight_TE / jnp.maximum(jnp.sum(weight_TE, axis=1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    entropy_T = jnp.sum(jax.scipy.special.entr(probs_TE), axis=1)

    same = jaccard = outside = None
    if has_logits and k is not None:
        hard_TE = multi_hot(best(logits_TX, k), num_experts) > 0
        both_T, either_T = jnp.sum(hard_TE & chosen_TE, axis=1), jnp.sum(hard_TE | chosen_TE, axis=1)
        same = jnp.sum((both_T == either_T) & mask_T, dtype=jnp.float32)
        jaccard = jnp.sum(jnp.where(mask_T, both_T / either_T, 0.0))
        outside = jnp.sum(jnp.where(hard_TE, 0.0, jnp.abs(weight_TE)))

    counts_T = jnp.sum(chosen_TE, axis=1)
    is_count_TE = (counts_T[:, None] == jnp.arange(num_experts + 1)[None]) & mask_T[:, None]
    joint = {
        name: jnp.zeros((size, num_experts), jnp.float32).at[value_BL.reshape(-1)].add(choice_TE)
        for name, (value_BL, size) in attributes.items()
    }
    if isinstance(routing, Slots):
        choices = kept = tokens * num_experts
        rows = jnp.sum(jnp.any(routing.dispatch > 0, axis=1), dtype=jnp.float32)
    else:
        choices, kept = (jnp.sum(count_G).astype(jnp.float32) for count_G in (routing.choices, observed.kept))
        rows = kept
    return RoutingSums(
        tokens=tokens,
        choices=choices,
        kept=kept,
        rows=rows,
        load=expert_load(routing, num_experts),
        histogram=jnp.sum(is_count_TE, axis=0, dtype=jnp.float32),
        entropy=jnp.sum(jnp.where(mask_T, entropy_T, 0.0)),
        weight=jnp.sum(jnp.abs(weight_TE)),
        same=same,
        jaccard=jaccard,
        outside=outside,
        choice_gram=jnp.einsum("TE,TF->EF", choice_TE, choice_TE, precision="highest"),
        weight_gram=jnp.einsum("TE,TF->EF", weight_TE, weight_TE, precision="highest"),
        joint=joint,
    )


def observe(
    model: Model,
    config: ModelConfig,
    variables: tuple[Variables, Variables | None],
    batch: Batch,
    *,
    k: int | None,
    num_experts: int,
    mesh: Mesh,
) -> tuple[RoutingSums, Changes | None]:
    """The sums of every MoE layer of a batch, from one forward pass; to be jitted.

    variables: of the checkpoint, and of another, or None; by that the batch is routed as well, to compare each token.
    """
    own, other = variables
    attributes = config.attributes(batch)

    def look(observed: Observed) -> PyTree:
        had = chosen(observed, num_experts) if other is not None else None
        return layer_sums(observed, k, num_experts, attributes), had

    def look_only(observed: Observed) -> PyTree:
        return chosen(observed, num_experts)

    def run(variables: Variables, look: Look) -> Any:
        return model.method("observe")(variables, batch, mesh=mesh, look=look)

    sums, now = run(own, look)
    return sums, None if other is None else changes(run(other, look_only), now)


def changes(before: Chosen, now: Chosen) -> Changes:
    """Tokens whose experts changed, of each layer: leaves have a leading axis over layers. Padding never changes."""
    sets = jnp.any(before.chosen != now.chosen, axis=-1)
    first = jnp.argmax(before.weight, axis=-1) != jnp.argmax(now.weight, axis=-1)
    return Changes(*(jnp.sum(part, axis=(1, 2), dtype=jnp.float32) for part in (sets, first)))


def parameter_gram(variables: Variables) -> Float[Array, "N E E"]:
    """For two experts of each MoE layer the product of their matrices' entries, summed; to be jitted."""
    leaves = jax.tree_util.tree_leaves_with_path(variables.params)
    experts = [leaf for path, leaf in leaves if any(str(getattr(part, "key", "")) == "experts" for part in path)]
    return sum(jnp.einsum("NEab,NFab->NEF", w, w, precision="highest") for w in experts)  # type: ignore[return-value]


def measure(
    sums: RoutingSums, parameters: Float64[np.ndarray, "E E"], changed: Changes | None = None
) -> dict[str, Any]:
    """The measures of one layer, of its sums over a whole set in float64; None where one isn't defined.

    load: each expert's share of the choices. load_cv: standard deviation of the loads (of the E, not an estimate by
        E - 1) over their mean. max_violation: largest load over the mean, minus 1 (MaxVio of Wang et al. 2024,
        2408.15664). dead_experts: with no choice.
    load_entropy: of `load`, in nats. entropy: mean over tokens of the entropy in nats of softmax(logits); of the
        combine weights over their sum where the gate has no logit per expert.
    overflow: share of the choices that found no place. experts_per_token: choices per token; …_histogram: shares of
        tokens with 0, …, E experts. rows_per_token: of the rows that experts work on: kept choices, or filled slots.
    topk_same: share of tokens whose experts are exactly those of the k highest logits, ties to the lower index.
    topk_jaccard: mean over tokens of |both| / |either|. weight_outside_topk: combine weight of experts outside these k,
        over all.
    mutual_information: I(expert; value) in nats of a choice drawn at random, for each attribute of its token: 0 where
        the attribute tells nothing of the expert, at most load_entropy. As a plug-in estimate from counts it is too
        large by about mutual_information_bias (Miller 1955), (cells - experts - values + 1) / (2 · choices), cells,
        experts and values counted where there is one.
    choice_similarity, weight_similarity, parameter_similarity [E, E]: cosines between experts of which tokens chose
        them (1: always together), of the tokens' combine weights, and of their parameters, entry by entry, so that the
        same units in another order don't count as similar; 0 beside a dead expert. Means are over pairs of different
        experts.
    changed_sets, changed_first: see `Changes`, as shares of the tokens.
    Raises ValueError if the set has no token.
    """
    sums = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), sums)
    load_E: Any = sums.load
    tokens, mean_load = float(sums.tokens), float(load_E.mean())
    if not tokens:
        raise ValueError("the evaluation set is empty: nothing was measured.")
    share_E = load_E / max(float(load_E.sum()), 1e-300)
    joint: dict[str, Any] = dict(sums.joint)
    grams: dict[str, Any] = {"choice": sums.choice_gram, "weight": sums.weight_gram, "parameter": parameters}
    similarity = {name: _cosines(gram_EE) for name, gram_EE in grams.items()}
    return {
        "load": share_E.tolist(),
        "load_cv": float(load_E.std() / mean_load) if mean_load else None,
        "max_violation": float(load_E.max() / mean_load - 1) if mean_load else None,
        "dead_experts": int(np.sum(load_E == 0)),
        "load_entropy": _entropy(share_E),
        "entropy": float(sums.entropy) / tokens,
        "overflow": float(1 - sums.kept / sums.choices) if sums.choices else None,
        "experts_per_token": float(sums.choices) / tokens,
        "experts_per_token_histogram": (sums.histogram / tokens).tolist(),
        "rows_per_token": float(sums.rows) / tokens,
        "topk_same": None if sums.same is None else float(sums.same) / tokens,
        "topk_jaccard": None if sums.jaccard is None else float(sums.jaccard) / tokens,
        "weight_outside_topk": None if sums.outside is None or not sums.weight else float(sums.outside / sums.weight),
        "mutual_information": {name: mutual_information(joint_VE) for name, joint_VE in joint.items()},
        "mutual_information_bias": {name: _bias(joint_VE) for name, joint_VE in joint.items()},
        **{f"{name}_similarity": np.round(cosine_EE, 6).tolist() for name, cosine_EE in similarity.items()},
        **{f"{name}_similarity_mean": _mean_of_pairs(cosine_EE) for name, cosine_EE in similarity.items()},
        **({} if changed is None else {"changed_sets": float(changed.sets) / tokens}),
        **({} if changed is None else {"changed_first": float(changed.first) / tokens}),
    }


def measure_layers(
    sums: RoutingSums, parameters: Float64[np.ndarray, "N E E"], changed: Changes | None, blocks: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """`measure` of each layer, as "layer_B", B the block that the experts stand in."""
    layers = {}
    for index, block in enumerate(blocks):
        one, its = jax.tree.map(lambda leaf, at=index: leaf[at], (sums, changed))
        layers[f"layer_{block}"] = measure(one, parameters[index], its)
    return layers


def mutual_information(joint_VE: Float64[np.ndarray, "V E"]) -> float:
    """Σ p(v, e) log(p(v, e) / (p(v) p(e))) in nats, p being the table over its sum; 0 for an empty one."""
    if not joint_VE.sum():
        return 0.0
    p_VE = joint_VE / joint_VE.sum()
    parts = _entropy(p_VE.sum(axis=1)), _entropy(p_VE.sum(axis=0)), _entropy(p_VE)
    return max(0.0, parts[0] + parts[1] - parts[2])


def _bias(joint_VE: Float64[np.ndarray, "V E"]) -> float:
    cells, values, experts = (int(np.sum(part > 0)) for part in (joint_VE, joint_VE.sum(axis=1), joint_VE.sum(axis=0)))
    return float((cells - values - experts + 1) / (2 * max(joint_VE.sum(), 1.0)))


def _entropy(p: Float64[np.ndarray, "..."]) -> float:
    positive = p[p > 0]
    return float(-np.sum(positive * np.log(positive)))


def _cosines(gram_EE: Float64[np.ndarray, "E E"]) -> Float64[np.ndarray, "E E"]:
    norm_E = np.sqrt(np.diag(gram_EE))
    scale_EE = norm_E[:, None] * norm_E[None]
    return np.where(scale_EE > 0, gram_EE / np.where(scale_EE > 0, scale_EE, 1.0), 0.0)


def _mean_of_pairs(cosine_EE: Float64[np.ndarray, "E E"]) -> float | None:
    pairs = len(cosine_EE) * (len(cosine_EE) - 1)
    return float((cosine_EE.sum() - np.trace(cosine_EE)) / pairs) if pairs else None

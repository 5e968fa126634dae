"""Cross-entropy over a vocabulary, a few positions at a time, so that no array holds all logits of a batch."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe.ops.blocks import vary_alike, zeros_like
from moe.types import PyTree


@dataclasses.dataclass(frozen=True)
class VocabularyLoss:
    """Settings of `vocabulary_loss`.

    chunk: positions of each sequence whose logits exist at once. cap: logits become cap · tanh(logit / cap); 0: don't.
    label_smoothing: share of the target spread over the vocabulary.
    z_weight: of the mean of log(Σ exp(logit))² (PaLM, 2204.02311, section 5).
    """

    chunk: int = 64
    cap: float = 0.0
    label_smoothing: float = 0.0
    z_weight: float = 0.0


class Sums(NamedTuple):
    """Sums over the tokens that the mask keeps. loss: what is minimised, cross_entropy + z.

    cross_entropy: in nats, smoothed. z: weighted. correct: targets that have the highest logit.
    """

    loss: Float[Array, ""]
    cross_entropy: Float[Array, ""]
    z: Float[Array, ""]
    correct: Float[Array, ""]


class Scores(NamedTuple):
    """What evaluation needs of each token. nll: -log p(target), in nats. correct: the target has the highest logit.

    top5: it is among the five highest, ties to the lower id. confidence: the highest probability of all.
    """

    nll: Float[Array, "B L"]
    correct: Bool[Array, "B L"]
    top5: Bool[Array, "B L"]
    confidence: Float[Array, "B L"]


def vocabulary_logits(
    x_BLD: Float[Array, "*B D"], head_DV: Float[Array, "D V"], cap: float = 0.0
) -> Float[Array, "*B V"]:
    """x times the head, in x's dtype with sums and result in float32."""
    logits = jnp.einsum("...D,DV->...V", x_BLD, head_DV.astype(x_BLD.dtype), preferred_element_type=jnp.float32)
    return cap * jnp.tanh(logits / cap) if cap else logits


def vocabulary_loss(
    x_BLD: Float[Array, "B L D"],
    head_DV: Float[Array, "D V"],
    target_BL: Int[Array, "B L"],
    mask_BL: Bool[Array, "B L"],
    settings: VocabularyLoss,
) -> Sums:
    """Sums of the loss over the tokens that the mask keeps; only `loss` has a gradient.

    The gradient is computed along with the value, chunk by chunk, as the logits need not be computed again then. In
    shard_map the sums are those of a device's rows.
    """
    x_BLD, head_DV, target_BL, mask_BL = vary_alike(x_BLD, head_DV, target_BL, mask_BL)
    loss, rest = _loss(x_BLD, head_DV, target_BL, mask_BL, settings)
    return Sums(loss, *jax.lax.stop_gradient(rest))


def vocabulary_scores(
    x_BLD: Float[Array, "B L D"], head_DV: Float[Array, "D V"], target_BL: Int[Array, "B L"], settings: VocabularyLoss
) -> Scores:
    """Scores of every token, without smoothing."""

    def step(_: None, chunk: tuple[Array, ...]) -> tuple[None, Scores]:
        x, target = chunk
        logits, total, picked = _log_sums(x, target, head_DV, settings.cap)
        is_lower = jnp.arange(logits.shape[-1])[None, None] < target[..., None]
        is_before = (logits > picked[..., None]) | ((logits == picked[..., None]) & is_lower)
        return None, Scores(
            nll=total - picked,
            correct=jnp.argmax(logits, axis=-1) == target,
            top5=jnp.sum(is_before, axis=-1) < 5,
            confidence=jnp.exp(jnp.max(logits, axis=-1) - total),
        )

    scores = jax.lax.scan(step, None, _chunks((x_BLD, target_BL), settings.chunk))[1]
    return jax.tree.map(lambda leaf: _whole(leaf, x_BLD.shape[1]), scores)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _loss(x: Array, head: Array, target: Array, mask: Array, settings: VocabularyLoss) -> tuple[Array, PyTree]:
    def step(sums: Sums, chunk: tuple[Array, ...]) -> tuple[Sums, None]:
        return jax.tree.map(jnp.add, sums, _chunk_sums(chunk, head, settings)[0]), None

    zeros = Sums(*(zeros_like((), x, jnp.float32),) * 4)
    sums, _ = jax.lax.scan(step, zeros, _chunks((x, target, mask), settings.chunk))
    return sums.loss, sums[1:]


def _loss_forward(
    x: Array, head: Array, target: Array, mask: Array, settings: VocabularyLoss
) -> tuple[tuple[Array, PyTree], tuple[Array, Array]]:
    def step(carry: tuple[Sums, Array], chunk: tuple[Array, ...]) -> tuple[tuple[Sums, Array], Array]:
        sums, head_gradient = carry
        chunk_sums, slope_of = _chunk_sums(chunk, head, settings)
        slope = slope_of().astype(x.dtype)
        x_gradient = jnp.einsum("BLV,DV->BLD", slope, head.astype(x.dtype), preferred_element_type=jnp.float32)
        head_gradient += jnp.einsum("BLD,BLV->DV", chunk[0], slope, preferred_element_type=jnp.float32)
        return (jax.tree.map(jnp.add, sums, chunk_sums), head_gradient), x_gradient.astype(x.dtype)

    zeros = Sums(*(zeros_like((), x, jnp.float32),) * 4), zeros_like(head.shape, x, jnp.float32)
    (sums, head_gradient), x_gradients = jax.lax.scan(step, zeros, _chunks((x, target, mask), settings.chunk))
    return (sums.loss, sums[1:]), (_whole(x_gradients, x.shape[1]), head_gradient.astype(head.dtype))


def _loss_backward(
    settings: VocabularyLoss, gradients: tuple[Array, Array], cotangents: tuple[Array, PyTree]
) -> tuple[Array, Array, None, None]:
    x_gradient, head_gradient = (g * cotangents[0].astype(g.dtype) for g in gradients)
    return x_gradient, head_gradient, None, None


_loss.defvjp(_loss_forward, _loss_backward)


def _chunk_sums(chunk: tuple[Array, ...], head: Array, settings: VocabularyLoss) -> tuple[Sums, Callable[[], Array]]:
    """The sums of one chunk, and a function that returns the slope of its loss in the product of x and head."""
    x, target, mask = chunk
    logits, total, picked = _log_sums(x, target, head, settings.cap)
    smoothing, size = settings.label_smoothing, logits.shape[-1]
    nll = total - (1 - smoothing) * picked
    if smoothing:
        nll -= smoothing * jnp.mean(logits, axis=-1)
    keep = mask.astype(jnp.float32)
    cross_entropy, z = jnp.sum(keep * nll), settings.z_weight * jnp.sum(keep * jnp.square(total))
    correct = jnp.sum(keep * (jnp.argmax(logits, axis=-1) == target))

    def slope() -> Array:
        probability = jnp.exp(logits - total[..., None])
        wanted = (1 - smoothing) * _one_hot(target, size) + smoothing / size
        d_logits = (1 + 2 * settings.z_weight * total)[..., None] * probability - wanted
        if settings.cap:
            d_logits *= 1 - jnp.square(logits / settings.cap)
        return keep[..., None] * d_logits

    return Sums(cross_entropy + z, cross_entropy, z, correct), slope


def _log_sums(x: Array, target: Array, head: Array, cap: float) -> tuple[Array, Array, Array]:
    """Logits, the logarithm of the sum of their exponentials, and the target's logit."""
    logits = vocabulary_logits(x, head, cap)
    # A sum and not a gather: the vocabulary may be cut along a mesh axis.
    picked = jnp.sum(jnp.where(_one_hot(target, logits.shape[-1]), logits, 0.0), axis=-1)
    return logits, jax.nn.logsumexp(logits, axis=-1), picked


def _one_hot(target: Array, size: int) -> Array:
    return target[..., None] == jnp.arange(size)[None, None]


def _chunks(arrays: tuple[Array, ...], size: int) -> tuple[Array, ...]:
    """[B, L, …] -> [chunks, B, size, …], the last chunk filled up with zeros."""

    def one(x: Array) -> Array:
        here = min(size, x.shape[1])
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % here)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, here, *x.shape[2:]), 1, 0)

    return tuple(one(x) for x in arrays)


def _whole(chunks: Array, length: int) -> Array:
    """The inverse of `_chunks`."""
    x = jnp.moveaxis(chunks, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]

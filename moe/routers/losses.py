"""Router losses, each with one normalisation, over the T tokens of a group that `mask_T` keeps.

All are unweighted here; a router multiplies them by its own weights. None divides by a quantity that vanishes at
perfect balance, so values and gradients are finite there.
"""

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm
from jaxtyping import Array, Bool, Float

from moe.types import Losses


def token_mean(
    values_TX: Float[Array, "T *X"], mask_T: Bool[Array, "T"], axis_name: str | None = None
) -> Float[Array, "*X"]:
    """Mean over the tokens that the mask keeps, in all groups along `axis_name` where it is given; 0 if it keeps none.

    Groups count by their tokens, so those with more padding count less.
    """
    keep = mask_T.reshape((-1,) + (1,) * (values_TX.ndim - 1))
    total, count = jnp.sum(jnp.where(keep, values_TX, 0.0), axis=0), jnp.sum(mask_T)
    if axis_name is not None:
        total, count = jax.lax.psum((total, count), axis_name)
    return total / jnp.maximum(count, 1)


def squared_variation(values_E: Float[Array, "E"]) -> Float[Array, ""]:
    """Squared coefficient of variation, variance / mean²: 0 at balance, E - 1 when one expert has everything."""
    mean = jnp.mean(values_E)
    variance = jnp.mean(jnp.square(values_E - mean))
    # The floor only guards an all-padding group, whose mean is exactly 0.
    return variance / jnp.maximum(jnp.square(mean), jnp.finfo(values_E.dtype).tiny)


def importance(probs_TE: Float[Array, "T E"], mask_T: Bool[Array, "T"]) -> Float[Array, ""]:
    """Shazeer et al. 2017 (1701.06538) eq. 6-7: squared variation of the probability mass that each expert receives."""
    return squared_variation(token_mean(probs_TE, mask_T))


def load(
    logits_TE: Float[Array, "T E"],
    noisy_logits_TE: Float[Array, "T E"],
    k: int,
    noise_std: float,
    mask_T: Bool[Array, "T"],
) -> Float[Array, ""]:
    """V-MoE (2106.05974) appendix A: squared variation of each expert's expected load.

    The load of an expert is the probability, over a new draw of its own noise of standard deviation `noise_std`, that
    its noisy logit reaches the token's k-th largest noisy logit.
    """
    threshold_T1 = jax.lax.top_k(noisy_logits_TE, k)[0][:, -1:]
    probability_TE = norm.cdf((logits_TE - threshold_T1) / noise_std)
    return squared_variation(token_mean(probability_TE, mask_T))


def load_balancing(
    probs_TE: Float[Array, "T E"],
    choice_TE: Float[Array, "T E"],
    k: int,
    mask_T: Bool[Array, "T"],
    axis_name: str | None = None,
) -> Float[Array, ""]:
    """Switch Transformer (2101.03961) eq. 4 divided by K: E/K Σ_e f_e P_e; 1 at balance, E/K at worst for k = 1.

    f_e is the mean of `choice_TE` over tokens (its rows sum to about k), P_e the mean probability. With `axis_name`
    both are means over all groups, as in the global-batch loss of Qiu et al. 2025 (2501.11873).
    """
    num_experts = probs_TE.shape[-1]
    f_E, P_E = (token_mean(values_TE, mask_T, axis_name) for values_TE in (choice_TE, probs_TE))
    return num_experts / k * jnp.sum(f_E * P_E)


def load_balancing_by_example(
    probs_TE: Float[Array, "T E"],
    choice_TE: Float[Array, "T E"],
    k: int,
    mask_T: Bool[Array, "T"],
    num_examples: int,
) -> Float[Array, ""]:
    """DeepSeek-V3 (2412.19437) eq. 17: `load_balancing` of each example, averaged over those that aren't padding."""
    by_example = tuple(x.reshape(num_examples, -1, *x.shape[1:]) for x in (probs_TE, choice_TE, mask_T))
    loss_B = jax.vmap(lambda probs, choice, mask: load_balancing(probs, choice, k, mask))(*by_example)
    return token_mean(loss_B, jnp.any(by_example[2], axis=1))


def z(logits_TE: Float[Array, "T E"], mask_T: Bool[Array, "T"]) -> Float[Array, ""]:
    """ST-MoE (2202.08906) eq. 5: mean over tokens of log(Σ_e exp(logit_e))²."""
    return token_mean(jnp.square(jax.nn.logsumexp(logits_TE, axis=-1)), mask_T)


def entropy(logits_TE: Float[Array, "T E"], mask_T: Bool[Array, "T"]) -> Float[Array, ""]:
    """Mean over tokens of the entropy of softmax(logits), in nats: log E when uniform, 0 when collapsed."""
    # log_softmax stays finite, with its gradient, where a probability underflows to 0.
    return token_mean(jnp.sum(-jax.nn.softmax(logits_TE) * jax.nn.log_softmax(logits_TE), axis=-1), mask_T)


def weighted(router: object, unweighted: Losses) -> Losses:
    """Multiplies each loss by the router's field `<name>_weight`; losses of weight 0 are left out."""
    weights = {name: getattr(router, f"{name}_weight") for name in unweighted}
    return {name: weights[name] * value for name, value in unweighted.items() if weights[name]}

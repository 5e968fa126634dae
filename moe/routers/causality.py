"""Whether a router can be trusted with text, where a token may not know what comes after it."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moe.routers.base import Router
from moe.types import Layout, RouterInputs, Slots

_TOKENS, _WIDTH = 32, 4


def sees_later_tokens(router: Router, num_experts: int) -> bool:
    """Whether in evaluation a token's experts or their weights depend on tokens that come after it in its group.

    Found by trial: a group of 32 random tokens is routed twice, the second time with a second half of tokens that all
    want the same expert. Soft slots mix all tokens of a group. Such a router leaks the text to come into the prediction
    of it, as expert choice does (2202.09368), and can't route tokens one by one as they are generated.
    """
    random = np.random.default_rng(0)
    tokens = np.tile(random.standard_normal((_TOKENS, _WIDTH)).astype(np.float32), (2, 1, 1))
    tokens[1, _TOKENS // 2 :] = 8 * tokens[1, 0]
    gate = random.standard_normal((_WIDTH, router.num_logits(num_experts))).astype(np.float32)
    params, state = router.init(num_experts)

    def weights_of_first_half(tokens_TD: Float[Array, "T D"]) -> Float[Array, "half E"] | None:
        ids, layout = jnp.arange(_TOKENS, dtype=jnp.int32), Layout(num_experts, num_examples=1)
        inputs = RouterInputs(tokens_TD @ gate, tokens_TD, ids, gate=jnp.asarray(gate), layout=layout)
        routing = router(params, inputs, state, None).routing
        if isinstance(routing, Slots):
            return None
        weight_N = jnp.where(routing.valid, routing.weight, 0.0)
        weights_TE = jnp.zeros((_TOKENS, num_experts)).at[routing.token, routing.expert].add(weight_N)
        return weights_TE[: _TOKENS // 2]

    first, second = (jax.jit(weights_of_first_half)(one) for one in tokens)
    if first is None or second is None:
        return True
    return not np.allclose(first, second, rtol=1e-5, atol=1e-6)

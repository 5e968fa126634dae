"""Routers whose choice of experts isn't learned: by a hash of the token's id, or at random.

The gate weighs what they choose: combine weights are the softmax of the k chosen logits. So k = 1 gives weight 1, as in
the papers, and k = E the full mixture.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from moe.routers.base import answer, best, example_noise, given, no_variables, one_logit_per_expert, queue
from moe.types import Keys, PyTree, Routed, RouterInputs


@dataclasses.dataclass(frozen=True)
class Hash:
    """A token's experts are a balanced hash of its id (Roller et al. 2021, arXiv 2106.04426, section 3).

    Each run of E consecutive ids, from a multiple of E on, gives every expert exactly k ids, and each id k distinct
    experts: so loads are equal over the vocabulary, though not over the tokens of a text, whose ids aren't equally
    frequent. On images ids are positions. See `hashed_experts` for the hash.

    k: experts per token, exactly. seed: of the hash.
    """

    k: int = 1
    seed: int = 0

    num_logits = one_logit_per_expert
    init = no_variables

    def __call__(self, params: PyTree, inputs: RouterInputs, state: PyTree, key: Keys | None) -> Routed:
        """Routes one group; see `moe.routers.base.Router`."""
        one = given(self, inputs)
        if inputs.ids is None:
            raise ValueError("router hash chooses by token id: give ids in RouterInputs.")
        expert_TK = hashed_experts(inputs.ids, self.k, one.num_experts, self.seed)
        return answer(self, queue(expert_TK, _weights(one.logits, expert_TK), one.mask), {}, state)


@dataclasses.dataclass(frozen=True)
class Random:
    """A token's experts are drawn at random (THOR, Zuo et al. 2022, arXiv 2110.04260): a floor for learned routers.

    In training by the example's key, anew at every step. In evaluation once for each position of an example, so that
    results can be repeated and an example doesn't depend on its neighbours.

    k: experts per token, exactly. seed: of the draws for evaluation.
    """

    k: int = 1
    seed: int = 0

    num_logits = one_logit_per_expert
    init = no_variables

    def __call__(self, params: PyTree, inputs: RouterInputs, state: PyTree, key: Keys | None) -> Routed:
        """Routes one group; see `moe.routers.base.Router`."""
        one = given(self, inputs)
        if key is None:
            key = jnp.broadcast_to(jax.random.key(self.seed), (one.num_examples,))
        # The k largest of E independent draws are k experts, all equally likely.
        expert_TK = best(example_noise(key, *one.logits.shape), self.k)
        return answer(self, queue(expert_TK, _weights(one.logits, expert_TK), one.mask), {}, state)


def _weights(logits_TE: Float[Array, "T E"], expert_TK: Int[Array, "T K"]) -> Float[Array, "T K"]:
    return jax.nn.softmax(jnp.take_along_axis(logits_TE, expert_TK, axis=-1))


def hashed_experts(id_T: Int[Array, "T"], k: int, num_experts: int, seed: int) -> Int[Array, "T K"]:
    """k distinct experts per id; the ids b·E … b·E + E - 1 meet every expert k times.

    Choice j of id b·E + r is expert (a·r + s·j + c) mod E, where a, s, coprime to E, and c are drawn by block b. For
    fixed j this permutes the block's ids over the experts, for fixed r the choices.
    """
    block_T, place_T = jnp.divmod(id_T, num_experts)
    bits_T = mix(block_T.astype(jnp.uint32) + np.uint32(seed * 0x9E3779B9 % 2**32))
    coprime = jnp.asarray([n for n in range(1, num_experts + 1) if math.gcd(n, num_experts) == 1], jnp.int32)
    # From disjoint bits: ten, ten and twelve.
    a_T, s_T = (coprime[((bits_T >> shift) & 1023).astype(jnp.int32) % len(coprime)] for shift in (0, 10))
    c_T = (bits_T >> 20).astype(jnp.int32) % num_experts
    choice_K = jnp.arange(k, dtype=jnp.int32)
    return ((a_T * place_T + c_T)[:, None] + s_T[:, None] * choice_K[None]) % num_experts


def mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A permutation of 32-bit integers in which every input bit reaches every output bit (MurmurHash3's finaliser)."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)

"""Which experts the tokens of given examples have in a trained model, and with what weight."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Shaped

from moe.models import Variables, make_model
from moe.parallel.mesh import batch_shards
from moe.routers.base import Router
from moe.types import GROUP_AXIS, Assignments, Keys, PyTree, Routed, RouterInputs, Slots
from moe.workdir import Loaded

# Where the recorded weights stand among a router's state.
_NAME = "recorded_weights"
# Examples: every one of them holds the weights of all for a moment.
_AT_A_TIME = 64


def expert_weights(loaded: Loaded, inputs: Shaped[Array | np.ndarray, "B *size"]) -> Float[np.ndarray, "M B L E"]:
    """The combine weight of every expert in every token, of the M layers with experts, first layer first.

    In evaluation: without noise, and dropping nothing. 0 where a token doesn't have the expert. For soft slots, the
    weight with which a token reads the expert's slots, together.

    loaded: a run's model, from `moe.workdir.load_model`. inputs: what the model is called with, images [B, h, w, c] as
    the data give them or tokens [B, L]. L: tokens of an example; of an image its patches row by row, after the class
    token where there is one.
    Raises ValueError for a model without experts.
    """
    config = loaded.config
    if not config.model.moe_every:
        raise ValueError("the model has no experts (model.moe_every = 0): nothing is routed.")
    model = make_model(config.model, config.moe, _Recorder(config.router))
    empty = jax.eval_shape(model.init, jax.random.key(0)).router_state
    zeros = flatten_dict(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), empty))
    variables = Variables(loaded.variables.params, unflatten_dict(zeros | flatten_dict(loaded.variables.router_state)))

    @jax.jit
    def run(variables: Variables, inputs: Array) -> PyTree:
        return model.apply(variables, inputs, keys=None, mesh=loaded.mesh).routers.state

    # Each example is routed by itself, so that those that fill up the last part and device change nothing.
    shards = batch_shards(loaded.mesh)
    size = shards * min(-(-len(inputs) // shards), -(-_AT_A_TIME // shards))
    parts = jnp.resize(jnp.asarray(inputs), (-(-len(inputs) // size), size, *inputs.shape[1:]))
    states = [flatten_dict(jax.device_get(run(variables, part))) for part in parts]
    weights = [next(leaf for path, leaf in state.items() if path[-1] == _NAME) for state in states]
    return np.concatenate(weights, axis=1)[:, : len(inputs)]


@dataclasses.dataclass(frozen=True)
class _Recorder:
    """`router`, whose state also takes its combine weights out of the model: those of all groups, in each of them."""

    router: Router

    @property
    def k(self) -> int | None:
        return self.router.k

    def num_logits(self, num_experts: int) -> int:
        return self.router.num_logits(num_experts)

    def init(self, num_experts: int) -> tuple[PyTree, PyTree]:
        params, state = self.router.init(num_experts)
        return params, {**state, _NAME: jnp.zeros(())}

    def __call__(self, params: PyTree, inputs: RouterInputs, state: dict[str, Any], key: Keys | None) -> Routed:
        given = {name: value for name, value in state.items() if name != _NAME}
        routed = self.router(params, inputs, given, key)
        num_experts = inputs.logits.shape[1] if inputs.layout is None else inputs.layout.num_experts
        weights_TE = _weights(routed.routing, len(inputs.logits), num_experts)
        return routed._replace(state={**routed.state, _NAME: jax.lax.all_gather(weights_TE, GROUP_AXIS)})


def _weights(routing: Assignments | Slots, num_tokens: int, num_experts: int) -> Float[Array, "T E"]:
    if isinstance(routing, Slots):
        return jnp.sum(routing.combine, axis=2)
    weight_N = jnp.where(routing.valid, routing.weight, 0.0)
    return jnp.zeros((num_tokens, num_experts)).at[routing.token, routing.expert].add(weight_N)

"""Which experts the tokens of given examples have in a trained model, and with what weight."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from moe.evaluation.routing import chosen
from moe.models import Batch, ModelConfig, Variables
from moe.parallel.mesh import batch_shards
from moe.types import Observed
from moe.workdir import Loaded

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
    num_experts = config.moe.num_experts

    def look(observed: Observed) -> Array:
        return chosen(observed, num_experts).weight

    @jax.jit
    def run(variables: Variables, inputs: Array) -> Array:
        observe = loaded.model.method("observe")
        return observe(variables, _batch(inputs, config.model), mesh=loaded.mesh, look=look)

    # Each example is routed by itself, so that those that fill up the last part and device change nothing.
    shards = batch_shards(loaded.mesh)
    size = shards * min(-(-len(inputs) // shards), -(-_AT_A_TIME // shards))
    parts = jnp.resize(jnp.asarray(inputs), (-(-len(inputs) // size), size, *inputs.shape[1:]))
    weights = [jax.device_get(run(loaded.variables, part)) for part in parts]
    return np.concatenate(weights, axis=1)[:, : len(inputs)]


def _batch(inputs: Array, config: ModelConfig) -> Batch:
    """An evaluation batch of these inputs, each of them whole and by itself."""
    mask = jnp.ones(len(inputs), bool)
    if config.task == "image":
        return {"image": inputs, "mask": mask}
    position = jnp.broadcast_to(jnp.arange(inputs.shape[1], dtype=jnp.int32), inputs.shape)
    return {"tokens": inputs, "position": position, "segment": jnp.ones_like(position), "mask": mask}

"""What a forward pass keeps for its backward pass, as JAX traces them: before the compiler sees either."""

import math
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
from jax.sharding import Mesh

from moe.config import Config
from moe.models import Objective, Variables, make_model
from moe.parallel.mesh import batch_shards


def kept_bytes(config: Config, variables: Variables, batch: dict[str, jax.ShapeDtypeStruct], mesh: Mesh) -> int:
    """Bytes that one micro-batch keeps on each device; variables, batch: abstract, of a whole step.

    The values that the forward pass hands over, but for parameters and what else is given, each once. All of them
    belong to examples, and lie where these do; those of the shape of a parameter are its copies in another type, and
    lie as it does. Along `tensor` none is taken to be cut.
    """
    model = make_model(config.model, config.moe, config.router)
    objective = Objective(config.loss, config.label_smoothing)
    rows = config.batch_size // config.accumulation_steps
    micro = {name: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype) for name, leaf in batch.items()}
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))

    def kept(params: Any, state: Any, micro: Any, keys: Any) -> list[Any]:
        def loss(params: Any) -> jax.Array:
            output = model.loss(Variables(params, state), micro, keys=keys, mesh=mesh, objective=objective)
            return output.loss + sum(jnp.sum(values) for values in output.routers.losses.values())

        return jax.tree.leaves(jax.vjp(loss, params)[1])

    traced = jax.make_jaxpr(kept)(*variables, micro, keys).jaxpr
    shards = {leaf.shape: leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(variables.params)}
    given, total = set(traced.invars), 0
    for value in dict.fromkeys(one for one in traced.outvars if isinstance(one, jax.extend.core.Var)):
        if value not in given:
            array: Any = value.aval
            cut = math.prod(shards[array.shape]) if array.shape in shards else array.size // batch_shards(mesh)
            total += cut * array.dtype.itemsize
    return total

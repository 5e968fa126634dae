"""A training state with every layer's arrays on their own, for a step in which every layer is compiled on its own.

The arrays of a model are stacked over its layers, in checkpoints and wherever else one sees them. An unrolled program
copies each layer's out of the stack, and gathers their gradients in another. From one step to the next the layers can
stay apart instead: where they are stacked only for a slice to be taken, XLA does neither.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from moe.types import PyTree


class Loop(NamedTuple):
    """A training step as a run repeats it: on a state that is taken apart where that is faster.

    enter(state) -> its form for `train`; the state is used up. leave(of that, all or a part) -> as it was, in new
    arrays. train(that, batch) -> that, metrics, jitted. abstract_state: shapes, types and shardings of that.
    """

    enter: Callable[[Any], Any]
    train: Any
    leave: Callable[[PyTree], PyTree]
    abstract_state: Any


def make_loop(
    jitted: Callable[[Any], Any],
    abstract_state: Any,
    axes: PyTree,
    optimizer: optax.GradientTransformation,
    *,
    apart: bool,
) -> Loop:
    """The loop over a step, which is to `stack` the parameters that it is given.

    jitted(abstract_state): the step for states of these shapes and shardings, which have the fields `variables`, with
    `params`, and `opt_state`. axes: of the parameters, see `Model.axes`.
    """
    if not apart:
        return Loop(lambda state: state, jitted(abstract_state), lambda tree: tree, abstract_state)
    shared = jax.tree.map(lambda _, names: names[0] == "layers", abstract_state.variables.params, axes)

    def split_by(split: Callable[[Any], list], state: Any) -> Any:
        def one(leaf: Any, is_shared: bool) -> Any:
            return split(leaf) if is_shared else leaf

        params = jax.tree.map(one, state.variables.params, shared)
        opt_state = optax.tree_utils.tree_map_params(optimizer, one, state.opt_state, shared)
        return state._replace(variables=state.variables._replace(params=params), opt_state=opt_state)

    abstract = split_by(_split_abstract, abstract_state)
    return Loop(functools.partial(split_by, _split), jitted(abstract), functools.partial(stack, join=_join), abstract)


def stack(tree: PyTree, join: Callable[[list], Any] = jnp.stack) -> PyTree:
    """The tree with `join(layers)` in place of each list of layers; without lists, the same tree."""

    def one(node: Any) -> Any:
        return join(node) if isinstance(node, list) else node

    return jax.tree.map(one, tree, is_leaf=lambda node: isinstance(node, list))


def _split(x: jax.Array) -> list[jax.Array]:
    """The layers of a stacked array, laid out over the devices as it is."""
    layers = jax.jit(lambda x: list(jnp.unstack(x)), out_shardings=[_of_layer(x.sharding)] * len(x))(x)
    # Of a large model there is no room for both.
    jax.block_until_ready(layers)
    x.delete()
    return layers


def _split_abstract(x: jax.ShapeDtypeStruct) -> list[jax.ShapeDtypeStruct]:
    layer = jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=_of_layer(x.sharding))
    return [layer] * x.shape[0]


def _join(layers: list[jax.Array]) -> jax.Array:
    sharding: Any = layers[0].sharding
    whole = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
    if all(layer.is_fully_addressable for layer in layers):
        # In this machine's memory: nothing to compile.
        return jax.device_put(np.stack([np.asarray(layer) for layer in layers]), whole)
    return _joiner(whole)(layers)


@functools.lru_cache(maxsize=64)
def _joiner(sharding: NamedSharding) -> Any:
    """The same function for the same layout, so that a save compiles nothing that an earlier one has."""
    return jax.jit(lambda layers: jnp.stack(layers), out_shardings=sharding)


def _of_layer(sharding: Any) -> NamedSharding:
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))

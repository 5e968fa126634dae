"""Models, chosen by name; and the functional form in which the training step sees one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from moe.layers.moe import MoeConfig
from moe.layers.param import RouterState
from moe.models.vit import ModelOutput, VisionTransformer, ViTConfig
from moe.routers.base import Router
from moe.types import PyTree

MODELS = {"vit": (ViTConfig, VisionTransformer)}


class Variables(NamedTuple):
    """The arrays of a model: nested dicts, by the names of the modules.

    params: what the optimizer changes. router_state: what routers adapt outside the gradient.
    """

    params: PyTree
    router_state: PyTree


class Model(NamedTuple):
    """A model as pure functions.

    init(key): fresh variables. axes: the logical axes of every variable, in the same trees.
    apply(variables, inputs, keys=…, mesh=…, mask=…): the module's own call, but the new state of the routers comes back
        as the tree that `variables.router_state` is.
    """

    init: Callable[[jax.Array], Variables]
    axes: Variables
    apply: Callable[..., ModelOutput]


def make_model(config: ViTConfig, moe: MoeConfig, router: Router) -> Model:
    """The model of `config`; allocates nothing."""

    def build(key: jax.Array) -> nnx.Module:
        return VisionTransformer(config, moe, router, key=key)

    def split(module: nnx.Module) -> tuple[Any, ...]:
        return tuple(nnx.split(module, nnx.Param, RouterState))

    graph, *abstract = split(nnx.eval_shape(build, jax.random.key(0)))

    def init(key: jax.Array) -> Variables:
        return Variables(*(nnx.to_pure_dict(state) for state in split(build(key))[1:]))

    def apply(variables: Variables, *args: Any, **kwargs: Any) -> ModelOutput:
        output = nnx.merge(graph, *(nnx.State(tree) for tree in variables))(*args, **kwargs)
        # A period has one router and all periods are stacked, so both trees have the same leaves in the same order.
        leaves, structure = jax.tree.leaves(output.routers.state), jax.tree.structure(variables.router_state)
        return output._replace(routers=output.routers._replace(state=jax.tree.unflatten(structure, leaves)))

    return Model(init, Variables(*(_axes(state) for state in abstract)), apply)


def _axes(state: PyTree) -> PyTree:
    """The tree of variables with their logical axes in their place."""
    return nnx.to_pure_dict(
        jax.tree.map(
            lambda variable: variable.replace(variable.get_metadata("axes")),
            state,
            is_leaf=lambda node: isinstance(node, nnx.Variable),
        )
    )


__all__ = ["MODELS", "Model", "ModelOutput", "Variables", "ViTConfig", "VisionTransformer", "make_model"]

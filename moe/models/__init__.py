"""Models, chosen by name; and the functional form in which the training step sees one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from moe.layers.moe import MoeConfig
from moe.layers.param import RouterState
from moe.models.base import Batch, LossOutput, ModelConfig, ModelOutput, Objective
from moe.models.lm import LanguageModel, LmConfig
from moe.models.vit import VisionTransformer, ViTConfig
from moe.routers.base import Router
from moe.types import PyTree

MODELS: dict[str, tuple[type[ModelConfig], Any]] = {
    "vit": (ViTConfig, VisionTransformer),
    "lm": (LmConfig, LanguageModel),
}


class Variables(NamedTuple):
    """The arrays of a model: nested dicts, by the names of the modules.

    params: what the optimizer changes. router_state: what routers adapt outside the gradient.
    """

    params: PyTree
    router_state: PyTree


class Model(NamedTuple):
    """A model as pure functions.

    init(key): fresh variables. axes: the logical axes of every variable, in the same trees.
    apply(variables, inputs, keys=…, mesh=…): the module's own call, its logits and what its routers return.
    loss(variables, batch, keys=…, mesh=…): `LossOutput` of a training batch. terms(batch): what to divide its sums by.
    score(variables, batch, mesh=…): what `moe.evaluation` makes its measures of.
    method(name): any method of the module, as a function of the variables and its arguments.
    New state of the routers comes back as the tree that `variables.router_state` is.
    """

    init: Callable[[jax.Array], Variables]
    axes: Variables
    apply: Callable[..., ModelOutput]
    loss: Callable[..., LossOutput]
    terms: Callable[[Batch], Any]
    score: Callable[..., PyTree]
    method: Callable[[str], Callable[..., Any]]


def make_model(config: ModelConfig, moe: MoeConfig, router: Router) -> Model:
    """The model of `config`, for images or text, with the MoE layers that `moe` and `router` describe.

    Allocates nothing.
    """
    module_class = next(module for config_class, module in MODELS.values() if config_class is type(config))

    def build(key: jax.Array) -> nnx.Module:
        return module_class(config, moe, router, key=key)

    def split(module: nnx.Module) -> tuple[Any, ...]:
        return tuple(nnx.split(module, nnx.Param, RouterState))

    graph, *abstract = split(nnx.eval_shape(build, jax.random.key(0)))

    def init(key: jax.Array) -> Variables:
        return Variables(*(nnx.to_pure_dict(state) for state in split(build(key))[1:]))

    def method(name: str) -> Callable[..., Any]:
        def call(variables: Variables, *args: Any, **kwargs: Any) -> Any:
            module = nnx.merge(graph, *(nnx.State(tree) for tree in variables))
            output = getattr(module, name)(*args, **kwargs)
            if not hasattr(output, "routers"):
                return output
            # A period has one router and all periods are stacked, so both trees have the same leaves in one order.
            leaves, structure = jax.tree.leaves(output.routers.state), jax.tree.structure(variables.router_state)
            return output._replace(routers=output.routers._replace(state=jax.tree.unflatten(structure, leaves)))

        return call

    return Model(
        init=init,
        axes=Variables(*(_axes(state) for state in abstract)),
        apply=method("__call__"),
        loss=method("loss"),
        terms=module_class.terms,
        score=method("score"),
        method=method,
    )


def _axes(state: PyTree) -> PyTree:
    """The tree of variables with their logical axes in their place."""
    return nnx.to_pure_dict(
        jax.tree.map(
            lambda variable: variable.replace(variable.get_metadata("axes")),
            state,
            is_leaf=lambda node: isinstance(node, nnx.Variable),
        )
    )


__all__ = [
    "MODELS",
    "Batch",
    "LanguageModel",
    "LmConfig",
    "LossOutput",
    "Model",
    "ModelConfig",
    "ModelOutput",
    "Objective",
    "Variables",
    "ViTConfig",
    "VisionTransformer",
    "make_model",
]

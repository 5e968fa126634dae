"""Which experts the tokens of a few evaluation examples go to, layer by layer, to be shown in a report."""

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from moe.evaluation.routing import chosen
from moe.layers.moe import MoeConfig
from moe.models import Batch, ModelConfig, Variables, make_model
from moe.parallel.mesh import batch_sharding, batch_shards, local_rows, param_shardings, replicated, to_global
from moe.routers.base import Router
from moe.types import Observed, PyTree

# So many examples and tokens are shown at most, and of a token so many experts.
_EXAMPLES, _TOKENS, _CHOICES = 8, 2048, 2


class Examples(NamedTuple):
    """expert, weight: of each MoE layer (N) and example (S), the experts of each token by falling combine weight.

    A weight of 0 marks a choice that wasn't made, or padding. batch: the examples' rows of the evaluation batch.
    """

    batch: Batch
    expert: Int[np.ndarray, "N S L K"]
    weight: Float[np.ndarray, "N S L K"]


def trace_examples(
    config: ModelConfig, moe: MoeConfig, router: Router, variables: Variables, batch: Batch, mesh: Mesh
) -> Examples | None:
    """Runs the first examples of an evaluation batch, in one program; every process has to call it.

    None of a model without experts. As many examples are run as make whole groups on every device; fewer are shown.
    The group of moe.group_size = 0, the whole batch, is here these examples alone.
    """
    if not config.moe_every:
        return None
    size = len(batch["mask"])
    whole = math.lcm(batch_shards(mesh), moe.group_size or 1)
    rows = min(whole * -(-_EXAMPLES // whole), size)
    length = batch["tokens"].shape[1] if "tokens" in batch else config.length  # type: ignore[attr-defined]
    shown = max(1, min(_EXAMPLES, rows, _TOKENS // length))
    model = make_model(config, moe, router)

    def look(observed: Observed) -> tuple[Array, Array]:
        weight, expert = jax.lax.top_k(chosen(observed, moe.num_experts).weight, min(_CHOICES, moe.num_experts))
        return weight, expert

    def run(variables: Variables, batch: Batch) -> PyTree:
        observed = model.method("observe")(variables, batch, mesh=mesh, look=look)
        return jax.tree.map(lambda x_NGTK: x_NGTK.reshape(len(x_NGTK), rows, length, -1)[:, :shown], observed)

    first = {name: np.asarray(batch[name])[:rows] for name in config.scored}
    mine = np.array(local_rows(mesh, rows))
    laid = {name: to_global(values[mine], mesh) for name, values in first.items()}
    abstract = jax.eval_shape(lambda tree: tree, variables)
    shardings = Variables(*(param_shardings(*pair, mesh) for pair in zip(abstract, model.axes, strict=True)))
    # It runs once, on few rows: on CPU LLVM would take longer to make it fast.
    quick = {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else None
    laid_out = (shardings, batch_sharding(mesh))
    jitted = jax.jit(run, in_shardings=laid_out, out_shardings=replicated(mesh), compiler_options=quick)
    weight, expert = jax.device_get(jitted(variables, laid))
    kept: dict[str, Any] = {name: np.asarray(values)[:shown] for name, values in batch.items() if np.ndim(values)}
    return Examples(kept, expert, weight)

"""Which experts the tokens of a few evaluation examples go to, layer by layer, to be shown in a report."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from moe.layers.moe import MoeConfig
from moe.models import Batch, ModelConfig, Variables, make_model
from moe.parallel.mesh import batch_sharding, batch_shards, local_rows, param_shardings, replicated, to_global
from moe.routers.base import Router
from moe.types import GROUP_AXIS, Keys, PyTree, Routed, RouterInputs, Slots

# So many examples and tokens are shown at most, and of a token so many experts.
_EXAMPLES, _TOKENS, _CHOICES = 8, 2048, 2


class Examples(NamedTuple):
    """expert, weight: of each MoE layer (N) and example (S), the experts of each token by falling combine weight.

    A weight of 0 marks a choice that wasn't made, or padding. batch: the examples' rows of the evaluation batch.
    """

    batch: Batch
    expert: Int[np.ndarray, "N S L K"]
    weight: Float[np.ndarray, "N S L K"]


@dataclasses.dataclass(frozen=True)
class _Recorder:
    """A router that does what `router` does, and lists its first choices for the first tokens among its metrics."""

    router: Router
    tokens: int

    @property
    def k(self) -> int | None:
        return self.router.k

    def num_logits(self, num_experts: int) -> int:
        return self.router.num_logits(num_experts)

    def init(self, num_experts: int) -> tuple[PyTree, PyTree]:
        return self.router.init(num_experts)

    def __call__(self, params: PyTree, inputs: RouterInputs, state: PyTree, key: Keys | None) -> Routed:
        routed = self.router(params, inputs, state, key)
        num_experts = self.num_experts(inputs)
        if isinstance(routed.routing, Slots):
            weight_TE = jnp.sum(routed.routing.combine, axis=-1)
        else:
            one = routed.routing
            weight_N = jnp.where(one.valid, one.weight, 0).astype(jnp.float32)
            shape = (inputs.logits.shape[0], num_experts)
            weight_TE = jnp.zeros(shape).at[one.token, one.expert].add(weight_N)
        weight_TK, expert_TK = jax.lax.top_k(weight_TE, min(_CHOICES, num_experts))
        chosen = jnp.stack([expert_TK.astype(jnp.float32), weight_TK])
        # Of all groups, in order; each group says the same, so that their mean is it.
        chosen_GCTK = jax.lax.all_gather(chosen, GROUP_AXIS)
        first = jnp.moveaxis(chosen_GCTK, 1, 0).reshape(2, -1, chosen.shape[-1])[:, : self.tokens]
        return routed._replace(metrics={**routed.metrics, "chosen": first})

    @staticmethod
    def num_experts(inputs: RouterInputs) -> int:
        return inputs.layout.num_experts if inputs.layout else inputs.logits.shape[-1]


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
    model = make_model(config, moe, _Recorder(router, shown * length))

    def run(variables: Variables, batch: Batch) -> Array:
        if "tokens" in batch:
            segment_BL = jnp.where(batch["mask"][:, None], batch["segment"], 0)
            inputs = {"position_BL": batch["position"], "segment_BL": segment_BL}
            output = model.apply(variables, batch["tokens"], keys=None, mesh=mesh, **inputs)
        else:
            output = model.apply(variables, batch["image"], keys=None, mesh=mesh, mask=batch["mask"])
        return output.routers.metrics["chosen"]

    first = {name: np.asarray(batch[name])[:rows] for name in config.scored}
    mine = np.array(local_rows(mesh, rows))
    laid = {name: to_global(values[mine], mesh) for name, values in first.items()}
    abstract = jax.eval_shape(lambda tree: tree, variables)
    shardings = Variables(*(param_shardings(*pair, mesh) for pair in zip(abstract, model.axes, strict=True)))
    # It runs once, on few rows: on CPU LLVM would take longer to make it fast.
    quick = {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else None
    laid_out = (shardings, batch_sharding(mesh))
    jitted = jax.jit(run, in_shardings=laid_out, out_shardings=replicated(mesh), compiler_options=quick)
    chosen_N2TK = np.asarray(jax.device_get(jitted(variables, laid)))
    layers, _, _, choices = chosen_N2TK.shape
    expert, weight = np.moveaxis(chosen_N2TK.reshape(layers, 2, shown, length, choices), 1, 0)
    kept: dict[str, Any] = {name: np.asarray(values)[:shown] for name, values in batch.items() if np.ndim(values)}
    return Examples(kept, np.rint(expert).astype(np.int32), weight.astype(np.float32))

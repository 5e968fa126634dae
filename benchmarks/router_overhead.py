"""What share of an MoE layer's time is its router's, and of a training step's the router metrics'?

    python -m benchmarks.router_overhead [--json FILE] [--markdown FILE] [--cpu-time] [--only NAME ...]

case router   Forward and backward in training (with keys, losses and metrics) of one layer of SwiGLU experts, float32,
              T = 2048 tokens, D = 512, F = 1024, E = 8, K = 2, capacity 1.05: 8 examples of 256 tokens, in one group,
              which asks most of routers that look at a whole group. A row is the time of gate and router, its ratio
              that to the time of the whole layer with this router in the same interleaved run. A router that runs on
              one thread has a larger ratio by the clock than by --cpu-time.
case layer    The metrics that every router has, computed alone at that shape; ratio to the layer with softmax.
case digits   The step of configs/digits.py less that of the same step where nobody reads the metrics of its layers, so
              that XLA leaves them out; ratio to the step. The median over pairs of steps, one of each, as the
              difference is small.
"""

import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

sys.path.append(str(Path(__file__).parents[1]))  # for a call by path, which finds no packages beside this folder

import train
from benchmarks import common
from benchmarks.common import Row
from moe import isotonic, routers, topk
from moe.config import load_file, resolve
from moe.layers.moe import Moe, MoeConfig
from moe.parallel.mesh import MeshConfig, make_mesh
from moe.routers import ROUTERS, Router
from moe.routers.metrics import routing_metrics
from moe.types import Layout, Routed, RouterInputs

DIGITS = Path(__file__).parents[1] / "configs" / "digits.py"
EXAMPLES, LENGTH, WIDTH, HIDDEN, EXPERTS, K = 8, 256, 512, 1024, 8, 2
BY_EXAMPLE = "soft, slots=T/E, groups of one example"
Clock = Callable[[], float]


def settings() -> dict[str, Router]:
    """Every router at its defaults (k = K where it has one), and the variants that cost something else."""
    sparse = functools.partial(routers.SparseTopK, k=K)
    table: dict[str, Router] = {name: kind(**_k(kind)) for name, kind in ROUTERS.items()}
    return table | {
        "softmax, batch_priority": routers.Softmax(k=K, batch_priority=True),
        "softmax, jitter": routers.Softmax(k=K, jitter=0.01),
        "softmax, balance": routers.Softmax(k=K, noise=0.0, load_weight=0.0, balance_weight=0.01, z_weight=1e-3),
        "softmax, expert_groups": routers.Softmax(k=K, expert_groups=4, groups_per_token=2),
        "sigmoid, expert_groups": routers.Sigmoid(k=K, expert_groups=4, groups_per_token=2),
        "sparse_topk, mask": sparse(composition="mask"),
        "sparse_topk, magnitude": sparse(composition="magnitude", strength=0.1),
        "sparse_topk, by experts": sparse(choice="expert"),
        "sparse_topk, p=2": sparse(p=2.0),
        "sparse_topk, learned": sparse(schedule="learned"),
        "sparse_topk, Dykstra": sparse(p=2.0, solver=isotonic.Dykstra(steps=100)),
        "sparse_topk, max_experts": sparse(max_experts=3),
        "successive_halving, centred": routers.SuccessiveHalving(k=K, weights=topk.CentredBoost()),
        "successive_halving, over tokens": routers.SuccessiveHalving(k=K, over="tokens"),
        # As many slots as tokens, by example as in its paper.
        BY_EXAMPLE: routers.Soft(slots=LENGTH // EXPERTS),
    }


def _k(kind: type[Router]) -> dict[str, int]:
    fields = getattr(kind, "__dataclass_fields__", {})
    return {"k": K} if "k" in fields else {}


def programs(router: Router, groups: int) -> dict[str, Any]:
    """Compiled calls: gate and router, and the whole layer."""
    size = EXAMPLES // groups
    config = MoeConfig(
        num_experts=EXPERTS, expert_width=HIDDEN, group_size=size, dispatch="capacity", capacity_factor=1.05
    )
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    moe = Moe(WIDTH, config, router, "swiglu", key=jax.random.key(1))
    graph, variables, adapted = nnx.split(moe, nnx.Param, nnx.Variable)
    x = jax.random.normal(jax.random.key(0), (EXAMPLES, LENGTH, WIDTH))
    keys = jax.random.split(jax.random.key(2), EXAMPLES)

    def layer(variables: Any, x: jax.Array) -> Any:
        output = nnx.merge(graph, variables, adapted)(x, keys, mesh)
        return 0.5 * jnp.sum(jnp.square(output.y)) + sum(output.losses.values()), (output.metrics, output.state)

    params, state = router.init(EXPERTS)
    gate = moe.w_gate[...]

    def gate_and_router(variables: Any, x: jax.Array) -> Any:
        routed, _ = route(router, *variables, x, state, keys, groups)
        weights = [leaf for leaf in jax.tree.leaves(routed.routing) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        reads = sum(0.5 * jnp.sum(jnp.square(weight)) for weight in weights)
        return reads + sum(jnp.sum(loss) for loss in routed.losses.values()), routed

    return {
        "router": _with_gradients(gate_and_router, (params, gate), x),
        "layer": _with_gradients(layer, variables, x),
    }


def route(
    router: Router, params: Any, gate: jax.Array, x: jax.Array, state: Any, keys: jax.Array, groups: int
) -> tuple[Routed, jax.Array]:
    """What `Moe` does before it dispatches, and the logits."""
    x_GTD = x.reshape(groups, -1, WIDTH)
    ids_GT = jnp.tile(jnp.arange(LENGTH, dtype=jnp.int32), EXAMPLES).reshape(groups, -1)
    logits_GTX = jnp.einsum("GTD,DX->GTX", x_GTD, gate, precision="highest")
    inputs = RouterInputs(logits_GTX, tokens=x_GTD, ids=ids_GT, layout=Layout(EXPERTS, EXAMPLES // groups))
    by_group = jax.vmap(lambda one, key: router(params, one._replace(gate=gate), state, key))
    return by_group(inputs, keys.reshape(groups, -1)), logits_GTX


def _with_gradients(function: Any, *arguments: Any) -> Any:
    gradient = jax.jit(jax.value_and_grad(function, argnums=(0, 1), has_aux=True))
    return functools.partial(gradient.lower(*arguments).compile(), *arguments)


def of_routers(names: Sequence[str], clock: Clock) -> list[Row]:
    """Each router beside its layer."""
    rows = []
    for name, router in settings().items():
        if not names or name in names:
            calls = programs(router, groups=EXAMPLES if name == BY_EXAMPLE else 1)
            times = common.interleaved(calls, repeats=9, seconds=4, clock=clock)
            ratio = times["router"] / times["layer"]
            rows.append(Row(name=name, case="router", value=times["router"], unit="ms", ratio=ratio))
            print(common.table(rows[-1:]).splitlines()[-1], flush=True)
    return rows


def of_metrics(clock: Clock) -> list[Row]:
    """The metrics at the layer's shape, and in the step of the digits."""
    softmax = routers.Softmax(k=K)
    x = jax.random.normal(jax.random.key(0), (EXAMPLES, LENGTH, WIDTH))
    gate = jax.random.normal(jax.random.key(3), (WIDTH, EXPERTS)) * WIDTH**-0.5
    routed, logits_GTX = route(softmax, {}, gate, x, {}, jax.random.split(jax.random.key(2), EXAMPLES), 1)
    mask_GT = jnp.ones(logits_GTX.shape[:2], bool)
    metrics = jax.jit(functools.partial(routing_metrics, num_experts=EXPERTS))
    alone = functools.partial(metrics, routed.routing, logits_GTX, mask_GT, routed.routing.choices)
    times = common.interleaved({"alone": alone, "layer": programs(softmax, 1)["layer"]}, seconds=6, clock=clock)
    rows = [("layer", "layer", times["alone"], times["alone"] / times["layer"])]

    whole, more = pairs(*digits_steps(), clock=clock)
    rows.append(("step", "digits", more, more / whole))
    return [
        Row(name=f"router metrics, share of {what}", case=case, value=value, unit="ms", ratio=ratio)
        for what, case, value, ratio in rows
    ]


def pairs(first: Any, second: Any, *, clock: Clock, repeats: int = 600, seconds: float = 30.0) -> tuple[float, float]:
    """Median milliseconds of the first call, and by how much it takes longer than the second, by pairs in either order.

    Neighbours in time share what else the machine does.
    """
    for call in (first, second):
        jax.block_until_ready(call())
    times: dict[Any, list[float]] = {first: [], second: []}
    begin = time.perf_counter()
    while len(times[first]) < repeats and time.perf_counter() - begin < seconds:
        for call in (first, second) if len(times[first]) % 2 else (second, first):
            start = clock()
            jax.block_until_ready(call())
            times[call].append(1e3 * (clock() - start))
    return float(np.median(times[first])), float(np.median(np.subtract(times[first], times[second])))


def digits_steps() -> tuple[Any, Any]:
    """The training step of configs/digits.py, with all its metrics and without those of its MoE layers."""
    config = resolve(load_file(str(DIGITS)))
    step = train.make_step(config, make_mesh(config.mesh, jax.devices()[:1]))
    image = np.random.default_rng(0).uniform(size=(config.batch_size, *config.model.image_size)).astype(np.float32)
    batch = {"image": image, "label": np.arange(config.batch_size, dtype=np.int32) % config.model.num_classes}
    state = step.init(jax.random.key(config.seed))

    def with_metrics(state: Any, batch: Any) -> Any:
        return step.train(state, batch)

    def without_metrics(state: Any, batch: Any) -> Any:
        state, metrics = step.train(state, batch)
        return state, {name: values for name, values in metrics.items() if name != "moe"}

    # As programs of one kind, which both copy the state.
    lowered = [jax.jit(run).lower(state, batch) for run in (with_metrics, without_metrics)]
    calls = [program.compile(step.compiler_options) for program in lowered]
    return functools.partial(calls[0], state, batch), functools.partial(calls[1], state, batch)


def main() -> None:
    """Time every router, then the metrics."""
    options = common.parser(__doc__)
    options.add_argument("--only", nargs="+", metavar="NAME", default=[], help="rows of case router; all by default")
    arguments = options.parse_args()
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    common.report([*of_routers(arguments.only, clock), *of_metrics(clock)], arguments)


if __name__ == "__main__":
    main()

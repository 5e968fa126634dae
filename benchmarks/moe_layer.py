"""How fast is the MoE layer's dispatch beside a dense layer of the same active FLOPs?

    python -m benchmarks.moe_layer [--json FILE] [--markdown FILE] [--cpu-time] [--quick]

Forward and backward of SwiGLU experts in float32, T = 2048 tokens, D = 512, F = 1024, E = 8, K = 2; the dense layer has
width K F. `uniform`: every choice is as likely to be any expert. `skewed`: 60 % of all choices are one expert (with a
capacity, most of those overflow and cost nothing). Routing itself isn't in it: choices are drawn beforehand.
The row `dense, share of peak` says how near the dense layer comes to the machine's fastest matrix product: below .7 the
ratios say little.
"""

import functools
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.append(str(Path(__file__).parents[1]))  # for a call by path, which finds no packages beside this folder

from benchmarks import common
from benchmarks.common import Row
from moe.layers.mlp import WEIGHT_AXES, mlp
from moe.ops.permute import capacity
from moe.parallel.dispatch import dispatch
from moe.parallel.mesh import MeshConfig, make_mesh
from moe.types import Assignments

TOKENS, WIDTH, HIDDEN, EXPERTS, K = 2048, 512, 1024, 8, 2
SKEW = 0.6
CAPACITIES = (1.05, 1.25)


def weights(hidden: int, num_experts: int | None) -> dict[str, jax.Array]:
    """SwiGLU's matrices, of every expert or of one dense layer."""
    lead = () if num_experts is None else (num_experts,)
    shapes = {"w_in": (WIDTH, hidden), "w_gate": (WIDTH, hidden), "w_out": (hidden, WIDTH)}
    keys = jax.random.split(jax.random.key(1), len(shapes))
    return {
        name: jax.random.normal(key, lead + shape) * shape[0] ** -0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def assignments(tokens: int, skewed: bool) -> Assignments:
    """K choices for every token, first choices first; skewed: the share SKEW of all choices is one expert."""
    rows = tokens * K
    rest = (1 - SKEW) / (EXPERTS - 1)
    shares = [SKEW] + [rest] * (EXPERTS - 1) if skewed else [1 / EXPERTS] * EXPERTS
    expert = np.random.default_rng(0).choice(EXPERTS, size=(1, rows), p=shares)
    return Assignments(
        token=jnp.tile(jnp.arange(tokens, dtype=jnp.int32), K)[None],
        expert=jnp.asarray(expert, jnp.int32),
        weight=jnp.full((1, rows), 1.0 / K),
        valid=jnp.ones((1, rows), bool),
        choices=jnp.full((1,), rows, jnp.int32),
    )


def step(apply: Any) -> Any:
    """Output, and gradients in the input and all matrices, for a cotangent that depends on the output."""
    return jax.jit(jax.value_and_grad(lambda x, w: 0.5 * jnp.sum(jnp.square(apply(x, w))), argnums=(0, 1)))


def layer(tokens: int, routing: Assignments, factor: float | None) -> Any:
    """The experts behind one dispatch; factor None: without capacity."""
    places = None if factor is None else capacity(factor, tokens, K, EXPERTS)

    def apply(x: jax.Array, w: dict[str, jax.Array]) -> jax.Array:
        return dispatch(
            lambda weights, x, product: mlp(weights, x, "swiglu", product),
            w,
            {name: ("expert", *WEIGHT_AXES[name]) for name in w},
            x[None],
            routing,
            num_experts=EXPERTS,
            capacity=places,
            mesh=make_mesh(MeshConfig(data=1), jax.devices()[:1]),
        )[0]

    return step(apply)


def peak_flops() -> float:
    """FLOP/s of the fastest of a few large matrix products."""
    best = 0.0
    for size in (1024, 2048):
        a = jax.random.normal(jax.random.key(0), (size, size))
        product = jax.jit(jnp.matmul)
        product(a, a).block_until_ready()
        for _ in range(5):
            start = time.perf_counter()
            product(a, a).block_until_ready()
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def main() -> None:
    """Time all layers in turns, once for each routing."""
    options = common.parser(__doc__)
    options.add_argument("--quick", action="store_true", help="an eighth of the tokens")
    arguments = options.parse_args()
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    tokens = TOKENS // 8 if arguments.quick else TOKENS
    x = jax.random.normal(jax.random.key(0), (tokens, WIDTH))
    experts, dense = weights(HIDDEN, EXPERTS), weights(K * HIDDEN, None)
    rows: list[Row] = []
    for case in ("uniform", "skewed"):
        routing = assignments(tokens, case == "skewed")
        layers = {"dense": functools.partial(step(lambda x, w: mlp(w, x, "swiglu")), x, dense)}
        for factor in CAPACITIES:
            layers[f"capacity_{factor}"] = functools.partial(layer(tokens, routing, factor), x, experts)
        layers["dropless"] = functools.partial(layer(tokens, routing, None), x, experts)
        times = common.interleaved(layers, repeats=9, seconds=60, clock=clock)
        rows += common.timed_rows(case, times, "dense")
        achieved = 3 * 3 * 2 * tokens * WIDTH * K * HIDDEN / (1e-3 * times["dense"])
        share = achieved / peak_flops()
        rows.append(Row(name="dense, share of peak", case=case, value=share, unit="", ratio=None))
    common.report(rows, arguments)


if __name__ == "__main__":
    main()

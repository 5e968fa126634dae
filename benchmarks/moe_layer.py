"""How fast is the MoE layer's dispatch beside a dense layer of the same active FLOPs, and how much memory does it take?

    python -m benchmarks.moe_layer [--json FILE] [--markdown FILE] [--cpu-time] [--quick]

Forward and backward of SwiGLU experts in float32, T = 2048 tokens, D = 512, F = 1024, E = 8, K = 2; the dense layer has
width K F. `uniform`: every choice is as likely to be any expert. `skewed`: 60 % of all choices are one expert (with a
capacity, most of those overflow and cost nothing). Routing itself isn't in it: choices are drawn beforehand.
With the extra `parity` the same run times the same numbers in PyTorch (`torch_dense`) and in Mixtral's experts of
transformers (`hf_eager`, `hf_grouped_mm`).
The row `dense, share of peak` says how near the dense layer comes to the machine's fastest matrix product: below .7 the
ratios say little. `peak, …` names that product, the fastest of some large ones, the layer's own among them, by JAX,
NumPy and PyTorch. Products and layers run in turns, and every time is a median.
`einsum_1.25` cuts the tokens into 4 groups, as its tensors grow with the square of a group.
Rows `…, temp`: the largest memory that XLA has in use at a time besides arguments and results.
"""

import functools
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

sys.path.append(str(Path(__file__).parents[1]))  # for a call by path, which finds no packages beside this folder

from benchmarks import common, torch_layers
from benchmarks.common import Row
from moe.layers.mlp import WEIGHT_AXES, mlp
from moe.ops.permute import capacity
from moe.parallel.dispatch import dispatch
from moe.parallel.mesh import MeshConfig, make_mesh
from moe.types import Assignments

TOKENS, WIDTH, HIDDEN, EXPERTS, K = 2048, 512, 1024, 8, 2
SKEW = 0.6
CASES = {"uniform": False, "skewed": True}


class Layer(NamedTuple):
    """A way to dispatch.

    factor: of the capacity, None for no limit. groups: into which the tokens are cut. settings: what else `dispatch` is
    given, names and values.
    """

    factor: float | None
    groups: int = 1
    settings: tuple[tuple[str, Any], ...] = ()


LAYERS = {
    "capacity_1.05": Layer(1.05),
    "capacity_1.25": Layer(1.25),
    "dropless": Layer(None),
    "einsum_1.25": Layer(1.25, groups=4, settings=(("implementation", "einsum"),)),
}


def weights(hidden: int, num_experts: int | None) -> dict[str, jax.Array]:
    """SwiGLU's matrices, of every expert or of one dense layer."""
    lead = () if num_experts is None else (num_experts,)
    shapes = {"w_in": (WIDTH, hidden), "w_gate": (WIDTH, hidden), "w_out": (hidden, WIDTH)}
    keys = jax.random.split(jax.random.key(1), len(shapes))
    return {
        name: jax.random.normal(key, lead + shape) * shape[0] ** -0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def choices(tokens: int, skewed: bool) -> np.ndarray:
    """K experts for every token, [T, K]; skewed: the share SKEW of all choices is one expert."""
    rest = (1 - SKEW) / (EXPERTS - 1)
    shares = [SKEW] + [rest] * (EXPERTS - 1) if skewed else [1 / EXPERTS] * EXPERTS
    return np.random.default_rng(0).choice(EXPERTS, size=(tokens, K), p=shares)


def assignments(expert_TK: np.ndarray, groups: int) -> Assignments:
    """These choices in queue order, first choices first, with equal weights."""
    tokens = len(expert_TK) // groups
    rows = tokens * K
    expert_GN = expert_TK.reshape(groups, tokens, K).swapaxes(1, 2).reshape(groups, rows)
    return Assignments(
        token=jnp.tile(jnp.arange(tokens, dtype=jnp.int32), (groups, K)),
        expert=jnp.asarray(expert_GN, jnp.int32),
        weight=jnp.full((groups, rows), 1.0 / K),
        valid=jnp.ones((groups, rows), bool),
        choices=jnp.full(groups, rows, jnp.int32),
    )


def dense_layer(x: jax.Array, w: dict[str, jax.Array], routing: None) -> jax.Array:
    """What the others are compared with, which has no routing."""
    del routing
    return mlp(w, x, "swiglu")


def moe_layer(layer: Layer, x: jax.Array, w: dict[str, jax.Array], routing: Assignments) -> jax.Array:
    """The experts behind one dispatch."""
    x_GTD = x.reshape(layer.groups, -1, WIDTH)
    y_GTD, _ = dispatch(
        lambda weights, x, product: mlp(weights, x, "swiglu", product),
        w,
        {name: ("expert", *WEIGHT_AXES[name]) for name in w},
        x_GTD,
        routing,
        num_experts=EXPERTS,
        capacity=None if layer.factor is None else capacity(layer.factor, x_GTD.shape[1], K, EXPERTS),
        mesh=make_mesh(MeshConfig(data=1), jax.devices()[:1]),
        **dict(layer.settings),
    )
    return y_GTD.reshape(x.shape)


def compiled(apply: Any, *arguments: Any) -> Any:
    """Half the squares' sum of the output, and gradients in the input and all matrices, as a program."""

    # The routing is an argument, as a constant would let XLA compute the places of rows beforehand.
    def total(x: jax.Array, w: dict[str, jax.Array], routing: Assignments | None) -> jax.Array:
        return 0.5 * jnp.sum(jnp.square(apply(x, w, routing)))

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1))).lower(*arguments).compile()


def products(tokens: int, width: int, hidden: int) -> dict[str, tuple[float, Any]]:
    """FLOPs and a call of large matrix products: a dense layer's, forward and for its gradients, and a square one."""
    shapes = [(tokens, width, hidden), (tokens, hidden, width), (width, tokens, hidden), (TOKENS, TOKENS, TOKENS)]
    calls = torch_layers.products(shapes)
    times_jit = jax.jit(jnp.matmul)
    for m, k, n in shapes:
        a, b = jax.random.normal(jax.random.key(0), (m, k)), jax.random.normal(jax.random.key(1), (k, n))
        calls[f"jax {m}x{k}x{n}"] = functools.partial(times_jit, a, b)
        calls[f"numpy {m}x{k}x{n}"] = functools.partial(np.matmul, np.array(a), np.array(b))
    flops = {f"{m}x{k}x{n}": 2.0 * m * k * n for m, k, n in shapes}
    return {f"peak, {name}": (flops[name.split()[1]], call) for name, call in calls.items()}


def timed(case: str, layers: dict[str, Any], tokens: int, clock: Any) -> list[Row]:
    """Times of the layers, and how near the dense one comes to the fastest product, all in one run."""
    peaks = products(tokens, WIDTH, K * HIDDEN)
    calls = layers | {name: call for name, (_, call) in peaks.items()}
    # The threads of one library rest before another's begin.
    times = common.interleaved(calls, repeats=9, seconds=60, clock=clock, rest=0.05)
    speeds = {name: 1e-6 * flops / times.pop(name) for name, (flops, _) in peaks.items()}
    fastest = max(speeds, key=lambda name: speeds[name])
    share = 1e-6 * 3 * 3 * 2 * tokens * WIDTH * K * HIDDEN / times["dense"] / speeds[fastest]
    return [
        *common.timed_rows(case, times, "dense"),
        Row(name="dense, share of peak", case=case, value=share, unit="", ratio=None),
        Row(name=fastest, case=case, value=speeds[fastest], unit="GFLOP/s", ratio=None),
    ]


def main() -> None:
    """Time all layers in turns, once for each routing."""
    options = common.parser(__doc__)
    options.add_argument("--quick", action="store_true", help="an eighth of the tokens")
    arguments = options.parse_args()
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    tokens = TOKENS // 8 if arguments.quick else TOKENS
    x = jax.random.normal(jax.random.key(0), (tokens, WIDTH))
    experts, dense = weights(HIDDEN, EXPERTS), weights(K * HIDDEN, None)

    any_choice = choices(tokens, skewed=False)
    programs = {"dense": compiled(dense_layer, x, dense, None)}
    for name, layer in LAYERS.items():
        apply = functools.partial(moe_layer, layer)
        programs[name] = compiled(apply, x, experts, assignments(any_choice, layer.groups))
    if torch_layers.MISSING:
        print(f"without PyTorch's layers: {' and '.join(torch_layers.MISSING)} not installed (extra parity)")

    rows: list[Row] = []
    for case, skewed in CASES.items():
        expert_TK = choices(tokens, skewed)
        layers = {"dense": functools.partial(programs["dense"], x, dense, None)}
        for name, layer in LAYERS.items():
            layers[name] = functools.partial(programs[name], x, experts, assignments(expert_TK, layer.groups))
        layers |= torch_layers.layers(*jax.tree.map(np.array, (x, expert_TK, experts, dense)))
        rows += timed(case, layers, tokens, clock)
    bytes_of = {name: program.memory_analysis().temp_size_in_bytes for name, program in programs.items()}
    for name, size in bytes_of.items():
        ratio = size / bytes_of["dense"]
        rows.append(Row(name=f"{name}, temp", case="memory", value=size / 2**20, unit="MiB", ratio=ratio))
    common.report(rows, arguments)


if __name__ == "__main__":
    main()

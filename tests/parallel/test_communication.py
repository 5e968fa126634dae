"""Bytes that a layer's devices trade, counted from the compiled program: in proportion to tokens, not to experts."""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from moe.ops.permute import capacity
from moe.parallel.mesh import MeshConfig, make_mesh
from moe.types import Assignments
from tests.parallel.helpers import HIDDEN, WIDTH, Case, K, run
from tests.routers.helpers import COMPILER_OPTIONS

SHARDS = 8
BYTES = {"f32": 4, "s32": 4, "u32": 4, "pred": 1}
COLLECTIVE = r"= (\(.*?\)|\S+) (?:all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute)(?:-start)?\("


def traded_bytes(hlo: str) -> int:
    """Bytes of the results of all collectives in the text, one device's; a loop's body counts once.

    Groups of one device trade nothing: they are left of axes of the mesh that have size 1.
    """
    total = 0
    for line in hlo.splitlines():
        collective = re.search(COLLECTIVE, line)
        if collective is None or is_alone(line):
            continue
        shapes = re.findall(r"(\w+)\[([\d,]*)\]", collective[1])
        total += sum(BYTES[kind] * math.prod(int(size) for size in sizes.split(",") if size) for kind, sizes in shapes)
    return total


def is_alone(collective: str) -> bool:
    """Whether its groups are of one device, written as a list, a shape, or axes of the mesh."""
    by_axes = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", collective)
    if by_axes is None:
        return re.search(r"replica_groups=(?:\{\{\d+\}|\[\d+,1\])", collective) is not None
    sizes = dict(axis.split("=") for axis in by_axes[1].split(","))
    return all(sizes[axis] == "1" for axis in by_axes[2].split(","))


@functools.cache
def layer_bytes(way: str, num_tokens: int, num_experts: int, receive_factor: float = float(SHARDS)) -> int:
    """Of output and gradients, for one group of tokens on each of eight devices that share the experts."""
    shapes = {"w_in": (WIDTH, HIDDEN), "w_gate": (WIDTH, HIDDEN), "w_out": (HIDDEN, WIDTH)}
    like = jax.ShapeDtypeStruct
    weights = {name: like((num_experts, *shape), jnp.float32) for name, shape in shapes.items()}
    rows = (SHARDS, num_tokens * K)
    routing = Assignments(
        *(like(rows, kind) for kind in (jnp.int32, jnp.int32, jnp.float32, bool)), like(rows[:1], jnp.int32)
    )
    x = like((SHARDS, num_tokens, WIDTH), jnp.float32)
    places = None if way == "dropless" else capacity(1.0, num_tokens, K, num_experts)
    how: dict[str, Any] = {"implementation": way, "capacity": places, "receive_factor": receive_factor}
    mesh = make_mesh(MeshConfig(data=1, expert=SHARDS))
    batch = jax.NamedSharding(mesh, jax.P(("data", "fsdp", "expert")))
    x, routing = jax.tree.map(lambda a: like(a.shape, a.dtype, sharding=batch), (x, routing))
    split = jax.NamedSharding(mesh, jax.P("expert"))
    weights = {name: like(a.shape, a.dtype, sharding=split) for name, a in weights.items()}
    # What is differentiated lies where its gradient goes, so that only the layer itself communicates.
    program = jax.jit(lambda *case: run(Case(*case), mesh, **how)[2:])
    return traded_bytes(program.lower(x, weights, routing).compile(COMPILER_OPTIONS).as_text())


@pytest.mark.parametrize("way", ["einsum", "capacity", "dropless"])
def test_bytes_follow_the_tokens_and_not_the_experts(way: str) -> None:
    """Four journeys of rows of the model's width, and little else; dropless with room for any routing.

    Twice the bytes for twice the tokens and half the experts: a share that followed the experts would show.
    """
    base = layer_bytes(way, num_tokens=64, num_experts=32)
    assert layer_bytes(way, num_tokens=128, num_experts=16) == pytest.approx(2 * base, rel=0.01)
    journeys = 4 * (64 * K) * 4 * WIDTH
    assert base == pytest.approx(journeys if way != "dropless" else SHARDS * journeys, rel=0.15)


def test_a_round_with_less_room_trades_less() -> None:
    """Room for an even share: an eighth of the bytes, counted for the first round and, with what the backward pass
    computes again, for a later one.
    """
    most = layer_bytes("dropless", num_tokens=64, num_experts=32)
    assert layer_bytes("dropless", num_tokens=64, num_experts=32, receive_factor=1.0) < 0.3 * most

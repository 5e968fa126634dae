"""Reading what a TPU program costs, on texts small enough to count by hand, and the real compiler's MoE programs.

A Pallas kernel counts as its compiled body times its grid, whatever it declares. Megablox's grid is known only at run
time: it is counted as large as the rows in use can make it (`most_visits`).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu.megablox.gmm import make_group_metadata
from jax.sharding import AxisType, Mesh, SingleDeviceSharding

from benchmarks import tpu_moe_layer
from moe.ops.grouped_matmul import grouped_matmul
from moe.parallel.mesh import MESH_AXES
from moe.plan import program

HLO = """HloModule m

%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %left.1 = bf16[3,4,5]{2,1,0:T(8,128)} parameter(0)
  %right.1 = bf16[3,5,6]{2,1,0:T(8,128)} parameter(1)
  %conv.1 = bf16[3,4,6]{2,1,0:T(8,128)} convolution(%left.1, %right.1), window={size=3 stride=2 lhs_dilate=3}, dim_labels=0bf_0io->0bf
  %a2a.1 = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} all-to-all(%conv.1), channel_id=1, replica_groups={{0,1}}
}

%cond.1 (q: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7)
  ROOT %lt = pred[] compare(%limit, %limit), direction=LT
}

%small (p: f32[2,3]) -> f32[2,3] {
  ROOT %p.1 = f32[2,3]{1,0} parameter(0)
}

%large (p: f32[2,3]) -> f32[2,2] {
  %p.2 = f32[2,3]{1,0} parameter(0)
  ROOT %dot.1 = f32[2,2]{1,0} dot(%p.2, %p.2), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %fusion.1 = f32[8]{0} fusion(%x), kind=kOutput, calls=%large, backend_config={"estimated_cycles":"30"}
  %conditional.1 = f32[2,2]{1,0} conditional(%x, %x, %x), branch_computations={%small, %large}
  %ragged.1 = ((f32[6]{0}, f32[9]{0}, s32[2]{0}), f32[9]{0}) ragged-all-to-all-start(%x, %x, %x), replica_groups={{0,1}}
  %gather.1 = (f32[4]{0}, f32[8]{0}) all-gather-start(%x), replica_groups={{0,1}}
  ROOT %while.3 = (s32[], f32[8]{0}) while(%t), condition=%cond.1, body=%body.1
}
"""  # noqa: E501


def test_flops_are_counted_by_hand() -> None:
    """Of the dilated convolution, a batch of 3, only one pair for each output is in place."""
    batch, dot = 2 * 3 * 4 * 5 * 6, 2 * 2 * 2 * 3
    assert program.flops(HLO) == 7 * batch + 2 * dot
    assert program.flops(HLO, branch=min) == 7 * batch + dot


def test_attributes_may_go_over_lines() -> None:
    told = HLO.replace(
        "lhs_contracting_dims={1}", 'frontend_attributes={kernel_metadata={\n"a":"1"\n}}, lhs_contracting_dims={1}'
    )
    assert told.count("\n") == HLO.count("\n") + 2
    assert program.flops(told) == program.flops(HLO)
    # And a computation may be another core's.
    assert program.flops(HLO.replace("}\n\n%small", '}, execution_thread="sparsecore"\n\n%small')) == program.flops(HLO)


def test_cycles_are_counted_by_hand() -> None:
    assert program.fusion_cycles(HLO) == 30


def test_a_loop_of_unknown_length_is_named() -> None:
    with pytest.raises(ValueError, match=r"the condition of while.3 holds the constants \[\], not one trip count"):
        program.flops(HLO.replace("constant(7)", "parameter(0)"))


def test_visits_are_those_of_megablox() -> None:
    rng, tile, block, groups = np.random.default_rng(0), 16, 4, 6
    for _ in range(5):
        counts = rng.multinomial(60, rng.dirichlet(np.full(groups, 0.5)))
        sizes = -(-counts // block) * block
        _, visits = make_group_metadata(
            group_sizes=jnp.asarray(sizes, jnp.int32),
            m=96,
            tm=tile,
            start_group=jnp.int32(0),
            num_nonzero_groups=groups,
            visit_empty_groups=False,
        )
        assert program.visited(sizes.tolist(), tile) == visits
        kernel = program.Kernel("gmm", 0.0, 1, True, tile, 0, "")
        assert visits <= program.most_visits(60, groups, block)(kernel)
        aligned = kernel._replace(rows=block)
        assert program.visited(sizes.tolist(), block) <= program.most_visits(60, groups, block)(aligned)


# The real compiler ----------------------------------------------------------------------------------------------------

ROWS, WIDTH, HIDDEN, EXPERTS, BLOCK = 8192, 256, 512, 8, 128
# 1.15 times the active rows, and one block for each expert.
BOUND = 1.15 + EXPERTS * BLOCK / ROWS


@pytest.fixture(params=["v5e:2x2", "v5p:2x2x1"])
def devices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[jax.Device]:
    """Four that this machine doesn't have."""
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install 'moe-jax[tpu-aot]'")
    for name, value in program.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    return list(topologies.get_topology_desc(platform="tpu", topology_name=request.param).devices)


def product_flops(device: jax.Device, implementation: str | None, wanted: tuple[int, ...]) -> float:
    """Of the gradients in x (0), w (1) and the value they come with, over one product of the rows for each of them."""
    argument = functools.partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device))
    x = argument((ROWS + EXPERTS * BLOCK, WIDTH), jnp.bfloat16)
    w, sizes_E = argument((EXPERTS, WIDTH, HIDDEN), jnp.float32), argument((EXPERTS,), jnp.int32)
    product: Callable = functools.partial(grouped_matmul, block=BLOCK, implementation=implementation)

    def loss(x: jax.Array, w: jax.Array, sizes_E: jax.Array) -> jax.Array:
        y = product(x, w, sizes_E).astype(jnp.float32)
        return jnp.sum(jnp.sin(y) if len(wanted) == 2 else y)

    step = jax.jit(jax.grad(loss, argnums=wanted))
    hlo = step.trace(x, w, sizes_E).lower(lowering_platforms=("tpu",)).compile().as_text()
    found = program.flops(hlo, program.most_visits(ROWS, EXPERTS, BLOCK))
    return found / ((3 if len(wanted) == 2 else 1) * 2 * ROWS * WIDTH * HIDDEN)


@pytest.mark.tpu_aot
def test_the_grouped_matmul_costs_its_rows_on_tpu(devices: list[jax.Device]) -> None:
    assert 1 <= product_flops(devices[0], None, (0, 1)) <= BOUND


@pytest.mark.tpu_aot
@pytest.mark.parametrize("devices", ["v5e:2x2"], indirect=True)
def test_the_count_sees_the_dense_product_of_ragged_dot(devices: list[jax.Device]) -> None:
    """On v5e: with jax 0.12 everywhere, before that in the matrices' gradient alone."""
    wanted = (0, 1) if jax.__version_info__ >= (0, 12) else (1,)
    assert product_flops(devices[0], "ragged_dot", wanted) >= 6


@pytest.mark.tpu_aot
@pytest.mark.parametrize("name", ["capacity_1.05", "capacity_1.25", "dropless"])
def test_the_layer_costs_its_rows_on_tpu(name: str, devices: list[jax.Device]) -> None:
    mesh = Mesh(np.array(devices).reshape(1, 2, 1, 2, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 5)
    shape = tpu_moe_layer.Shape(tokens=2 * ROWS, width=WIDTH, hidden=HIDDEN, experts=2 * EXPERTS, k=2)
    compiled = tpu_moe_layer.compile_layer(shape, tpu_moe_layer.IMPLEMENTATIONS[name], mesh)
    found = program.flops(compiled.as_text(), program.most_visits(ROWS, EXPERTS, BLOCK))
    factor = tpu_moe_layer.IMPLEMENTATIONS[name].capacity_factor
    assert 1 <= found / shape.active_flops(len(devices)) <= (BOUND if factor is None else 1.15 * factor)

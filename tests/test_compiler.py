"""Options of the compiler by device, and that libtpu knows those of the presets."""

from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from moe.compiler import OVERLAP, CompilerConfig, TooLarge, compile_step, compiler_options
from moe.plan import program
from moe.plan.chips import CHIPS, parse_slice, peak_flops

CPU = SimpleNamespace(platform="cpu", device_kind="cpu")
V5P = SimpleNamespace(platform="tpu", device_kind="TPU v5")


def test_options_follow_the_device_and_the_users_win() -> None:
    assert list(compiler_options(CompilerConfig(), CPU)) == ["xla_cpu_scheduler_type"]
    assert compiler_options(CompilerConfig(), V5P) == {}
    assert compiler_options(CompilerConfig(preset="overlap"), CPU) == compiler_options(CompilerConfig(), CPU)
    own = CompilerConfig(preset="overlap", options=("xla_enable_async_all_gather=false", "xla_x=a=b"))
    assert compiler_options(own, V5P) == {
        **OVERLAP["TPU v5"].options,
        "xla_enable_async_all_gather": "false",
        "xla_x": "a=b",
    }


@pytest.mark.parametrize("option", ["xla_tpu_x", "tpu_x=1", "--xla_x=1", ""])
def test_an_option_is_a_name_and_a_value(option: str) -> None:
    with pytest.raises(ValueError, match=rf"has '{option}': each must be xla_NAME=VALUE\.$"):
        CompilerConfig(options=(option,))


def test_every_chip_has_a_preset_with_its_source_and_a_peak() -> None:
    assert len(OVERLAP) == len(CHIPS)
    for kind, preset in OVERLAP.items():
        assert preset.source.startswith("https://github.com/AI-Hypercomputer/maxtext/")
        assert peak_flops(kind) > 100e12
    assert peak_flops("TPU7x") == CHIPS["tpu7x"].flops / 2
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12
    assert peak_flops("cpu") == 0.0


@pytest.mark.tpu_aot
@pytest.mark.parametrize("name", CHIPS)
def test_libtpu_knows_every_option(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install 'moe-jax[tpu-aot]'")
    from jax.experimental import topologies

    for variable, value in program.ENVIRONMENT.items():
        monkeypatch.setenv(variable, value)
    one = parse_slice(f"{name}:{'x'.join(map(str, CHIPS[name].host_shape))}")
    found = topologies.get_topology_desc(platform="tpu", topology_name=one.topology, **one.chip.options)
    device = found.devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((128, 128), jnp.bfloat16, sharding=sharding)
    lowered = jax.jit(lambda x: x @ x).trace(x).lower(lowering_platforms=("tpu",))
    assert peak_flops(device.device_kind) == CHIPS[name].flops / CHIPS[name].cores
    options = compiler_options(CompilerConfig(preset="overlap"), device)
    assert len(options) > 5
    lowered.compile(options)
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_tpu_no_such_option"):
        lowered.compile({"xla_tpu_no_such_option": True})


def refused(message: str) -> mock.Mock:
    """A program of which XLA says so when it is compiled."""
    return mock.Mock(spec=jax.stages.Lowered, compile=mock.Mock(side_effect=jax.errors.JaxRuntimeError(message)))


def test_a_program_that_does_not_fit_says_by_how_much() -> None:
    message = (
        "RESOURCE_EXHAUSTED: permanent error.\nUsed: total memory required (86.40G) exceeds available HBM (15.75G)"
    )
    with pytest.raises(TooLarge, match=r"^the training step needs 86\.40G of the 15\.75G that a device has$") as caught:
        compile_step(refused(message), {})
    assert caught.value.needed == 86.40 * 2**30


def test_an_option_that_the_compiler_refuses_is_named() -> None:
    lowered = jax.jit(lambda x: x + 1).lower(jnp.zeros(3))
    with pytest.raises(ValueError, match=r"^compiler\.options or compiler\.preset: .*'xla_no_such'"):
        compile_step(lowered, {"xla_no_such": "1"})
    with pytest.raises(ValueError, match="xla_cpu_scheduler_type"):
        compile_step(lowered, {"xla_cpu_scheduler_type": "X"})
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        compile_step(refused("INTERNAL: something else"), {})

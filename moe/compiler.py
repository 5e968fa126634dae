"""How the training step is compiled: options by device, presets of such options, and a cache of compiled programs."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

import jax

_TRILLIUM = "https://github.com/AI-Hypercomputer/maxtext/blob/main/benchmarks/maxtext_trillium_model_configs.py"
_V5P = "https://github.com/AI-Hypercomputer/maxtext/tree/main/src/MaxText/configs/tpu/v5p"


@dataclasses.dataclass(frozen=True)
class CompilerConfig:
    """How the training step is compiled.

    preset: "default", what the compiler does by itself; "overlap", on TPU, its options for collectives that run
        while the chip multiplies, as `OVERLAP` has them for each kind of chip.
    options: further ones, "NAME=VALUE" each, which win over the preset's.
    cache: folder, or gs:// path, in which compiled programs are kept from one start to the next; "": nowhere.
    """

    preset: Literal["default", "overlap"] = "default"
    options: tuple[str, ...] = ()
    cache: str = ""

    def __post_init__(self) -> None:
        for option in self.options:
            name, equals, _ = option.partition("=")
            if not name.startswith("xla_") or not equals:
                raise ValueError(f"compiler.options has '{option}': each must be xla_NAME=VALUE.")


@dataclasses.dataclass(frozen=True)
class Preset:
    """Options of libtpu, and where they are published."""

    options: Mapping[str, Any]
    source: str


_GATHERS = {
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
    "xla_enable_async_all_gather": True,
}
# libtpu 0.0.52 refuses it on every other chip, where MaxText has it too, for fear of wrong results.
_GATHERS_ON_V5E = {"xla_tpu_enable_async_collective_fusion_fuse_all_gather": True}
# Between slices: gradients are summed while the backward pass goes on.
_REPLICAS = {
    "xla_tpu_enable_data_parallel_all_reduce_opt": True,
    "xla_tpu_data_parallel_opt_different_sized_ops": True,
}
_DENSE = {
    **_GATHERS,
    **_REPLICAS,
    "xla_tpu_megacore_fusion_allow_ags": False,
    "xla_enable_async_collective_permute": True,
    "xla_tpu_enable_ag_backward_pipelining": True,
}
_MOE = {**_GATHERS, **_REPLICAS, "xla_tpu_scoped_vmem_limit_kib": 81920}
# By what JAX calls a kind of chip. MaxText publishes those of v5p for all of its models, and those of v6e for Mixtral
# 8x7B; v5p's are taken for v4 and v5e, and v6e's for tpu7x.
OVERLAP: Mapping[str, Preset] = {
    "TPU v4": Preset(_DENSE, _V5P),
    "TPU v5 lite": Preset(_DENSE | _GATHERS_ON_V5E, _V5P),
    "TPU v5": Preset(_DENSE, _V5P),
    "TPU v6 lite": Preset(_MOE, _TRILLIUM),
    "TPU7x": Preset(_MOE, _TRILLIUM),
}
# On CPU XLA by default orders operations for a concurrency that a few cores don't have, and temporaries take half as
# much memory again, or more.
_CPU = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def compiler_options(config: CompilerConfig, device: Any) -> dict[str, Any]:
    """What `.lower(…).compile(…)` of a step is given for such a device."""
    options: dict[str, Any] = dict(_CPU) if device.platform == "cpu" else {}
    if config.preset == "overlap" and device.platform == "tpu":
        options |= OVERLAP[device.device_kind].options
    return options | {name: value for name, _, value in (option.partition("=") for option in config.options)}


class TooLarge(Exception):
    """A program doesn't fit in a device's memory. needed: bytes that it takes there."""

    def __init__(self, needed: float, message: str) -> None:
        super().__init__(message)
        self.needed = needed


def compile_step(lowered: jax.stages.Lowered, options: Mapping[str, Any]) -> Any:
    """Compiles a training step. Raises ValueError for an option that the compiler doesn't know or like, TooLarge."""
    try:
        return lowered.compile(dict(options))
    except jax.errors.JaxRuntimeError as error:
        message = " ".join(str(error).split())
        if re.search(r"compile option|setting option|FAILED_PRECONDITION", message):
            raise ValueError(f"compiler.options or compiler.preset: {message[:300]}") from error
        sizes = re.search(r"required.*?\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+[KMGT])\)", message)
        if sizes is None:
            raise
        needed = float(sizes[1]) * 1024 ** ("KMGT".index(sizes[2]) + 1)
        raise TooLarge(
            needed, f"the training step needs {sizes[1]}{sizes[2]} of the {sizes[3]} that a device has"
        ) from error


def keep_programs(config: CompilerConfig) -> None:
    """Turns on the cache of compiled programs, where the config names a folder; before anything is compiled."""
    if config.cache:
        jax.config.update("jax_compilation_cache_dir", config.cache)
        # However quickly a program was compiled: on many hosts even small ones are worth a file.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

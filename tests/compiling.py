"""How the tests' programs are compiled: in half the time, but for those in which a test counts what users run."""

from importlib import metadata
from pathlib import Path
from typing import Any

# Most of the tests' time would go into optimising programs that run for microseconds. The fusion emitters, which take
# as long as LLVM does, can be left out up to jaxlib 0.10.
_FAST: dict[str, Any] = {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}
# Compiler options for a program as users compile it.
AS_USERS: dict[str, Any] = {"xla_backend_optimization_level": 3}
if metadata.version("jaxlib").startswith("0.10."):
    _FAST["xla_cpu_use_fusion_emitters"] = False
    AS_USERS["xla_cpu_use_fusion_emitters"] = True
# For the whole process and its children, as in the environment's XLA_FLAGS.
FLAGS = [f"--{name}={str(value).lower()}" for name, value in _FAST.items()]


def make_room() -> None:
    """Forgets compiled programs before there are 65 530 maps of memory, where Linux ends the process."""
    import jax  # It reads FLAGS from the environment, which conftest sets first.

    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_text().splitlines()) > 30_000:
        jax.clear_caches()

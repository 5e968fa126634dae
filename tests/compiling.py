"""How the tests' programs are compiled: in half the time, but for those that count what a user's program does."""

from importlib import metadata
from typing import Any

# Most of the tests' time would go into optimising programs that run for microseconds. The fusion emitters, which take as
# long as LLVM does, can be left out up to jaxlib 0.10.
FAST: dict[str, Any] = {"xla_backend_optimization_level": 0}
# Undoes it, for counts of bytes and operations in a program as users compile it.
AS_USERS: dict[str, Any] = {"xla_backend_optimization_level": 3}
if metadata.version("jaxlib").startswith("0.10."):
    FAST["xla_cpu_use_fusion_emitters"] = False
    AS_USERS["xla_cpu_use_fusion_emitters"] = True


def flags() -> str:
    """`FAST` for a whole process and its children, as XLA_FLAGS has it."""
    return " ".join(f"--{name}={str(value).lower()}" for name, value in FAST.items())

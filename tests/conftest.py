"""Every test sees eight simulated devices, shapes checked against signatures, no rank promotion, and quick compiles."""

import gc
import os
from collections.abc import Iterator

from tests import compiling

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8", *compiling.FLAGS]
).strip()

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_rank_promotion", "raise")
# Tracing makes many objects and few cycles: a twentieth of the time went into looking for these.
gc.set_threshold(100_000, 20, 20)
install_import_hook("moe", "beartype.beartype")


@pytest.fixture(scope="session", autouse=True)
def eight_devices() -> None:
    assert jax.device_count() == 8


@pytest.fixture(scope="module", autouse=True)
def room_for_programs() -> Iterator[None]:
    yield
    compiling.make_room()

"""Every test sees eight simulated devices, shapes checked against signatures, no rank promotion, and quick compiles."""

import gc
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

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


@pytest.fixture
def record() -> Callable[[str, str, float, str], None]:
    """Keeps a figure: a row of the JSON list in the file that $SURVIVAL_JSON names, if any."""

    def write(name: str, case: str, value: float, unit: str) -> None:
        if target := os.environ.get("SURVIVAL_JSON"):
            path = Path(target)
            rows = json.loads(path.read_text()) if path.exists() else []
            rows = [row for row in rows if (row["name"], row["case"]) != (name, case)]
            rows.append({"name": name, "case": case, "value": value, "unit": unit, "ratio": None})
            path.write_text(json.dumps(rows, indent=1) + "\n")

    return write

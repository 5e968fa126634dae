"""What a run runs on: versions, platform, devices."""

import importlib.metadata
import os
import platform
from collections import Counter
from typing import Any

import jax
from jax.sharding import Mesh

_PACKAGES = ("moe-jax", "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def environment(mesh: Mesh) -> dict[str, Any]:
    """What environment.json holds, as texts and numbers by name; nothing that names the machine or its user."""
    kinds = Counter(device.device_kind for device in mesh.devices.flat)
    axes = (f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    return {
        "devices": ", ".join(f"{count} × {kind}" for kind, count in kinds.items()),
        "mesh": " × ".join(axes) or "one device",
        "processes": jax.process_count(),
        "platform": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        **{name: version for name in _PACKAGES if (version := _version(name))},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""

"""Slices of Cloud TPUs that people rent, and the meshes that configs lay over them."""

from collections.abc import Mapping

# The number in a slice's name counts chips, or on v5p the two cores of each.
PER_CHIP = {"v5e": 1, "v5p": 2, "v6e": 1}


def chips(name: str) -> int:
    """The chips of a slice by name: 64 of "v5p-128", 16 of "v5e-16"."""
    kind, _, size = name.partition("-")
    return int(size) // PER_CHIP[kind]


def meshes(**shapes: tuple[int, int, int]) -> Mapping[str, Mapping[str, int]]:
    """Meshes by the name of their slice, such as v5e-16, from v5e_16=(fsdp, expert, tensor); data takes in the rest.

    A config has them as MESHES, and `--config=FILE.py:v5e-16` chooses one. Raises ValueError for a shape that doesn't
    divide the chips of its slice.
    """
    table = {}
    for key, (fsdp, expert, tensor) in shapes.items():
        name = key.replace("_", "-")
        data, left = divmod(chips(name), fsdp * expert * tensor)
        if left or not data:
            raise ValueError(
                f"a mesh of fsdp={fsdp} × expert={expert} × tensor={tensor} doesn't divide the {chips(name)} chips of "
                f"{name}."
            )
        table[name] = {"dcn": 1, "data": data, "fsdp": fsdp, "expert": expert, "tensor": tensor}
    return table


def micro_batches(batch_size: int, mesh: Mapping[str, int], rows: int = 1) -> int:
    """The accumulation_steps with which a device has so many examples at a time; ValueError where that leaves some."""
    at_once = rows * mesh["dcn"] * mesh["data"] * mesh["fsdp"] * mesh["expert"]
    count, left = divmod(batch_size, at_once)
    if left or not count:
        raise ValueError(f"micro-batches of {at_once} examples, {rows} a device, don't divide a batch of {batch_size}.")
    return count

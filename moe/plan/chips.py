"""The TPUs that a step can be compiled for, and what a chip of each can do at most: the one table of such figures."""

import dataclasses
import math
import re

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU chip.

    flops: bfloat16 FLOP/s at peak. usable_bytes: of memory that libtpu lets a program have on a device, by its own
        message where one needs more (0.0.42 and 0.0.52, alike to .01 GiB). hbm_bandwidth: bytes/s to and from memory.
    links: to neighbours, two for each dimension of the torus. link_bandwidth: bytes/s of one link in one direction.
    dcn_bandwidth: bytes/s over the data centre's network. cores: devices that JAX shows for a chip.
    host_shape: chips of a host. largest: of a slice. source: where the figures stand.
    """

    name: str
    flops: float
    usable_bytes: float
    hbm_bandwidth: float
    links: int
    link_bandwidth: float
    dcn_bandwidth: float
    cores: int
    host_shape: tuple[int, ...]
    largest: tuple[int, ...]
    source: str

    @property
    def options(self) -> dict[str, str]:
        """What libtpu wants to know besides the topology's name: JAX shows v4's two cores as one device."""
        return {"chip_config_name": "megacore"} if self.name == "v4" else {}

    @property
    def dimensions(self) -> int:
        """Of the torus."""
        return self.links // 2


_DOCS = "https://docs.cloud.google.com/tpu/docs/"
# The pages give the interconnect in both directions together, and the network in bits; v4's network isn't given there,
# and is taken to be v5e's.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 30.75 * GIB, 1.2e12, 6, 50e9, 25e9 / 8, 1, (2, 2, 1), (12, 16, 16), _DOCS + "v4"),
        Chip("v5e", 197e12, 15.75 * GIB, 819e9, 4, 50e9, 25e9 / 8, 1, (2, 2), (16, 16), _DOCS + "v5e"),
        Chip("v5p", 459e12, 95.73 * GIB, 2765e9, 6, 100e9, 50e9 / 8, 1, (2, 2, 1), (16, 16, 24), _DOCS + "v5p"),
        Chip("v6e", 918e12, 31.24 * GIB, 1638e9, 4, 100e9, 100e9 / 8, 1, (2, 2), (16, 16), _DOCS + "v6e"),
        Chip("tpu7x", 2307e12, 94.74 * GIB, 7380e9, 6, 100e9, 100e9 / 8, 2, (2, 2, 1), (16, 16, 36), _DOCS + "tpu7x"),
    )
}


# What JAX calls the devices of each.
_DEVICE_KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU7x": "tpu7x"}
# The same of GPUs: bfloat16 FLOP/s of dense matrices, from NVIDIA's data sheets (SXM), by the beginning of the name.
_GPUS = {"NVIDIA A100": 312e12, "NVIDIA H100": 989.4e12, "NVIDIA H200": 989.4e12, "NVIDIA B200": 2250e12}


def peak_flops(device_kind: str) -> float:
    """bfloat16 FLOP/s at peak of one device that JAX calls so; 0 where it isn't known, as of a CPU."""
    if device_kind in _DEVICE_KINDS:
        chip = CHIPS[_DEVICE_KINDS[device_kind]]
        return chip.flops / chip.cores
    return next((flops for name, flops in _GPUS.items() if device_kind.startswith(name)), 0.0)


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips of one kind in a torus of `shape`, `count` of them connected by the data centre's network."""

    chip: Chip
    shape: tuple[int, ...]
    count: int = 1

    @property
    def topology(self) -> str:
        """The name that libtpu knows one of them by."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        """Of all slices together."""
        return self.count * math.prod(self.shape)

    @property
    def devices(self) -> int:
        """That JAX shows for them."""
        return self.chips * self.chip.cores


def parse_slice(name: str, count: int = 1) -> Slice:
    """The slices that a topology's name stands for, such as v5p:4x4x8. Raises ValueError for one that there isn't."""
    kind, _, shape = name.partition(":")
    known = "; ".join(f"{chip.name}:{_shape(chip.host_shape)} … {_shape(chip.largest)}" for chip in CHIPS.values())
    if kind not in CHIPS:
        raise ValueError(f"topology '{name}' is of no kind of TPU known here: {known}.")
    chip = CHIPS[kind]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise ValueError(f"topology '{name}' must be a kind and a shape, such as {kind}:{_shape(chip.host_shape)}.")
    sizes = tuple(map(int, shape.split("x")))
    if len(sizes) != chip.dimensions:
        raise ValueError(
            f"topology '{name}' has {len(sizes)} dimensions, and slices of {kind} have {chip.dimensions}: {known}."
        )
    if math.prod(sizes) > math.prod(chip.largest):
        raise ValueError(
            f"topology '{name}' has {math.prod(sizes)} chips, and a slice of {kind} at most {math.prod(chip.largest)}, "
            f"{_shape(chip.largest)}."
        )
    if count < 1:
        raise ValueError(f"slices = {count} must be at least 1.")
    return Slice(chip, sizes, count)


def _shape(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))

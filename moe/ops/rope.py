"""Rotary position embedding (RoFormer, Su et al. 2021, arXiv 2104.09864), and how its frequencies are stretched."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@runtime_checkable
class RopeScaling(Protocol):
    """How a model reads positions beyond those that it was first trained on."""

    @property
    def attention_factor(self) -> float:
        """What queries and keys are multiplied by besides the rotation."""
        ...

    def scale(self, frequencies: Float[np.ndarray, "d"], theta: float) -> Float[np.ndarray, "d"]:
        """The frequencies to use instead of theta^(-i/d), i = 0 … d - 1, in radians per position."""
        ...


@dataclasses.dataclass(frozen=True)
class Unscaled:
    """The frequencies as they are."""

    attention_factor = 1.0

    def scale(self, frequencies: Float[np.ndarray, "d"], theta: float) -> Float[np.ndarray, "d"]:
        """See `RopeScaling`."""
        return frequencies


@dataclasses.dataclass(frozen=True)
class Linear:
    """Position interpolation (Chen et al. 2023, arXiv 2306.15595): positions, or frequencies, over `factor`."""

    factor: float = 1.0
    attention_factor = 1.0

    def __post_init__(self) -> None:
        _check_factor(self.factor)

    def scale(self, frequencies: Float[np.ndarray, "d"], theta: float) -> Float[np.ndarray, "d"]:
        """See `RopeScaling`."""
        return frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3:
    """Llama 3.1 (arXiv 2407.21783): slow rotations over `factor`, fast ones kept, by turns within `original_length`.

    Fewer than `low_turns` turns are slow, more than `high_turns` fast; in between the frequency is interpolated.
    """

    factor: float = 8.0
    low_turns: float = 1.0
    high_turns: float = 4.0
    original_length: int = 8192
    attention_factor = 1.0

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        if not 0 < self.low_turns < self.high_turns:
            raise ValueError(
                f"model.rope_scaling.low_turns = {self.low_turns} must be positive and below high_turns = "
                f"{self.high_turns}."
            )

    def scale(self, frequencies: Float[np.ndarray, "d"], theta: float) -> Float[np.ndarray, "d"]:
        """See `RopeScaling`."""
        turns = self.original_length * frequencies / (2 * np.pi)
        kept = np.clip((turns - self.low_turns) / (self.high_turns - self.low_turns), 0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN (Peng et al. 2023, arXiv 2309.00071), section 3.2: like `Llama3`, interpolated along the index i instead.

    fast_turns, slow_turns: turns within `original_length` from which on a frequency is kept, and below which it is
        divided by `factor`. truncate: round the indices where these lie outwards to whole ones.
    attention: the factor of section 3.4 on queries and keys; 0: .1 ln(factor) + 1.
    """

    factor: float = 4.0
    fast_turns: float = 32.0
    slow_turns: float = 1.0
    original_length: int = 4096
    truncate: bool = True
    attention: float = 0.0

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        if not 0 < self.slow_turns < self.fast_turns:
            raise ValueError(
                f"model.rope_scaling.slow_turns = {self.slow_turns} must be positive and below fast_turns = "
                f"{self.fast_turns}."
            )

    @property
    def attention_factor(self) -> float:
        """See `RopeScaling`."""
        return self.attention or 0.1 * math.log(self.factor) + 1.0

    def scale(self, frequencies: Float[np.ndarray, "d"], theta: float) -> Float[np.ndarray, "d"]:
        """See `RopeScaling`."""
        count = len(frequencies)

        def index(turns: float) -> float:
            return count * math.log(self.original_length / (turns * 2 * math.pi)) / math.log(theta)

        low, high = index(self.fast_turns), index(self.slow_turns)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        # The published code bounds the upper index by the width of a head, which has twice as many entries.
        low, high = max(low, 0), min(high, 2 * count - 1)
        divided = np.clip((np.arange(count) - low) / max(high - low, 1e-3), 0, 1)
        return frequencies * (1 - divided + divided / self.factor)


ROPE_SCALINGS: Mapping[str, type] = {"none": Unscaled, "linear": Linear, "llama3": Llama3, "yarn": Yarn}


def rotation(
    position_BL: Int[Array, "B L"], head_width: int, theta: float, scaling: RopeScaling
) -> tuple[Float[Array, "B L d"], Float[Array, "B L d"]]:
    """Cosine and sine of every position's angles, d = head_width / 2 of them, times the attention factor; float32."""
    count = head_width // 2
    frequencies = scaling.scale(theta ** -(np.arange(count) / count), theta)
    angle_BLd = position_BL[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)[None, None]
    return scaling.attention_factor * jnp.cos(angle_BLd), scaling.attention_factor * jnp.sin(angle_BLd)


def rotate(
    x_BLHd: Float[Array, "B L H w"], cos_BLd: Float[Array, "B L d"], sin_BLd: Float[Array, "B L d"]
) -> Float[Array, "B L H w"]:
    """Turns the plane of entries (i, i + w/2) of each head by angle i, in float32."""
    first, second = jnp.split(x_BLHd.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BLd[:, :, None], sin_BLd[:, :, None]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BLHd.dtype)


def _check_factor(factor: float) -> None:
    if factor < 1:
        raise ValueError(f"model.rope_scaling.factor = {factor} must be at least 1.")

"""Random shifts, rotations, scales, slants and flips of image batches, as one resampling per image.

What happens to an image depends on the seed and on its position in the sequence of training examples, and on nothing
else: not on the batch that it is in, the host that reads it, or what was read before.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Float32, Int, UInt64

DRAWS = 6  # random numbers per image: two shifts, angle, scale, flip, shear


@dataclasses.dataclass(frozen=True)
class Augment:
    """How far images may be moved; all zero, the default, leaves them as they are.

    shift: up to so many pixels along each axis, uniform.
    rotate_degrees: up to so many degrees either way about the centre, uniform.
    scale: by a factor between 1 / (1 + scale) and 1 + scale about the centre, log-uniform.
    flip: mirror left to right, every second image on average.
    shear_degrees: slant by up to so many degrees either way, uniform, rows staying horizontal.
    """

    shift: float = 0.0
    rotate_degrees: float = 0.0
    scale: float = 0.0
    flip: bool = False
    shear_degrees: float = 0.0

    def __post_init__(self) -> None:
        """Raises ValueError for a negative extent."""
        for name in ("shift", "rotate_degrees", "scale", "shear_degrees"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ValueError(f"augment.{name} is {value}: give the largest change, a number that is at least 0")

    def __bool__(self) -> bool:
        """Whether any image is changed."""
        return bool(self.shift or self.rotate_degrees or self.scale or self.flip or self.shear_degrees)


def augment(
    images: Float32[np.ndarray, "B h w c"], positions: Int[np.ndarray, "B"], config: Augment, seed: int
) -> Float32[np.ndarray, "B h w c"]:
    """The images, each moved by the random transform of its position; what comes into view from outside is 0."""
    if not config:
        return images
    return warp(images, *sample_maps(positions, config, seed))


def sample_maps(
    positions: Int[np.ndarray, "B"], config: Augment, seed: int
) -> tuple[Float[np.ndarray, "B 2 2"], Float[np.ndarray, "B 2"]]:
    """Random (matrix, shift) pairs as `warp` takes them, one per position.

    M = R(angle) · diag(scale, ±scale) · S, where S slants: it moves a pixel along its row by tan(shear) · its row.
    """
    draws = uniform(seed, positions, DRAWS)
    signed = 2.0 * draws - 1.0
    shift = config.shift * signed[:, :2]
    angle = np.deg2rad(config.rotate_degrees) * signed[:, 2]
    scale = np.exp(np.log1p(config.scale) * signed[:, 3])
    mirror = np.where(config.flip & (draws[:, 4] < 0.5), -1.0, 1.0)
    cosine, sine = scale * np.cos(angle), scale * np.sin(angle)
    # Coordinates are (row, column) with rows growing downwards, so this turns counterclockwise to the eye.
    matrix = np.stack([np.stack([cosine, -sine * mirror], -1), np.stack([sine, cosine * mirror], -1)], axis=-2)
    slant = np.tile(np.eye(2), (len(positions), 1, 1))
    slant[:, 1, 0] = np.tan(np.deg2rad(config.shear_degrees) * signed[:, 5])
    return matrix @ slant, shift


def warp(
    images: Float32[np.ndarray, "B h w c"], matrix: Float[np.ndarray, "B 2 2"], shift: Float[np.ndarray, "B 2"]
) -> Float32[np.ndarray, "B h w c"]:
    """Moves what is at x to M (x - centre) + centre + shift, x = (row, column), interpolating linearly; outside is 0.

    As scipy.ndimage.affine_transform with order 1 and mode "grid-constant", for a batch with a map for each image.
    """
    batch, height, width, channels = images.shape
    centre = np.array([height - 1, width - 1], np.float32) / 2
    grid = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1).reshape(-1, 2)
    inverse = np.linalg.inv(matrix).astype(np.float32)
    offset = centre - np.einsum("bij,bj->bi", inverse, centre + shift.astype(np.float32))
    sought = grid.astype(np.float32) @ inverse.transpose(0, 2, 1) + offset[:, None, :]  # [B, h·w, 2]

    # One pixel of zeros all around stands for all that is outside; coordinates are in the padded image from here on.
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0))).reshape(-1, channels)
    limit = np.array([height, width], np.float32)
    sought = np.clip(sought, -1.0, limit) + 1.0
    corner = np.minimum(np.floor(sought), limit)  # so that corner + 1 exists
    fraction = sought - corner
    row_weight, column_weight = fraction[..., 0, None], fraction[..., 1, None]
    stride = width + 2
    row, column = np.moveaxis(corner.astype(np.int64), -1, 0)
    first = (np.arange(batch)[:, None] * (height + 2) + row) * stride + column
    upper = padded[first] * (1 - column_weight) + padded[first + 1] * column_weight
    lower = padded[first + stride] * (1 - column_weight) + padded[first + stride + 1] * column_weight
    return (upper * (1 - row_weight) + lower * row_weight).reshape(images.shape)


def uniform(seed: int, positions: Int[np.ndarray, "B"], draws: int) -> Float[np.ndarray, "B {draws}"]:
    """Numbers in [0, 1) that depend on (seed, position, draw) alone: for each position, a SplitMix64 stream.

    Its start is a hash of seed and position. Source: Steele, Lea and Flood, Fast splittable pseudorandom number
    generators, OOPSLA 2014 (constants of its reference implementation).
    """
    start = _mix(positions.astype(np.uint64) + _mix(np.array([seed], np.uint64)))
    counters = start[:, None] + np.uint64(0x9E3779B97F4A7C15) * np.arange(1, draws + 1, dtype=np.uint64)
    return (_mix(counters) >> np.uint64(11)) * 2.0**-53


def _mix(bits: UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """SplitMix64's finaliser, a bijection of 64 bits; products wrap around, as array arithmetic does."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))

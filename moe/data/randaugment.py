"""RandAugment (Cubuk et al. 2019, arXiv 1909.13719): a few operations drawn at random, all of one magnitude.

The operations are those of Pillow where it has them, as the paper and AutoAugment (1805.09501) define them by Pillow;
the list and the extents are those of the paper's own code, which V-MoE and "How to train your ViT?" (2106.10270) use.
"""

import dataclasses
from collections.abc import Callable, Mapping

from jaxtyping import Float
from numpy import ndarray
from PIL import Image, ImageEnhance, ImageOps

DRAWS = 4  # random numbers per operation: which one, its sign, and where it falls along the two axes
_GREY = 128  # of what comes into view from outside, and of what is cut out
_REFERENCE = 224  # side in pixels of the images for which the paper's code gives extents in pixels


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """How many operations, and how strong.

    layers: N, operations on an image, one after the other, each drawn with replacement; 0: none.
    magnitude: M; 10 is what the paper's code calls an operation's full extent, 30 the largest that the paper tries.

    "light" in V-MoE's ImageNet runs: N = 2, M = 10; "medium" 2, 15; "strong" 2, 20.
    """

    layers: int = 0
    magnitude: float = 10.0

    def __post_init__(self) -> None:
        """Raises ValueError for a number out of range."""
        if self.layers < 0:
            raise ValueError(f"data.photo.randaugment.layers is {self.layers}: it must be at least 0")
        if not 0 <= self.magnitude <= 30:
            raise ValueError(f"data.photo.randaugment.magnitude is {self.magnitude}: it must lie between 0 and 30")


def randaugment(image: Image.Image, draws: Float[ndarray, "N 4"], magnitude: float) -> Image.Image:
    """The image after one operation for each row of `draws`, numbers in [0, 1): (operation, sign, row, column)."""
    for choice, sign, row, column in draws.tolist():
        operation = list(OPERATIONS.values())[int(choice * len(OPERATIONS))]
        image = operation(image, magnitude / 10, _Place(1.0 if sign < 0.5 else -1.0, row, column))
    return image


@dataclasses.dataclass(frozen=True)
class _Place:
    """sign: 1 or -1. row, column: in [0, 1), as shares of height and width."""

    sign: float
    row: float
    column: float


Operation = Callable[[Image.Image, float, _Place], Image.Image]


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """Fetches the pixel at (x, y) from (a x + b y + c, d x + e y + f), the nearest one."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=_grey(image))


def _grey(image: Image.Image) -> int | tuple[int, ...]:
    return _GREY if image.mode == "L" else (_GREY,) * len(image.getbands())


def _rotate(image: Image.Image, level: float, place: _Place) -> Image.Image:
    """By 30 degrees times the level, either way about the centre."""
    return image.rotate(30 * level * place.sign, Image.Resampling.NEAREST, fillcolor=_grey(image))


def _shear_x(image: Image.Image, level: float, place: _Place) -> Image.Image:
    """Moves a row along itself by 0.3 times the level for each row below the first."""
    return _affine(image, (1.0, 0.3 * level * place.sign, 0.0, 0.0, 1.0, 0.0))


def _shear_y(image: Image.Image, level: float, place: _Place) -> Image.Image:
    return _affine(image, (1.0, 0.0, 0.0, 0.3 * level * place.sign, 1.0, 0.0))


def _translate_x(image: Image.Image, level: float, place: _Place) -> Image.Image:
    """By 100 pixels of 224 times the level."""
    return _affine(image, (1.0, 0.0, 100 / _REFERENCE * level * place.sign * image.width, 0.0, 1.0, 0.0))


def _translate_y(image: Image.Image, level: float, place: _Place) -> Image.Image:
    return _affine(image, (1.0, 0.0, 0.0, 0.0, 1.0, 100 / _REFERENCE * level * place.sign * image.height))


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    """Blends the image with one that has none of what `kind` enhances, by the factor 0.1 + 1.8 times the level."""
    return lambda image, level, place: kind(image).enhance(0.1 + 1.8 * level)


def _posterize(image: Image.Image, level: float, place: _Place) -> Image.Image:
    """Keeps the highest ⌊4 · level⌋ bits, but at least one."""
    return ImageOps.posterize(image, min(8, max(1, int(4 * level))))


def _solarize(image: Image.Image, level: float, place: _Place) -> Image.Image:
    """Inverts values from 256 times the level on: at M = 10 none."""
    return ImageOps.solarize(image, int(256 * level))


def _solarize_add(image: Image.Image, level: float, place: _Place) -> Image.Image:
    """Adds 110 times the level to values below 128."""
    table = [min(255, value + int(110 * level)) if value < 128 else value for value in range(256)]
    return image.point(table * len(image.getbands()))


def _cutout(image: Image.Image, level: float, place: _Place) -> Image.Image:
    """Blanks what lies within 40 pixels of 224 times the level of a random place, along both axes (1708.04552)."""
    row, column = int(place.row * image.height), int(place.column * image.width)
    half_height = int(40 / _REFERENCE * level * image.height)
    half_width = int(40 / _REFERENCE * level * image.width)
    box = (
        max(0, column - half_width),
        max(0, row - half_height),
        min(image.width, column + half_width),
        min(image.height, row + half_height),
    )
    changed = image.copy()
    changed.paste(_grey(image), box)
    return changed


OPERATIONS: Mapping[str, Operation] = {
    "autocontrast": lambda image, level, place: ImageOps.autocontrast(image),
    "equalize": lambda image, level, place: ImageOps.equalize(image),
    "invert": lambda image, level, place: ImageOps.invert(image),
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": _solarize,
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
    "cutout": _cutout,
    "solarize_add": _solarize_add,
}

"""Each operation against what it is defined to be, in NumPy."""

import numpy as np
import pytest
from PIL import Image

from moe.data.randaugment import OPERATIONS, RandAugment, _Place, randaugment

SIDE = 56  # a quarter of the 224 pixels that extents in pixels refer to
PIXELS = np.random.default_rng(0).integers(20, 200, (SIDE, SIDE, 3), np.uint8)
GREY = 128


def apply(name, level, sign=1.0, row=0.5, column=0.5, pixels=PIXELS):
    image = Image.fromarray(pixels)
    changed = np.asarray(OPERATIONS[name](image, level, _Place(sign, row, column)))
    np.testing.assert_array_equal(np.asarray(image), pixels, err_msg="the operation changed its input")
    assert changed.shape == pixels.shape
    return changed


def luminance(pixels):
    """ITU-R 601-2, in 16 bits, as Pillow rounds it."""
    weights = np.array([19595, 38470, 7471])
    return ((pixels.astype(np.int64) @ weights + 0x8000) >> 16)[..., None]


def blend(degenerate, pixels, level):
    mixed = degenerate + (0.1 + 1.8 * level) * (pixels.astype(np.float64) - degenerate)
    return np.clip(mixed, 0, 255)


@pytest.mark.parametrize("level", [0.0, 0.3, 1.0])
def test_operations_on_single_values(level):
    wide = PIXELS.astype(int)
    np.testing.assert_array_equal(apply("invert", level), 255 - wide)
    bits = max(1, int(4 * level))
    np.testing.assert_array_equal(apply("posterize", level), (wide >> (8 - bits)) << (8 - bits))
    np.testing.assert_array_equal(apply("solarize", level), np.where(wide < int(256 * level), wide, 255 - wide))
    added = np.where(wide < 128, np.minimum(wide + int(110 * level), 255), wide)
    np.testing.assert_array_equal(apply("solarize_add", level), added)
    # Blends are cut off, not rounded.
    np.testing.assert_allclose(apply("brightness", level), blend(0, PIXELS, level), atol=1)
    np.testing.assert_allclose(apply("color", level), blend(luminance(PIXELS), PIXELS, level), atol=1)
    mean = int(luminance(PIXELS).mean() + 0.5)
    np.testing.assert_allclose(apply("contrast", level), blend(mean, PIXELS, level), atol=1)


@pytest.mark.parametrize("level", [0.0, 0.6, 1.0])
def test_sharpness_blends_with_a_smoothed_image(level):
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    smooth = PIXELS.astype(np.float64)
    windows = np.lib.stride_tricks.sliding_window_view(PIXELS, (3, 3), axis=(0, 1))
    smooth[1:-1, 1:-1] = np.einsum("hwcij,ij->hwc", windows, kernel)  # the border stays
    np.testing.assert_allclose(apply("sharpness", level), blend(smooth, PIXELS, level), atol=1.6)


def test_operations_on_the_histogram():
    wide = PIXELS.astype(np.float64)
    low, high = wide.min(axis=(0, 1)), wide.max(axis=(0, 1))
    np.testing.assert_allclose(apply("autocontrast", 0.5), 255 * (wide - low) / (high - low), atol=1)

    equalized = apply("equalize", 0.5)
    for channel in range(3):
        values, counts = np.unique(PIXELS[..., channel], return_counts=True)
        step = (counts.sum() - counts[-1]) // 255
        table = dict(zip(values, (step // 2 + np.cumsum(counts) - counts) // step, strict=True))
        expected = np.vectorize(table.get)(PIXELS[..., channel])
        np.testing.assert_array_equal(equalized[..., channel], np.clip(expected, 0, 255))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("level", [0.37, 1.0])
def test_operations_that_move_pixels(level, sign):
    rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    centre, angle = SIDE / 2, np.deg2rad(30 * level * sign)
    cosine, sine = np.cos(angle), np.sin(angle)
    x, y = columns - centre, rows - centre
    pixels = 25.0 * level * sign
    slant = 0.3 * level * sign
    sources = {
        "translate_x": (rows, columns + pixels),
        "translate_y": (rows + pixels, columns),
        "shear_x": (rows, columns + slant * rows),
        "shear_y": (rows + slant * columns, columns),
        # Counterclockwise to the eye, with rows growing downwards: the source lies clockwise of its target.
        "rotate": (centre + sine * x + cosine * y, centre + cosine * x - sine * y),
    }
    for name, (row, column) in sources.items():
        row, column = np.floor(row).astype(int), np.floor(column).astype(int)
        inside = (row >= 0) & (row < SIDE) & (column >= 0) & (column < SIDE)
        expected = np.full_like(PIXELS, GREY)
        expected[inside] = PIXELS[row[inside], column[inside]]
        # A source within rounding of the edge of a pixel may fall to either side.
        assert (apply(name, level, sign) != expected).any(axis=-1).mean() < 0.02, name
        assert not inside.all(), name


def test_cutout_blanks_a_square_and_what_is_left_of_it_at_the_border():
    half = 5  # 40 pixels of 224 at half the magnitude
    inside = apply("cutout", 0.5, row=0.5, column=0.25)
    expected = PIXELS.copy()
    expected[28 - half : 28 + half, 14 - half : 14 + half] = GREY
    np.testing.assert_array_equal(inside, expected)
    corner = apply("cutout", 0.5, row=0.0, column=0.999)
    expected = PIXELS.copy()
    expected[:half, 55 - half :] = GREY
    np.testing.assert_array_equal(corner, expected)


def test_there_are_sixteen_operations_and_a_draw_names_one():
    assert len(OPERATIONS) == 16
    image = Image.fromarray(PIXELS)
    for index, name in enumerate(OPERATIONS):
        draws = np.array([[(index + 0.5) / 16, 0.7, 0.2, 0.9]])
        expected = apply(name, 0.6, sign=-1.0, row=0.2, column=0.9)
        np.testing.assert_array_equal(np.asarray(randaugment(image, draws, 6.0)), expected, err_msg=name)


def test_operations_follow_one_another():
    draws = np.array([[2.5 / 16, 0, 0, 0], [5.5 / 16, 0, 0, 0]])  # invert, then solarize
    inverted = 255 - PIXELS.astype(int)
    expected = np.where(inverted < 128, inverted, 255 - inverted)
    np.testing.assert_array_equal(np.asarray(randaugment(Image.fromarray(PIXELS), draws, 5.0)), expected)
    assert randaugment(image := Image.fromarray(PIXELS), draws[:0], 5.0) is image


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("level", [0.0, 1.0, 3.0])
def test_every_operation_takes_grey_images_and_every_magnitude(name, level):
    apply(name, level, pixels=PIXELS[..., 0])
    apply(name, level, sign=-1.0, row=0.0, column=0.0)


@pytest.mark.parametrize(("field", "value"), [("layers", -1), ("magnitude", -0.5), ("magnitude", 31.0)])
def test_numbers_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=rf"data.photo.randaugment.{field} is {value}: it must"):
        RandAugment(**{field: value})

import numpy as np
import pytest
from scipy import ndimage

from moe.data.augment import Augment, augment, sample_maps, uniform, warp

IMAGES = np.random.default_rng(0).random((16, 7, 8, 2), np.float32)
POSITIONS = np.arange(16)
ALL = Augment(shift=2.0, rotate_degrees=40.0, scale=0.5, flip=True, shear_degrees=20.0)


def test_warp_matches_scipy():
    matrix, shift = sample_maps(POSITIONS, ALL, seed=1)
    centre = np.array([3.0, 3.5])
    expected = np.empty_like(IMAGES)
    for b, channel in np.ndindex(len(IMAGES), 2):
        inverse = np.linalg.inv(matrix[b])
        ndimage.affine_transform(
            IMAGES[b, ..., channel],
            inverse,
            centre - inverse @ (centre + shift[b]),
            output=expected[b, ..., channel],
            order=1,
            mode="grid-constant",
        )
    np.testing.assert_allclose(warp(IMAGES, matrix, shift), expected, atol=2e-5)


def test_whole_pixels_are_moved_exactly():
    shift = np.tile([2.0, -3.0], (16, 1))
    expected = np.zeros_like(IMAGES)
    expected[:, 2:, :-3] = IMAGES[:, :-2, 3:]
    np.testing.assert_array_equal(warp(IMAGES, np.tile(np.eye(2), (16, 1, 1)), shift), expected)
    far = np.full((16, 2), 1e6)
    np.testing.assert_array_equal(warp(IMAGES, np.tile(np.eye(2), (16, 1, 1)), far), np.zeros_like(IMAGES))


def test_a_positive_angle_turns_counterclockwise():
    square = IMAGES[:, :, :7]
    quarter = np.tile([[0.0, -1.0], [1.0, 0.0]], (16, 1, 1))
    np.testing.assert_allclose(warp(square, quarter, np.zeros((16, 2))), np.rot90(square, axes=(1, 2)), atol=1e-6)
    matrix, _ = sample_maps(np.arange(200), Augment(rotate_degrees=90.0), seed=0)
    angle = np.rad2deg(np.arctan2(matrix[:, 1, 0], matrix[:, 0, 0]))
    np.testing.assert_allclose(np.linalg.det(matrix), 1.0)
    assert -90 <= angle.min() < -80
    assert 80 < angle.max() <= 90


def test_shift_and_scale_stay_within_their_extents_and_reach_them():
    matrix, shift = sample_maps(np.arange(500), Augment(shift=1.5, scale=0.25), seed=3)
    factor = matrix[:, 0, 0]
    np.testing.assert_array_equal(matrix, factor[:, None, None] * np.eye(2))
    assert 0.8 <= factor.min() < 0.81
    assert 1.24 < factor.max() <= 1.25
    np.testing.assert_allclose(np.abs(shift).max(axis=0), 1.5, atol=0.02)
    assert abs(np.corrcoef(shift.T)[0, 1]) < 0.15


def test_a_slant_moves_rows_sideways_and_not_up_or_down():
    matrix, _ = sample_maps(np.arange(500), Augment(shear_degrees=10.0), seed=2)
    np.testing.assert_array_equal(matrix[:, 0], np.tile([1.0, 0.0], (500, 1)))
    np.testing.assert_array_equal(matrix[:, 1, 1], 1.0)
    degrees = np.rad2deg(np.arctan(matrix[:, 1, 0]))
    assert -10 <= degrees.min() < -9.8
    assert 9.8 < degrees.max() <= 10


def test_flip_mirrors_about_half_of_the_images():
    flipped = augment(IMAGES, POSITIONS, Augment(flip=True), seed=0)
    mirrored = (flipped == IMAGES[:, :, ::-1]).all(axis=(1, 2, 3))
    kept = (flipped == IMAGES).all(axis=(1, 2, 3))
    assert (mirrored ^ kept).all()
    assert 4 <= mirrored.sum() <= 12


def test_an_image_depends_on_seed_and_position_alone():
    images = np.repeat(IMAGES[:1], 16, axis=0)
    whole = augment(images, POSITIONS, ALL, seed=5)
    assert whole.dtype == np.float32
    order = np.random.default_rng(1).permutation(16)[:5]
    np.testing.assert_array_equal(augment(images[order], POSITIONS[order], ALL, seed=5), whole[order])
    distinct = np.concatenate(
        [whole, augment(images, POSITIONS, ALL, seed=6), augment(images, POSITIONS + 2**40, ALL, 5)]
    )
    assert len(np.unique(distinct.reshape(48, -1), axis=0)) == 48


def test_nothing_is_done_by_default():
    assert augment(IMAGES, POSITIONS, Augment(), seed=0) is IMAGES


def test_uniform_is_uniform_and_uncorrelated():
    draws = uniform(0, np.arange(4000), 4)
    tables = np.concatenate([draws, uniform(1, np.arange(4000), 4)], axis=1)
    counts = np.apply_along_axis(lambda column: np.histogram(column, 10, (0, 1))[0], 0, tables)
    assert np.abs(counts - 400).max() < 5 * np.sqrt(400)
    correlation = np.corrcoef(np.concatenate([tables[1:], tables[:-1]], axis=1).T) - np.eye(16)
    assert np.abs(correlation).max() < 5 / np.sqrt(4000)


def test_uniform_is_splitmix64():
    # The first two outputs of the reference implementation started from state 0, where the hash of (0, 0) starts.
    np.testing.assert_array_equal(
        uniform(0, np.array([0]), 2)[0], np.array([0xE220A8397B1DCDAF >> 11, 0x6E789E6AA1B965F4 >> 11]) * 2.0**-53
    )


@pytest.mark.parametrize(
    ("field", "value"), [("shift", -1.0), ("rotate_degrees", float("nan")), ("scale", float("inf"))]
)
def test_an_extent_that_is_none_is_refused(field, value):
    with pytest.raises(ValueError, match=rf"augment.{field} is {value}: give the largest change"):
        Augment(**{field: value})

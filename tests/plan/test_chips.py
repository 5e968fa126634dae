"""Slices by name, and the mistakes that one can make in it."""

import pytest

from moe.plan.chips import CHIPS, parse_slice


def test_a_slice_is_read_from_its_name() -> None:
    one = parse_slice("v5p:4x4x8", count=2)
    assert (one.chip.name, one.shape, one.chips, one.devices, one.topology) == ("v5p", (4, 4, 8), 256, 256, "v5p:4x4x8")
    # JAX shows two devices for a chip.
    assert parse_slice("tpu7x:2x2x1").devices == 8


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v7:2x2", "of no kind of TPU known here: v4:2x2x1"),
        ("v5e", "must be a kind and a shape, such as v5e:2x2"),
        ("v5e:4xfour", "must be a kind and a shape"),
        ("v5e:4x0", "must be a kind and a shape"),
        ("v5p:4x4", "has 2 dimensions, and slices of v5p have 3"),
        ("v5e:32x32", "has 1024 chips, and a slice of v5e at most 256, 16x16"),
    ],
)
def test_another_name_is_answered_with_those_there_are(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_slice(name)


def test_peaks_are_of_plausible_size_and_sourced() -> None:
    for chip in CHIPS.values():
        # FLOPs for each byte of memory bandwidth, as published designs have them.
        assert 150 < chip.flops / chip.hbm_bandwidth < 650
        assert chip.source.startswith("https://docs.cloud.google.com/tpu/docs/")

"""Block formats: sizes by hand."""

import pytest

from mxperts.formats import (
    BLOCK_FORMATS,
    MXFP4,
    MXFP6_E2M3,
    MXFP6_E3M2,
    MXFP8_E4M3,
    MXINT8,
    SCALE_BIAS,
    SCALE_MAX,
    SCALE_NAN,
    BlockFormat,
)

each_format = pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=str)


def test_scales_are_e8m0() -> None:
    """Section 5.4.1: bias 127, 0xFF is NaN, no zero and no infinity."""
    assert (SCALE_BIAS, SCALE_MAX, SCALE_NAN) == (127, 254, 255)


@each_format
def test_a_block_is_32_elements(fmt: BlockFormat) -> None:
    """Table 1."""
    assert fmt.block_size == 32


@pytest.mark.parametrize(
    ("fmt", "bits_per_value", "elements", "size", "block"),
    [
        (MXFP4, 4.25, 2, 1, 16),
        (MXFP6_E2M3, 6.25, 4, 3, 24),
        (MXFP6_E3M2, 6.25, 4, 3, 24),
        (MXFP8_E4M3, 8.25, 1, 1, 32),
        (MXINT8, 8.25, 1, 1, 32),
    ],
    ids=str,
)
def test_packing_sizes(fmt: BlockFormat, bits_per_value: float, elements: int, size: int, block: int) -> None:
    assert fmt.bits_per_value == bits_per_value
    assert (fmt.pack_elements, fmt.pack_bytes, fmt.block_bytes) == (elements, size, block)


@pytest.mark.parametrize(("k", "blocks"), [(1, 1), (31, 1), (32, 1), (33, 2), (40, 2), (64, 2), (4096, 128)])
def test_the_last_block_may_be_padding(k: int, blocks: int) -> None:
    assert MXFP4.blocks(k) == blocks
    assert MXFP4.packed_size(k) == 16 * blocks
    assert MXFP4.nbytes(3, 5, k) == 15 * 17 * blocks


@each_format
def test_bytes_of_whole_blocks_follow_from_bits_per_value(fmt: BlockFormat) -> None:
    assert fmt.nbytes(7, 64) == 7 * 64 * fmt.bits_per_value / 8


def test_a_format_prints_as_its_name() -> None:
    assert [str(f) for f in BLOCK_FORMATS] == [
        "mxfp4",
        "mxfp6_e2m3",
        "mxfp6_e3m2",
        "mxfp8_e4m3",
        "mxfp8_e5m2",
        "mxint8",
    ]

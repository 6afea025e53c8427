"""Packed bytes: golden ones by hand, and round trips of every code at every place."""

import itertools

import pytest
import torch

from mxperts.formats import BLOCK_FORMATS, MXFP4, MXFP6_E2M3, MXFP6_E3M2, BlockFormat
from mxperts.packing import pack, unpack

each_format = pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=str)


def u8(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8)


def test_fp4_puts_the_first_code_into_the_low_nibble() -> None:
    assert pack(u8(0x1, 0x2, 0xF, 0x8), MXFP4).tolist() == [0x21, 0x8F]


@pytest.mark.parametrize("fmt", [MXFP6_E2M3, MXFP6_E3M2], ids=str)
@pytest.mark.parametrize(
    ("codes", "packed"),
    [
        ((0x3F, 0, 0, 0), [0x3F, 0x00, 0x00]),
        ((0, 0x3F, 0, 0), [0xC0, 0x0F, 0x00]),
        ((0, 0, 0x3F, 0), [0x00, 0xF0, 0x03]),
        ((0, 0, 0, 0x3F), [0x00, 0x00, 0xFC]),
        ((0x01, 0x02, 0x03, 0x04), [0x81, 0x30, 0x10]),
        ((0b100001, 0b010010, 0b001100, 0b111000), [0b10_100001, 0b1100_0100, 0b111000_00]),
    ],
)
def test_fp6_puts_four_codes_into_three_little_endian_bytes(
    fmt: BlockFormat, codes: tuple[int, ...], packed: list[int]
) -> None:
    word = sum(code << (6 * i) for i, code in enumerate(codes))
    assert packed == list(word.to_bytes(3, "little")), "the golden bytes are c0 | c1<<6 | c2<<12 | c3<<18"
    assert pack(u8(*codes), fmt).tolist() == packed


@each_format
def test_every_code_at_every_place_round_trips(fmt: BlockFormat) -> None:
    codes = torch.arange(1 << fmt.element.bits, dtype=torch.uint8)
    for place in range(fmt.pack_elements):
        group = torch.zeros(len(codes), fmt.pack_elements, dtype=torch.uint8)
        group[:, place] = codes
        packed = pack(group, fmt)
        assert packed.shape == (len(codes), fmt.pack_bytes)
        assert torch.equal(unpack(packed, fmt), group)
        words = torch.stack([packed[:, j].long() << (8 * j) for j in range(fmt.pack_bytes)]).sum(0)
        assert torch.equal(words, codes.long() << (fmt.element.bits * place))


@pytest.mark.parametrize("fmt", [MXFP4], ids=str)
def test_every_pair_of_fp4_codes_round_trips(fmt: BlockFormat) -> None:
    codes = torch.tensor(list(itertools.product(range(16), repeat=2)), dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes, fmt), fmt), codes)


@each_format
def test_unpacking_then_packing_gives_any_bytes_back(fmt: BlockFormat) -> None:
    packed = torch.randint(0, 256, (5, 7, fmt.block_bytes), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    codes = unpack(packed, fmt)
    assert codes.shape == (5, 7, fmt.block_size)
    assert codes.dtype is torch.uint8
    assert torch.equal(pack(codes, fmt), packed)


@each_format
def test_leading_dimensions_may_be_empty_and_inputs_strided(fmt: BlockFormat) -> None:
    assert pack(torch.zeros(0, 3, 32, dtype=torch.uint8), fmt).shape == (0, 3, fmt.block_bytes)
    codes = torch.randint(0, 1 << fmt.element.bits, (64, 6), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    strided = codes.t()
    assert not strided.is_contiguous()
    assert torch.equal(pack(strided, fmt), pack(strided.contiguous(), fmt))
    assert torch.equal(unpack(pack(strided, fmt), fmt), strided)

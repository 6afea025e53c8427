"""What products in fp8 rest on, without a GPU: powers of two that fit, rows' exponents, how codes are decoded."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import mxperts as mx
from mxperts.backend.gpu.cuda import fold, folded, grouped
from mxperts.backend.gpu.cuda.element import bf16_rule
from mxperts.backend.gpu.cuda.layout import STEP, UNIT_ROWS, Tiles
from mxperts.formats import E5M2, Scheme, all_schemes

FOLDABLE = (mx.MXFP4, mx.MXFP6_E2M3, mx.MXFP6_E3M2)
HOPPER = grouped.Device(132, 232448, 233472, True)
FP8 = {False: torch.float8_e4m3fn, True: torch.float8_e5m2}


def survives(fmt: mx.BlockFormat, r: int, dtype: torch.dtype) -> bool:
    values = torch.tensor([v for v in fmt.element.values if math.isfinite(v)], dtype=torch.float64) * 2.0**r
    return torch.equal(values.to(torch.float32).to(dtype).double(), values)


@pytest.mark.parametrize("fmt", FOLDABLE, ids=str)
def test_windows_are_what_the_formats_of_fp8_have(fmt: mx.BlockFormat) -> None:
    low, high = fold.window(fmt) or (0, 0)
    assert [r for r in range(-30, 30) if survives(fmt, r, torch.float8_e4m3fn)] == list(range(low, high + 1))
    rule = fold.weight_rule(fmt)
    assert all(survives(fmt, r, FP8[rule.e5m2]) for r in range(rule.least, rule.most + 1))
    assert not survives(fmt, rule.least - 1, FP8[rule.e5m2])
    assert rule.most + rule.exponent == rule.fields or not survives(fmt, rule.most + 1, FP8[rule.e5m2])
    assert rule.e5m2 == (fmt.element.mantissa_bits <= E5M2.mantissa_bits)


def test_schemes_that_have_products_in_fp8() -> None:
    foldable = {str(s) for s in all_schemes() if s.weight is not None and fold.can_fold(s.weight, s.activation)}
    weights = ("mxfp4", "mxfp6_e2m3", "mxfp6_e3m2")
    inputs = (*weights, "fp8_static", "fp8_dynamic")
    assert foldable == {str(Scheme(f"w_{w}_a_{a}")) for w in weights for a in inputs}


def multiplied(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Two 16-bit numbers a word, int64, each times the other's."""
    halves = []
    for shift in (0, 16):
        x, y = (((t >> shift) & 0xFFFF).to(torch.uint16).view(dtype).double() for t in (a, b))
        halves.append((x * y).to(torch.float32).to(dtype).view(torch.uint16).to(torch.int64) << shift)
    return halves[0] | halves[1]


def moved(w: Tensor, left: int) -> Tensor:
    return (w << left) & 0xFFFFFFFF if left >= 0 else w >> -left


def decoded(
    fmt: mx.BlockFormat, word: Tensor, rest: Tensor | None, factors: tuple[Tensor, Tensor], m: int
) -> list[Tensor]:
    """``decode_fp8`` of folded.cu: bytes of row g, then of row g + 8, of half m of a block; int64 words."""
    rule, bf16 = fold.weight_rule(fmt), bf16_rule(fmt)
    up = 3 if rule.e5m2 else 0
    code, sign = 0x01C001C0 << up, 0x80008000
    v = [moved(word, left + up) & code for left in (0, 3, 6, -3)]
    if rest is not None:
        v = [x | moved(rest, bf16.rest_left(4 * m + i) + up) & (bf16.low << up) for i, x in enumerate(v)]
    if rule.e5m2:
        v = [x | moved(word, left) & sign for x, left in zip(v, (0, 3, 2, 1), strict=True)]
    dtype = torch.float16 if rule.e5m2 else torch.bfloat16
    v = [multiplied(x, factors[i & 1], dtype) for i, x in enumerate(v)]
    if rule.e5m2:  # the upper byte of each half
        pairs = ((v[0], v[2]), (v[1], v[3]))
        return [(a >> 8) & 0xFF | b & 0xFF00 | (a >> 8) & 0xFF0000 | b & 0xFF000000 for a, b in pairs]
    low, high = (word >> 8) & 0x00800080 | (word << 2) & 0x80008000, (word >> 5) & 0x00800080 | (word << 1) & 0x80008000
    return [(v[0] >> 4) | moved(v[2], 4) | low, (v[1] >> 4) | moved(v[3], 4) | high]


@pytest.mark.parametrize("fmt", FOLDABLE, ids=str)
def test_decoding_gives_elements_times_the_scale_relative_to_the_row(fmt: mx.BlockFormat) -> None:
    """All codes with all scales that a row may hold, and blocks of zeros with scales far below."""
    rule, g = fold.weight_rule(fmt), torch.Generator().manual_seed(0)
    k = STEP * 2 * (rule.most - rule.least + 2)
    tiles = Tiles(format=fmt, rows=UNIT_ROWS, k=k)
    codes = torch.randint(1 << fmt.element.bits, (1, UNIT_ROWS, k), generator=g, dtype=torch.uint8)
    scales = torch.randint(100 + rule.least, 101 + rule.most, (1, UNIT_ROWS, k // 32), generator=g, dtype=torch.uint8)
    scales[:, ::2, 1::2] = scales[:, 1::2, 2::2] = 100 + rule.most  # or the largest would be too far above the mean
    codes[:, :, :32], scales[:, :, 0] = 0, 0
    weight = mx.MXTensor.from_codes(codes, scales, fmt)
    rows, bad = fold._row_exponents(fmt, weight.packed[0], weight.scales[0])
    assert not bad
    assert (rows == 100).all()
    values = torch.tensor(fmt.element.values, dtype=torch.float64)[codes[0].long()]
    expected = values * torch.exp2(scales[0].double() - 100).repeat_interleave(32, -1)  # [32, K]

    slices = tiles.to_tiles(weight.packed, weight.scales)[0, 0]  # [K / 64, bytes]
    lane = torch.arange(32)
    row, t = lane // 4, lane % 4
    for cell in range(2):
        part = slices[:, cell * tiles.cell_bytes : (cell + 1) * tiles.cell_bytes]
        main = words(part[:, :512]).view(-1, 32, 4)
        low = words(part[:, 512:]).view(-1, 32, 2) if fmt.element.bits == 6 else None
        scale = slices[:, 2 * tiles.cell_bytes :].view(-1, 8, 2, 2, 2)[:, row, cell].long()  # step, lane, block, half
        for block in range(2):
            field = scale[:, :, block] + rule.exponent - 100
            field = field.clamp(min=0) if rule.e5m2 else field
            factors = (field << (10 if rule.e5m2 else 7)) * 0x10001
            for m in range(2):
                rest = None if low is None else low[:, :, block]
                found = decoded(fmt, main[:, :, 2 * block + m], rest, (factors[..., 0], factors[..., 1]), m)
                for half, word in enumerate(found):
                    for i, at in enumerate((0, 2, 1, 3)):
                        got = ((word >> (8 * i)) & 0xFF).to(torch.uint8).view(FP8[rule.e5m2]).double()
                        k_of = 64 * torch.arange(len(slices))[:, None] + 32 * block + 8 * t + 4 * m + at
                        assert torch.equal(got, expected[(cell * 16 + row + 8 * half).expand_as(k_of), k_of])


def words(data: Tensor) -> Tensor:
    return data.contiguous().view(torch.int32).long() & 0xFFFFFFFF


def experts(scales: list[list[int]], code: int = 1) -> list[Tensor]:
    """Both projections of one expert: 32 rows of blocks with these scales, all elements alike."""
    s = torch.full((1, 32, 2), 110, dtype=torch.uint8)
    s[0, : len(scales)] = torch.tensor(scales, dtype=torch.uint8)
    w = mx.MXTensor.from_codes(torch.full((1, 32, 64), code, dtype=torch.uint8), s, mx.MXFP4)
    return [w.packed, w.scales, w.packed, torch.full_like(w.scales, 110)]


@pytest.mark.parametrize(
    ("scales", "code", "row", "unfit"),
    [
        ([[110, 110]], 1, 109, False),
        ([[110, 96]], 1, 109, False),  # 7 above the mean
        ([[110, 95]], 1, 109, True),
        ([[110, 93]], 0, 127, False),  # zeros are in any window
        ([[129, 0]], 0, 127, True),  # but not with a factor that is Inf
        ([[40, 40]], 1, 39, True),
        ([[62, 62]], 1, 61, True),  # nor may the padding have one
        ([[215, 215]], 1, 214, False),
        ([[216, 216]], 1, 215, True),
    ],
)
def test_rows_have_exponents_or_their_expert_is_unfit(
    scales: list[list[int]], code: int, row: int, unfit: bool
) -> None:
    tiles = Tiles(format=mx.MXFP4, rows=32, k=64)
    weights = experts(scales, code)
    known = fold.exponents(weights, (tiles, tiles))
    at = fold.addresses(known, (tiles, tiles), 1)
    assert known[at.rows1 - at.counted].item() == row
    assert known[at.unfit - at.counted].item() == unfit
    assert fold.counted(known) == (0, 0)


def test_launch_choices() -> None:
    """Tiles share an expert's tokens out evenly; there is room for some stages; wide products go to float32 earlier."""
    assert [folded.tile_of(t * 4, 128) for t in (64, 2048, 4096)] == [16, 80, 160]
    assert folded.tile_of(8192, 8) == 160
    for fmt in FOLDABLE:
        slice_bytes = Tiles(format=fmt, rows=UNIT_ROWS, k=STEP).slice_bytes
        for tile in range(16, 161, 16):
            number, size = folded.ring(tile, slice_bytes, HOPPER)
            assert 4 <= number <= 8
            assert size <= HOPPER.shared_bytes
    assert folded.promoted(mx.MXFP4, mx.MXFP6_E3M2) == 128
    assert folded.promoted(mx.MXFP6_E3M2, mx.MXFP6_E3M2) == 64
    assert folded.promoted(mx.MXFP4, "fp8_dynamic") == 128

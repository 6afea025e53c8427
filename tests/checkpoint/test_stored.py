"""Stored codes and scales as tensors."""

from __future__ import annotations

import pytest
import torch

import mxperts as mx
from mxperts.checkpoint.stored import stored_tensor


@pytest.mark.parametrize("rows", [32, 64, 72, 8])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_rows_share_scales_within_their_part_only(rows: int, parts: int, dtype: torch.dtype) -> None:
    """[R, 32] blocks of R = 32 rows; the last of a part may be shorter."""
    blocks = -(-rows // 32)
    scales = torch.arange(parts * blocks, dtype=torch.uint8).reshape(1, parts * blocks, 1).expand(3, -1, -1)
    codes = torch.zeros(3, parts * rows, 32, dtype=torch.float8_e4m3fn)
    t = stored_tensor(codes, scales.contiguous().view(dtype), mx.MXFP8_E4M3, 32, block_rows=32, parts=parts)
    expected = [part * blocks + row // 32 for part in range(parts) for row in range(rows)]
    assert t.shape == (3, parts * rows, 32)
    assert t.scales[1, :, 0].tolist() == expected


def test_a_last_block_is_padded_and_blocks_are_joined() -> None:
    x = torch.randn(4, 48, generator=torch.Generator().manual_seed(0))
    t = mx.quantize(x, mx.MXFP4)
    again = stored_tensor(t.packed[:, : mx.MXFP4.stored_size(48)], t.scales, mx.MXFP4, 48)
    assert torch.equal(again.packed, t.packed)
    joined = stored_tensor(t.packed.unflatten(-1, (2, 16)), t.scales, mx.MXFP4, 64)
    assert torch.equal(joined.packed, t.packed)

"""Codes to packed bytes and back: a little-endian bit stream along the last dimension."""

from __future__ import annotations

import torch
from torch import Tensor

from mxperts.formats import BlockFormat


def pack(codes: Tensor, fmt: BlockFormat) -> Tensor:
    """Pack codes, one a byte, into ``fmt.element.bits`` bits each.

    Args:
        codes: uint8 [..., K], K a multiple of ``fmt.pack_elements``; bits beyond the element's width must be 0.

    Returns:
        uint8 [..., K * bits / 8]. Code ``j`` takes the bits ``[j*bits, (j+1)*bits)`` of a row, lowest bit first: low
        nibble first for 4 bits, ``c0 | c1<<6 | c2<<12 | c3<<18`` as three little-endian bytes for 6 bits.

    Source: AMD Quark ``Pack_fp4``, ``Pack_fp6``; compressed-tensors ``pack_fp4_to_uint8``.
    """
    if fmt.pack_elements == 1:
        return codes
    bits = fmt.element.bits
    groups = codes.unflatten(-1, (-1, fmt.pack_elements)).to(torch.int32)  # [..., K / pack_elements, pack_elements]
    words = torch.zeros_like(groups[..., 0])
    for i in range(fmt.pack_elements):
        words |= groups[..., i] << (bits * i)
    bytes_ = [(words >> (8 * j)) & 0xFF for j in range(fmt.pack_bytes)]
    return torch.stack(bytes_, dim=-1).flatten(-2).to(torch.uint8)


def magnitudes(packed: Tensor, fmt: BlockFormat) -> Tensor:
    """``unpack`` with the bits cleared that are only signs: 0 for zeros of either sign."""
    codes = unpack(packed, fmt)
    return codes & (fmt.element.sign_bit - 1) if fmt.element.has_signed_zero else codes


def unpack(packed: Tensor, fmt: BlockFormat) -> Tensor:
    """The codes that ``pack`` packed: uint8 [..., packed * 8 / bits], one a byte.

    Args:
        packed: uint8 [..., P], P a multiple of ``fmt.pack_bytes``.
    """
    if fmt.pack_elements == 1:
        return packed
    bits = fmt.element.bits
    groups = packed.unflatten(-1, (-1, fmt.pack_bytes)).to(torch.int32)
    words = torch.zeros_like(groups[..., 0])
    for j in range(fmt.pack_bytes):
        words |= groups[..., j] << (8 * j)
    codes = [(words >> (bits * i)) & ((1 << bits) - 1) for i in range(fmt.pack_elements)]
    return torch.stack(codes, dim=-1).flatten(-2).to(torch.uint8)

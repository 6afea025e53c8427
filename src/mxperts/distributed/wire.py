"""Rows of hidden states as they travel: in the codes and scales that the experts quantise them to anyway."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mxperts.formats import E4M3, FP8_DYNAMIC, FP8_STATIC, Activation, BlockFormat, Role
from mxperts.ops.quantize import dequantize, quantize
from mxperts.tensor import MXTensor

FP8 = torch.float8_e4m3fn
_SCALE_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Wire:
    """One row [H] as so many bytes, from which the experts compute what they would from the row itself, bit for bit.

    A row arrives as its QDQ, and quantising that once more changes nothing (tests/distributed/test_wire.py). Only
    dynamic fp8 in float32 is not packed: there 448 times the scale need not be the largest number again.

    Attributes:
        hidden: H.
        dtype: of hidden states.
        activation: what the experts quantise their input to, as ``Scheme.activation``.
        input_scale: for static fp8, its one scale.
        backend: "auto" or the name of the one that quantises.
    """

    hidden: int
    dtype: torch.dtype
    activation: Activation
    input_scale: float | None = None
    backend: str = "auto"

    @property
    def is_packed(self) -> bool:
        """Whether rows travel in the activation format; otherwise as they are."""
        return self.activation is not None and not (self.activation == FP8_DYNAMIC and self.dtype is torch.float32)

    @property
    def row_bytes(self) -> int:
        """Of one row."""
        if not self.is_packed:
            return self.hidden * self.dtype.itemsize
        if isinstance(self.activation, BlockFormat):
            return self.activation.packed_size(self.hidden) + self.activation.blocks(self.hidden)
        return self.hidden + (_SCALE_BYTES if self.activation == FP8_DYNAMIC else 0)

    def pack(self, x: Tensor) -> Tensor:
        """Rows [R, H] as uint8 [R, ``row_bytes``]."""
        if not self.is_packed or not len(x):
            return x.contiguous().view(torch.uint8) if len(x) else x.new_empty((0, self.row_bytes), dtype=torch.uint8)
        if isinstance(self.activation, BlockFormat):
            t = quantize(x, self.activation, role=Role.ACTIVATION, backend=self.backend)
            return torch.cat([t.packed, t.scales], dim=1)
        if self.activation == FP8_STATIC:
            return _to_fp8(x, self._static_scale(x.device))
        amax = x.to(torch.float32).abs().amax(-1, keepdim=True)
        scale = amax / torch.full_like(amax, E4M3.max)  # by a number, GPUs would multiply by its inverse
        scale = torch.where(scale == 0, 1.0, scale)
        return torch.cat([_to_fp8(x, scale), scale.view(torch.uint8)], dim=1)

    def unpack(self, rows: Tensor) -> Tensor:
        """What ``pack`` made of rows as numbers again: [R, H], quantised and dequantised."""
        if not self.is_packed or not len(rows):
            return rows.view(self.dtype) if len(rows) else rows.new_empty((0, self.hidden), dtype=self.dtype)
        if isinstance(self.activation, BlockFormat):
            packed, scales = rows.split(
                [self.activation.packed_size(self.hidden), self.activation.blocks(self.hidden)], dim=1
            )
            t = MXTensor(packed.contiguous(), scales.contiguous(), self.activation, self.hidden)
            return dequantize(t, self.dtype, backend=self.backend)
        codes = rows[:, : self.hidden].view(FP8).to(torch.float32)
        if self.activation == FP8_STATIC:
            return (codes * self._static_scale(rows.device)).to(self.dtype)
        return (codes * rows[:, self.hidden :].contiguous().view(torch.float32)).to(self.dtype)

    def _static_scale(self, device: torch.device) -> Tensor:
        assert self.input_scale is not None, "static fp8 without a scale"
        return torch.full((1,), self.input_scale, dtype=torch.float32, device=device)


def _to_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """``x / scale`` as bytes of E4M3, saturating; NaN stays NaN."""
    scaled = (x.to(torch.float32) / scale).clamp(-E4M3.max, E4M3.max)
    return scaled.to(FP8).view(torch.uint8)

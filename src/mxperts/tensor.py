"""MXTensor: packed codes, scales and the format that gives them meaning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mxperts.errors import FormatError
from mxperts.formats import BlockFormat
from mxperts.formats import format as lookup
from mxperts.packing import pack, unpack

_BYTE_DTYPES = (torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.int8)


@dataclass(frozen=True, eq=False, repr=False)
class MXTensor:
    """A tensor in an MX format, blocked along its last dimension.

    Attributes:
        packed: uint8 [..., P], the codes as a little-endian bit stream; ``P = format.packed_size(K)``.
        scales: uint8 [..., ceil(K / 32)], E8M0: byte ``s`` stands for 2^(s - 127), 0xFF makes its block NaN.
        format: the block format.
        k: number of values in a row. Where it is not a multiple of 32, the last block is padded with zero codes.

    Raises:
        FormatError: dtypes, shapes or devices do not fit together.
    """

    packed: Tensor
    scales: Tensor
    format: BlockFormat
    k: int

    def __post_init__(self) -> None:
        packed, scales, fmt = self.packed, self.scales, self.format
        for name, t in (("packed", packed), ("scales", scales)):
            if t.dtype is not torch.uint8:
                raise FormatError(
                    f"{name} must be uint8, not {t.dtype}; MXTensor.from_packed takes other byte dtypes too"
                )
            if t.ndim == 0:
                raise FormatError(f"{name} must have at least one dimension")
        expected_packed = (*packed.shape[:-1], fmt.packed_size(self.k))
        expected_scales = (*packed.shape[:-1], fmt.blocks(self.k))
        if tuple(packed.shape) != expected_packed:
            raise FormatError(
                f"packed codes of {fmt} with {self.k} values a row must have shape {expected_packed}, "
                f"not {tuple(packed.shape)}: a block of {fmt.block_size} takes {fmt.block_bytes} bytes"
            )
        if tuple(scales.shape) != expected_scales:
            raise FormatError(
                f"scales must have shape {expected_scales}, one byte for each block of {fmt.block_size} values, "
                f"not {tuple(scales.shape)}; packed codes have shape {tuple(packed.shape)}"
            )
        if packed.device != scales.device:
            raise FormatError(f"packed codes are on {packed.device} but scales on {scales.device}; move one of them")

    @classmethod
    def from_packed(cls, packed: Tensor, scales: Tensor, fmt: BlockFormat | str, *, k: int | None = None) -> MXTensor:
        """Wrap packed codes and scales without copying them.

        Args:
            packed: [..., P], uint8 or any other one-byte dtype (float8 dtypes are reinterpreted, not converted).
            scales: [..., P / block bytes], uint8 or float8_e8m0fnu.
            fmt: a block format or its name.
            k: values in a row, if the last block is partly padding; default: all of them.

        Raises:
            FormatError: dtypes, shapes or devices do not fit together.
        """
        fmt = lookup(fmt)
        packed, scales = _as_bytes(packed, "packed"), _as_bytes(scales, "scales")
        if packed.ndim and packed.shape[-1] % fmt.block_bytes:
            raise FormatError(
                f"a row of {packed.shape[-1]} bytes does not hold whole blocks of {fmt}, "
                f"which take {fmt.block_bytes} bytes each"
            )
        if k is None:
            k = packed.shape[-1] // fmt.block_bytes * fmt.block_size if packed.ndim else 0
        return cls(packed, scales, fmt, k)

    @classmethod
    def from_codes(cls, codes: Tensor, scales: Tensor, fmt: BlockFormat | str) -> MXTensor:
        """Pack codes, one a byte.

        Args:
            codes: uint8 [..., K], element bit patterns in the low bits, the others 0. A last block that is not full is
                padded with zero codes.
            scales: uint8 [..., ceil(K / 32)].
            fmt: a block format or its name.

        Raises:
            FormatError: a code has bits beyond the element's width, or shapes or dtypes do not fit together.
        """
        fmt = lookup(fmt)
        codes, scales = _as_bytes(codes, "codes"), _as_bytes(scales, "scales")
        if codes.ndim == 0:
            raise FormatError("codes must have at least one dimension")
        if codes.device.type != "meta" and codes.numel() and int(codes.max()) >> fmt.element.bits:
            raise FormatError(f"code {int(codes.max())} has more than the {fmt.element.bits} bits of {fmt.element}")
        k = codes.shape[-1]
        padded = torch.nn.functional.pad(codes, (0, fmt.blocks(k) * fmt.block_size - k))
        return cls(pack(padded, fmt), scales, fmt, k)

    def codes(self) -> Tensor:
        """Element bit patterns, one a byte, without padding: uint8 [..., K]."""
        return unpack(self.packed, self.format)[..., : self.k]

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor that this stands for: [..., K]."""
        return torch.Size((*self.packed.shape[:-1], self.k))

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return self.packed.ndim

    @property
    def device(self) -> torch.device:
        """Where codes and scales are."""
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of packed codes and scales."""
        return self.packed.nbytes + self.scales.nbytes

    def to(self, device: torch.device | str) -> MXTensor:
        """The same tensor on another device."""
        return self._map(lambda t: t.to(device))

    def contiguous(self) -> MXTensor:
        """The same tensor with contiguous codes and scales."""
        return self._map(Tensor.contiguous)

    def __getitem__(self, index: int | slice | Tensor) -> MXTensor:
        """Index the first dimension, for example an expert: a view for integers and slices.

        Raises:
            FormatError: there is only the blocked dimension.
        """
        if not isinstance(index, int | slice | Tensor):
            raise FormatError(f"an MXTensor is indexed along its first dimension only, not by {index!r}")
        if self.ndim < 2:
            raise FormatError("cannot index the blocked dimension of an MXTensor; use codes() or dequantize")
        return self._map(lambda t: t[index])

    def __len__(self) -> int:
        return self.shape[0]

    def _map(self, f: Callable[[Tensor], Tensor]) -> MXTensor:
        return MXTensor(f(self.packed), f(self.scales), self.format, self.k)

    def __repr__(self) -> str:
        return f"MXTensor({self.format}, shape={tuple(self.shape)}, nbytes={self.nbytes}, device='{self.device}')"


def _as_bytes(t: Tensor, name: str) -> Tensor:
    if not isinstance(t, Tensor):
        raise FormatError(f"{name} must be a torch.Tensor, not {type(t).__name__}")
    if t.dtype not in _BYTE_DTYPES:
        raise FormatError(f"{name} must have a one-byte dtype such as uint8, not {t.dtype}")
    return t if t.dtype is torch.uint8 else t.view(torch.uint8)

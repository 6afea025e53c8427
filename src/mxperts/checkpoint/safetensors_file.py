"""One safetensors file: its header, read and checked without its data, and writing it one tensor at a time.

Source: https://github.com/huggingface/safetensors, README, "Format".
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from mxperts.errors import CheckpointError

MAX_HEADER = 100_000_000
"""Longest header, in bytes, that safetensors itself accepts."""

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""What safetensors calls a dtype, and what torch calls it."""


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """A stored tensor without its data.

    Attributes:
        name: its name in the file.
        dtype: safetensors' name of its dtype, such as ``BF16``.
        shape: its shape.
        file: where it is.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path

    @property
    def values(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return self.values * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor to be written.

    Attributes:
        name: its name in the file.
        dtype: its dtype.
        shape: its shape.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a file, checked against its size.

    Raises:
        CheckpointError: the file is missing, truncated or no safetensors file.
    """
    try:
        with file.open("rb") as f:
            size = os.fstat(f.fileno()).st_size
            start = f.read(8)
            if len(start) < 8:
                raise CheckpointError(f"{file} has {size} bytes: too short for a safetensors file")
            (length,) = struct.unpack("<Q", start)
            if length > min(MAX_HEADER, size - 8):
                raise CheckpointError(
                    f"{file} says that its header has {length} bytes, but the file has {size}: it is truncated or not "
                    "a safetensors file"
                )
            text = f.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    try:
        header = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{file} has a header that is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} has a header that is no JSON object")
    header.pop("__metadata__", None)
    offsets = []
    found: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        match entry:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if all(
                type(n) is int and n >= 0 for n in shape
            ):
                pass
            case _:
                raise CheckpointError(f"{file}: {name} has the header entry {entry!r}, without dtype, shape or offsets")
        if dtype not in DTYPES:
            raise CheckpointError(f"{file}: {name} has dtype {dtype!r}; mxperts reads {', '.join(DTYPES)}")
        info = found[name] = TensorInfo(name=name, dtype=dtype, shape=tuple(shape), file=file)
        if end - begin != info.nbytes:
            raise CheckpointError(f"{file}: {name} is {info}, {info.nbytes} bytes, but has {end - begin} bytes of data")
        offsets.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(offsets):
        if begin != position:
            raise CheckpointError(f"{file}: the data of {name} begin at byte {begin}; expected {position}")
        position = end
    if 8 + length + position != size:
        raise CheckpointError(
            f"{file} should have {8 + length + position} bytes by its header, but has {size}: truncated or damaged"
        )
    return found


def write_file(
    file: Path, entries: Sequence[Entry], tensors: Iterable[Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a file whole or not at all; only one tensor is in memory at a time.

    Args:
        file: its name.
        entries: what it will hold, in this order.
        tensors: the tensors of ``entries``.
        metadata: of the file; ``{"format": "pt"}`` by default, which Transformers asks for.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata) if metadata is not None else {"format": "pt"}}
    position = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": next(name for name, dtype in DTYPES.items() if dtype == entry.dtype),
            "shape": list(entry.shape),
            "data_offsets": [position, position + entry.nbytes],
        }
        position += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(file) as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for entry, tensor in zip(entries, tensors, strict=True):
            assert tensor.dtype == entry.dtype, (entry, tensor.dtype)
            assert tuple(tensor.shape) == entry.shape, (entry, tensor.shape)
            f.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[BinaryIO]:
    """A file to write, which gets its name only when it is whole and on the disk; until then ``.tmp`` is behind it."""
    temporary = file.with_name(file.name + ".tmp")
    try:
        with temporary.open("wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise

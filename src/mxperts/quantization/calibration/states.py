"""Hidden states between decoder layers, in files: the system keeps in memory what it can, and a run can go on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor


def mapped(file: Path, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A file of this many bytes as a tensor; it is made if it is not there, and what is written goes to it."""
    size = torch.Size(shape).numel()
    with file.open("ab") as f:
        f.truncate(size * dtype.itemsize)
    return torch.from_file(str(file), shared=True, size=size, dtype=dtype).reshape(tuple(shape))


class HiddenStates:
    """What enters each decoder layer, one file a layer, of which the newest is kept.

    Args:
        folder: where the files are; made if it is not there.
        name: what their names begin with.
        shape: [windows, context, H].
        dtype: of the model.
    """

    def __init__(self, folder: Path, name: str, shape: Sequence[int], dtype: torch.dtype) -> None:
        self._folder, self._name, self._shape, self._dtype = folder, name, tuple(shape), dtype
        folder.mkdir(parents=True, exist_ok=True)

    def has(self, layer: int) -> bool:
        """Whether what enters this layer is known."""
        return self._file(layer).exists()

    def newest(self, layers: int) -> int | None:
        """The last of so many layers of which it is known what enters it."""
        return next((layer for layer in reversed(range(layers)) if self.has(layer)), None)

    def entering(self, layer: int) -> Tensor:
        """What enters this layer, [windows, context, H]."""
        return mapped(self._file(layer), self._shape, self._dtype)

    @contextmanager
    def writing(self, layer: int) -> Iterator[Tensor]:
        """A tensor to fill with what enters this layer; the file gets its name when it is whole and on the disk.

        What enters earlier layers is then deleted.
        """
        file = self._file(layer)
        temporary = file.with_name(file.name + ".tmp")
        states = mapped(temporary, self._shape, self._dtype)
        yield states
        del states
        with temporary.open("rb+") as f:
            os.fsync(f.fileno())
        temporary.replace(file)
        for earlier in range(layer):
            self._file(earlier).unlink(missing_ok=True)

    def _file(self, layer: int) -> Path:
        return self._folder / f"{self._name}-{layer:05d}.bin"

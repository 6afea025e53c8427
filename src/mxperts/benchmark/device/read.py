"""Reading a GPU's memory as fast as it goes."""

from __future__ import annotations

from functools import partial
from statistics import median

import torch
from torch import Tensor

from mxperts.benchmark.device.replay import Stopwatch

TILES = ((4096, 8, 8), (8192, 4, 8), (2048, 16, 4), (8192, 16, 16))
"""Words of a step, steps of a block of threads, and warps: the fastest is taken."""


class Read:
    """A buffer much larger than the caches, read by a kernel that does nothing else.

    Args:
        nbytes: of the buffer, about.
        device: where.
        stopwatch: of the device.

    Attributes:
        amount: bytes that a pass reads.
        tiles: those that were fastest.
    """

    def __init__(self, nbytes: int, device: str, stopwatch: Stopwatch) -> None:
        step = max(words * steps for words, steps, _ in TILES)
        words = max(1, nbytes // 4 // step) * step
        self._buffer = torch.empty(words, dtype=torch.int32, device=device).random_()
        self._out = torch.empty(words // min(w * s for w, s, _ in TILES), dtype=torch.int32, device=device)
        self.amount = self._buffer.nbytes

        def seconds(tiles: tuple[int, int, int]) -> float:
            read(self._buffer, self._out, tiles)  # compiles
            return median(stopwatch(partial(read, self._buffer, self._out, tiles), 5))

        self.tiles = min(TILES, key=seconds)

    def __call__(self) -> None:
        """Read all of it once."""
        read(self._buffer, self._out, self.tiles)


def read(buffer: Tensor, out: Tensor, tiles: tuple[int, int, int]) -> None:
    """Read an int32 buffer of whole blocks; each block of threads writes one number to ``out``."""
    from mxperts.benchmark.device import read_kernel

    words, steps, warps = tiles
    blocks = buffer.numel() // (words * steps)
    read_kernel.read_kernel[(blocks,)](buffer, out, WORDS=words, STEPS=steps, num_warps=warps)

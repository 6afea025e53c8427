"""How fast a problem could run: bytes that must be read, operations that must be done, and what the machine can do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np
import torch

from mxperts.benchmark.inputs import Call
from mxperts.benchmark.problem import Problem

MATMUL_SIZE = 2048
STREAM_FACTOR = 8
"""The buffer that bandwidth is measured on, in last-level caches."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a call of a problem cannot do without, on average over its routings.

    Attributes:
        active_experts: different experts.
        bytes: packed weights of these experts, hidden states and results.
        flops: of the projections, two a multiplication.
    """

    active_experts: float
    bytes: float
    flops: float


def work(problem: Problem, calls: Sequence[Call]) -> Work:
    """Count the work of a problem with these routings."""
    shape, tokens = problem.shape, problem.tokens
    active = mean(call.active_experts for call in calls)
    states = 2 * tokens * shape.hidden * problem.dtype.itemsize  # read once, written once
    return Work(
        active_experts=active,
        bytes=active * problem.packed_bytes / shape.experts + states,
        flops=2 * tokens * shape.top_k * shape.values,
    )


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the machine reached next to the timings.

    Attributes:
        stream: bytes a second that all threads together read from memory.
        matmul: operations a second of a bf16 matrix product.
    """

    stream: float
    matmul: float

    def bound(self, w: Work) -> float:
        """Seconds that the work takes at least, by either limit."""
        return max(w.bytes / self.stream, w.flops / self.matmul)


class Stream:
    """A buffer much larger than the caches, to read with PyTorch's threads: a sum of 64-bit integers is pure reading.

    Args:
        cache: bytes of the last-level cache.

    Attributes:
        amount: bytes that a pass reads, ``STREAM_FACTOR`` times the cache.
    """

    def __init__(self, cache: int) -> None:
        # numpy asks for huge pages, which PyTorch does not
        self._buffer = torch.from_numpy(np.ones(max(STREAM_FACTOR * cache, 1 << 20) // 8, dtype=np.int64))
        self.amount = self._buffer.nbytes

    def __call__(self) -> None:
        """Read all of it once."""
        self._buffer.sum()


class Matmul:
    """A product of two square matrices by PyTorch: what the device reaches where memory is no limit.

    Attributes:
        amount: operations of a product.
    """

    def __init__(self, size: int = MATMUL_SIZE, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> None:
        self._a, self._b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        self._out = torch.empty(size, size, dtype=dtype, device=device)
        self.amount = 2 * size**3

    def __call__(self) -> None:
        """Multiply once."""
        torch.mm(self._a, self._b, out=self._out)

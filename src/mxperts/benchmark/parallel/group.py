"""The processes of a benchmark: started by torchrun, or this one alone."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from types import TracebackType

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mxperts.benchmark.problem import check_device

WARM_UP = 2
FEWEST, MOST = 5, 200
"""Calls that are timed, within the time there is."""


class Group:
    """All processes, joined by NCCL on GPUs and by gloo on CPUs, while the context is open.

    Args:
        device: "cpu" or "cuda", of which each process takes one.

    Raises:
        ArgumentError: the device is not there.
    """

    def __init__(self, device: str) -> None:
        launched = dist.is_torchelastic_launched()
        self.kind = device
        self.size = int(os.environ["WORLD_SIZE"]) if launched else 1
        self.rank = int(os.environ["RANK"]) if launched else 0
        self.device = device if device == "cpu" else f"{device}:{os.environ['LOCAL_RANK'] if launched else 0}"
        check_device(self.device)
        self.backend = "gloo" if device == "cpu" else "nccl"

    def __enter__(self) -> Group:
        where = torch.device(self.device)
        if where.type == "cuda":
            torch.cuda.set_device(where)
        bound = where if self.backend == "nccl" else None
        store = None if self.size > 1 else dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(self.backend, store=store, rank=self.rank, world_size=self.size, device_id=bound)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:  # else it would wait for the others
            dist.destroy_process_group()

    @cached_property
    def mesh(self) -> DeviceMesh:
        """Experts over all processes, each of which has a batch of its own."""
        return init_device_mesh(self.kind, (self.size, 1), mesh_dim_names=("ep", "tp"))

    def total(self, numbers: Sequence[int]) -> list[int]:
        """Sums over the processes."""
        return [int(n) for n in self._reduce(numbers, dist.ReduceOp.SUM)]

    def all(self, truth: bool) -> bool:
        """Whether it is so in every process."""
        return self._reduce([float(truth)], dist.ReduceOp.MIN) == [1.0]

    def seconds(self, call: Callable[[int], object], budget: float) -> list[float]:
        """Call it with 0, 1, …, in all processes together: the time of each call, that of the slowest process."""
        for i in range(WARM_UP):
            self._second(call, i)
        (once,) = self._reduce([self._second(call, WARM_UP)], dist.ReduceOp.MAX)
        times = max(FEWEST, min(MOST, int(budget / once)))
        return self._reduce([self._second(call, i) for i in range(times)], dist.ReduceOp.MAX)

    def _second(self, call: Callable[[int], object], i: int) -> float:
        self.meet()
        start = time.perf_counter()
        call(i)
        if self.kind == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def meet(self) -> None:
        """Wait for all processes."""
        dist.barrier()
        if self.kind == "cuda":
            torch.cuda.synchronize()

    def _reduce(self, numbers: Sequence[float], how: dist.ReduceOp.RedOpType) -> list[float]:
        tensor = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, how)
        reduced: list[float] = tensor.tolist()
        return reduced

"""The processor: calls one after another, timed by its clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from mxperts.benchmark.contenders.base import Run
from mxperts.benchmark.device.base import MATMUL, STREAM, Device, Limit, Timed
from mxperts.benchmark.inputs import Inputs, Weights, make_inputs
from mxperts.benchmark.machine import available_memory, last_level_cache
from mxperts.benchmark.problem import Problem
from mxperts.benchmark.roofline import Matmul, Stream
from mxperts.benchmark.timing import Plan, interleave


class Host(Device):
    """All cores that PyTorch's threads run on."""

    slice = Plan.slice
    checked_weights = 300_000_000

    def cache(self) -> int:
        return last_level_cache()

    def free_memory(self) -> int | None:
        return available_memory()

    def inputs(self, problem: Problem, layers: Sequence[Weights]) -> Inputs:
        return make_inputs(problem, layers=tuple(layers))

    def stream(self, cache: int) -> Limit:
        return Stream(cache)

    def matmul(self) -> Limit:
        return Matmul()

    def results(self, run: Run) -> Iterator[Tensor]:
        yield run(0)

    def time(self, runs: Mapping[str, Run], inputs: Inputs, stream: Limit, matmul: Limit, plan: Plan) -> Timed:
        calls: dict[str, Callable[[int], object]] = {**runs, STREAM: lambda i: stream(), MATMUL: lambda i: matmul()}
        timings = interleave(calls, plan, {name: _seconds(call) for name, call in calls.items()})
        return Timed(timings=timings, notes={}, details={})


def _seconds(call: Callable[[int], object]) -> float:
    """How long a call takes that is not the first, which may compile."""
    start = time.perf_counter()
    call(1)
    return time.perf_counter() - start

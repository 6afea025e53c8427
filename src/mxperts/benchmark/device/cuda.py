"""A CUDA device: calls recorded as CUDA graphs, timed by CUDA events."""

from __future__ import annotations

import importlib.metadata
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mxperts.benchmark.contenders.base import Run
from mxperts.benchmark.device.base import MATMUL, STREAM, Device, Limit, Timed
from mxperts.benchmark.device.read import Read
from mxperts.benchmark.device.replay import Replay, eager_seconds, record, slice_of
from mxperts.benchmark.inputs import Inputs, Weights, make_inputs
from mxperts.benchmark.problem import Problem
from mxperts.benchmark.roofline import Matmul, work
from mxperts.benchmark.timing import Plan, percentile, take_turns

MATMUL_SIZE = 8192
DEFAULT_CACHE = 64 << 20
"""Taken for the L2 cache where PyTorch does not tell."""
READ_BYTES = 4 << 30
"""The buffer that bandwidth is measured on, where there is room for it."""
EAGER_CALLS = 16
"""Calls in a row whose time is that of eager calls."""


class Cuda(Device):
    """One GPU.

    A slice is short and follows a rest of the same length, so that all is timed, and the limits are measured, at the
    clocks of a burst: a GPU that multiplies all the time throttles within a second.
    """

    slice = 0.02
    checked_weights = 4_000_000_000
    failures = (Exception,)
    details = ("captured", "replay_calls", "eager_ms", "matmul_fraction")

    def __init__(self, name: str) -> None:
        device = torch.device(name)
        if device.index is not None:
            torch.cuda.set_device(device.index)
        self._name = name

    def cache(self) -> int:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return int(getattr(properties, "L2_cache_size", 0)) or DEFAULT_CACHE

    def free_memory(self) -> int:
        free, _total = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()

    def inputs(self, problem: Problem, layers: Sequence[Weights]) -> Inputs:
        return make_inputs(problem, layers=tuple(layers), routings=routings(problem.tokens), disjoint=True)

    def stream(self, cache: int) -> Limit:
        nbytes = max(1 << 30, min(READ_BYTES, self.free_memory() // 8))
        return Read(max(nbytes, 8 * cache), self._name, event_seconds)

    def matmul(self) -> Limit:
        return Matmul(MATMUL_SIZE, device=self._name)

    def results(self, run: Run) -> Iterator[Tensor]:
        yield run(0)
        try:
            graph, result = capture(partial(run, 0))
        except Exception:  # whatever the software behind a contender raises; ``time`` says that it calls it one by one
            torch.cuda.synchronize()
            return
        graph.replay()
        torch.cuda.synchronize()
        yield result.clone()

    def time(self, runs: Mapping[str, Run], inputs: Inputs, stream: Limit, matmul: Limit, plan: Plan) -> Timed:
        calls = calls_of(inputs)
        eager = {name: eager_seconds(run, min(EAGER_CALLS, 2 * calls), event_seconds) for name, run in runs.items()}
        replays = {name: record(run, calls, record_graph, event_seconds) for name, run in runs.items()}
        for name, limit in ((STREAM, stream), (MATMUL, matmul)):
            replays[name] = Replay(go=limit, calls=1, seconds=min(event_seconds(limit, 3)))
        slices = {name: slice_of(r, plan.slice, event_seconds, rest=plan.slice) for name, r in replays.items()}
        timings = take_turns(slices, plan, {name: replay.seconds for name, replay in replays.items()})
        product = percentile(timings.seconds(MATMUL), 0.5) / matmul.amount * work(inputs.problem, inputs.calls).flops
        details = {
            name: {
                "captured": not replays[name].why_not,
                "replay_calls": replays[name].calls,
                "eager_ms": eager[name] * 1e3,
                "matmul_fraction": product / percentile(timings.seconds(name), 0.5),
            }
            for name in runs
        }
        notes = {
            name: f"called one by one, because no CUDA graph can be made of it ({replays[name].why_not})"
            for name in runs
            if replays[name].why_not
        }
        return Timed(timings=timings, notes=notes, details=details)

    def finish(self) -> None:
        torch.cuda.synchronize()

    def release(self) -> None:
        torch.cuda.empty_cache()

    def machine(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return {
            "gpu": {
                "name": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "sm_count": properties.multi_processor_count,
                "memory_bytes": properties.total_memory,
                "l2_bytes": self.cache(),
                "driver": _driver(),
                "cuda": torch.version.cuda,
                "torch": torch.__version__,
                "triton": _version("triton"),
            }
        }


def routings(tokens: int) -> int:
    """Routings that are recorded one after another: fewer, the more of the layer's weights each of them takes."""
    return next(count for limit, count in ((8, 8), (64, 4), (512, 2), (float("inf"), 1)) if tokens < limit)


def calls_of(inputs: Inputs) -> int:
    """Calls that take every routing equally often and every copy of the layer."""
    return len(inputs.calls) * -(-len(inputs.layers) // len(inputs.calls))


def capture(work: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of work that has run before, and the memory that replays write the result to."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is made anew for another stream, such as workspaces, is made here
        work()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    return graph, result


def record_graph(run: Run, calls: int) -> Callable[[], None]:
    """Calls 0 to ``calls`` - 1 as one graph, replayed once."""

    def work() -> Tensor:
        for i in range(calls - 1):
            run(i)
        return run(calls - 1)

    try:
        graph, _result = capture(work)
    except Exception:
        torch.cuda.synchronize()
        raise
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def event_seconds(go: Callable[[], object], times: int) -> list[float]:
    """Run something so many times, one right after another: seconds of each, between events on the device."""
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]
    for start, end in pairs:
        start.record()
        go()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e-3 for start, end in pairs]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    """Version of the driver; None where nvidia-smi does not tell."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().partition("\n")[0] or None

"""One line of a benchmark of layers: what was run, how long it took, and how that compares with what is possible."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from mxperts.benchmark.problem import Problem
from mxperts.benchmark.roofline import Limits, Work
from mxperts.benchmark.timing import Timings, percentile


class Status(StrEnum):
    """What became of a contender."""

    OK = "ok"
    SKIPPED = "skipped"
    WRONG = "wrong"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Times of a contender, and what follows from them. Rates are of the problem's work, whatever a contender reads.

    Attributes:
        median_ms, p20_ms, p80_ms: of a call.
        samples: calls that were timed.
        rounds: rounds that it took part in.
        disturbed: whether other processes used the machine all the time.
        gb_s: packed bytes of the active experts, and hidden states, over the median.
        gflop_s: operations over the median.
        stream_gb_s: bandwidth of reading memory, measured in the same rounds.
        stream_fraction: ``gb_s`` over the bandwidth, the median of the rounds.
        matmul_gflop_s: rate of a bf16 matrix product of the same PyTorch on the same threads.
        bound_ms: what the problem takes at least, by either limit.
        bound_fraction: ``bound_ms`` over the median.
        speedup: median of the first row over this median; None if the first row has none.
    """

    median_ms: float
    p20_ms: float
    p80_ms: float
    samples: int
    rounds: int
    disturbed: bool
    gb_s: float
    gflop_s: float
    stream_gb_s: float
    stream_fraction: float
    matmul_gflop_s: float
    bound_ms: float
    bound_fraction: float
    speedup: float | None

    @classmethod
    def of(
        cls, name: str, timings: Timings, work: Work, limits: Limits, *, stream: str, stream_bytes: int, baseline: str
    ) -> Measurement:
        """Of one contender.

        Args:
            name: the contender's.
            timings: of all contenders.
            work: of a call.
            limits: of the machine.
            stream, stream_bytes: what the measurement of bandwidth is called in ``timings``, and what it reads.
            baseline: the contender that speed-ups refer to.
        """
        samples = timings.seconds(name)
        seconds = percentile(samples, 0.5)
        of_baseline = timings.seconds(baseline)
        return cls(
            median_ms=seconds * 1e3,
            p20_ms=percentile(samples, 0.2) * 1e3,
            p80_ms=percentile(samples, 0.8) * 1e3,
            samples=len(samples),
            rounds=len(timings.of(name)),
            disturbed=timings.disturbed(name),
            gb_s=work.bytes / seconds / 1e9,
            gflop_s=work.flops / seconds / 1e9,
            stream_gb_s=limits.stream / 1e9,
            stream_fraction=work.bytes / stream_bytes * timings.ratio(stream, name),
            matmul_gflop_s=limits.matmul / 1e9,
            bound_ms=limits.bound(work) * 1e3,
            bound_fraction=limits.bound(work) / seconds,
            speedup=percentile(of_baseline, 0.5) / seconds if of_baseline else None,
        )


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """One contender at one problem.

    Attributes:
        problem: what was run.
        contender, version: its name, and the version of the software behind it if that is not mxperts.
        how: how it ran the problem, if it said so.
        status, note: whether it was timed, and if not, why; a note may also say how it was timed.
        threads: of PyTorch, which all contenders use as many of.
        copies: of the layer's weights, that calls cycle through.
        load_seconds: to bring the weights into its own form.
        error, error_limit: relative rms error against the reference, and the largest that counts.
        work: of a call.
        measured: None unless ``status`` is ok.
        details: what the device's way of timing tells besides, with the same keys for every row of the device.
    """

    problem: Problem
    contender: str
    version: str | None
    how: str
    status: Status
    note: str
    threads: int
    copies: int
    load_seconds: float | None
    error: float | None
    error_limit: float
    work: Work
    measured: Measurement | None
    details: Mapping[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """A flat dictionary of plain values, with the same keys for every row on a device."""
        shape, problem = self.problem.shape, self.problem
        names = [f.name for f in dataclasses.fields(Measurement)]
        measured = dataclasses.asdict(self.measured) if self.measured else dict.fromkeys(names)
        return {
            "benchmark": "layer",
            "shape": shape.name,
            "experts": shape.experts,
            "top_k": shape.top_k,
            "hidden": shape.hidden,
            "intermediate": shape.intermediate,
            "tokens": problem.tokens,
            "scheme": problem.scheme.name,
            "activation": problem.activation,
            "dtype": str(problem.dtype).removeprefix("torch."),
            "device": problem.device,
            "threads": self.threads,
            "seed": problem.seed,
            "contender": self.contender,
            "version": self.version,
            "how": self.how,
            "status": self.status.value,
            "note": self.note,
            "copies": self.copies,
            "load_seconds": self.load_seconds,
            "error": self.error,
            "error_limit": self.error_limit,
            "active_experts": self.work.active_experts,
            "bytes": self.work.bytes,
            "flops": self.work.flops,
            **measured,
            **self.details,
        }

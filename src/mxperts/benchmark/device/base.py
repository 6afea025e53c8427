"""What a benchmark of layers asks of the device that it runs on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from mxperts.benchmark.contenders.base import Run
from mxperts.benchmark.inputs import Inputs, Weights
from mxperts.benchmark.problem import Problem
from mxperts.benchmark.timing import Plan, Timings

STREAM, MATMUL = "(stream)", "(matmul)"
"""What the measurements of the machine's limits are called among the contenders."""


class Limit(Protocol):
    """Something whose time tells a limit of the machine."""

    @property
    def amount(self) -> int:
        """What one call does: bytes that are read, or operations."""

    def __call__(self) -> None:
        """Do it once."""


@dataclass(frozen=True, kw_only=True)
class Timed:
    """What became of timing a problem.

    Attributes:
        timings: of all contenders, and of ``STREAM`` and ``MATMUL``.
        notes: by contender, what is to be said about how it was timed.
        details: by contender, further fields of its row; the same ones for every contender.
    """

    timings: Timings
    notes: Mapping[str, str]
    details: Mapping[str, Mapping[str, Any]]


class Device(ABC):
    """A processor or an accelerator.

    Attributes:
        slice: seconds that each contender runs in a round.
        checked_weights: weights that the reference, which takes its time, multiplies with at most, but one token.
        failures: exceptions of a contender that end its part in the benchmark and not the benchmark.
        details: fields that rows have on this device beyond those that they have everywhere.
    """

    slice: float
    checked_weights: int
    failures: tuple[type[Exception], ...] = ()
    details: tuple[str, ...] = ()

    @abstractmethod
    def cache(self) -> int:
        """Bytes of the last-level cache."""

    @abstractmethod
    def free_memory(self) -> int | None:
        """Bytes that can be had; None where nobody tells."""

    @abstractmethod
    def inputs(self, problem: Problem, layers: Sequence[Weights]) -> Inputs:
        """Random inputs of a problem, with these layers."""

    @abstractmethod
    def stream(self, cache: int) -> Limit:
        """Reads memory, much more than a cache of so many bytes holds: as fast as the device reads."""

    @abstractmethod
    def matmul(self) -> Limit:
        """Multiplies bf16 matrices where memory is no limit."""

    @abstractmethod
    def results(self, run: Run) -> Iterator[Tensor]:
        """Call 0 of a contender, in every way in which it is going to be timed: [T, H] each."""

    @abstractmethod
    def time(self, runs: Mapping[str, Run], inputs: Inputs, stream: Limit, matmul: Limit, plan: Plan) -> Timed:
        """Time contenders, by name, and the machine's limits side by side."""

    def finish(self) -> None:  # noqa: B027
        """Wait until all that was asked for is done."""

    def release(self) -> None:  # noqa: B027
        """Give memory back that is kept for nothing."""

    def machine(self) -> dict[str, Any]:
        """What figures depend on that ``conditions`` does not know, ready for JSON."""
        return {}

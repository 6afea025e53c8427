"""Dense experts on a GPU: with weights that are dense beforehand, and with weights that every call dequantises."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mxperts.benchmark.contenders.base import Bind, Contender, Run
from mxperts.benchmark.contenders.dense import Dense
from mxperts.benchmark.contenders.dequantize_first import DequantizeFirst
from mxperts.benchmark.contenders.grouped.experts import GroupedExperts, tiles_for
from mxperts.benchmark.contenders.grouped.tiles import Tiles
from mxperts.benchmark.contenders.installed import package_folder
from mxperts.benchmark.contenders.loop import quantizer
from mxperts.benchmark.device.cuda import event_seconds
from mxperts.benchmark.device.replay import Stopwatch
from mxperts.benchmark.inputs import Inputs, Weights
from mxperts.benchmark.problem import Problem
from mxperts.ops import dispatch
from mxperts.ops.quantize import dequantize


class Grouped(Contender):
    """What both have in common: the products.

    Args:
        backend: of mxperts, that dequantises weights and quantises activations.
        stopwatch: of the device, to choose tiles by; without one they are vLLM's default.
    """

    def __init__(self, backend: str = "gpu", stopwatch: Stopwatch | None = event_seconds) -> None:
        self._backend, self._stopwatch = backend, stopwatch
        self._tiles: dict[Problem, Tiles] = {}

    def unavailable(self) -> str | None:
        if package_folder("triton") is None:
            return "its kernels need triton, which is not installed"
        if self._backend not in {backend.name for backend in dispatch.BACKENDS}:
            return f"this version has no backend {self._backend!r} to dequantise with"
        return None

    def how(self, problem: Problem) -> str:
        tiles = self._tiles.get(problem)
        return "grouped products by Triton" + (f", tiles {tiles}" if tiles else "")

    def _dense(self, layer: Weights, problem: Problem) -> tuple[Tensor, Tensor]:
        """Both weights of all experts in the dtype of the hidden states."""
        gate_up, down = (dequantize(w, problem.dtype, backend=self._backend) for w in (layer.gate_up, layer.down))
        return gate_up, down


class GroupedDense(Grouped, Dense):
    """Weights in bf16."""

    def load(self, problem: Problem, layers: Sequence[Weights]) -> Bind:
        dense = [self._dense(layer, problem) for layer in layers]
        as_is = quantizer(None, None)

        def bind(inputs: Inputs) -> Run:
            problem, calls = inputs.problem, inputs.calls
            tiles = self._tiles[problem] = tiles_for(problem, calls[0], *dense[0], as_is, self._stopwatch)
            experts = [GroupedExperts(problem, call, tiles) for call in calls]
            return lambda i: experts[i % len(experts)](*dense[i % len(dense)], as_is)

        return bind


class DequantizeFirstGrouped(Grouped, DequantizeFirst):
    """vLLM's emulation at its best: all experts are dequantised in every call, by the kernel of mxperts' own backend.

    vLLM's own dequantisation is slower: of MXFP4 about half as fast, of MXFP6 not in one kernel.
    """

    def load(self, problem: Problem, layers: Sequence[Weights]) -> Bind:
        as_is = quantizer(None, None)

        def bind(inputs: Inputs) -> Run:
            problem, calls = inputs.problem, inputs.calls
            quantize = quantizer(problem.scheme.activation, inputs.input_scales, backend=self._backend)
            tiles = self._tiles[problem] = tiles_for(
                problem, calls[0], *self._dense(layers[0], problem), as_is, self._stopwatch
            )
            experts = [GroupedExperts(problem, call, tiles) for call in calls]

            def run(i: int) -> Tensor:
                return experts[i % len(experts)](*self._dense(layers[i % len(layers)], problem), quantize)

            return run

        return bind

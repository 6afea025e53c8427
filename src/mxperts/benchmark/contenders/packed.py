"""mxperts itself, on one of its backends."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mxperts.benchmark.contenders.base import Bind, Contender, Run
from mxperts.benchmark.inputs import Inputs, Weights
from mxperts.benchmark.problem import Problem
from mxperts.errors import MxpertsError
from mxperts.formats import MXFP4
from mxperts.ops import dispatch
from mxperts.ops.dispatch import Choice, explain, resolve
from mxperts.ops.experts import fused_experts
from mxperts.ops.prepare import prepare

PACKED = dispatch.Problem(op="fused_experts", device=torch.device("cpu"), dtype=torch.bfloat16, weight=MXFP4)
"""What a backend must be able to run to take part."""


class Packed(Contender):
    """``fused_experts`` on prepared weights."""

    def __init__(self, backend: str) -> None:
        self.backend = resolve(backend, PACKED).backend.name  # refused before work starts, if it cannot run here
        self.name = f"mxperts {self.backend}"

    def refuses(self, problem: Problem) -> str | None:
        try:
            self._explain(problem)
        except MxpertsError as error:
            return str(error)
        return None

    def how(self, problem: Problem) -> str:
        return self._explain(problem).how

    def _explain(self, problem: Problem) -> Choice:
        return explain(
            device=problem.device,
            dtype=problem.dtype,
            weight=problem.scheme.weight,
            activation=problem.scheme.activation,
            backend=self.backend,
        )

    def memory(self, problem: Problem, copies: int) -> int:
        return 0 if self.backend == "reference" else copies * problem.packed_bytes

    def load(self, problem: Problem, layers: Sequence[Weights]) -> Bind:
        activation_format = problem.scheme.activation
        prepared = [
            prepare(
                layer.gate_up,
                layer.down,
                activation_format=activation_format,
                dtype=problem.dtype,
                backend=self.backend,
            )
            for layer in layers
        ]

        def bind(inputs: Inputs) -> Run:
            activation, input_scales = inputs.problem.activation, inputs.input_scales

            def run(i: int) -> Tensor:
                call = inputs.call(i)
                return fused_experts(
                    call.hidden_states,
                    prepared[i % len(prepared)],
                    None,
                    call.top_k_index,
                    call.top_k_weights,
                    activation=activation,
                    activation_format=activation_format,
                    input_scales=input_scales,
                    backend=self.backend,
                )

            return run

        return bind


def default_backends() -> list[str]:
    """The backends that are built for speed and can run here; the reference if there are none."""
    found = [backend.name for backend in dispatch.BACKENDS if backend.refuses(PACKED) is None]
    return [name for name in found if name != "reference"] or ["reference"]

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
from mxperts.ops.prepare import PreparedExperts, Weight, prepare

CANONICAL = ":canonical"
"""After a backend's name: on weights as they are stored, not prepared."""


def packed_on(device: str = "cpu") -> dispatch.Problem:
    """What a backend must be able to run to take part on a device."""
    return dispatch.Problem(op="fused_experts", device=torch.device(device), dtype=torch.bfloat16, weight=MXFP4)


PACKED = packed_on()


class Packed(Contender):
    """``fused_experts`` on prepared weights, or on weights as they are.

    Args:
        backend: its name, with ``CANONICAL`` behind for weights that are not prepared.
        device: where.

    Raises:
        ArgumentError: no backend has this name.
        BackendUnavailable: it cannot run here; so it is refused before work starts.
    """

    def __init__(self, backend: str, device: str = "cpu") -> None:
        name, self.prepared = backend.removesuffix(CANONICAL), not backend.endswith(CANONICAL)
        self.backend = resolve(name, packed_on(device)).backend.name
        self.name = f"mxperts {self.backend}" + ("" if self.prepared else " canonical")

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
        return copies * problem.packed_bytes if self.prepared and self.backend != "reference" else 0

    def load(self, problem: Problem, layers: Sequence[Weights]) -> Bind:
        activation_format = problem.scheme.activation
        weights: list[tuple[Weight | PreparedExperts, Weight | None]] = [
            (
                prepare(
                    layer.gate_up,
                    layer.down,
                    activation_format=activation_format,
                    dtype=problem.dtype,
                    backend=self.backend,
                ),
                None,
            )
            if self.prepared
            else (layer.gate_up, layer.down)
            for layer in layers
        ]

        def bind(inputs: Inputs) -> Run:
            activation, input_scales = inputs.problem.activation, inputs.input_scales

            def run(i: int) -> Tensor:
                call = inputs.call(i)
                return fused_experts(
                    call.hidden_states,
                    *weights[i % len(weights)],
                    call.top_k_index,
                    call.top_k_weights,
                    activation=activation,
                    activation_format=activation_format,
                    input_scales=input_scales,
                    backend=self.backend,
                )

            return run

        return bind


def default_backends(device: str = "cpu") -> list[str]:
    """The backends that are built for speed and can run on a device; the reference if there are none."""
    problem = packed_on(device)
    found = [backend.name for backend in dispatch.BACKENDS if backend.refuses(problem) is None]
    return [name for name in found if name != "reference"] or ["reference"]

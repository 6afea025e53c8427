"""Unquantised weights: what the model would cost in bf16."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from mxperts.benchmark.contenders.base import Bind, Contender, Run
from mxperts.benchmark.contenders.dequantize_first import dequantize_all, lookup_table
from mxperts.benchmark.contenders.loop import gated, loop_experts, projection, quantizer
from mxperts.benchmark.inputs import Inputs, Weights
from mxperts.benchmark.problem import Problem, copies_needed
from mxperts.formats import Activation


class Dense(Contender):
    """PyTorch's ``F.linear`` with the weights of every expert that is hit, dequantised beforehand."""

    name = "bf16"

    def activation(self, problem: Problem) -> Activation:
        return None

    def copies(self, problem: Problem, copies: int, cache: int) -> int:
        return min(copies, copies_needed(problem.dense_bytes, cache))

    def memory(self, problem: Problem, copies: int) -> int:
        return copies * problem.dense_bytes

    def load(self, problem: Problem, layers: Sequence[Weights]) -> Bind:
        assert problem.scheme.weight is not None, problem
        table = lookup_table(problem.scheme.weight, problem.dtype)
        dense = [[projection(dequantize_all(w, table)) for w in (layer.gate_up, layer.down)] for layer in layers]
        activate, as_is = partial(gated, activation=problem.activation), quantizer(None, None)

        def bind(inputs: Inputs) -> Run:
            def run(i: int) -> Tensor:
                call, (gate_up, down) = inputs.call(i), dense[i % len(dense)]
                states = (call.hidden_states, call.top_k_index, call.top_k_weights)
                return loop_experts(*states, gate_up, down, activate, as_is)

            return run

        return bind

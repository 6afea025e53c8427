"""The baseline, as vLLM emulates MX schemes: every forward pass dequantises all experts, then multiplies in bf16."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from mxperts.benchmark.contenders.base import Bind, Contender, Run
from mxperts.benchmark.contenders.loop import gated, loop_experts, projection, quantizer
from mxperts.benchmark.inputs import Inputs, Weights
from mxperts.benchmark.problem import Problem
from mxperts.formats import BlockFormat
from mxperts.packing import unpack
from mxperts.tensor import MXTensor


class DequantizeFirst(Contender):
    """Plain PyTorch: a table look-up for the codes, a product with the scales, a loop over the experts."""

    name = "dequantise-first"

    def memory(self, problem: Problem, copies: int) -> int:
        return problem.dense_bytes

    def load(self, problem: Problem, layers: Sequence[Weights]) -> Bind:
        assert problem.scheme.weight is not None, problem
        table = lookup_table(problem.scheme.weight, problem.dtype)

        def bind(inputs: Inputs) -> Run:
            quantize = quantizer(problem.scheme.activation, inputs.input_scales)
            activate = partial(gated, activation=problem.activation)

            def run(i: int) -> Tensor:
                layer, call = layers[i % len(layers)], inputs.call(i)
                gate_up, down = (projection(dequantize_all(w, table)) for w in (layer.gate_up, layer.down))
                states = (call.hidden_states, call.top_k_index, call.top_k_weights)
                return loop_experts(*states, gate_up, down, activate, quantize)

            return run

        return bind


def lookup_table(fmt: BlockFormat, dtype: torch.dtype) -> Tensor:
    """Values of a byte's codes [256, codes a byte] where codes fill bytes, else of single codes [codes, 1]."""
    values = torch.tensor(fmt.element.values, dtype=dtype)
    if fmt.pack_bytes > 1:
        return values.unsqueeze(-1)
    codes = unpack(torch.arange(256, dtype=torch.uint8).unsqueeze(-1), fmt)
    return values[codes.to(torch.int64)]


def dequantize_all(weight: MXTensor, table: Tensor) -> Tensor:
    """A dense weight [E, N, K] of the table's dtype, one expert after another."""
    out = torch.empty(weight.shape, dtype=table.dtype)
    for expert in range(len(weight)):
        out[expert] = _dequantize(weight[expert], table)
    return out


def _dequantize(weight: MXTensor, table: Tensor) -> Tensor:
    fmt = weight.format
    index = weight.packed if table.shape[0] == 256 else unpack(weight.packed, fmt)
    values = torch.nn.functional.embedding(index.to(torch.int32), table).flatten(-2)  # [N, K]
    scales = torch.exp2(weight.scales.float() - 127).to(table.dtype)
    blocks = values.unflatten(-1, (-1, fmt.block_size)).mul_(scales.unsqueeze(-1))
    dense: Tensor = blocks.flatten(-2)[..., : weight.k]
    return dense

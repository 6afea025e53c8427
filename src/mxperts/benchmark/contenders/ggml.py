"""ggml's experts: the graph that llama.cpp builds for a layer, on the layout that it repacks MXFP4 to by default."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from mxperts.benchmark.contenders.base import Bind, Contender, Run, needs_whole_blocks
from mxperts.benchmark.contenders.ggml_library import TYPE_F32, TYPE_I32, TYPE_MXFP4, Ggml, load_ggml
from mxperts.benchmark.contenders.installed import version_of
from mxperts.benchmark.contenders.loop import SWIGLU_ALPHA, SWIGLU_LIMIT
from mxperts.benchmark.inputs import Inputs, Weights
from mxperts.benchmark.problem import Problem
from mxperts.formats import MXFP4, Activation
from mxperts.packing import unpack
from mxperts.tensor import MXTensor


class GgmlExperts(Contender):
    """MXFP4 weights, and activations in ggml's q8_0: 8-bit integers with a half-precision scale for 32 of them."""

    name = "ggml"
    limit = 3e-2

    def unavailable(self) -> str | None:
        found = load_ggml()
        return found if isinstance(found, str) else None

    def refuses(self, problem: Problem) -> str | None:
        if problem.scheme.weight != MXFP4:
            return f"of the MX formats it has MXFP4 only, not {problem.scheme.weight}"
        return needs_whole_blocks(problem)

    def activation(self, problem: Problem) -> Activation:
        return None

    def memory(self, problem: Problem, copies: int) -> int:
        return copies * problem.packed_bytes

    def load(self, problem: Problem, layers: Sequence[Weights]) -> Bind:
        ggml = load_ggml()
        assert isinstance(ggml, Ggml), ggml
        buffers = ggml.weight_buffers()
        loaded = [_LoadedLayer(ggml, problem, layer, buffers) for layer in layers]

        def bind(inputs: Inputs) -> Run:
            graphs = [_Graph(ggml, inputs.problem, layer) for layer in loaded]
            calls = [
                (c.hidden_states.float().numpy(), c.top_k_index.int().numpy(), c.top_k_weights.numpy())
                for c in inputs.calls
            ]
            return lambda i: graphs[i % len(graphs)](*calls[i % len(calls)])

        return bind

    def version(self) -> str | None:
        ggml = load_ggml()
        return f"ggml {ggml.version().decode()}, {version_of('llama_cpp_python')}" if isinstance(ggml, Ggml) else None


class _LoadedLayer:
    """Weights of one layer in ggml's own memory."""

    def __init__(self, ggml: Ggml, problem: Problem, weights: Weights, buffers: int) -> None:
        shape = problem.shape
        context = ggml.context()
        half = shape.intermediate
        gate_up = weights.gate_up
        sources = {
            "gate": MXTensor(gate_up.packed[:, :half], gate_up.scales[:, :half], MXFP4, shape.hidden),
            "up": MXTensor(gate_up.packed[:, half:], gate_up.scales[:, half:], MXFP4, shape.hidden),
            "down": weights.down,
        }
        self.tensors = {
            name: ggml.new_tensor_3d(context, TYPE_MXFP4, *reversed(source.shape)) for name, source in sources.items()
        }
        buffer = ggml.backend_alloc_ctx_tensors_from_buft(context, buffers)
        weakref.finalize(self, _release, (ggml.backend_buffer_free, buffer), (ggml.free, context))
        for name, source in sources.items():
            blocks = to_blocks(source)
            ggml.backend_tensor_set(self.tensors[name], blocks.data_ptr(), 0, blocks.nbytes)


class _Graph:
    """The computation of one layer for a number of tokens, as llama.cpp's ``build_moe_ffn`` makes it."""

    def __init__(self, ggml: Ggml, problem: Problem, layer: _LoadedLayer) -> None:
        shape, tokens = problem.shape, problem.tokens
        self._ggml, self._layer = ggml, layer
        context = ggml.context()
        self._x = ggml.new_tensor_3d(context, TYPE_F32, shape.hidden, 1, tokens)
        self._ids = ggml.new_tensor_2d(context, TYPE_I32, shape.top_k, tokens)
        self._weights = ggml.new_tensor_3d(context, TYPE_F32, 1, shape.top_k, tokens)
        for tensor in (self._x, self._ids, self._weights):
            ggml.set_input(tensor)
        gate = ggml.mul_mat_id(context, layer.tensors["gate"], self._x, self._ids)
        up = ggml.mul_mat_id(context, layer.tensors["up"], self._x, self._ids)
        if problem.activation == "silu":
            a = ggml.swiglu_split(context, gate, up)
        else:
            a = ggml.swiglu_oai(context, gate, up, SWIGLU_ALPHA, SWIGLU_LIMIT)
        y = ggml.mul(context, ggml.mul_mat_id(context, layer.tensors["down"], a, self._ids), self._weights)
        row = shape.hidden * 4
        parts = [
            ggml.view_2d(context, y, shape.hidden, tokens, row * shape.top_k, row * slot) for slot in range(shape.top_k)
        ]
        total = parts[0] if len(parts) > 1 else ggml.cont(context, parts[0])
        for part in parts[1:]:
            total = ggml.add(context, total, part)
        ggml.set_output(total)
        self._graph = ggml.new_graph(context)
        ggml.build_forward_expand(self._graph, total)
        allocator = ggml.gallocr_new(ggml.host_buffers)
        ggml.gallocr_alloc_graph(allocator, self._graph)
        self._backend = ggml.backend_cpu_init()
        ggml.backend_cpu_set_n_threads(self._backend, torch.get_num_threads())
        memory = (ctypes.c_float * (tokens * shape.hidden)).from_address(ggml.get_data(total))
        self._result = torch.from_numpy(np.ctypeslib.as_array(memory)).view(tokens, shape.hidden)
        weakref.finalize(
            self, _release, (ggml.backend_free, self._backend), (ggml.gallocr_free, allocator), (ggml.free, context)
        )

    def __call__(self, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> Tensor:
        for tensor, values in ((self._x, x), (self._ids, ids), (self._weights, weights)):
            ctypes.memmove(self._ggml.get_data(tensor), values.ctypes.data, values.nbytes)
        self._ggml.backend_graph_compute(self._backend, self._graph)
        return self._result.clone()  # it lies in memory that ggml frees


def to_blocks(weight: MXTensor) -> Tensor:
    """ggml's ``block_mxfp4``, uint8 [..., K/32, 17]: the scale byte, then code j and code j + 16 in byte j."""
    out = torch.empty(*weight.scales.shape, 1 + MXFP4.block_bytes, dtype=torch.uint8)
    out[..., 0] = weight.scales
    for source, target in zip(weight.packed, out, strict=True):
        codes = unpack(source, MXFP4).unflatten(-1, (-1, MXFP4.block_size))
        low, high = codes.chunk(2, dim=-1)
        target[..., 1:] = low | (high << 4)
    return out


def _release(*steps: tuple[Callable[[int], None], int]) -> None:
    for function, handle in steps:
        function(handle)

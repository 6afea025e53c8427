"""Calls as vLLM makes them, recorded by ``record.py`` with vLLM itself, replayed on any device without it."""

import json
from pathlib import Path

import pytest
import torch

import mxperts as mx
from mxperts.ops.activation import BoundActivation
from mxperts.ops.prepare import ExpertsLayout

SIGNATURES = json.loads(Path(__file__).with_name("signatures.json").read_text())
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
        ],
    ),
]
LOOSE = 2**-6
"""Of the largest number of a result: a rounding to few bits may fall otherwise. Exact bounds: tests/backend."""


class Replayed:
    """One recorded call, with random numbers."""

    def __init__(self, signature, device):
        g = torch.Generator().manual_seed(7)
        layout = ExpertsLayout.decode(signature["layout"])

        def numbers(described, scale=1.0):
            if described is None:
                return None
            dtype, *shape = described
            return (torch.randn(shape, generator=g) * scale).to(getattr(torch, dtype)).to(device)

        def weight(*shape):
            return mx.quantize(torch.randn(shape, generator=g) * 0.1, layout.weight).to(device)

        self.weights = (
            weight(layout.experts, layout.gate_up_rows, layout.hidden),
            weight(layout.experts, layout.hidden, layout.intermediate),
        )
        experts = signature["expert_map"]
        self.x = numbers(signature["hidden_states"])
        dtype, tokens, k = signature["top_k_index"]
        count = layout.experts if experts is None else len(experts)
        ids = torch.stack([torch.randperm(count, generator=g)[:k] for _ in range(tokens)])
        self.ids = ids.to(getattr(torch, dtype)).to(device)
        self.routing = numbers(signature["top_k_weights"]).softmax(-1)
        function = BoundActivation.decode(signature["activation"])
        scales = signature["input_scales"]
        self.arguments = {
            "activation": function.name,
            "activation_format": signature["activation_format"],
            "interleaved": layout.interleaved,
            **{f"swiglu_{c}": getattr(function, c) for c in ("limit", "alpha", "beta", "linear_beta")},
            "gate_up_bias": numbers(signature["gate_up_bias"], 0.1),
            "down_bias": numbers(signature["down_bias"], 0.1),
            "input_scales": None if scales is None else tuple(numbers(s).abs() * 0.02 + 0.01 for s in scales),
            "expert_map": None if experts is None else torch.tensor(experts, dtype=torch.int32, device=device),
        }

    def run(self, weights, **more):
        return mx.fused_experts(self.x, *weights, self.ids, self.routing, **self.arguments, **more)

    def prepare(self):
        format_, interleaved = self.arguments["activation_format"], self.arguments["interleaved"]
        return mx.prepare(*self.weights, activation_format=format_, interleaved=interleaved, dtype=self.x.dtype)


@pytest.fixture(params=range(len(SIGNATURES)), ids=lambda i: f"{i}-{SIGNATURES[i]['layout']}")
def signature(request):
    return SIGNATURES[request.param]


@pytest.mark.parametrize("device", DEVICES)
def test_as_vllm_calls_it(signature, device):
    """Prepared weights and a given output, eager and compiled alike: ``MXExperts.apply``."""
    call = Replayed(signature, device)
    weights = (call.prepare(), None)
    assert weights[0].backend == {"cpu": "cpu", "cuda": "gpu"}[device]
    out = torch.empty_like(call.x)
    assert call.run(weights, out=out) is out
    again = torch.empty_like(call.x)
    torch.compiler.reset()  # PyTorch compiles one function only so many times
    torch.compile(lambda: call.run(weights, out=again), fullgraph=True, backend="eager")()
    assert torch.equal(out, again)
    expected = call.run(call.weights, backend="reference").float()
    assert (out.float() - expected).abs().max() <= LOOSE * expected.abs().max()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_in_a_cuda_graph(signature):
    """vLLM captures decoding steps; a replay must follow what is in the input then."""
    call = Replayed(signature, "cuda")
    weights, out = (call.prepare(), None), torch.empty_like(call.x)
    call.run(weights, out=out)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.run(weights, out=out)
    call.x.copy_(call.x.flip(0) * 0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, call.run(weights))


def test_recorded_calls_are_of_every_kind():
    """One scheme of each kind of input, biases, static scales, expert parallelism, one token and several."""
    formats = {s["activation_format"] for s in SIGNATURES}
    assert formats >= {None, "mxfp4", "mxfp6_e3m2", "fp8_static", "fp8_dynamic"}
    assert any(s["gate_up_bias"] for s in SIGNATURES)
    assert any(s["expert_map"] for s in SIGNATURES)
    tokens = {s["hidden_states"][1] for s in SIGNATURES}
    assert min(tokens) <= 2 < max(tokens)

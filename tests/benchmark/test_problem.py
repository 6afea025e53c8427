import pytest
import torch

from mxperts.benchmark import SHAPES, Problem, parse_shape
from mxperts.benchmark.inputs import SCALE_BYTE, SCALE_SPREAD, make_inputs
from mxperts.benchmark.problem import MAX_COPIES, ROUTINGS, copies_needed
from mxperts.errors import ArgumentError
from mxperts.formats import BLOCK_FORMATS, Scheme
from mxperts.ops.quantize import dequantize


def problem(shape="4,2,64,32", tokens=3, scheme="w_mxfp4", **more):
    return Problem(shape=parse_shape(shape), tokens=tokens, scheme=Scheme(scheme), **more)


def test_named_shapes_are_those_of_the_models():
    # config.json of the models: num_local_experts, num_experts_per_tok, hidden_size, (moe_)intermediate_size
    sizes = {s.name: (s.experts, s.top_k, s.hidden, s.intermediate) for s in SHAPES.values()}
    assert sizes["gpt-oss-20b"] == (32, 4, 2880, 2880)
    assert sizes["qwen3-30b-a3b"] == (128, 8, 2048, 768)
    assert sizes["deepseek-v3"] == (256, 8, 7168, 2048)


def test_sizes_make_a_shape():
    shape = parse_shape(" 8, 2,1024,2048 ")
    assert (shape.experts, shape.top_k, shape.hidden, shape.intermediate) == (8, 2, 1024, 2048)
    assert shape.name == "8,2,1024,2048"
    assert shape.values == 3 * 1024 * 2048


@pytest.mark.parametrize("text", ["8,2,1024", "8,9,64,64", "0,0,64,64", "1,2,3,4,5"])
def test_sizes_that_make_no_layer_are_refused(text):
    with pytest.raises(ArgumentError, match="four sizes E,k,H,I"):
        parse_shape(text)


def test_unknown_names_suggest_near_ones():
    with pytest.raises(ArgumentError, match="gpt-oss-20b"):
        parse_shape("gpt-oss-20")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": 0}, "at least one token"),
        ({"scheme": "a_mxfp4"}, "unquantised"),
        ({"activation": "relu"}, "swigluoai"),
        ({"device": "tpu"}, "'cpu'"),
    ],
)
def test_problems_that_nothing_can_run_are_refused(fields, message):
    with pytest.raises(ArgumentError, match=message):
        problem(**fields)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_named():
    with pytest.raises(ArgumentError, match="sees no CUDA device"):
        problem(device="cuda")


def test_bytes_of_a_layer():
    # 4 experts of 2*32*64 + 64*32 weights: 4 bits each and 8 for 32 of them
    assert problem().packed_bytes == 4 * (64 * 64 + 64 * 32) * 4.25 / 8
    assert problem().dense_bytes == 4 * 3 * 64 * 32 * 2


def test_copies_exceed_the_cache_or_stop_at_the_limit():
    assert copies_needed(layer_bytes=100, cache_bytes=30, factor=8) == 3
    assert copies_needed(layer_bytes=1000, cache_bytes=30, factor=8) == 1
    assert copies_needed(layer_bytes=1, cache_bytes=1 << 20) == MAX_COPIES


@pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=str)
def test_random_weights_are_finite_and_of_similar_size_in_every_format(fmt):
    layer = make_inputs(problem(scheme=f"w_{fmt}", shape="2,1,512,512"), copies=1).layers[0]
    assert layer.gate_up.shape == (2, 1024, 512)
    assert layer.down.shape == (2, 512, 512)
    for weight in (layer.gate_up, layer.down):
        values = dequantize(weight, torch.float32)
        assert bool(values.isfinite().all())
        assert 0.01 < float(values.std()) < 0.2


def test_random_scales_are_around_the_middle():
    scales = make_inputs(problem(), copies=1).layers[0].gate_up.scales
    assert int(scales.min()) == SCALE_BYTE - SCALE_SPREAD
    assert int(scales.max()) == SCALE_BYTE + SCALE_SPREAD


@pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=str)
def test_padding_is_zero(fmt):
    weight = make_inputs(problem(scheme=f"w_{fmt}", shape="2,1,40,33"), copies=1).layers[0].down  # [2, 40, 33]
    padded = type(weight)(weight.packed, weight.scales, fmt, 64)
    assert not padded.codes()[..., 33:].any()
    assert weight.codes()[..., :33].any(dim=-1).all()


def test_inputs_repeat_for_a_seed_and_routings_are_experts_of_the_layer():
    a, b, other = (make_inputs(problem(seed=seed), copies=2) for seed in (1, 1, 2))
    assert len(a.layers) == 2
    assert len(a.calls) == ROUTINGS
    assert torch.equal(a.layers[1].down.packed, b.layers[1].down.packed)
    assert not torch.equal(a.layers[0].down.packed, a.layers[1].down.packed)
    assert not torch.equal(a.layers[0].down.packed, other.layers[0].down.packed)
    for call in a.calls:
        assert call.hidden_states.dtype is torch.bfloat16
        assert call.hidden_states.shape == (3, 64)
        assert all(len(set(ids)) == 2 and max(ids) < 4 for ids in call.top_k_index.tolist())
        torch.testing.assert_close(call.top_k_weights.sum(dim=-1), torch.ones(3))

"""The Triton path of fused_experts and mx_linear: exact where float32 sums are, within their bounds elsewhere."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import bounds
import dense
import pytest
import torch
from covering import DTYPES, FORMATS, PAIRS, E
from layers import Layer, to
from torch import Tensor

import mxperts as mx
from mxperts.backend.gpu import paths, portable
from mxperts.backend.reference.linear import quantize_input
from mxperts.formats import BLOCK_FORMATS, parse_activation
from mxperts.ops import dispatch
from mxperts.ops.activation import ACTIVATIONS, bind_activation
from mxperts.ops.experts import ExpertsCall
from mxperts.ops.prepare import canonical_tensors, layout_of

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, which the interpreter computes with


@pytest.fixture(autouse=True)
def as_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``backend="portable"``, and bounds for sums that round once a product, as far as matrix units truncate."""
    backend = dispatch.Backend(
        name="portable", module="mxperts.backend.gpu.portable", refuses=lambda problem: None, summary=""
    )
    monkeypatch.setattr(dispatch, "BACKENDS", (*dispatch.BACKENDS, backend))
    monkeypatch.setattr(bounds, "roundings", lambda paths, k, dtype, activation: 2 * k)
    return


HALF = [(i, *pair) for i, pair in enumerate(PAIRS) if (i + i // 10) % 2]
"""Every weight format with half of the activation formats, and the other way round."""


@pytest.mark.parametrize(("i", "fmt", "activation_format"), HALF)
def test_exact_sums(i: int, fmt: str, activation_format: str | None, device: str) -> None:
    """Integers: no sum is rounded, no rounding is open, and the result is the reference's, bit for bit."""
    layer = Layer(i, fmt, activation_format, integers=True)
    expected, limits = layer.run("reference"), layer.bounds()
    same = limits[2] & (limits[0] == limits[1]).all(1)
    y = layer.portable(device)
    bounds.assert_within(y, limits)
    assert torch.equal(y[same], expected[same])


@pytest.mark.parametrize("i", range(22))
def test_random_numbers(i: int, device: str) -> None:
    fmt, activation_format = PAIRS[(7 * i + 3) % 60]
    layer = Layer(i + 60 + i // 11, fmt, activation_format, integers=False)
    y = layer.portable(device)
    assert y.dtype is layer.dtype
    bounds.assert_within(y, layer.bounds())


def test_random_numbers_have_every_function_and_dtype() -> None:
    layers = [Layer(i + 60 + i // 11, *PAIRS[(7 * i + 3) % 60], integers=False) for i in range(22)]
    assert {layer.name for layer in layers} == set(ACTIVATIONS)
    assert {layer.dtype for layer in layers} == set(DTYPES)
    assert {layer.fmt for layer in layers} == set(FORMATS)
    assert {layer.interleaved for layer in layers} == {layer.mapped for layer in layers} == {False, True}


@pytest.mark.parametrize(
    ("fmt", "activation_format"), [("mxfp4", "mxfp4"), ("mxfp6_e3m2", None), ("mxfp8_e4m3", "fp8_dynamic")]
)
def test_bf16_results_are_an_eighth_of_its_rounding_from_the_definition(
    fmt: str, activation_format: str | None, device: str
) -> None:
    """The contract's limit, 2.1e-4, with several blocks of rows an expert and several steps along K."""
    g = torch.Generator().manual_seed(0)
    h, inner, tokens = 256, 160, 48
    gate_up = mx.quantize(torch.randn(2, 2 * inner, h, generator=g) * h**-0.5, fmt)
    down = mx.quantize(torch.randn(2, h, inner, generator=g) * inner**-0.5, fmt)
    x = torch.randn(tokens, h, generator=g).bfloat16()
    ids = torch.randint(2, (tokens, 1), generator=g)
    arguments = (x, gate_up, down, ids, torch.rand(tokens, 1, generator=g))
    expected = mx.fused_experts(*arguments, activation_format=activation_format, backend="reference").double()
    y = mx.fused_experts(*to(device, arguments), activation_format=activation_format, backend="portable").cpu().double()
    assert ((y - expected).square().mean() / expected.square().mean()).sqrt() <= 2.1e-4


# Routing


def plain(activation_format: str | None = None, tokens: int = 9, k: int = 2) -> Layer:
    """A layer of integers without a bias."""
    layer = Layer(1, "mxfp4", activation_format, integers=True)
    layer.name, layer.constants, layer.interleaved, layer.on_input, layer.mapped = "relu2", {}, False, False, False
    layer.bias, layer.dtype, layer.hidden, layer.inner = (None, None), torch.bfloat16, 40, 33
    layer.gate_up, layer.down = layer.weight(2 * layer.inner, layer.hidden), layer.weight(layer.hidden, layer.inner)
    layer.x = layer.numbers(tokens, layer.hidden).bfloat16()
    layer.x[:, 0] = 7.0
    layer.ids = torch.randint(E, (tokens, k), generator=layer.g)
    layer.routing = torch.exp2(torch.randint(-2, 2, (tokens, k), generator=layer.g).float())
    return layer


@pytest.mark.parametrize("activation_format", [None, "mxfp4", "fp8_dynamic", "fp8_per_expert"])
def test_routing_of_every_kind(activation_format: str | None, device: str) -> None:
    """One expert for all, the same one twice, none at all."""
    layer = plain(activation_format)
    for ids in ([[3, 3]], [[0, 1], [0, 1], [-1, 1]], [[4, -1]] * 9, [[-1, -1]] * 4, [[2, 2], [-1, 2], [2, -1]] * 30):
        layer.ids = torch.tensor(ids, dtype=torch.int32)
        layer.x = layer.numbers(len(ids), layer.hidden).bfloat16()
        layer.x[:, 0] = 7.0
        layer.routing = torch.full(layer.ids.shape, 0.5)
        layer.routing[layer.ids < 0] = torch.nan
        expected = layer.run("reference")
        assert torch.equal(layer.portable(device), expected)
        assert not expected[(layer.ids < 0).all(1)].any()


def test_ids_out_of_range_contribute_nothing(device: str) -> None:
    layer = plain()
    for i, wrong in enumerate((E, -2, 2**40, -(2**40))):
        layer.ids[i, 1] = wrong
    expert_map = torch.tensor([0, 1, 2, 3, 4, E, -7, 2**33])
    ids = layer.ids.clone()
    layer.ids = torch.where((ids < 0) | (ids >= E), -1, ids)
    expected = layer.run("reference")
    call = _call(layer, ids=ids)
    y = torch.empty_like(expected, device=device)
    portable.fused_experts(_on(device, call), y)
    assert torch.equal(y.cpu(), expected)
    ids[5, 1], ids[6, 1], ids[7, 1] = 5, 6, 7
    layer.ids[5:8, 1] = -1
    portable.fused_experts(_on(device, _call(layer, ids=ids, expert_map=expert_map)), y)
    assert torch.equal(y.cpu(), layer.run("reference"))


def _call(layer: Layer, *, ids: Tensor, expert_map: Tensor | None = None) -> ExpertsCall:
    """What ``mx.fused_experts`` gives a backend; on CPU it refuses such ids."""
    return ExpertsCall(
        hidden_states=layer.x,
        weights=canonical_tensors(layer.gate_up, layer.down),
        layout=layout_of(layer.gate_up, layer.down, interleaved=False, gated=True),
        top_k_index=ids,
        top_k_weights=layer.routing,
        activation=bind_activation("relu2"),
        activation_format=parse_activation(layer.activation_format),
        gate_up_bias=None,
        down_bias=None,
        input_scales=None,
        expert_map=expert_map,
        router_weight_on_input=False,
        accumulation="auto",
        prepared=False,
    )


def _on(device: str, call: ExpertsCall) -> ExpertsCall:
    for name in ("hidden_states", "top_k_index", "top_k_weights", "expert_map"):
        setattr(call, name, to(device, getattr(call, name)))
    call.weights = [to(device, t) for t in call.weights]
    return call


def test_many_experts_and_many_a_token(device: str) -> None:
    g = torch.Generator().manual_seed(6)
    for experts, k, hidden, inner in ((1024, 8, 33, 1), (70, 64, 64, 33)):
        gate_up = mx.quantize(torch.randint(-1, 2, (experts, 2 * inner, hidden), generator=g) / 8, "mxfp4")
        down = mx.quantize(torch.randint(-1, 2, (experts, hidden, inner), generator=g) / 8, "mxfp4")
        ids = torch.stack([torch.randperm(experts, generator=g)[:k] for _ in range(1 + experts // 1024)])
        x, weights = torch.randint(-3, 4, (len(ids), hidden), generator=g).bfloat16(), torch.ones(len(ids), k)
        arguments: Any = (x, gate_up, down, ids, weights)
        y = mx.fused_experts(*to(device, arguments), activation="relu2", backend="portable").cpu()
        assert torch.equal(y, mx.fused_experts(*arguments, activation="relu2", backend="reference"))


def test_no_tokens(device: str) -> None:
    assert plain(tokens=0).portable(device).shape == (0, 40)


@pytest.mark.parametrize("activation_format", ["mxfp4", "fp8_per_expert"])
def test_tokens_go_in_turns_where_results_would_take_much_memory(
    activation_format: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = plain(activation_format, tokens=5)
    expected = layer.run("reference")
    for most in (1, 2500):
        monkeypatch.setattr(portable, "WORKSPACE", most)
        assert torch.equal(layer.portable(device), expected)


@pytest.mark.parametrize("rows", [16, 48, 96, 128])
def test_every_choice_of_tiles(rows: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, choose = plain("mxfp4", tokens=70), portable.choose_tiles
    expected = layer.run("reference")
    monkeypatch.setattr(
        portable, "choose_tiles", lambda pairs, experts, operand, gated: choose(rows, 1, operand, gated=gated)
    )
    assert torch.equal(layer.portable(device), expected)


@pytest.mark.parametrize(("fmt", "activation_format"), [("mxfp4", "mxfp4"), ("mxfp8_e4m3", None)])
def test_a_token_does_not_depend_on_its_batch_if_that_is_asked_for(
    fmt: str, activation_format: str | None, device: str
) -> None:
    g = torch.Generator().manual_seed(2)
    gate_up, down = (
        mx.quantize(torch.randn(2, *shape, generator=g) / 12, fmt, backend="reference")
        for shape in ((144, 160), (160, 72))
    )
    x, ids = torch.randn(80, 160, generator=g).bfloat16(), torch.randint(2, (80, 2), generator=g)
    arguments = to(device, (x, ids, torch.rand(80, 2, generator=g)))

    def run(tokens: slice) -> Tensor:
        x, ids, weights = (t[tokens] for t in arguments)
        y = mx.fused_experts(
            x, *to(device, (gate_up, down)), ids, weights, activation_format=activation_format, backend="portable"
        )
        one = mx.MXTensor(gate_up.packed[0], gate_up.scales[0], gate_up.format, gate_up.k)
        linear = mx.mx_linear(x, to(device, one), out_dtype=torch.float32, backend="portable")
        return torch.cat([y.float(), linear], -1)

    with paths.batch_invariant():
        together = run(slice(None))
        for some in (slice(0, 1), slice(3, 20), slice(79, 80)):
            assert torch.equal(run(some), together[some])


def test_both_projections_have_the_same_blocks_of_rows() -> None:
    for rows, experts, dtype in itertools.product((1, 8, 100, 1000, 10**5), (1, 8, 1024), DTYPES):
        first, second = (portable.choose_tiles(rows, experts, dtype, gated=gated) for gated in (True, False))
        assert first.block_m == second.block_m
        assert first.block_n % 32 == 0


# How tensors lie in memory


def test_tensors_of_any_strides(device: str) -> None:
    layer = plain("mxfp4")
    expected, x = layer.run("reference"), layer.x
    wide = torch.full((9, 3 * layer.hidden), torch.nan, dtype=x.dtype)
    for view in (wide[:, 7 : 7 + layer.hidden], wide[:, ::3], wide.T.contiguous().T[:, 1 : 1 + layer.hidden]):
        layer.x = view.copy_(x)
        assert torch.equal(layer.portable(device), expected)
    layer.x = x.repeat_interleave(2, 0)[::2]
    layer.ids = layer.ids.T.contiguous().T
    layer.routing = layer.routing.repeat_interleave(2, 1)[:, ::2]
    layer.gate_up = mx.MXTensor(
        *(t.repeat_interleave(2, 1)[:, ::2] for t in (layer.gate_up.packed, layer.gate_up.scales)),
        layer.gate_up.format,
        layer.gate_up.k,
    )
    assert torch.equal(layer.portable(device), expected)
    layer.x, layer.ids, layer.routing = (t[:1].expand(9, -1) for t in (x, layer.ids, layer.routing))
    assert torch.equal(layer.portable(device), expected[:1].expand(9, -1))


def test_what_pads_a_row_is_not_read(device: str) -> None:
    """Codes that are Inf and NaN, where a row's last block is partly padding."""
    layer = plain()
    layer.gate_up, layer.down = (
        mx.quantize(torch.randint(-1, 2, (E, *shape), generator=layer.g) / 8, "mxfp8_e5m2")
        for shape in ((2 * layer.inner, layer.hidden), (layer.hidden, layer.inner))
    )
    expected = layer.run("reference")
    for weight in (layer.gate_up, layer.down):
        weight.packed[..., weight.k :] = 0x7F
        weight.packed[:, ::2, weight.k :] = 0x7C
    assert torch.equal(layer.portable(device), expected)


# Numbers of any size


@pytest.mark.parametrize(("i", "fmt"), list(enumerate(FORMATS)))
def test_nan_and_inf_are_where_they_must_be(i: int, fmt: str, device: str) -> None:
    for activation_format in (None, FORMATS[i - 1], "fp8_dynamic"):
        layer = Layer(7 * i, fmt, activation_format, integers=True)
        layer.dtype = DTYPES[i % 3]
        layer.x, layer.on_input, layer.mapped = layer.x[:1].to(layer.dtype).repeat(7, 1), False, False
        layer.ids, layer.routing = torch.tensor([0, 0, 0, 1, 2, 3, 4])[:, None], torch.ones(7, 1)
        layer.x[0, -1], layer.x[1, -1], layer.x[2, 0] = torch.nan, torch.inf, -torch.inf
        layer.gate_up.scales[1, 0, -1] = 255
        layer.down.scales[2, -1, 0] = 255
        last = len(layer.gate_up.format.element.magnitudes) - 1
        if layer.gate_up.format.element.sign_bit - 1 > last:  # codes beyond are Inf, if there is one, and NaN
            layer.gate_up.packed[3, 0, 0] = last + 1
            layer.down.packed[4, -1, 0] = layer.gate_up.format.element.sign_bit | last + 1
        expected, y = layer.run("reference"), layer.portable(device)
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(y), kind(expected)), (activation_format, layer.dtype, layer.name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
def test_weights_at_the_ends_of_the_range(fmt: str, dtype: torch.dtype, device: str) -> None:
    """Every scale but NaN: weights that overflow or become subnormal, times powers of two that bring them back."""
    for activation in (None, "mxfp4", "mxfp8_e5m2"):
        g = torch.Generator().manual_seed(1)
        weight = mx.MXTensor(
            torch.randint(0, 256, (255, mx.format(fmt).block_bytes), dtype=torch.uint8, generator=g),
            torch.arange(255, dtype=torch.uint8)[:, None],
            mx.format(fmt),
            32,
        )
        x = torch.zeros(3, 32)
        x[0, 3], x[1, 5], x[2, 7] = 1.0, 2.0**14 if dtype is torch.float16 else 2.0**90, 2.0**-14
        expected = mx.mx_linear(
            x.to(dtype), weight, activation=activation, out_dtype=torch.float32, backend="reference"
        )
        y = mx.mx_linear(
            *to(device, (x.to(dtype), weight)), activation=activation, out_dtype=torch.float32, backend="portable"
        ).cpu()
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.nan_to_num(0.0), expected.nan_to_num(0.0))


# mx_linear


@pytest.mark.parametrize("fmt", FORMATS)
def test_linear_is_within_its_bound(fmt: str, device: str) -> None:
    """Half of the activation formats, in every dtype; exact products, and a rounding a product at most."""
    for i, activation in enumerate([None, *FORMATS, "fp8_static", "fp8_dynamic"]):
        if (i + FORMATS.index(fmt)) % 2:
            continue
        dtype = DTYPES[(i + FORMATS.index(fmt)) % 3]
        g = torch.Generator().manual_seed(i)
        n, k = 40, (100, 33, 1, 160)[i % 4]
        w = mx.quantize(torch.randn(n, k, generator=g), fmt)
        x, bias = torch.randn(2, 3, k, generator=g).to(dtype), torch.randn(n, generator=g) if i % 2 else None
        scale = 0.013 if activation == "fp8_static" else None
        settings: Any = {"activation": activation, "input_scale": scale, "out_dtype": torch.float32}
        y = mx.mx_linear(*to(device, (x, w, bias)), **settings, backend="portable").cpu()
        rows = quantize_input(
            x.view(6, k), parse_activation(activation), None if scale is None else torch.tensor([scale])
        )
        known = bounds.Interval.known(rows.double().numpy())
        expected = bounds.product(known, dense.decode(w, dtype), None if bias is None else bias.double().numpy(), 2 * k)
        assert (abs(y.view(6, n).double().numpy() - expected.mid) <= expected.error).all(), activation
        out_dtype = DTYPES[i % 3]
        rounded = mx.mx_linear(*to(device, (x, w, bias)), **{**settings, "out_dtype": out_dtype}, backend="portable")
        assert torch.equal(rounded.cpu(), y.to(out_dtype))


@pytest.mark.parametrize("shape", [(0,), (1,), (130,), (2, 0, 3), ()])
def test_linear_of_any_shape(shape: tuple[int, ...], device: str) -> None:
    g = torch.Generator().manual_seed(2)
    w = mx.quantize(torch.randint(-1, 2, (70, 65), generator=g) / 8, "mxfp6_e2m3")
    x = torch.randint(-3, 4, (*shape, 65), generator=g).half()
    expected = mx.mx_linear(x, w, activation="mxint8", backend="reference")
    assert torch.equal(mx.mx_linear(*to(device, (x, w)), activation="mxint8", backend="portable").cpu(), expected)


def test_operands_are_exact_in_the_dtype_that_multiplies_them() -> None:
    """float32 values of block formats in bfloat16, at the smallest and the largest scale."""
    for weight, activation in itertools.product(BLOCK_FORMATS, BLOCK_FORMATS):
        operand = portable.operand_dtype(torch.float32, weight, activation)
        for fmt in (weight, activation):
            for scale in (-127, 127):
                values = torch.tensor([math.ldexp(v, scale) for v in fmt.element.values], dtype=torch.float64).float()
                known = values.isfinite()
                assert torch.equal(values[known].to(operand).float(), values[known])
        assert (operand is torch.bfloat16) == all("fp8" not in f.name for f in (weight, activation))
    for dtype in (torch.bfloat16, torch.float16):
        assert portable.operand_dtype(dtype, BLOCK_FORMATS[0], None) is dtype
    assert portable.operand_dtype(torch.float32, BLOCK_FORMATS[0], "fp8_static") is torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_last_step_by_itself_is_that_of_the_whole(dtype: torch.dtype, device: str) -> None:
    """Rows of pairs one by one, in any order, and ``sum_slots``: what a layer over several processes does."""
    g = torch.Generator().manual_seed(0)
    tokens, k, h, inner = 5, 3, 80, 64
    gate_up, down = (mx.quantize(torch.randn(E, *s, generator=g) / 8, "mxfp4") for s in ((2 * inner, h), (h, inner)))
    x, ids = torch.randn(tokens, h, generator=g).to(dtype), torch.rand(tokens, E, generator=g).topk(k).indices
    ids[2, 1] = -1
    weights = torch.rand(tokens, k, generator=g)
    order = torch.randperm(tokens * k, generator=g)
    position = torch.empty_like(order)
    position[order] = torch.arange(tokens * k)
    position = position.view(tokens, k).masked_fill(ids < 0, -1)
    x, ids, weights, order, position, gate_up, down = to(device, (x, ids, weights, order, position, gate_up, down))
    with paths.batch_invariant():
        whole = mx.fused_experts(x, gate_up, down, ids, weights, backend="portable")
        pairs, ones = ids.flatten()[order].unsqueeze(1), torch.ones(tokens * k, 1, device=device)
        rows = mx.fused_experts(x[order // k], gate_up, down, pairs, ones, out_dtype=torch.float32, backend="portable")
    out = torch.empty_like(whole)
    portable.sum_slots(rows, position, ids, weights, out)
    assert rows.dtype is torch.float32
    assert torch.equal(out, whole)

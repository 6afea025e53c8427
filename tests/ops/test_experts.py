"""fused_experts against a dense computation, value by value; its checks; what it touches.

The dense computation is what the reference backend must equal. Other backends round their sums; what holds for every
backend is asked of all that run on this machine, and of the one that "auto" takes where nothing is said.
"""

from __future__ import annotations

import itertools
from typing import Any

import dense
import pytest
import torch
from torch import Tensor

import mxperts as mx
from mxperts.backend.reference import experts as reference
from mxperts.backend.reference import linear as reference_linear
from mxperts.formats import BLOCK_FORMATS
from mxperts.ops.activation import ACTIVATIONS

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WEIGHTS = (*(f.name for f in BLOCK_FORMATS), None)
ACTIVATION_FORMATS = (None, *(f.name for f in BLOCK_FORMATS), "fp8_static", "fp8_dynamic")
CONSTANTS: dict[str, tuple[dict[str, float], ...]] = {
    "silu": ({}, {"limit": 0.25}),
    "swigluoai": ({}, {"limit": 0.5, "alpha": 1.25, "beta": 0.0}),
    "situ": ({"beta": 0.75}, {"beta": 1.5, "linear_beta": 0.5}),
    "swiglustep": ({}, {"limit": 0.125}),
}
E, H, INNER, T = 4, 40, 72, 3


def weight(rows: int, k: int, fmt: str | None, generator: torch.Generator, dtype: torch.dtype) -> mx.MXTensor | Tensor:
    values = torch.randn(E, rows, k, generator=generator) * 0.2
    return values.to(dtype) if fmt is None else mx.quantize(values, fmt)


def make(
    seed: int,
    *,
    fmt: str | None = "mxfp4",
    dtype: torch.dtype = torch.bfloat16,
    gated: bool = True,
    tokens: int = T,
    k: int = 2,
    dense_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, mx.MXTensor | Tensor, mx.MXTensor | Tensor, Tensor, Tensor]:
    """hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, H, generator=g).to(dtype)
    gate_up = weight(2 * INNER if gated else INNER, H, fmt, g, dense_dtype)
    down = weight(H, INNER, fmt, g, dense_dtype)
    top_k_index = torch.stack([torch.randperm(E, generator=g)[:k] for _ in range(tokens)] or [torch.zeros(k).long()])
    return x, gate_up, down, top_k_index[:tokens], torch.rand(tokens, k, generator=g)


def call(*args: Any, constants: dict[str, float] | None = None, **kwargs: Any) -> Tensor:
    return mx.fused_experts(*args, **kwargs, **{f"swiglu_{k}": v for k, v in (constants or {}).items()})


def defined(*args: Any, **kwargs: Any) -> Tensor:
    return call(*args, **kwargs, backend="reference")


each_backend = pytest.mark.parametrize("backend", ["reference", "cpu"])


@pytest.mark.parametrize(
    ("i", "fmt", "activation_format"),
    [(i, *pair) for i, pair in enumerate(itertools.product(WEIGHTS, ACTIVATION_FORMATS))],
)
def test_equals_dense_computation(i: int, fmt: str | None, activation_format: str | None) -> None:
    """Every weight format × every activation format; functions and dtypes take turns: all pairs of them occur."""
    name, dtype = list(ACTIVATIONS)[i % 11], DTYPES[i % 3]
    gated = ACTIVATIONS[name].gated
    choices = CONSTANTS.get(name, ({},))
    k = 1 + i % E
    args = make(i, fmt=fmt, dtype=dtype, gated=gated, k=k, dense_dtype=DTYPES[i // 3 % 3])
    args[3][i % T, i % k] = -1
    options: dict[str, Any] = {
        "activation": name,
        "constants": choices[i // 11 % len(choices)],
        "activation_format": activation_format,
        "interleaved": gated and i % 5 < 2,
    }
    g = torch.Generator().manual_seed(1000 + i)
    if i % 2:
        options["gate_up_bias"] = torch.randn(E, 2 * INNER if gated else INNER, generator=g).to(DTYPES[i // 2 % 3])
        options["down_bias"] = torch.randn(E, H, generator=g).to(DTYPES[i // 2 % 3])
    scales = ([0.011, 0.011, 0.011, 0.011], [0.003, 0.001, 0.02, 0.005])
    static = activation_format == "fp8_static"
    expected = dense.experts(*args, **options, input_scales=scales if static else None)
    actual = defined(*args, **options, input_scales=(0.011, torch.tensor(scales[1])) if static else None)
    assert actual.dtype is dtype
    dense.assert_within(actual, expected)


def test_every_function_meets_every_dtype() -> None:
    pairs = {(i % 11, i % 3) for i in range(len(WEIGHTS) * len(ACTIVATION_FORMATS))}
    assert len(pairs) == len(ACTIVATIONS) * len(DTYPES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation_format", ["mxfp6_e3m2", "fp8_dynamic"])
def test_router_weight_on_input(dtype: torch.dtype, activation_format: str) -> None:
    args = make(1, dtype=dtype, k=1)
    expected = dense.experts(*args, activation_format=activation_format, router_weight_on_input=True)
    actual = defined(*args, activation_format=activation_format, apply_router_weight_on_input=True)
    dense.assert_within(actual, expected)


def test_per_expert_scales_of_both_projections() -> None:
    args = make(2, dtype=torch.float32)
    scales = ([0.004, 0.008, 0.016, 0.032], [0.003, 0.001, 0.02, 0.005])
    expected = dense.experts(*args, activation_format="fp8_static", input_scales=scales)
    actual = defined(*args, activation_format="fp8", input_scales=tuple(torch.tensor(s) for s in scales))
    dense.assert_within(actual, expected)


@each_backend
def test_input_scale_in_every_form(backend: str) -> None:
    args = make(3)
    half = torch.tensor(0.5)
    forms = [0.5, half, half.reshape(1), half.bfloat16(), torch.full((E,), 0.5)]
    results = [call(*args, activation_format="fp8", input_scales=(form, form), backend=backend) for form in forms]
    assert all(torch.equal(results[0], r) for r in results)


def test_expert_map() -> None:
    """Global experts 5, 0, 3, 6 are local 0 to 3; the others are elsewhere."""
    x, gate_up, down, local, w = make(4, k=3)
    expert_map = torch.tensor([1, -1, -1, 2, -1, 0, 3], dtype=torch.int32)
    to_global = torch.tensor([5, 0, 3, 6])
    global_ids = to_global[local]
    global_ids[0, 0], global_ids[2, 1] = 4, -1
    local[0, 0], local[2, 1] = -1, -1
    dense.assert_within(
        defined(x, gate_up, down, global_ids, w, expert_map=expert_map), dense.experts(x, gate_up, down, local, w)
    )


def test_an_expert_that_is_named_twice_counts_twice() -> None:
    x, gate_up, down, ids, w = make(5, k=3)
    ids[:, 1] = ids[:, 0]
    dense.assert_within(defined(x, gate_up, down, ids, w), dense.experts(x, gate_up, down, ids, w))


@each_backend
def test_a_token_without_experts_is_zero(backend: str) -> None:
    x, gate_up, down, ids, w = make(6)
    ids[1] = -1
    w[1] = torch.nan
    y = call(x, gate_up, down, ids, w, backend=backend)
    assert torch.equal(y[1], torch.zeros_like(y[1]))
    assert y[0].abs().sum() > 0


@each_backend
@pytest.mark.parametrize("activation_format", ACTIVATION_FORMATS)
def test_no_tokens(activation_format: str | None, backend: str) -> None:
    x, gate_up, down, ids, w = make(7, tokens=0)
    scales = (1.0, 1.0) if activation_format == "fp8_static" else None
    y = call(x, gate_up, down, ids, w, activation_format=activation_format, input_scales=scales, backend=backend)
    assert y.shape == (0, H)


@each_backend
def test_index_dtypes_weights_dtypes_and_strides_do_not_matter(backend: str) -> None:
    x, gate_up, down, ids, w = make(8)
    w = w.bfloat16()
    expected = call(x, gate_up, down, ids, w.float(), backend=backend)
    wide = torch.stack([x, x], dim=-1)[..., 0]
    assert not wide.is_contiguous()
    assert torch.equal(call(wide, gate_up, down, ids.int(), w, backend=backend), expected)
    assert torch.equal(
        call(x.T.contiguous().T, gate_up, down, ids.T.contiguous().T, w.double(), backend=backend), expected
    )


@each_backend
def test_blocks_beyond_the_last_value_are_not_used(backend: str) -> None:
    """H = 40 and I = 72 leave 24 codes of padding in each row."""
    x, gate_up, down, ids, w = make(9)
    assert isinstance(gate_up, mx.MXTensor)
    padded = mx.MXTensor(gate_up.packed.clone(), gate_up.scales, gate_up.format, H)
    padded.packed[..., H // 2 :] = 0x77
    assert torch.equal(call(x, padded, down, ids, w, backend=backend), call(x, gate_up, down, ids, w, backend=backend))


@each_backend
def test_only_experts_with_tokens_are_touched(backend: str) -> None:
    x, gate_up, down, ids, w = make(10)
    assert isinstance(gate_up, mx.MXTensor)
    assert isinstance(down, mx.MXTensor)
    ids[ids == 2] = 1
    expected = call(x, gate_up, down, ids, w, backend=backend)
    gate_up.scales[2], down.scales[2] = 0xFF, 0xFF
    assert torch.equal(call(x, gate_up, down, ids, w, backend=backend), expected)
    ids[0, 0] = 2
    y = call(x, gate_up, down, ids, w, backend=backend)
    assert y[0].isnan().all()
    assert torch.equal(y[1:], expected[1:])


def test_one_projection_of_one_expert_is_expanded_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    def spy(packed: Tensor, *args: Any) -> Tensor:
        shapes.append(tuple(packed.shape[:-1]))
        return dequantize(packed, *args)

    dequantize = reference_linear.dequantize
    monkeypatch.setattr(reference_linear, "dequantize", spy)
    x, gate_up, down, ids, w = make(11)
    defined(x, gate_up, down, ids, w)
    assert shapes == [(2 * INNER,), (H,)] * len(ids.unique())


def test_wide_weights_are_expanded_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    args = make(12)
    expected = defined(*args)
    monkeypatch.setattr(reference_linear, "CHUNK", 7 * H)
    assert torch.equal(defined(*args), expected)


@each_backend
@pytest.mark.parametrize("activation_format", ACTIVATION_FORMATS)
def test_a_token_does_not_depend_on_its_batch(activation_format: str | None, backend: str) -> None:
    x, gate_up, down, ids, w = make(13, tokens=17, k=3)
    options: dict[str, Any] = {"activation_format": activation_format, "backend": backend}
    if activation_format == "fp8_static":
        options["input_scales"] = (0.011, 0.004)
    together = call(x, gate_up, down, ids, w, **options)
    for t in range(17):
        one = slice(t, t + 1)
        assert torch.equal(call(x[one], gate_up, down, ids[one], w[one], **options), together[one])


@each_backend
def test_one_nan_stays_in_its_token(backend: str) -> None:
    x, gate_up, down, ids, w = make(14)
    expected = call(x, gate_up, down, ids, w, activation_format="mxfp4", backend=backend)
    x[1, 3] = torch.nan
    y = call(x, gate_up, down, ids, w, activation_format="mxfp4", backend=backend)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], expected[[0, 2]])


@each_backend
def test_out_is_filled_and_returned(backend: str) -> None:
    args = make(15)
    out = torch.empty_like(args[0])
    assert call(*args, out=out, backend=backend) is out
    assert torch.equal(out, call(*args, backend=backend))


@pytest.mark.parametrize("accumulation", ["auto", "exact"])
def test_accumulation(accumulation: str) -> None:
    args = make(16)
    assert torch.equal(defined(*args, accumulation=accumulation), defined(*args))


@pytest.mark.parametrize("fmt", WEIGHTS)
@pytest.mark.parametrize("gated", [True, False])
def test_prepared_experts(fmt: str | None, gated: bool) -> None:
    x, gate_up, down, ids, w = make(17, fmt=fmt, gated=gated)
    activation = "silu" if gated else "relu2_no_mul"
    prepared = mx.prepare(gate_up, down, interleaved=gated, backend="reference")
    y = call(x, prepared, None, ids, w, activation=activation, interleaved=gated)
    assert torch.equal(y, defined(x, gate_up, down, ids, w, activation=activation, interleaved=gated))
    assert prepared.backend == "reference"
    assert prepared.nbytes == gate_up.nbytes + down.nbytes
    for given, back in zip((gate_up, down), prepared.unprepare(), strict=True):
        if isinstance(given, Tensor):
            assert torch.equal(back, given)
        else:
            assert isinstance(back, mx.MXTensor)
            assert (back.format, back.k) == (given.format, given.k)
            assert torch.equal(back.packed, given.packed)
            assert torch.equal(back.scales, given.scales)
    assert "weight=" + str(fmt) in repr(prepared)


def test_compiled_equals_eager() -> None:
    x, gate_up, down, ids, w = make(18)
    prepared = mx.prepare(gate_up, down)
    bias = torch.randn(E, 2 * INNER)

    def layers(x: Tensor, ids: Tensor, w: Tensor, out: Tensor) -> Tensor:
        y = mx.fused_experts(x, gate_up, down, ids, w, activation="swigluoai", gate_up_bias=bias, interleaved=True)
        y = mx.fused_experts(y, gate_up, down, ids, w, activation_format="fp8", input_scales=(0.5, torch.ones(E)))
        return y + mx.fused_experts(y, prepared, None, ids, w, activation_format="mxfp4", out=out)

    compiled = torch.compile(layers, fullgraph=True, backend="aot_eager")
    outs = torch.empty_like(x), torch.empty_like(x)
    assert torch.equal(compiled(x, ids, w, outs[0]), layers(x, ids, w, outs[1]))
    assert torch.equal(*outs)


@pytest.mark.parametrize("with_out", [False, True])
def test_operator_registration(with_out: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from mxperts.ops import experts as ops

    x, gate_up, down, ids, w = make(19)
    captured: list[tuple[Any, ...]] = []
    name = "_fused_experts_out_op" if with_out else "_fused_experts_op"
    op = getattr(ops, name)
    monkeypatch.setattr(ops, name, lambda *args: captured.append(args) or op(*args))
    monkeypatch.setattr(ops, "is_eager", lambda *tensors: False)
    out = torch.empty_like(x) if with_out else None
    call(x, gate_up, down, ids, w, activation_format="fp8", input_scales=(1.0, 1.0), out=out)
    torch.library.opcheck(op, captured[0])


def test_no_gradient() -> None:
    x, gate_up, down, ids, w = make(20)
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="no autograd formula"):
        call(x, gate_up, down, ids, w).sum().backward()
    with pytest.raises(mx.ArgumentError, match="out= takes no part in automatic differentiation"):
        call(x, gate_up, down, ids, w, out=torch.empty_like(x))


def test_ids_out_of_range_contribute_nothing_where_they_are_not_checked() -> None:
    ids = torch.tensor([[0, 3, 4, -1, -7, 2**40]])
    assert reference.local_experts(ids, None, 4).tolist() == [[0, 3, -1, -1, -1, -1]]
    expert_map = torch.tensor([2, -1, 9, -5, 1])
    assert reference.local_experts(ids, expert_map, 4).tolist() == [[2, -1, 1, -1, -1, -1]]


NOT_CONTIGUOUS = torch.empty(H, T, dtype=torch.bfloat16).T


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_states": [1.0]}, "hidden_states must be a torch.Tensor, not list"),
        ({"hidden_states": torch.zeros(T, H).double()}, "hidden_states must be float32, bfloat16 or float16, not"),
        ({"hidden_states": torch.zeros(1, T, H)}, r"must have shape \[T, H\], not \(1, 3, 40\); flatten"),
        ({"hidden_states": torch.zeros(T, H + 1)}, "have 41 values a token, but gate_up_proj takes H = 40"),
        ({"gate_up_proj": "mxfp4"}, "gate_up_proj must be an MXTensor or a torch.Tensor, not str"),
        ({"gate_up_proj": torch.zeros(E, 2 * INNER, H, dtype=torch.uint8)}, "wrap packed codes"),
        ({"gate_up_proj": torch.zeros(2 * INNER, H)}, r"gate_up_proj must have shape \[E, 2I, H\]"),
        ({"down_proj": torch.zeros(E, H, INNER)}, "must have one format, not mxfp4 and dense"),
        ({"down_proj": mx.quantize(torch.ones(E, H, INNER), "mxint8")}, "one format, not mxfp4 and mxint8"),
        ({"down_proj": mx.quantize(torch.ones(E + 1, H, INNER), "mxfp4")}, "must agree in E"),
        ({"down_proj": mx.quantize(torch.ones(E, H + 1, INNER), "mxfp4")}, "second of the other, H"),
        ({"down_proj": mx.quantize(torch.ones(E, H, INNER + 1), "mxfp4")}, "has 144 rows: a gated activation needs 2I"),
        ({"down_proj": None}, "down_proj is missing"),
        ({"activation": "silu_no_mul"}, "has 144 rows: one without a gate needs I"),
        ({"activation": "sillu"}, "unknown activation 'sillu'; did you mean silu"),
        ({"swiglu_alpha": 1.0}, "'silu' takes swiglu_limit, not swiglu_alpha"),
        ({"activation_format": "mxfp5"}, "unknown MX format 'mxfp5'; did you mean mxfp4"),
        ({"top_k_index": torch.zeros(T, 2)}, "top_k_index must be int32 or int64, not torch.float32"),
        ({"top_k_index": torch.zeros(T + 1, 2).long()}, r"\[T, k\] with T = 3 .* not \(4, 2\)"),
        ({"top_k_index": torch.zeros(T, 0).long()}, "k >= 1"),
        ({"top_k_index": torch.full((T, 2), E)}, "top_k_index holds 4; ids of 4 experts lie in 0..3"),
        ({"top_k_index": torch.full((T, 2), -2)}, "top_k_index holds -2"),
        ({"top_k_weights": torch.zeros(T, 2).long()}, "top_k_weights must be a float tensor, not torch.int64"),
        ({"top_k_weights": torch.zeros(T, 3)}, r"must have the shape of top_k_index, \(3, 2\), not \(3, 3\)"),
        ({"expert_map": torch.zeros(7)}, "expert_map must be int32 or int64, not torch.float32"),
        ({"expert_map": torch.zeros(7, 1).long()}, r"one entry for each global expert, not shape \(7, 1\)"),
        ({"expert_map": torch.tensor([0, 1, 2, 4])}, "expert_map holds 4; ids of 4 experts"),
        ({"expert_map": torch.tensor([0])}, "top_k_index holds [123]; ids of 1 experts"),
        ({"gate_up_bias": torch.zeros(E, INNER)}, r"gate_up_bias must have shape \(4, 144\)"),
        ({"down_bias": torch.zeros(H)}, r"down_bias must have shape \(4, 40\)"),
        ({"down_bias": torch.zeros(E, H).long()}, "down_bias must be a float tensor"),
        ({"activation_format": "fp8"}, "'fp8_static' needs input_scales"),
        ({"input_scales": (1.0, 1.0)}, "of use only with activation_format='fp8_static', not None"),
        ({"activation_format": "fp8_dynamic", "input_scales": (1.0, 1.0)}, "not fp8_dynamic"),
        ({"activation_format": "fp8", "input_scales": 1.0}, "input_scales must be a pair"),
        ({"activation_format": "fp8", "input_scales": (1.0, 0.0)}, r"input_scales\[1\] must be a number above 0"),
        ({"activation_format": "fp8", "input_scales": ("a", 1.0)}, r"input_scales\[0\] must be a number above 0"),
        ({"activation_format": "fp8", "input_scales": (1.0, torch.ones(3))}, "one for each of 4 experts"),
        ({"activation_format": "fp8", "input_scales": (1.0, torch.ones(1).int())}, "must be a float tensor"),
        ({"activation_format": "fp8", "input_scales": (torch.tensor(-1.0), 1.0)}, "above 0 and finite, not"),
        ({"activation_format": "fp8", "input_scales": (torch.tensor(torch.nan), 1.0)}, "above 0 and finite, not"),
        (
            {"activation_format": "fp8", "input_scales": (1.0, torch.ones(1, device="meta"))},
            r"input_scales\[1\] is on meta but the input on cpu",
        ),
        ({"apply_router_weight_on_input": True}, "needs one expert a token, not k = 2"),
        ({"accumulation": "fast"}, "accumulation must be 'auto' or 'exact', not 'fast'"),
        ({"out": torch.zeros(T, H)}, "out must be torch.bfloat16 of shape"),
        ({"out": NOT_CONTIGUOUS}, "out must be contiguous"),
        ({"down_bias": torch.zeros(E, H, device="meta")}, "down_bias is on meta but hidden_states on cpu"),
        ({"backend": "referense"}, "unknown backend 'referense'; did you mean reference"),
    ],
)
def test_errors(changes: dict[str, Any], message: str) -> None:
    names = ("hidden_states", "gate_up_proj", "down_proj", "top_k_index", "top_k_weights")
    arguments = dict(zip(names, make(21), strict=True))
    arguments["top_k_index"][0, 0] = 3
    with pytest.raises((mx.ArgumentError, mx.FormatError), match=message):
        mx.fused_experts(**{**arguments, **changes})


def test_errors_of_interleaved_and_prepared() -> None:
    x, gate_up, down, ids, w = make(22)
    with pytest.raises(mx.ArgumentError, match="must have one format"):
        mx.prepare(gate_up, torch.zeros(E, H, INNER))
    with pytest.raises(mx.ArgumentError, match="2I, or I, are needed"):
        mx.prepare(gate_up, mx.quantize(torch.ones(E, H, INNER + 1), "mxfp4"))
    with pytest.raises(mx.ArgumentError, match="gate_up_proj is on cpu but down_proj on meta"):
        mx.prepare(torch.zeros(E, 2 * INNER, H), torch.zeros(E, H, INNER, device="meta"))
    with pytest.raises(mx.ArgumentError, match="interleaved=True needs gate and up rows"):
        mx.prepare(mx.quantize(torch.ones(E, INNER, H), "mxfp4"), down, interleaved=True)
    prepared = mx.prepare(gate_up, down, backend="reference")
    with pytest.raises(mx.ArgumentError, match="down_proj must be None"):
        call(x, prepared, down, ids, w)
    with pytest.raises(mx.ArgumentError, match="prepared for backend 'reference', not 'gpu'"):
        call(x, prepared, None, ids, w, backend="gpu")
    with pytest.raises(mx.ArgumentError, match="prepared with interleaved=False, not True"):
        call(x, prepared, None, ids, w, interleaved=True)
    with pytest.raises(mx.ArgumentError, match="'silu_no_mul' has no gate and up rows"):
        call(x, prepared, None, ids, w, activation="silu_no_mul")


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("eager", [True, False])
def test_out_dtype_is_what_the_sum_is_rounded_to(backend: str, eager: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from mxperts.ops import experts as ops

    if not eager:
        monkeypatch.setattr(ops, "is_eager", lambda *tensors: False)
    x, gate_up, down, ids, w = make(21)
    y = call(x, gate_up, down, ids, w, backend=backend)
    wide = call(x, gate_up, down, ids, w, out_dtype=torch.float32, backend=backend)
    assert wide.dtype is torch.float32
    assert torch.equal(wide.to(x.dtype), y)
    assert not torch.equal(wide, y.to(torch.float32))
    out = torch.empty_like(wide)
    assert call(x, gate_up, down, ids, w, out_dtype=torch.float32, out=out, backend=backend) is out
    assert torch.equal(out, wide)


def test_only_the_reference_sums_in_float64() -> None:
    x, gate_up, down, ids, w = make(22)
    wide = call(x, gate_up, down, ids, w, out_dtype=torch.float64, backend="reference")
    assert wide.dtype is torch.float64
    assert torch.equal(wide.float().to(x.dtype), call(x, gate_up, down, ids, w, backend="reference"))
    with pytest.raises(mx.BackendUnavailable, match="float64 needs backend='reference'"):
        call(x, gate_up, down, ids, w, out_dtype=torch.float64, backend="cpu")
    with pytest.raises(mx.ArgumentError, match="out_dtype must be float32"):
        call(x, gate_up, down, ids, w, out_dtype=torch.int8)
    with pytest.raises(mx.ArgumentError, match=r"out must be torch\.float32 of shape"):
        call(x, gate_up, down, ids, w, out_dtype=torch.float32, out=torch.empty_like(x))

"""fused_experts on prepared weights, by every kernel in CUDA: these need an NVIDIA GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import bounds
import covering
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from covering import FORMATS, PAIRS, E
from layers import Layer, to
from torch import Tensor

import mxperts as mx
from mxperts.backend.gpu import experts as dispatcher
from mxperts.backend.gpu import paths
from mxperts.backend.gpu.cuda import fold, folded, grouped
from mxperts.backend.gpu.prepared import are_tiles
from mxperts.formats import parse_activation

pytestmark = pytest.mark.gpu

KERNELS = ("single", "narrow", "wide", "folded")
SLACK = 2.0**-15
"""Of the activation function, relative: an exponential of a number that is itself rounded. float32 has none of it."""


@pytest.fixture(autouse=True)
def needs_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    activate = bounds.activate

    def loosely(h: bounds.Interval, *arguments: Any) -> bounds.Interval:
        a = activate(h, *arguments)
        return bounds.Interval(a.mid, a.error + SLACK * abs(a.mid) + 2.0**-126)

    # Matrix units truncate; sums of parts are rounded besides.
    monkeypatch.setattr(bounds, "roundings", lambda paths, k, dtype, activation: 2 * k + 64)
    monkeypatch.setattr(bounds, "activate", loosely)


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """One of the kernels, which then runs every call."""
    module = {"single": dispatcher.single, "folded": folded}.get(request.param, grouped)
    monkeypatch.setattr(dispatcher, "choose_kernel", lambda call: module)
    monkeypatch.setattr(grouped, "MOST_NARROW", 1e9 if request.param == "narrow" else 0)
    grouped.choose_product.cache_clear()
    with paths.use_path("cuda"):
        yield request.param
    grouped.choose_product.cache_clear()


class CudaLayer(Layer):
    """With as many tokens as every kernel wants; nothing here is interpreted."""

    token_counts = covering.Layer.token_counts


CUT = 13
"""Bits below the largest of 32 products and the sum so far, behind which fp8 matrix units cut off all of them."""


@pytest.fixture
def layer_for(kernel: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., CudaLayer]:
    """A layer that the kernel is for, with bounds for its sums."""

    def make(i: int, fmt: str, activation_format: str | None, *, integers: bool) -> CudaLayer:
        layer = CudaLayer(i, fmt, activation_format, integers=integers)
        if kernel != "folded":
            return layer
        activation = parse_activation(layer.activation_format)
        static = layer.arguments()[1].get("input_scales") or ()
        per_expert = any(isinstance(s, Tensor) and s.numel() > 1 for s in static)
        if not fold.can_fold(mx.format(fmt), activation) or layer.dtype is not torch.bfloat16 or per_expert:
            pytest.skip("nothing for fp8")
        # Sums grow over as much of K as is added up within matrix units, 32 products at a time. fp8 inputs are not
        # rounded to bf16 as the reference rounds them.
        steps = folded.promoted(mx.format(fmt), activation) // 32
        share = 33 * steps * 2.0**-CUT + (0 if isinstance(activation, mx.BlockFormat) else 2.0**-8)

        def error(size: np.ndarray, lowest: np.ndarray, n: int) -> np.ndarray:
            fits = (size <= lowest * 2.0**CUT) & isinstance(activation, mx.BlockFormat)
            return np.where(fits, 0.0, share * size + (n + 1) * bounds.SMALLEST)

        monkeypatch.setattr(bounds, "rounding_error", error)
        return layer

    return make


def bounds_of(layer: CudaLayer, kernel: str) -> tuple[Any, ...]:
    """``single`` weights what each warp has of a sum, but for integers, whose weights are powers of two."""
    return layer.bounds(weighted_parts=16 if kernel == "single" and not layer.integers else 0)


def on_gpu(layer: CudaLayer) -> Tensor:
    return layer.on("gpu", "cuda", prepare=True)


@pytest.mark.parametrize(("i", "fmt", "activation_format"), [(i, *pair) for i, pair in enumerate(PAIRS)])
def test_exact_sums(i: int, fmt: str, activation_format: str | None, kernel: str, layer_for: Any) -> None:
    """Integers: no sum is rounded, and the result is the reference's where the activation function leaves no choice."""
    layer = layer_for(i, fmt, activation_format, integers=True)
    expected, limits = layer.run("reference"), bounds_of(layer, kernel)
    y = on_gpu(layer)
    bounds.assert_within(y, limits)
    if layer.name.startswith("relu2"):
        same = limits[2] & (limits[0] == limits[1]).all(1)
        assert torch.equal(y[same], expected[same])


@pytest.mark.parametrize(("i", "fmt", "activation_format"), [(i, *pair) for i, pair in enumerate(PAIRS)])
def test_random_numbers(i: int, fmt: str, activation_format: str | None, kernel: str, layer_for: Any) -> None:
    layer = layer_for(i + 60, fmt, activation_format, integers=False)
    y = on_gpu(layer)
    assert y.dtype is layer.dtype
    bounds.assert_within(y, bounds_of(layer, kernel))


@pytest.mark.parametrize("path", ["cuda", "triton"])
@pytest.mark.parametrize("tokens", [1, 3, 300])
def test_exact_accumulation(tokens: int, path: str) -> None:
    """The first projection within 1e-6 of float64, so its square within 2e-6; the second adds as much as the first."""
    K, g = 4096, torch.Generator().manual_seed(0)
    gate_up = mx.quantize(torch.randn(E, K, K, generator=g), "mxfp4", backend="reference")
    down = mx.quantize(torch.randn(E, K, K, generator=g), "mxfp4", backend="reference")
    x, router = torch.randn(tokens, K, generator=g), torch.rand(tokens, 2, generator=g)
    ids = torch.randint(E, (tokens, 2), generator=g)
    gate_up, down, x, ids, router = to("cuda", (gate_up, down, x, ids, router))
    how = {"activation": "relu2_no_mul", "accumulation": "exact", "backend": "gpu"}
    with paths.use_path(path):
        weights = (mx.prepare(gate_up, down, backend="gpu"), None) if path == "cuda" else (gate_up, down)
        y = mx.fused_experts(x, *weights, ids, router, **how)
    h = torch.einsum("tk,enk->ten", x.double(), mx.dequantize(gate_up, torch.float64)).relu().square()
    each = torch.einsum("tek,enk->ten", h, mx.dequantize(down, torch.float64))
    expected = (each.gather(1, ids[:, :, None].expand(-1, -1, K)) * router[:, :, None]).sum(1)
    assert (y.double() - expected).norm() <= 2.3e-6 * expected.norm()


FOLDABLE = ("mxfp4", "mxfp6_e2m3", "mxfp6_e3m2")
LARGEST_ERROR = 2.1e-4
"""An eighth of what rounding to bf16 costs: rms, relative."""


def numbers(data: str, rows: int, k: int, g: torch.Generator) -> Tensor:
    """Normal numbers; heavy tails with channels 50 times as large; blocks 1e-4 times as large; four large channels."""
    x = torch.randn(rows, k, generator=g)
    if data == "heavy tails":
        x /= (torch.randn(3, rows, k, generator=g) ** 2).mean(0).sqrt()
        x[:, torch.randperm(k, generator=g)[: k // 100]] *= 50
    elif data == "dead blocks":
        x[:, (torch.rand(k // 32, generator=g) < 0.01).repeat_interleave(32)] *= 1e-4
    elif data == "large channels":
        x[:, torch.randperm(k, generator=g)[:4]] *= 1000
    return x


@pytest.mark.parametrize("kernel", ["folded"], indirect=True)
@pytest.mark.parametrize("data", ["normal", "heavy tails", "dead blocks", "large channels"])
@pytest.mark.parametrize("activation_format", FOLDABLE)
@pytest.mark.parametrize("fmt", FOLDABLE)
def test_sums_in_fp8_keep_the_contract(fmt: str, activation_format: str, data: str, kernel: str) -> None:
    """The second projection alone, in float32: what it is given is known, as the first is the identity."""
    T = N = 256
    for k in (2880, 16384):
        g = torch.Generator().manual_seed(k)
        x, weight = numbers(data, T, k, g).abs().sqrt().bfloat16(), numbers(data, N, k, g) * 2.0**-12
        identity = mx.quantize(torch.eye(k, device="cuda")[None], fmt, backend="gpu")
        down = mx.quantize(F.pad(weight.cuda(), (0, 0, 0, k - N))[None], fmt, backend="gpu")
        x = x.cuda()
        squares = mx.fake_quantize(x, activation_format, backend="gpu").float().square().bfloat16()
        inputs = mx.fake_quantize(squares, activation_format, backend="gpu").double()
        expected = inputs @ mx.dequantize(down, torch.float64)[0, :N].T
        ids, router = torch.zeros(T, 1, dtype=torch.int64, device="cuda"), torch.ones(T, 1, device="cuda")
        how = {"activation": "relu2_no_mul", "activation_format": activation_format, "out_dtype": torch.float32}
        prepared = mx.prepare(identity, down, backend="gpu")
        y = mx.fused_experts(x, prepared, None, ids, router, backend="gpu", **how)
        assert (y[:, :N].double() - expected).norm() <= LARGEST_ERROR * expected.norm()
        assert torch.equal(y, mx.fused_experts(x, prepared, None, ids, router, backend="gpu", **how))


@pytest.mark.parametrize("kernel", ["folded"], indirect=True)
def test_what_fp8_has_not_all_of_is_computed_in_bf16_and_counted(kernel: str) -> None:
    """Tokens with blocks too far apart, with Inf and NaN; and an expert with such a row."""
    g, T, k = torch.Generator().manual_seed(0), 300, 2
    gate_up, down = torch.randn(E, 192, 128, generator=g) / 8, torch.randn(E, 128, 96, generator=g) / 8
    x = torch.randn(T, 128, generator=g)
    x[::7, :32] *= 2.0**-14
    x[5, 2], x[6, 3], x[8] = float("inf"), float("nan"), 0
    gate_up[1, 3, 32:64] *= 2.0**-20
    ids = torch.stack([torch.randperm(E, generator=g)[:k] for _ in range(T)])
    weights = [mx.quantize(w.cuda(), "mxfp6_e3m2", backend="gpu") for w in (gate_up, down)]
    prepared, x, ids = mx.prepare(*weights, backend="gpu"), x.bfloat16().cuda(), ids.cuda()
    router = torch.rand(T, k, generator=g).cuda()
    how = {"activation_format": "mxfp6_e3m2", "backend": "gpu"}
    y = mx.fused_experts(x, prepared, None, ids, router, **how)
    computed, outside = fold.counted(prepared.weights[2])
    assert computed == 2 * T * k
    assert T * k / 4 < outside < T * k
    expected = mx.fused_experts(x, *weights, ids, router, activation_format="mxfp6_e3m2", backend="reference")
    assert torch.equal(y.isnan(), expected.isnan())
    assert y.isnan().any()
    fine = ~expected.isnan().any(1)
    assert (y - expected)[fine].double().norm() <= 3e-3 * expected[fine].double().norm()
    said = str(mx.explain(device="cuda", weight="mxfp6_e3m2", activation="mxfp6_e3m2", prepared=prepared))
    assert f"{outside} of {computed}" in said


@pytest.mark.parametrize("fmt", FORMATS)
def test_prepared_weights_come_back(fmt: str) -> None:
    layer = CudaLayer(3, fmt, None, integers=False)
    prepared = mx.prepare(*to("cuda", (layer.gate_up, layer.down)), interleaved=layer.interleaved, backend="gpu")
    assert are_tiles(prepared.weights)
    for found, given in zip(prepared.unprepare(), (layer.gate_up, layer.down), strict=True):
        assert torch.equal(found.packed.cpu(), given.packed)
        assert torch.equal(found.scales.cpu(), given.scales)


@pytest.mark.parametrize("scale", [0, 10, 200, 255])
def test_weights_that_tiles_cannot_hold_stay_as_they_are(scale: int) -> None:
    layer = CudaLayer(0, "mxfp4", None, integers=True)
    layer.gate_up.scales[1, 0, 0] = scale
    layer.gate_up.packed[1, 0, 0] = 1
    prepared = mx.prepare(*to("cuda", (layer.gate_up, layer.down)), interleaved=layer.interleaved, backend="gpu")
    assert not are_tiles(prepared.weights)
    with paths.use_path("cuda"), pytest.raises(mx.BackendUnavailable, match="ends of the range"):
        mx.prepare(*to("cuda", (layer.gate_up, layer.down)), backend="gpu")


def layer_of(tokens: int, k: int, activation_format: str | None = "mxfp4") -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(0)
    gate_up = mx.quantize(torch.randn(E, 192, 128, generator=g) / 8, "mxfp4", backend="reference")
    down = mx.quantize(torch.randn(E, 128, 96, generator=g) / 8, "mxfp4", backend="reference")
    prepared = mx.prepare(*to("cuda", (gate_up, down)), backend="gpu")
    x, ids = torch.randn(tokens, 128, generator=g).bfloat16(), torch.randint(E, (tokens, k), generator=g)
    return prepared, *to("cuda", (x, ids, torch.rand(tokens, k, generator=g)))


@pytest.mark.parametrize("tokens", [1, 40, 600])
@pytest.mark.parametrize("activation_format", [None, "mxfp4", "fp8_dynamic"])
def test_graphs_follow_the_routing(tokens: int, activation_format: str | None) -> None:
    """Captured once, replayed with other tokens and experts; bit for bit what eager calls give."""
    prepared, x, ids, weights = layer_of(tokens, 2)

    def run() -> Tensor:
        return mx.fused_experts(x, prepared, None, ids, weights, activation_format=activation_format, backend="gpu")

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        x.copy_(torch.randn(x.shape, generator=g))
        ids.copy_(torch.randint(-1, E, ids.shape, generator=g))
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, run())


@pytest.mark.parametrize("tokens", [1, 40, 600])
def test_the_same_bits_every_time_and_on_every_stream(tokens: int) -> None:
    prepared, x, ids, weights = layer_of(tokens, 2)
    results, streams = [], [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    for i in range(20):
        with torch.cuda.stream(streams[i % 4]):
            results.append(mx.fused_experts(x, prepared, None, ids, weights, activation_format="mxfp4", backend="gpu"))
    torch.cuda.synchronize()
    assert all(torch.equal(results[0], y) for y in results)


def test_a_token_does_not_depend_on_its_batch_if_that_is_asked_for() -> None:
    prepared, x, ids, weights = layer_of(300, 2)

    def run(tokens: slice) -> Tensor:
        arguments = (x[tokens], prepared, None, ids[tokens], weights[tokens])
        return mx.fused_experts(*arguments, activation_format="mxfp4", backend="gpu")

    with paths.batch_invariant():
        together = run(slice(None))
        for some in (slice(0, 1), slice(5, 40), slice(299, 300)):
            assert torch.equal(run(some), together[some])


def test_compiled_whole() -> None:
    prepared, x, ids, weights = layer_of(5, 2)
    compiled = torch.compile(
        lambda x, ids, weights: mx.fused_experts(x * 2, prepared, None, ids, weights, backend="gpu"), fullgraph=True
    )
    assert torch.equal(compiled(x, ids, weights), mx.fused_experts(x * 2, prepared, None, ids, weights, backend="gpu"))


def test_ids_out_of_range_contribute_nothing(kernel: str) -> None:
    prepared, x, ids, weights = layer_of(9, 2)
    how = {"activation_format": "mxfp4" if kernel == "folded" else None, "backend": "gpu"}
    ids[0, 1], ids[1, 0], ids[2, 1] = E, 2**40, -7
    y = mx.fused_experts(x, prepared, None, ids, weights, **how)
    ids[(ids < 0) | (ids >= E)] = -1
    weights[ids < 0] = torch.nan
    assert torch.equal(y, mx.fused_experts(x, prepared, None, ids, weights, **how))


def test_all_tokens_to_one_expert_and_none_to_any(kernel: str) -> None:
    prepared, x, ids, weights = layer_of(30 if kernel == "single" else 250, 2)
    how = {"activation_format": "mxfp4" if kernel == "folded" else None}
    gate_up, down = prepared.unprepare()
    for expert in (2, -1):
        ids.fill_(expert)
        y = mx.fused_experts(x, prepared, None, ids, weights, **how, backend="gpu").double()
        expected = mx.fused_experts(x, gate_up, down, ids, weights, **how, backend="reference").double()
        assert (y - expected).norm() <= 3e-3 * expected.norm()


def test_backend_and_path_explain_themselves() -> None:
    assert mx.explain(device="cuda", weight="mxfp4").how.startswith("path cuda")
    with paths.use_path("triton"):
        assert mx.explain(device="cuda", weight="mxfp4").how.startswith("path triton")
    prepared, x, ids, weights = layer_of(3, 2)
    with paths.use_path("triton"), pytest.raises(mx.BackendUnavailable, match="unprepare"):
        mx.fused_experts(x, prepared, None, ids, weights, backend="gpu")

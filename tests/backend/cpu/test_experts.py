"""fused_experts on every path: within what float32 sums allow, exact where they are, one result for every batch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import bounds
import pytest
import torch
from covering import ACTIVATION_FORMATS, DTYPES, FORMATS, PAIRS, E, Layer
from torch import Tensor

import mxperts as mx
from mxperts.backend.cpu import experts as cpu
from mxperts.backend.cpu.paths import PATHS, use_path
from mxperts.backend.cpu.strip import AT_ONCE

INTEGERS = {"mxfp4", "mxfp6_e2m3", "mxint8"}
HERE = [p for p in PATHS if not p.missing()]


def paths_of(fmt: str, activation_format: str | None) -> list[str]:
    """The paths of this CPU that run a problem."""
    return [p.name for p in HERE if not p.integers or {fmt, activation_format} <= INTEGERS]


EVERY = [p.name for p in PATHS]
each_pair = pytest.mark.parametrize(("i", "fmt", "activation_format"), [(i, *pair) for i, pair in enumerate(PAIRS)])


@each_pair
def test_exact_sums(i: int, fmt: str, activation_format: str | None) -> None:
    """Integers: no sum is rounded, no rounding is open, and the result is the reference's, bit for bit."""
    layer = Layer(i, fmt, activation_format, integers=True)
    expected, limits = layer.run("reference"), layer.bounds(EVERY)
    low, high, bounded = limits
    same = bounded & (low == high).all(1)
    if activation_format != "fp8_dynamic" and (layer.name.startswith("relu2") or layer.dtype is not torch.float32):
        assert same.mean() > 0.75
    bounds.assert_within(expected, limits, "reference")
    for path in paths_of(fmt, activation_format):
        with use_path(path):
            y = layer.run("cpu")
        bounds.assert_within(y, limits, path)
        assert torch.equal(y[same], expected[same]), path


@each_pair
def test_random_numbers(i: int, fmt: str, activation_format: str | None) -> None:
    layer = Layer(len(PAIRS) + i, fmt, activation_format, integers=False)
    limits = layer.bounds(EVERY)
    assert (~limits[2]).sum() <= 1 + len(layer.x) // 10
    for path in paths_of(fmt, activation_format):
        with use_path(path):
            y = layer.run("cpu")
        assert y.dtype is layer.dtype
        bounds.assert_within(y, limits, path)


def test_every_choice_meets_every_other() -> None:
    layers = [Layer(i, *pair, integers=False) for i, pair in enumerate(2 * PAIRS)]
    choices = [
        {
            "function": layer.name,
            "dtype": layer.dtype,
            "weights": layer.fmt,
            "activations": layer.activation_format,
            "shape": (layer.hidden, layer.inner),
            "tokens": len(layer.x),
            "interleaved": layer.interleaved,
            "bias": layer.bias[0] is not None,
            "on input": layer.on_input,
            "mapped": layer.mapped,
        }
        for layer in layers
    ]
    few = {"function", "activations", "shape", "tokens"}
    for a, b in itertools.combinations(choices[0], 2):
        if {a, b} <= few or {a, b} == {"function", "interleaved"}:
            continue
        count = math.prod(len({choice[name] for choice in choices}) for name in (a, b))
        assert len({(choice[a], choice[b]) for choice in choices}) == count, (a, b)


@pytest.mark.parametrize(
    ("path", "fmt", "activation_format"),
    [
        ("avx512_vnni", "mxfp4", "mxfp4"),
        ("avx512_bf16", "mxfp4", "mxfp4"),
        ("avx512_bf16", "mxfp8_e4m3", "fp8_dynamic"),
        ("avx512_bf16", "mxfp6_e3m2", None),
        ("avx2", "mxfp6_e2m3", "mxfp6_e2m3"),
        ("portable", "mxfp4", "mxfp8_e4m3"),
    ],
)
@pytest.mark.usefixtures("forced")
def test_bf16_results_are_an_eighth_of_its_rounding_from_the_definition(
    path: str, fmt: str, activation_format: str | None
) -> None:
    """The contract's limit, 2.1e-4: rounding to bf16 errs by 1.66e-3 in the root mean square.

    What differs are roundings that float32 sums take to the other side, within the layer or at its end.
    """
    g = torch.Generator().manual_seed(0)
    h, inner, tokens = 512, 256, 96
    gate_up = mx.quantize(torch.randn(E, 2 * inner, h, generator=g) * h**-0.5, fmt)
    down = mx.quantize(torch.randn(E, h, inner, generator=g) * inner**-0.5, fmt)
    x = torch.randn(tokens, h, generator=g).bfloat16()
    ids = torch.stack([torch.randperm(E, generator=g)[:2] for _ in range(tokens)])
    arguments = (x, gate_up, down, ids, torch.rand(tokens, 2, generator=g))
    expected, y = (
        mx.fused_experts(*arguments, activation_format=activation_format, backend=backend).double()
        for backend in ("reference", "cpu")
    )
    assert ((y - expected).square().mean() / expected.square().mean()).sqrt() <= 2.1e-4


# One result, whatever else there is


BATCHES = [
    (p.name, *pair)
    for p in PATHS
    for pair in (("mxfp4", "mxfp4"), ("mxint8", "mxint8"), ("mxfp6_e3m2", None), ("mxfp8_e4m3", "fp8_dynamic"))
    if not p.integers or set(pair) <= INTEGERS
]


def crowd(fmt: str, activation_format: str | None, dtype: torch.dtype, tokens: int, k: int) -> Layer:
    """A layer with so many tokens, most of them for expert 2, none for expert 4."""
    layer = Layer(PAIRS.index((fmt, activation_format)), fmt, activation_format, integers=False)
    layer.dtype, layer.on_input, layer.mapped, layer.bias = dtype, False, False, (None, None)
    g = torch.Generator().manual_seed(3)
    layer.x = torch.randn(tokens, layer.hidden, generator=g).to(dtype)
    layer.ids = torch.stack([torch.randperm(4, generator=g)[:k] for _ in range(tokens)])
    if k == 1:
        layer.ids[layer.ids % 2 > 0] = 2
    layer.ids[5] = -1
    layer.routing = torch.rand(tokens, k, generator=g)
    return layer


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize(("path", "fmt", "activation_format"), BATCHES)
def test_a_token_does_not_depend_on_its_batch(path: str, fmt: str, activation_format: str | None) -> None:
    g = torch.Generator().manual_seed(4)
    for dtype, k in zip(DTYPES, (1, 3, 2), strict=True):
        layer = crowd(fmt, activation_format, dtype, 3 * AT_ONCE, k)
        together = layer.run("cpu")
        assert not together[5].any()
        assert together.any(1).sum() == len(together) - 1
        assert torch.equal(layer.run("cpu"), together)
        for tokens in (1, 2, 3, 4, 5, 6, 7, 12, 13, 24, 25, 31, AT_ONCE - 1, AT_ONCE, AT_ONCE + 1, 200):
            some = torch.randperm(len(layer.x), generator=g)[:tokens]
            assert torch.equal(layer.run("cpu", some), together[some]), (dtype, tokens)
        for rows in (AT_ONCE - 1, AT_ONCE, AT_ONCE + 1, 2 * AT_ONCE + 1):
            crowded = (layer.ids == 2).any(1).nonzero()[:rows, 0]
            assert torch.equal(layer.run("cpu", crowded), together[crowded]), (dtype, rows)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize(("path", "fmt", "activation_format"), BATCHES)
def test_the_number_of_threads_does_not_matter(path: str, fmt: str, activation_format: str | None) -> None:
    for tokens in (1, 3, 7, 200):
        layer = crowd(fmt, activation_format, torch.bfloat16, max(6, tokens), 2)
        some = slice(0, tokens)
        expected = layer.run("cpu", some)
        for count in (2, 3):
            with torch_threads(count):
                assert torch.equal(layer.run("cpu", some), expected)
                assert torch.get_num_threads() == count


def test_tokens_go_in_turns_where_results_would_take_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = crowd("mxfp4", "mxfp4", torch.bfloat16, 50, 3)
    expected, x = layer.run("cpu"), layer.x
    weight = mx.quantize(layer.numbers(70, x.shape[1]), "mxfp4")
    linear = mx.mx_linear(x, weight, backend="cpu")
    for most in (1, 3 * x.shape[1], 1000):
        monkeypatch.setattr(cpu, "MOST_SUMS", most)
        assert torch.equal(layer.run("cpu"), expected)
        assert torch.equal(mx.mx_linear(x, weight, backend="cpu"), linear)


# Routing


@pytest.mark.parametrize("activation_format", [None, "mxfp4", "fp8_dynamic", "fp8_per_expert"])
def test_routing_of_every_kind(activation_format: str | None) -> None:
    """One expert for all, the same one twice, none at all."""
    layer = Layer(1, "mxfp4", activation_format, integers=True)
    layer.name, layer.constants, layer.interleaved, layer.on_input, layer.mapped = "relu2", {}, False, False, False
    layer.gate_up, layer.bias = layer.weight(2 * layer.inner, layer.hidden), (None, None)
    for ids in ([[3, 3]], [[0, 1], [0, 1], [-1, 1]], [[4, -1]] * 9, [[-1, -1]] * 4, [[2, 2], [-1, 2], [2, -1]] * 40):
        layer.ids = torch.tensor(ids, dtype=torch.int32)
        layer.x = layer.numbers(len(ids), layer.hidden).bfloat16()
        layer.x[:, 0] = 7.0
        layer.routing = torch.full(layer.ids.shape, 0.5)
        layer.routing[layer.ids < 0] = torch.nan
        expected = layer.run("reference")
        assert torch.equal(layer.run("cpu"), expected)
        assert not expected[(layer.ids < 0).all(1)].any()


def test_many_experts_and_many_a_token() -> None:
    g = torch.Generator().manual_seed(6)
    for experts, k, hidden, inner in ((1024, 8, 33, 1), (70, 64, 64, 33)):
        gate_up = mx.quantize(torch.randint(-1, 2, (experts, 2 * inner, hidden), generator=g) / 8, "mxfp4")
        down = mx.quantize(torch.randint(-1, 2, (experts, hidden, inner), generator=g) / 8, "mxfp4")
        ids = torch.stack([torch.randperm(experts, generator=g)[:k] for _ in range(20)])
        x, weights = torch.randint(-3, 4, (20, hidden), generator=g).bfloat16(), torch.ones(20, k)
        arguments: Any = (x, gate_up, down, ids, weights)
        y = mx.fused_experts(*arguments, activation="relu2", backend="cpu")
        assert torch.equal(y, mx.fused_experts(*arguments, activation="relu2", backend="reference"))


# How tensors lie in memory


def test_hidden_states_of_any_strides() -> None:
    layer = crowd("mxfp4", "mxfp4", torch.bfloat16, 40, 2)
    expected, x = layer.run("cpu"), layer.x
    wide = torch.full((40, 3 * layer.hidden), torch.nan, dtype=x.dtype)
    for view in (wide[:, 7 : 7 + layer.hidden], wide[:, ::3], wide.T.contiguous().T[:, 1 : 1 + layer.hidden]):
        layer.x = view.copy_(x)
        assert not layer.x.is_contiguous()
        assert torch.equal(layer.run("cpu"), expected)
    layer.x = x.repeat_interleave(2, 0)[::2]
    assert torch.equal(layer.run("cpu"), expected)
    layer.x = x[:1].expand(40, -1)
    layer.ids, layer.routing = (t[:1].expand(40, -1) for t in (layer.ids, layer.routing))
    assert torch.equal(layer.run("cpu"), expected[:1].expand(40, -1))


def test_out_may_be_a_part_of_a_larger_tensor() -> None:
    layer = crowd("mxfp4", "mxfp4", torch.bfloat16, 40, 2)
    larger = torch.full((42, layer.hidden), 3.0, dtype=torch.bfloat16)
    out = larger[1:41]
    assert layer.run("cpu", out=out) is out
    assert torch.equal(out, layer.run("cpu"))
    assert (larger[[0, -1]] == 3).all()


def test_odd_addresses() -> None:
    """Codes, scales and numbers that begin where vectors do not."""
    layer = crowd("mxfp4", "mxfp4", torch.bfloat16, 9, 2)
    expected = layer.run("cpu")

    def moved(t: Tensor) -> Tensor:
        buffer = torch.empty(t.numel() + 1, dtype=t.dtype)
        return buffer[1:].view(t.shape).copy_(t)

    for name in ("gate_up", "down"):
        weight = getattr(layer, name)
        setattr(layer, name, mx.MXTensor(moved(weight.packed), moved(weight.scales), weight.format, weight.k))
    layer.x, layer.ids, layer.routing = moved(layer.x), moved(layer.ids), moved(layer.routing)
    assert torch.equal(layer.run("cpu"), expected)


# Numbers of any size


@pytest.mark.parametrize("activation_format", ACTIVATION_FORMATS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_nan_and_inf_are_where_they_must_be(fmt: str, activation_format: str | None) -> None:
    first = PAIRS.index((fmt, activation_format))
    for i, path in enumerate(paths_of(fmt, activation_format), first):
        dtype = DTYPES[i % 3]
        layer = Layer(7 * i % 60, fmt, activation_format, integers=True)
        layer.dtype, layer.x = dtype, layer.x.to(dtype)
        layer.x = layer.x[:1].repeat(7, 1)
        layer.ids, layer.routing = layer.ids[:1].repeat(7, 1), layer.routing[:1].repeat(7, 1)
        layer.ids[:, 0] = torch.tensor([0, 0, 0, 1, 2, 3, 4])
        layer.x[0, -1], layer.x[1, -1], layer.x[2, 0] = torch.nan, torch.inf, -torch.inf
        layer.gate_up.scales[1, 0, -1] = 255
        layer.down.scales[2, -1, 0] = 255
        last = len(layer.gate_up.format.element.magnitudes) - 1
        if layer.gate_up.format.element.sign_bit - 1 > last:  # codes beyond are Inf, if there is one, and NaN
            layer.gate_up.packed[3, 0, 0] = last + 1
            layer.down.packed[4, -1, 0] = layer.gate_up.format.element.sign_bit | last + 1
        expected = layer.run("reference")
        with use_path(path):
            y = layer.run("cpu")
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(y), kind(expected)), (path, dtype, layer.name)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.bfloat16, 60), (torch.bfloat16, 100), (torch.float32, 62), (torch.float16, 7), (torch.float16, 15)],
    ids=str,
)
@pytest.mark.parametrize("activation_format", [None, "mxfp4", "mxfp8_e4m3", "fp8_dynamic"])
def test_large_numbers_within_a_layer(dtype: torch.dtype, size: int, activation_format: str | None) -> None:
    """Tokens of 2^size and their squares, beside common ones: exact sums, and what overflows is Inf."""
    layer = Layer(2, "mxfp4", activation_format, integers=True)
    layer.name, layer.constants, layer.dtype = "relu2_no_mul", {}, dtype
    layer.interleaved, layer.on_input, layer.mapped = False, False, False
    layer.gate_up, layer.bias = layer.weight(layer.inner, layer.hidden), (None, None)
    layer.x = torch.randint(0, 4, (13, layer.hidden), generator=layer.g).to(dtype)
    layer.x[:, 0] = 7.0
    layer.x[::2] *= 2.0**size
    layer.ids, layer.routing = torch.randint(E, (13, 1), generator=layer.g), torch.ones(13, 1)
    expected = layer.run("reference")
    for path in paths_of("mxfp4", activation_format):
        with use_path(path):
            y = layer.run("cpu")
        if activation_format == "fp8_dynamic" and dtype is torch.float32:  # no integers: a scale has 24 bits
            assert torch.equal(y.isfinite(), expected.isfinite())
        else:
            assert torch.equal(y.isnan(), expected.isnan())
            assert torch.equal(y.nan_to_num(0), expected.nan_to_num(0))

"""mx_linear of the reference against a dense computation, value by value; the checks and what every backend does."""

from __future__ import annotations

from typing import Any

import dense
import pytest
import torch

import mxperts as mx
from mxperts.formats import BLOCK_FORMATS

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FORMATS = [f.name for f in BLOCK_FORMATS]
N, K, T = 24, 72, 3

each_backend = pytest.mark.parametrize("backend", ["reference", "cpu"])


def make(seed: int, fmt: str | None = "mxfp4", dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any, Any]:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(N, K, generator=g)
    x, bias = torch.randn(T, K, generator=g).to(dtype), torch.randn(N, generator=g)
    return x, (w if fmt is None else mx.quantize(w, fmt)), bias


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, *FORMATS, "fp8_static", "fp8_dynamic"])
@pytest.mark.parametrize("fmt", [*FORMATS, None])
def test_equals_dense_computation(fmt: str | None, activation: str | None, dtype: torch.dtype) -> None:
    x, w, bias = make(0, fmt, dtype)
    scale = 0.013 if activation == "fp8_static" else None
    for b in (None, bias, bias.to(dtype)):
        y = mx.mx_linear(x, w, b, activation=activation, input_scale=scale, backend="reference")
        assert y.dtype is dtype
        dense.assert_within(y, dense.linear(x, w, b, activation, scale))


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_dtype(dtype: torch.dtype, backend: str) -> None:
    """The sums are rounded to it directly, not by way of the dtype of ``x``."""
    x, w, bias = make(5)
    y = mx.mx_linear(x, w, bias, activation="mxfp4", out_dtype=dtype, backend=backend)
    assert y.dtype is dtype
    exact = mx.mx_linear(x, w, bias, activation="mxfp4", out_dtype=torch.float32, backend=backend)
    assert torch.equal(y, exact.to(dtype))
    assert not torch.equal(exact, exact.bfloat16().float())


@each_backend
def test_leading_dimensions(backend: str) -> None:
    x, w, bias = make(1)
    y = mx.mx_linear(x, w, bias, activation="mxfp4", backend=backend)
    assert torch.equal(
        mx.mx_linear(x.reshape(3, 1, 1, K), w, bias, activation="mxfp4", backend=backend).reshape(T, N), y
    )
    assert torch.equal(mx.mx_linear(x[0], w, bias, activation="mxfp4", backend=backend), y[0])
    assert mx.mx_linear(x[:0], w, bias, activation="fp8_dynamic", backend=backend).shape == (0, N)


def test_registration() -> None:
    from mxperts.ops.linear import _mx_linear_op

    x, w, bias = make(2)
    arguments = (x, [w.packed, w.scales], "mxfp4", bias, "fp8_static", torch.ones(1), None, torch.float32, "auto")
    torch.library.opcheck(_mx_linear_op, arguments)


def test_compiled_equals_eager() -> None:
    x, w, bias = make(2)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return mx.mx_linear(x, w, bias, activation="mxfp6_e2m3") * 2

    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_no_gradient() -> None:
    x, w, _ = make(3)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        mx.mx_linear(x.requires_grad_(), w).sum().backward()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": 1.0}, "x must be a torch.Tensor, not float"),
        ({"x": torch.zeros(T, K).int()}, "x must be float32, bfloat16 or float16, not torch.int32"),
        (
            {"x": torch.zeros(T, K + 1)},
            r"x must have shape \[..., 72\] for a weight of shape \(24, 72\), not \(3, 73\)",
        ),
        ({"out_dtype": torch.float64}, "out_dtype must be float32, bfloat16 or float16, not torch.float64"),
        ({"x": torch.zeros(())}, "x must have shape"),
        ({"weight": None}, "weight must be an MXTensor or a torch.Tensor, not NoneType"),
        ({"weight": mx.quantize(torch.ones(2, N, K), "mxfp4")}, r"weight must have shape \[N, K\]"),
        ({"bias": torch.zeros(N + 1)}, r"bias must have shape \(24,\), not \(25,\)"),
        ({"bias": torch.zeros(N).int()}, "bias must be a float tensor"),
        ({"bias": torch.zeros(N, device="meta")}, "bias is on meta but x on cpu"),
        ({"activation": "fp9"}, "unknown MX format 'fp9'"),
        ({"activation": "fp8"}, "'fp8_static' needs input_scale"),
        ({"input_scale": 1.0}, "of use only with activation='fp8_static', not None"),
        ({"activation": "fp8", "input_scale": -1}, "input_scale must be a number above 0"),
        ({"activation": "fp8", "input_scale": torch.zeros(1)}, "input_scale must be above 0 and finite"),
        ({"activation": "fp8", "input_scale": torch.ones(2)}, r"must have one element, not shape \(2,\)"),
        ({"backend": "cuda"}, "unknown backend 'cuda'"),
    ],
)
def test_errors(changes: dict[str, Any], message: str) -> None:
    x, w, bias = make(4)
    with pytest.raises((mx.ArgumentError, mx.FormatError), match=message):
        mx.mx_linear(**{"x": x, "weight": w, "bias": bias, **changes})
